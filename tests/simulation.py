"""Compiled GPU kernels over a Launch's real tensors without a GPU: ptxsim, where it is present, executes their PTX.

Every buffer of the launch is moved, for the time of a kernel, into memory of its own with gaps around it that belong to
nobody, at an address that is equally aligned. A kernel that touches a gap, or writes to a gradient or a table, faults;
`check_traffic` says that every byte was moved at most once.
"""

import ctypes
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from xgrad_optim.numeric import COMPUTE_DTYPES

PTXSIM = Path(__file__).resolve().parent.parent.parent / "shared" / "ptxsim"
if PTXSIM.is_dir():
    sys.path.append(str(PTXSIM))

try:
    import ptxsim
except ImportError:
    ptxsim = None

needs_simulator = pytest.mark.skipif(ptxsim is None, reason=f"no PTX simulator at {PTXSIM}")

SLOT_NAMES = ("param", "grad", "state0", "state1", "max_exp_avg_sq", "master_weights")
GAP = 256
"""Bytes between buffers; also the alignment that is kept, as much as any allocator gives."""


class Arena:
    """Copies of buffers, each in memory of its own with gaps on both sides, registered with the simulator."""

    def __init__(self) -> None:
        self.memory = ptxsim.Memory()

    def add(self, name: str, address: int, size: int, writable: bool) -> tuple[int, numpy.ndarray]:
        """Copy the bytes at the address; returns where the copy lies, and the copy."""
        room = numpy.empty(size + 3 * GAP, dtype=numpy.uint8)
        start = GAP + (address - room.ctypes.data) % GAP
        copy = room[start : start + size]
        copy[:] = bytes_at(address, size)
        return self.memory.register(copy, name, writable=writable), copy


def bytes_at(address: int, size: int) -> numpy.ndarray:
    return numpy.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)) if size else numpy.empty(0, "u1")


@dataclass
class Simulator:
    """Runs kernels over launches; `runs` has the statistics of each, in order."""

    runs: list[Any] = field(default_factory=list)
    _arena: Any = None
    _places: dict[int, int] = field(default_factory=dict)

    def run(
        self,
        kernel: Any,
        grid: int,
        block: int,
        arguments: Sequence[Any],
        addresses: Tensor,
        numels: Tensor,
        widths: Sequence[int],
        shared: int = 0,
    ) -> Any:
        """Execute one launch of a kernel that ptxsim has loaded.

        Args:
            kernel: of `ptxsim.load_ptx(text)`.
            grid: blocks.
            block: threads of each.
            arguments: the kernel's own. A tensor is a table, and passed as the address of a read-only copy; a function
                is called with a function from a table to the address of its copy, to make a struct that is passed by
                value; anything else is passed on.
            addresses: the table among these that leads to the buffers, its copy to the copies of the buffers.
            numels: elements of each tensor.
            widths: bytes of an element, by column of `addresses`; see `slot_widths`.
            shared: bytes of dynamic shared memory.

        Returns:
            ptxsim's statistics; buffers are called "param 0", "grad 0", ..., tables "table 0", ...
        """
        self._arena, self._places = Arena(), {}
        moved = addresses.clone()
        written = []
        for index, (line, numel) in enumerate(zip(addresses.tolist(), numels.tolist(), strict=True)):
            for slot, address in enumerate(line):
                if address and numel:
                    name, size, is_grad = SLOT_NAMES[slot], numel * widths[slot], SLOT_NAMES[slot] == "grad"
                    moved[index, slot], copy = self._arena.add(f"{name} {index}", address, size, not is_grad)
                    written += [] if is_grad else [(address, copy)]
        self._places[id(addresses)] = self._place(moved)
        values = [self._pass(argument) for argument in arguments]
        values += [0] * (len(kernel.params) - len(values))  # scratch memory that Triton's own launcher would add
        stats = kernel.launch(grid, block, values, self._arena.memory, shared=shared)
        for address, copy in written:
            bytes_at(address, len(copy))[:] = copy
        self.runs.append(stats)
        return stats

    def _pass(self, argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return self._place(argument)
        return argument(self._place) if callable(argument) else argument

    def _place(self, table: Tensor) -> int:
        """The address of the table's copy."""
        if id(table) not in self._places:
            assert table.is_contiguous()
            name = f"table {len(self._arena.memory.buffers)}"
            self._places[id(table)], _ = self._arena.add(name, table.data_ptr(), table.nbytes, False)
        return self._places[id(table)]


def slot_widths(dtype: torch.dtype, state_dtype: torch.dtype) -> tuple[int, ...]:
    """Bytes of an element, by column of the address table."""
    param, state, master = dtype.itemsize, state_dtype.itemsize, COMPUTE_DTYPES[dtype].itemsize
    return (param, param, state, state, state, master)


def check_traffic(stats: Any) -> None:
    """Every byte of every buffer was loaded once or not at all, and stored likewise; never a part of a buffer."""
    for name, traffic in stats.by_buffer.items():
        if not name.startswith("table"):
            assert traffic.loaded == traffic.distinct_loaded, (name, traffic)
            assert traffic.stored == traffic.distinct_stored, (name, traffic)
            assert {traffic.loaded, traffic.stored} <= {0, traffic.nbytes}, (name, traffic)


def bytes_moved(stats: Any) -> int:
    """Loaded and stored, tables aside."""
    buffers = [traffic for name, traffic in stats.by_buffer.items() if not name.startswith("table")]
    return sum(traffic.loaded + traffic.stored for traffic in buffers)
