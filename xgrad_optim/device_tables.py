"""The tables of a Launch on its GPU: uploaded without waiting, and only what has changed.

Nothing here reads from the device. Every copy is asynchronous, from pinned memory, on the current stream, and nothing
uploaded is overwritten: another version is other memory, so a kernel in flight keeps the one that it was given. torch's
allocators do the rest: pinned memory is handed out again when the copies from it are done (they query events, nobody
waits), memory of the device in the order of the stream that it was allocated on, which is the one that uses it.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xgrad_optim.launch import Launch

_read_by_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What the replay of a graph reads again, by the first parameter that it writes: of no use any longer than that."""


class Uploaded(NamedTuple):
    """What a kernel reads of a Launch, on the launch's device."""

    addresses: Tensor
    numels: Tensor
    row_of: Tensor
    rows: Tensor
    chunks: Tensor


class DeviceTables:
    """One Launch's tables, on the host as its tensors now are, and on its device as the current stream may read them.

    On the CPU (a kernel under an interpreter or a simulator) the two are the same memory.
    """

    def __init__(self) -> None:
        self._stream: torch.Stream | None = None
        self._shape: list[Tensor] = []
        self._known_addresses = self._addresses = torch.empty(0, dtype=torch.int64)
        self._spare: Tensor | None = None

    def upload(self, launch: Launch) -> Uploaded:
        """Bring the device up to date. Call it under the device's guard, right before the kernel that reads it."""
        tables, device = launch.tables, launch.device
        if device.type == "cpu":
            return Uploaded(tables.addresses, tables.numels, tables.row_of, launch.rows, tables.chunks)
        if _is_capturing(device):
            return self._upload_for_graph(launch)
        stream = torch.accelerator.current_stream(device)
        if stream != self._stream:
            # Another stream gets tables of its own, so that no memory is in use beyond its own stream's order.
            self._stream, self._known_addresses = stream, torch.empty(0, dtype=torch.int64)
            self._shape = [_upload(table, device)[1] for table in (tables.numels, tables.row_of, tables.chunks)]
        if not torch.equal(self._known_addresses, tables.addresses):
            self._known_addresses = tables.addresses.clone()
            self._addresses = _upload(tables.addresses, device)[1]
        if launch.is_capturable and self._spare is None:
            self._spare = _pinned_like(tables.addresses)
        rows = launch.rows if launch.rows.device == device else _upload(launch.rows, device)[1]
        numels, row_of, chunks = self._shape
        return Uploaded(self._addresses, numels, row_of, rows, chunks)

    def _upload_for_graph(self, launch: Launch) -> Uploaded:
        """While a graph is captured: what the replay reads, now or from pinned memory, is kept and never changed.

        What is on the device already was uploaded before the capture began, as the parameters were. Pinned memory was
        set aside then, because torch before 2.11 can't allocate any during a capture.
        """
        tables, device = launch.tables, launch.device
        if launch.rows.device != device:
            raise RuntimeError("a captured graph would repeat this step's lr and step count: use capturable=True")
        kept: list[Tensor] = []
        shape = self._shape
        if self._stream is None:
            for table in (tables.numels, tables.row_of, tables.chunks):
                kept.extend(_upload(table, device))
            shape = kept[1::2]
        addresses = self._addresses
        if not torch.equal(self._known_addresses, tables.addresses):
            pinned, self._spare = self._spare, None
            source, addresses = _upload(tables.addresses, device, pinned)
            kept.append(source)
        kept += [*shape, addresses]
        _read_by_graphs.setdefault(launch.params[0], []).extend(kept)
        numels, row_of, chunks = shape
        return Uploaded(addresses, numels, row_of, launch.rows, chunks)


def tables_of(launch: Launch) -> DeviceTables:
    """The launch's own, made when they are first asked for."""
    if launch.bound is None:
        launch.bound = DeviceTables()
    return launch.bound


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _is_capturing(device: torch.device) -> bool:
    module = torch.get_device_module(device)
    return hasattr(module, "is_current_stream_capturing") and module.is_current_stream_capturing()


def _pinned_like(table: Tensor) -> Tensor:
    return torch.empty_like(table, pin_memory=True)


def _upload(table: Tensor, device: torch.device, pinned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The table in pinned memory and on the device."""
    source = table.pin_memory() if pinned is None else pinned.copy_(table)
    return source, source.to(device, non_blocking=True)
