"""What a GPU back end does around its kernels, whoever compiled them: a launch's tables on the GPU, without waiting.

Every copy is asynchronous, from pinned memory, on the current stream, and nothing uploaded is overwritten: another
version is other memory, so a kernel in flight keeps the one that it was given. torch's allocators do the rest: pinned
memory is handed out again when the copies from it are done (they query events, nobody waits), memory of the device in
the order of the stream that it was allocated on, which is the one that uses it.

A step is one upload of what has changed, the kernel that makes the rows where the numbers live on the device, and the
launch itself.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import numpy
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from xgrad_optim.backends import addresses
from xgrad_optim.launch import Launch
from xgrad_optim.numbers import DeviceNumbers, HostNumbers, Numbers, is_capturing
from xgrad_optim.rows import OptionArray, Scaling, Target

_read_by_graphs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""What the replay of a graph reads again, by the first parameter that it writes: of no use any longer than that."""

ALIGNMENT = 16
"""Bytes. Tables begin at multiples of it: Triton compiles a kernel for each alignment that it meets."""


class Uploaded(NamedTuple):
    """What kernels read of a Launch, on the launch's device."""

    table: Tensor
    chunks: Tensor
    rows: Tensor
    next_numbers: Tensor
    grads: Tensor | None = None
    """None for a swap."""
    group_of: Tensor | None = None
    options: Tensor | None = None
    """None where the host has made the rows."""


class Kernels(Protocol):
    """What one GPU back end has compiled."""

    def make_rows(self, launch: Launch, uploaded: Uploaded) -> None:
        """Fill in `rows` and `next_numbers` from the numbers on the device, which stay as they are."""

    def run(self, launch: Launch, uploaded: Uploaded) -> object:
        """Restore, update where there are gradients, predict, and write the numbers that live on the device.

        Nothing may follow the launch in here: see `GpuRunner.run`.
        """


class GpuRunner:
    """Runs one launch on the current stream of its device."""

    def __init__(self, launch: Launch, numbers: Numbers, kernels: Kernels) -> None:
        self._launch, self._numbers, self._kernels = launch, numbers, kernels
        self._reader = addresses.follow(launch, writes_numbers=isinstance(numbers, DeviceNumbers))
        self._tables = DeviceTables(launch)
        self._fixed = {"chunks": launch.tables.chunks}
        if isinstance(numbers, DeviceNumbers):
            self._fixed["group_of"] = torch.tensor(launch.sources.group_of, dtype=torch.int64, device="cpu")
        self._options = OptionArray(launch.rule, launch.sources.options, launch.device)
        self._after: numpy.ndarray
        self._uploaded: Uploaded
        self.read, self.versions, self.finish = self._reader.read, self._reader.versions, self._reader.finish

    def load(self, target: Target, scaling: Scaling) -> None:
        """Bring the device up to date."""
        launch = self._launch
        tables = {**self._fixed, "table": launch.tables.table}
        if launch.has_grad:
            tables["grads"] = launch.tables.grads
        with guard(launch.device):
            if isinstance(self._numbers, HostNumbers):
                rows = self._numbers.rows(launch, target, scaling)
                tables |= rows._asdict()
                made = {}
                # The numbers of each tensor once the launch has run.
                self._after = rows.next_numbers.numpy()[launch.sources.row_of]
            else:
                tables["options"] = self._options.read(target, scaling)
                made = self._rows_to_make()
            self._uploaded = Uploaded(**self._tables.upload(tables), **made)

    def _rows_to_make(self) -> dict[str, Tensor]:
        launch, n_tensors = self._launch, len(self._launch.params)
        rule, device = launch.rule, launch.device
        return {
            "rows": torch.empty((n_tensors, len(rule.columns)), dtype=launch.compute_dtype, device=device),
            "next_numbers": torch.empty((n_tensors, len(rule.number_keys)), dtype=torch.float64, device=device),
        }

    def run(self) -> None:
        """Enqueue the launch; whoever interrupts finds it and its numbers both done or neither."""
        launch, uploaded, numbers = self._launch, self._uploaded, self._numbers
        with guard(launch.device):
            if isinstance(numbers, HostNumbers):
                values = numbers.values
                # One statement for both.
                values[launch.indices] = (self._kernels.run(launch, uploaded), self._after)[1]
            else:
                self._kernels.make_rows(launch, uploaded)
                self._kernels.run(launch, uploaded)

    def resume(self) -> None:
        """Run, unless that has happened. Waits for the device."""
        if isinstance(self._numbers, HostNumbers):
            is_done = numpy.array_equal(self._numbers.values[self._launch.indices], self._after, equal_nan=True)
        else:
            after = self._uploaded.next_numbers.unbind()
            vectors = [vector for vector, _ in self._launch.numbers]
            is_done = all(map(torch.equal, vectors, after))
        if not is_done:
            self.run()


class DeviceTables:
    """One launch's tables on its device, as the current stream may read them.

    On the CPU (a kernel in an interpreter) they are the tables themselves.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._stream: torch.Stream | None = None
        self._known: dict[str, Tensor] = {}
        self._on_device: dict[str, Tensor] = {}

    def upload(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """These tables on the device; what is not there yet is brought in one copy."""
        device = self._launch.device
        if device.type == "cpu":
            return tables
        if is_capturing(device):
            return self._upload_for_graph(tables)
        stream = torch.accelerator.current_stream(device)
        if self._stream is None or stream != self._stream:
            # Another stream gets tables of its own, so that no memory is in use beyond its own stream's order.
            self._stream, self._known = stream, {}
        changed = self._changed(tables)
        self._on_device |= _upload(changed, device)[1]
        self._known |= {name: table.clone() for name, table in changed.items()}
        return {name: self._on_device[name] for name in tables}

    def _changed(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        known = self._known
        return {name: t for name, t in tables.items() if name not in known or not torch.equal(t, known[name])}

    def _upload_for_graph(self, tables: dict[str, Tensor]) -> dict[str, Tensor]:
        """While a graph is captured: what the replay reads, now or from pinned memory, is kept and never changed.

        What is on the device already was uploaded before the capture began, as the parameters were; what is uploaded
        now is there at a replay only.
        """
        pinned, copies = _upload(self._changed(tables), self._launch.device)
        used = {name: copies[name] if name in copies else self._on_device[name] for name in tables}
        kept = [pinned, *used.values(), *(vector for vector, _ in self._launch.numbers)]
        _read_by_graphs.setdefault(self._launch.params[0], []).extend(kept)
        return used


def _upload(tables: dict[str, Tensor], device: torch.device) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The tables on the device, by one copy from pinned memory, which is returned too."""
    if not tables:
        return None, {}
    ends = numpy.cumsum([-(-table.nbytes // ALIGNMENT) * ALIGNMENT for table in tables.values()]).tolist()
    pinned = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=True)

    def parts(memory: Tensor) -> dict[str, Tensor]:
        starts = zip([0, *ends], tables.items(), strict=False)
        return {
            name: memory[start : start + table.nbytes].view(table.dtype).view(table.shape)
            for start, (name, table) in starts
        }

    for part, table in zip(parts(pinned).values(), tables.values(), strict=True):
        part.copy_(table)
    return pinned, parts(pinned.to(device, non_blocking=True))


def guard(device: torch.device) -> AbstractContextManager[object]:
    """Makes the device the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)
