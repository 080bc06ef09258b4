"""Compiled GPU kernels over a random launch's tensors without a GPU: ptxsim executes their PTX.

Every buffer of the launch is moved, for the time of a kernel, into memory of its own with gaps around it that belong to
nobody, at an address that is equally aligned. A kernel that touches a gap, or writes to a gradient or a table, faults;
`check_traffic` says that every byte was moved at most once.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import ptxsim
from random_launch import RandomLaunch
from torch import Tensor

from xgrad_optim.launch import NUMBERS, columns_of

GAP = 256
"""Bytes between buffers; also the alignment that is kept, as much as any allocator gives."""


class Arena:
    """Copies of a launch's buffers and tables, each in memory of its own with gaps on both sides."""

    def __init__(self, launch: RandomLaunch) -> None:
        self.memory = ptxsim.Memory()
        self._written: list[tuple[Tensor, numpy.ndarray]] = []
        table, grads = launch.tables.table.clone(), launch.tables.grads.clone()
        columns = columns_of(launch.rule)
        for name, slot in {"param": launch.params, **launch.state}.items():
            for index, tensor in enumerate(slot):
                table[index, columns[name]] = self._add(f"{name} {index}", tensor)
        for index, vector in enumerate(launch.numbers):
            if table[index, NUMBERS]:
                table[index, NUMBERS] = self._add(f"numbers {index}", vector)
        for index, tensor in enumerate(launch.grads):
            grads[index] = self._add(f"grad {index}", tensor, writable=False)
        tables = {"table": table, "grads": grads, "chunks": launch.tables.chunks}
        tables |= {"rows": launch.rows, "next_numbers": launch.next_numbers}
        self.tables = {name: self._add(f"table {name}", one, writable=False) for name, one in tables.items()}

    def _add(self, name: str, tensor: Tensor, writable: bool = True) -> int:
        """The address of the tensor's copy."""
        assert tensor.is_contiguous()
        size, address = tensor.nbytes, tensor.data_ptr()
        if size == 0:
            return 0
        room = numpy.empty(size + 3 * GAP, dtype=numpy.uint8)
        start = GAP + (address - room.ctypes.data) % GAP
        copy = room[start : start + size]
        copy[:] = bytes_of(tensor)
        if writable:
            self._written.append((tensor, copy))
        return self.memory.register(copy, name, writable=writable)

    def copy_back(self) -> None:
        for tensor, copy in self._written:
            bytes_of(tensor)[:] = copy


def bytes_of(tensor: Tensor) -> numpy.ndarray:
    return numpy.ctypeslib.as_array((ctypes.c_uint8 * tensor.nbytes).from_address(tensor.data_ptr()))


def simulate(
    kernel: Any,
    block: int,
    launch: RandomLaunch,
    arguments: Callable[[dict[str, int]], Sequence[Any]],
    shared: int = 0,
) -> Any:
    """Execute a launch by a kernel that ptxsim has loaded, one block for each chunk; returns ptxsim's statistics.

    Args:
        arguments: from the addresses of the copies of "table", "grads", "chunks", "rows" and "next_numbers" to the
            kernel's own arguments. Buffers are called "param 0", "grad 0", ... in the statistics.
    """
    arena = Arena(launch)
    values = list(arguments(arena.tables))
    values += [0] * (len(kernel.params) - len(values))  # scratch memory that Triton's own launcher would add
    stats = kernel.launch(len(launch.tables.chunks), block, values, arena.memory, shared=shared)
    arena.copy_back()
    return stats


def check_traffic(stats: Any) -> None:
    """Every byte of every buffer was loaded once or not at all, and stored likewise; never a part of a buffer."""
    for name, traffic in stats.by_buffer.items():
        if not name.startswith("table"):
            assert traffic.loaded == traffic.distinct_loaded, (name, traffic)
            assert traffic.stored == traffic.distinct_stored, (name, traffic)
            assert {traffic.loaded, traffic.stored} <= {0, traffic.nbytes}, (name, traffic)


def bytes_moved(stats: Any) -> int:
    """Loaded and stored, tables and numbers aside."""
    buffers = [each for name, each in stats.by_buffer.items() if not name.startswith(("table", "numbers"))]
    return sum(traffic.loaded + traffic.stored for traffic in buffers)
