"""The buffers that kernels may touch, at their real addresses."""

import bisect
import ctypes
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import numpy

from ptxsim.scalar_types import U64, UINT


@dataclass(frozen=True)
class Buffer:
    """Bytes of the host, at their address.

    Attributes:
        owner: kept, so that the memory lives.
        is_counted: whether `Stats` has a line for it.
    """

    name: str
    base: int
    n_bytes: int
    is_writable: bool = True
    owner: object = field(default=None, repr=False)
    is_counted: bool = True

    @property
    def end(self) -> int:
        return self.base + self.n_bytes

    def __str__(self) -> str:
        kind = "" if self.is_writable else " read-only"
        return f"{self.name!r} [{self.base:#x}, {self.end:#x}) {self.n_bytes} bytes{kind}"


class Memory:
    """The set of registered buffers; they do not overlap.

    Attributes:
        buffers: by name.
        poison: whether elements of two bytes or more whose bits are all set are poison, the load of which is a fault.
    """

    def __init__(self, poison: bool = False) -> None:
        self.poison = poison
        self.buffers: dict[str, Buffer] = {}
        self._order: list[tuple[int, int, str]] = []
        """(base, end, name) of those that are not empty, sorted."""

    def register(self, array: Any, name: str, writable: bool = True) -> int:
        """Let kernels touch a contiguous numpy array or CPU tensor; returns its address.

        Raises:
            ValueError: the name is taken, the memory is not contiguous, not the CPU's, read-only though `writable`, or
                overlaps another buffer.
            TypeError: it is neither an array nor a tensor.
        """
        if isinstance(array, numpy.ndarray):
            if not array.flags.c_contiguous:
                raise ValueError(f"{name}: the array is not contiguous")
            if writable and not array.flags.writeable:
                raise ValueError(f"{name}: the numpy array is read-only; pass writable=False")
            base, n_bytes = array.ctypes.data, array.nbytes
        elif hasattr(array, "data_ptr"):
            if array.device.type != "cpu":
                raise ValueError(f"{name}: not a CPU tensor")
            if not array.is_contiguous():
                raise ValueError(f"{name}: the tensor is not contiguous")
            base, n_bytes = array.data_ptr(), array.numel() * array.element_size()
        else:
            raise TypeError(f"{name}: expected a numpy array or a torch CPU tensor")
        self.register_bytes(base, n_bytes, name, writable, owner=array)
        return base

    def register_bytes(
        self, address: int, n_bytes: int, name: str, writable: bool = True, owner: object = None
    ) -> None:
        """Let kernels touch these bytes, which must live until they are unregistered."""
        if name in self.buffers:
            raise ValueError(f"a buffer named {name!r} is already registered")
        if n_bytes:
            index = bisect.bisect_left(self._order, (address, 0, ""))
            for base, end, other in self._order[max(0, index - 1) : index + 1]:
                if address < end and base < address + n_bytes:
                    place = f"[{address:#x}, {address + n_bytes:#x})"
                    raise ValueError(f"{name} {place} overlaps {self.buffers[other]}")
            self._order.insert(index, (address, address + n_bytes, name))
        self.buffers[name] = Buffer(name, address, n_bytes, writable, owner)

    def unregister(self, name: str) -> None:
        buffer = self.buffers.pop(name)
        if buffer.n_bytes:
            self._order.remove((buffer.base, buffer.end, name))


class AddressMap:
    """The buffers of one launch as arrays, in the order of their addresses.

    Attributes:
        buffers: those that are not empty.
        bases, ends, are_writable: of each.
        poison: as `Memory` has it.
    """

    def __init__(self, buffers: Iterable[Buffer], poison: bool = False) -> None:
        self.poison = poison
        self.buffers = sorted((buffer for buffer in buffers if buffer.n_bytes), key=attrgetter("base"))
        self._bases = [buffer.base for buffer in self.buffers]
        self.bases = numpy.array(self._bases, U64)
        self.ends = numpy.array([buffer.end for buffer in self.buffers], U64)
        self.are_writable = numpy.array([buffer.is_writable for buffer in self.buffers], numpy.bool_)
        self._views: dict[tuple[int, int], tuple[int, numpy.ndarray]] = {}

    def view(self, width: int, count: int) -> tuple[int, numpy.ndarray]:
        """An array `[n, count]` of unsigned elements of this width, and the address of its start.

        It spans the host's memory from the first buffer to the last, of which only rows inside buffers may be touched;
        rows are aligned.
        """
        view = self._views.get((width, count))
        if view is None:
            row = width * count
            start, end = self.buffers[0].base // row * row, self.buffers[-1].end // row * row
            memory = (ctypes.c_uint8 * (end - start)).from_address(start)
            view = start, numpy.frombuffer(memory, UINT[8 * width]).reshape(-1, count)
            self._views[width, count] = view
        return view

    def find(self, low: int, high: int) -> int | None:
        """The index of the buffer that holds all bytes from `low` to before `high`."""
        index = bisect.bisect_right(self._bases, low) - 1
        return index if index >= 0 and high <= self.buffers[index].end else None

    def nearest(self, address: int) -> str:
        """The buffer next to an address, in words."""
        if not self.buffers:
            return "none registered"

        def distance(buffer: Buffer) -> int:
            return buffer.base - address if address < buffer.base else max(0, address - buffer.end + 1)

        best = min(self.buffers, key=distance)
        if address < best.base:
            where = f"starts {best.base - address} bytes after the address"
        elif address >= best.end:
            where = f"ends {address - best.end} bytes before the address"
        else:
            where = f"holds the address at offset {address - best.base}"
        return f"{best}, which {where}"
