"""The tables of a Launch on its GPU: uploaded without waiting, and only what has changed.

Nothing here reads from the device. Every copy is asynchronous, from pinned memory, on the current stream, and nothing
uploaded is overwritten: another version is other memory, so a kernel in flight keeps the one that it was given. torch's
allocators do the rest: pinned memory is handed out again when the copies from it are done (they query events, nobody
waits), memory of the device in the order of the stream that it was allocated on, which is the one that uses it.
"""

from contextlib import AbstractContextManager, nullcontext
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xgrad_optim.launch import Launch
from xgrad_optim.layout import is_dense, local
from xgrad_optim.numeric import real_dtype

SLOTS = {
    "param": 0,
    "grad": 1,
    "momentum_buffer": 2,
    "exp_avg": 2,
    "exp_avg_sq": 3,
    "max_exp_avg_sq": 4,
    "master_weights": 5,
}
"""Columns of the address table (csrc/launch.h)."""

_read_by_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What the replay of a graph reads again, by the first parameter that it writes: of no use any longer than that."""

_LOOKS = (Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype"))
"""What tells a tensor's memory from other memory, and one way to lie in it from another."""


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
        self._seen: dict[str, list[list[object]]] = {}
        self._stream: torch.Stream | None = None
        self._shape: list[Tensor] = []
        self._known_addresses = self._addresses = torch.empty(0, dtype=torch.int64)
        self._spare: Tensor | None = None

    def read(self, launch: Launch) -> bool:
        """Read every address, dtype, size and stride again: tensors may have been moved, replaced or resized.

        Fills `launch.tables.addresses`, zeros where a tensor is not one flat range, and counts these in `n_refused`.
        Returns whether all but the gradients are what they were.
        """
        slots = {"param": launch.params, **launch.state}
        if launch.grads is not None:
            slots["grad"] = launch.grads
        tensors = {name: [local(tensor) for tensor in slot] for name, slot in slots.items()}
        seen = {name: [list(map(look, slot)) for look in _LOOKS] for name, slot in tensors.items()}
        seen["lazy"] = [list(map(look, tensors.get("grad", []))) for look in (Tensor.is_neg, Tensor.is_conj)]
        if seen == self._seen:
            return True
        is_first, before = not self._seen, self._seen
        _fill_addresses(launch, tensors)
        self._seen = seen
        return is_first or all(seen[name] == before[name] for name in ("param", *launch.state))

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


def refused(launch: Launch) -> list[int]:
    """The members that are not one flat range each, as `read` found them."""
    return torch.nonzero(launch.tables.addresses[:, 0] == 0).flatten().tolist() if launch.tables.n_refused else []


def _is_capturing(device: torch.device) -> bool:
    module = torch.get_device_module(device)
    return hasattr(module, "is_current_stream_capturing") and module.is_current_stream_capturing()


def _pinned_like(table: Tensor) -> Tensor:
    return torch.empty_like(table, pin_memory=True)


def _upload(table: Tensor, device: torch.device, pinned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The table in pinned memory and on the device."""
    source = table.pin_memory() if pinned is None else pinned.copy_(table)
    return source, source.to(device, non_blocking=True)


def _fill_addresses(launch: Launch, tensors: dict[str, list[Tensor]]) -> None:
    tables = launch.tables
    dtypes = {name: launch.state_dtype for name in tensors}
    dtypes |= {"param": launch.dtype, "grad": launch.dtype, "master_weights": launch.compute_dtype}
    tables.addresses.zero_()
    for name, slot in tensors.items():
        tables.addresses[:, SLOTS[name]] = torch.tensor([tensor.data_ptr() for tensor in slot], device="cpu")
    members = [dict(zip(tensors, member, strict=True)) for member in zip(*tensors.values(), strict=True)]
    numels = tables.numels.tolist()
    not_flat = [
        index
        for index, member in enumerate(members)
        if not _is_flat(member, dtypes, launch.device, numels[index])
    ]
    tables.addresses[not_flat] = 0
    tables.n_refused = len(not_flat)


def _is_flat(member: dict[str, Tensor], dtypes: dict[str, torch.dtype], device: torch.device, numel: int) -> bool:
    """Whether equal offsets into the buffers' memory are equal elements, and their bits the elements' values."""
    param = member["param"]
    n_reals = param.numel() * (2 if param.is_complex() else 1)
    return (
        n_reals == numel
        and is_dense(param)
        and all(
            tensor.device == device
            and real_dtype(tensor.dtype) == dtypes[name]
            and tensor.shape == param.shape
            and _steps(tensor) == _steps(param)
            and not (tensor.is_neg() or tensor.is_conj())
            and (numel == 0 or tensor.data_ptr() != 0)
            for name, tensor in member.items()
        )
    )


def _steps(tensor: Tensor) -> list[int]:
    """The strides that matter: a dimension of one element has none."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
