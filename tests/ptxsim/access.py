"""Loads and stores of a machine's threads: bounds, alignment and permissions are checked, global traffic is counted."""

from typing import TYPE_CHECKING, NoReturn

import numpy

from ptxsim.errors import MemoryFault
from ptxsim.memory import AddressMap
from ptxsim.program import Instruction
from ptxsim.scalar_types import U8, U64, UINT
from ptxsim.stats import Stats
from ptxsim.steps import Mask

if TYPE_CHECKING:
    from ptxsim.machine import Machine

SHARED_BASE, LOCAL_BASE, PARAM_BASE = 1 << 56, 2 << 56, 3 << 56
"""Windows of the generic address space; global memory is the host's, below 2**56."""

SHARED_START = 0x400
"""So that a null pointer into shared memory faults."""

WINDOWS = {"global": 0, "shared": SHARED_BASE, "local": LOCAL_BASE, "param": PARAM_BASE}
_WINDOW_NAMES = list(WINDOWS)


class Access:
    """Memory as the threads of one machine see it.

    Addresses are uint64 arrays of the threads that take part. `row`s are `[n, count]` unsigned elements.

    Attributes:
        parameters: the bytes of the kernel's arguments.
        stats, buffers: those of the present launch.
    """

    def __init__(self, machine: "Machine", shared_end: int, local_bytes: int) -> None:
        self._machine = machine
        self._shared_end, self._local_bytes = shared_end, local_bytes
        self._local_stride = -(-local_bytes // 32) * 32
        self._shared = _bytes(shared_end)
        self._local = _bytes(machine.n_threads * self._local_stride)
        self.parameters = _bytes(machine.body.parameter_bytes)
        self.buffers = AddressMap([])
        self.stats = Stats("", self.buffers)

    def reset(self) -> None:
        """Shared and local memory hold poison."""
        self._shared.fill(0xFF)
        self._local.fill(0xFF)

    def load(
        self, space: str, addresses: numpy.ndarray, width: int, count: int, mask: Mask, instruction: Instruction
    ) -> numpy.ndarray:
        """Rows of `count` elements of `width` bytes."""
        row = width * count
        if space == "generic":
            parts = self.split(addresses, mask)
            if len(parts) == 1:
                space, addresses, _, _ = parts[0]
            else:
                rows = numpy.empty((addresses.size, count), UINT[8 * width])
                for space, some, chosen, threads in parts:
                    rows[chosen] = self.load(space, some, width, count, threads, instruction)
                return rows
        if space in ("shared", "local", "param"):
            memory, index = self.place(space, addresses, row, mask, instruction, is_store=False)
            return _rows(memory, width, count)[index]
        index = self.locate(addresses, row, mask, instruction, is_store=False)
        if space != "const":
            self.record("load", index, row, addresses, mask)
        start, array = self.buffers.view(width, count)
        rows = array[_row_index(addresses, start, row)]
        if self.buffers.poison and width > 1:
            is_poison = (rows == numpy.iinfo(rows.dtype).max).any(axis=1)
            self._check(is_poison, "poison", False, addresses, row, mask, instruction)
        return rows

    def store(
        self,
        space: str,
        addresses: numpy.ndarray,
        width: int,
        count: int,
        rows: numpy.ndarray,
        mask: Mask,
        instruction: Instruction,
    ) -> None:
        row = width * count
        if space == "generic":
            parts = self.split(addresses, mask)
            if len(parts) > 1:
                for space, some, chosen, threads in parts:
                    self.store(space, some, width, count, rows[chosen], threads, instruction)
                return
            space, addresses, _, _ = parts[0]
        if space in ("shared", "local", "param"):
            memory, index = self.place(space, addresses, row, mask, instruction, is_store=True)
            _rows(memory, width, count)[index] = rows
            return
        index = self.locate(addresses, row, mask, instruction, is_store=True)
        self.record("store", index, row, addresses, mask)
        start, array = self.buffers.view(width, count)
        array[_row_index(addresses, start, row)] = rows

    def split(
        self, addresses: numpy.ndarray, mask: Mask
    ) -> list[tuple[str, numpy.ndarray, numpy.ndarray | None, Mask]]:
        """Generic addresses by space: the addresses in it, which of the given they are, and their threads."""
        window = addresses >> U64(56)
        first = int(window[0])
        if (window == window[0]).all():
            space = _WINDOW_NAMES[first] if first < len(_WINDOW_NAMES) else "global"
            return [(space, addresses - U64(WINDOWS[space]) if space != "global" else addresses, None, mask)]
        numbers = numpy.arange(self._machine.n_threads) if mask is None else numpy.flatnonzero(mask)
        parts = []
        for number in numpy.unique(window).tolist():
            space = _WINDOW_NAMES[number] if number < len(_WINDOW_NAMES) else "global"
            chosen = window == U64(number)
            threads = numpy.zeros(self._machine.n_threads, numpy.bool_)
            threads[numbers[chosen]] = True
            parts.append((space, addresses[chosen] - U64(WINDOWS[space]), chosen, threads))
        return parts

    def place(
        self, space: str, addresses: numpy.ndarray, row: int, mask: Mask, instruction: Instruction, is_store: bool
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """The bytes of a space that is no host memory, and the index of each access among its rows."""
        low, end, memory = {
            "shared": (SHARED_START, self._shared_end, self._shared),
            "local": (0, self._local_bytes, self._local),
            "param": (0, self._machine.body.parameter_bytes, self.parameters),
        }[space]
        name = f".{space} memory [{low:#x}, {end:#x})"
        ends = addresses + U64(row)
        is_outside = (addresses < U64(low)) | (ends > U64(end)) | (ends < addresses)
        self._check(is_outside, "out-of-bounds", is_store, addresses, row, mask, instruction, name)
        is_odd = (addresses & U64(row - 1)) != 0
        self._check(is_odd, "misaligned", is_store, addresses, row, mask, instruction, name)
        if space == "param" and is_store:
            self._fault("store to read-only memory", 0, addresses, row, mask, instruction, name)
        index = addresses.astype(numpy.intp)
        if space == "local":
            threads = self._machine.thread if mask is None else self._machine.thread[mask]
            index = index + threads * self._local_stride
        return memory, index // row

    def locate(
        self, addresses: numpy.ndarray, row: int, mask: Mask, instruction: Instruction, is_store: bool
    ) -> int | numpy.ndarray:
        """The index of the buffer that each global address lies in; one number where it is the same."""
        buffers = self.buffers
        index: int | numpy.ndarray | None = buffers.find(int(addresses.min()), int(addresses.max()) + row)
        if index is None:
            index = numpy.searchsorted(buffers.bases, addresses, "right") - 1
            is_outside = index < 0
            if buffers.buffers:
                ends = addresses + U64(row)
                is_outside |= (ends > buffers.ends[index]) | (ends < addresses)
            self._check(is_outside, "out-of-bounds", is_store, addresses, row, mask, instruction)
        if row > 1:
            is_odd = (addresses & U64(row - 1)) != 0
            self._check(is_odd, "misaligned", is_store, addresses, row, mask, instruction)
        if is_store and not buffers.are_writable[index].all():
            first = int(numpy.argmin(buffers.are_writable[index]))
            self._fault("store to a read-only buffer", first, addresses, row, mask, instruction)
        return index

    def record(self, kind: str, index: int | numpy.ndarray, row: int, addresses: numpy.ndarray, mask: Mask) -> None:
        """Count accesses to these buffers."""
        if self.stats.counts_traffic:
            warps = self._machine.warp if mask is None else self._machine.warp[mask]
            self.stats.record(kind, index, row, addresses, warps)

    def _check(
        self,
        is_wrong: numpy.ndarray,
        what: str,
        is_store: bool,
        addresses: numpy.ndarray,
        row: int,
        mask: Mask,
        instruction: Instruction,
        nearest: str | None = None,
    ) -> None:
        if is_wrong.any():
            reason, n_wrong = f"{what} {'store' if is_store else 'load'}", int(numpy.count_nonzero(is_wrong))
            first = int(numpy.argmax(is_wrong))
            self._fault(reason, first, addresses, row, mask, instruction, nearest, n_wrong)

    def _fault(
        self,
        reason: str,
        index: int,
        addresses: numpy.ndarray,
        row: int,
        mask: Mask,
        instruction: Instruction,
        nearest: str | None = None,
        n_threads: int = 1,
    ) -> NoReturn:
        machine = self._machine
        thread = index if mask is None else int(numpy.flatnonzero(mask)[index])
        block, place = (tuple(int(axis[thread]) for axis in t) for t in (machine.block_index, machine.thread_index))
        address = int(addresses[index])
        raise MemoryFault(
            reason,
            machine.body.name,
            instruction.line,
            instruction.text,
            block,
            place,
            address,
            row,
            nearest or self.buffers.nearest(address),
            n_threads,
        )


def _bytes(size: int) -> numpy.ndarray:
    """Room for this many bytes and any row that begins in it, aligned as rows are."""
    return numpy.zeros(-(-size // 64) * 8 + 8, U64).view(U8)


def _rows(memory: numpy.ndarray, width: int, count: int) -> numpy.ndarray:
    row = width * count
    return memory[: memory.size // row * row].view(UINT[8 * width]).reshape(-1, count)


def _row_index(addresses: numpy.ndarray, start: int, row: int) -> numpy.ndarray:
    return ((addresses - U64(start)) // U64(row)).astype(numpy.intp)
