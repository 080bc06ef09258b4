"""What a launch did: instructions, and traffic of each buffer."""

from collections import Counter

import numpy

from ptxsim.memory import AddressMap
from ptxsim.scalar_types import U8, U64, UINT

_SECTOR = 32
"""Bytes: the unit in which a GPU's memory is accessed."""


class BufferStats:
    """Traffic of one buffer. Bytes are those of each thread's access; requests and sectors are a warp's.

    An atomic operation is counted under `atomic` alone.

    Attributes:
        loaded, stored, atomic: bytes.
        load_requests, load_sectors, ...: warps' accesses, and the distinct 32-byte sectors of each.
        distinct_loaded, distinct_stored, distinct: bytes of the buffer that were touched at all.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        self.name, self.nbytes = name, nbytes
        self.loaded = self.stored = self.atomic = 0
        self.load_requests = self.store_requests = self.atomic_requests = 0
        self.load_sectors = self.store_sectors = self.atomic_sectors = 0
        self.distinct_loaded = self.distinct_stored = self.distinct = 0

    def __repr__(self) -> str:
        atomic = f", atomic {self.atomic}" if self.atomic else ""
        return (
            f"<{self.name}: {self.nbytes} B, loaded {self.loaded} (distinct {self.distinct_loaded}, "
            f"{self.load_sectors} sectors/{self.load_requests} requests), stored {self.stored} (distinct "
            f"{self.distinct_stored}, {self.store_sectors} sectors/{self.store_requests} requests){atomic}>"
        )


class _Traffic:
    """Accesses of one kind, by buffer."""

    def __init__(self, n_buffers: int, n_bytes: int) -> None:
        self.bytes, self.requests, self.sectors = (numpy.zeros(n_buffers, numpy.int64) for _ in range(3))
        self.requests_by_width: Counter[int] = Counter()
        self.accesses_by_width: Counter[int] = Counter()
        self.touched = numpy.zeros(n_bytes, U8)
        """Every buffer's bytes one after the other, each buffer from a multiple of a sector on."""

    def mark(self, offsets: numpy.ndarray, width: int) -> None:
        word = min(width, 8)
        ones = UINT[8 * word](int.from_bytes(b"\1" * word, "little"))
        self.touched.view(UINT[8 * word]).reshape(-1, width // word)[offsets // width] = ones


class Stats:
    """Result of a launch.

    Attributes:
        threads, blocks: how many ran.
        thread_instructions: sum over threads of instructions reached, also those that a predicate switched off.
        warp_instructions: the same for warps; divergent parts count each time.
        max_instructions: the largest count of any one thread.
        by_opcode: thread instructions of each.
        by_buffer: name -> BufferStats.
        load_requests_by_width, store_requests_by_width, atomic_requests_by_width: warps' accesses by bytes of a thread.
        load_accesses_by_width, ...: threads' accesses by bytes.
        bytes_loaded, bytes_stored, bytes_atomic, load_sectors, ...: sums over all buffers.
    """

    def __init__(self, kernel: str, buffers: AddressMap, counts_traffic: bool = True) -> None:
        self.kernel, self.counts_traffic = kernel, counts_traffic
        self.threads = self.blocks = 0
        self.thread_instructions = self.warp_instructions = self.max_instructions = 0
        self.by_opcode: Counter[str] = Counter()
        self.by_buffer: dict[str, BufferStats] = {}
        self._buffers = buffers.buffers
        self._are_counted = numpy.array([buffer.is_counted for buffer in self._buffers], numpy.bool_)
        starts = buffers.bases // _SECTOR * _SECTOR
        sizes = (buffers.ends - starts + U64(_SECTOR - 1)) // _SECTOR * _SECTOR
        slot_ends = numpy.cumsum(sizes, dtype=U64)
        self._slots = [slice(int(end - size), int(end)) for end, size in zip(slot_ends, sizes, strict=True)]
        self._shifts = slot_ends - sizes - starts  # from an address to its place in `touched`, modulo 2**64
        n_buffers, n_bytes = len(self._buffers), int(sizes.sum()) if counts_traffic else 0
        self._traffic = {kind: _Traffic(n_buffers, n_bytes) for kind in ("load", "store", "atomic")}
        self.load_requests_by_width = self._traffic["load"].requests_by_width
        self.store_requests_by_width = self._traffic["store"].requests_by_width
        self.atomic_requests_by_width = self._traffic["atomic"].requests_by_width
        self.load_accesses_by_width = self._traffic["load"].accesses_by_width
        self.store_accesses_by_width = self._traffic["store"].accesses_by_width
        self.atomic_accesses_by_width = self._traffic["atomic"].accesses_by_width

    def record(
        self, kind: str, index: int | numpy.ndarray, width: int, addresses: numpy.ndarray, warps: numpy.ndarray
    ) -> None:
        """Count one access of some threads: `index` tells of which buffers, `warps`, in order, which warps they are."""
        is_counted = self._are_counted[index]
        if not is_counted.all():
            if not is_counted.any():
                return
            index, addresses, warps = index[is_counted], addresses[is_counted], warps[is_counted]
        traffic = self._traffic[kind]
        offsets = addresses + self._shifts[index]
        traffic.mark(offsets, width)
        warps = warps << U64(48)
        # An access is aligned and no wider than a sector, so it lies in one.
        sectors, of_sectors = _distinct(warps | (offsets // U64(_SECTOR)), index)
        requests, of_requests = _distinct(warps | numpy.asarray(index, U64), index)
        if isinstance(index, numpy.ndarray):
            n_buffers = len(self._buffers)
            traffic.bytes += numpy.bincount(index, minlength=n_buffers) * width
            traffic.requests += numpy.bincount(of_requests, minlength=n_buffers)
            traffic.sectors += numpy.bincount(of_sectors, minlength=n_buffers)
        else:
            traffic.bytes[index] += addresses.size * width
            traffic.requests[index] += requests
            traffic.sectors[index] += sectors
        traffic.requests_by_width[width] += requests
        traffic.accesses_by_width[width] += addresses.size

    def finish(self) -> None:
        """Make the lines of the buffers that were touched, when all has run."""
        loads, stores, atomics = self._traffic.values()
        for i, buffer in enumerate(self._buffers):
            if not (loads.bytes[i] or stores.bytes[i] or atomics.bytes[i]):
                continue
            line = self.by_buffer[buffer.name] = BufferStats(buffer.name, buffer.n_bytes)
            for name, traffic in self._traffic.items():
                setattr(line, f"{name}_requests", int(traffic.requests[i]))
                setattr(line, f"{name}_sectors", int(traffic.sectors[i]))
            line.loaded, line.stored, line.atomic = (int(traffic.bytes[i]) for traffic in self._traffic.values())
            loaded, stored, both = (traffic.touched[self._slots[i]] for traffic in self._traffic.values())
            line.distinct_loaded = int(numpy.count_nonzero(loaded | both))
            line.distinct_stored = int(numpy.count_nonzero(stored | both))
            line.distinct = int(numpy.count_nonzero(loaded | stored | both))
        self._traffic.clear()

    def _sum(self, name: str) -> int:
        return sum(getattr(traffic, name) for traffic in self.by_buffer.values())

    bytes_loaded = property(lambda self: self._sum("loaded"))
    bytes_stored = property(lambda self: self._sum("stored"))
    bytes_atomic = property(lambda self: self._sum("atomic"))
    load_sectors = property(lambda self: self._sum("load_sectors"))
    store_sectors = property(lambda self: self._sum("store_sectors"))
    load_requests = property(lambda self: self._sum("load_requests"))
    store_requests = property(lambda self: self._sum("store_requests"))
    distinct_loaded = property(lambda self: self._sum("distinct_loaded"))
    distinct_stored = property(lambda self: self._sum("distinct_stored"))

    @property
    def instructions_per_thread(self) -> float:
        return self.thread_instructions / max(1, self.threads)

    @property
    def sectors_per_load_request(self) -> float:
        return self.load_sectors / max(1, self.load_requests)

    @property
    def sectors_per_store_request(self) -> float:
        return self.store_sectors / max(1, self.store_requests)

    def __str__(self) -> str:
        rows = [
            f"{self.kernel}: {self.blocks} blocks, {self.threads} threads, {self.instructions_per_thread:.1f} "
            f"instructions/thread (max {self.max_instructions}), {self.warp_instructions} warp instructions",
            f"  loaded {self.bytes_loaded} B, {self.load_sectors} sectors in {self.load_requests} requests "
            f"({self.sectors_per_load_request:.2f} each), requests by width {dict(self.load_requests_by_width)}",
            f"  stored {self.bytes_stored} B, {self.store_sectors} sectors in {self.store_requests} requests "
            f"({self.sectors_per_store_request:.2f} each), requests by width {dict(self.store_requests_by_width)}",
            *(f"  {traffic!r}" for traffic in self.by_buffer.values()),
        ]
        return "\n".join(rows)


def _distinct(keys: numpy.ndarray, index: int | numpy.ndarray) -> tuple[int, int | numpy.ndarray]:
    """How many different keys there are, and the index that belongs to each."""
    later, earlier = keys[1:], keys[:-1]
    if (later >= earlier).all():
        is_new = numpy.concatenate(([True], later != earlier))
        return int(numpy.count_nonzero(is_new)), index[is_new] if isinstance(index, numpy.ndarray) else index
    _, first = numpy.unique(keys, return_index=True)
    return first.size, index[first] if isinstance(index, numpy.ndarray) else index
