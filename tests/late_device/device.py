"""The late device as torch and its tests see it."""

import contextlib
import functools
import gc
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from late_device.build import extension

NAME = "lategpu"

KERNEL = "kernel"
UPLOAD, DOWNLOAD, COPY = "copy to the device", "copy to the host", "copy on the device"
"""Names of device operations; every other one is an operator's without its overload, as "aten::add" for `add_` too."""


@functools.cache
def start() -> None:
    """Make torch's PrivateUse1 backend this device, for the rest of the process.

    From then on it is `torch.accelerator.current_accelerator()`, and pinned memory is its own.
    """
    extension().register_device()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())


def _device_module() -> types.ModuleType:
    """What torch and the library ask `torch.lategpu`, as they ask torch.cuda."""
    module = types.ModuleType(f"torch.{NAME}")
    functions: dict[str, Callable[..., object]] = {
        "device": lambda device: contextlib.nullcontext(),
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "is_current_stream_capturing": extension().is_capturing,
        "synchronize": lambda device=None: synchronize(),
        "manual_seed_all": lambda seed: None,
        "_is_in_bad_fork": lambda: False,
    }
    vars(module).update(functions)
    return module


class Block(NamedTuple):
    """Memory of the device that is in use; a graph keeps its own, whoever frees it."""

    address: int
    n_bytes: int
    id: int
    is_of_graph: bool


def live_blocks() -> list[Block]:
    return [Block(*block) for block in extension().live_blocks()]


def enqueue_kernel(prepare: Callable[[], Callable[[], None]]) -> None:
    """Launch something on the current stream: `prepare` is called now, and what it returns when the stream runs.

    While a graph is captured `prepare` is called by each replay.
    """
    extension().enqueue_kernel(prepare)


def synchronize() -> None:
    """Wait for all streams; what a task raises is raised here."""
    extension().synchronize()


def pending() -> int:
    """How many tasks have not run."""
    return extension().n_pending()


def abandon() -> None:
    """Forget what has not run, after a failure."""
    extension().abandon()


# -- counts --------------------------------------------------------------------------------------------------------


@dataclass
class Counts:
    """What the host asked of the device during a block.

    Attributes:
        operations: kernels, copies and operators, by name.
        synchronizations: how often the host waited for the device.
    """

    operations: Counter[str] = field(default_factory=Counter)
    synchronizations: int = 0


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts the block's operations; they are there when it has ended."""
    counts, before = Counts(), _counts_so_far()
    try:
        yield counts
    finally:
        after = _counts_so_far()
        counts.operations = after.operations - before.operations
        counts.synchronizations = after.synchronizations - before.synchronizations


def _counts_so_far() -> Counts:
    return Counts(Counter(extension().operations()), extension().n_synchronizations())


# -- graphs --------------------------------------------------------------------------------------------------------


class Graph:
    """What was enqueued while it was captured; its memory is its own while it lives."""

    def __init__(self) -> None:
        self._id: int | None = None

    def replay(self) -> None:
        """Enqueue it again, on the current stream."""
        extension().replay(self._id)

    @property
    def n_nodes(self) -> int:
        return extension().n_nodes(self._id)

    def __del__(self) -> None:
        if self._id is not None:
            extension().drop_graph(self._id)


@contextlib.contextmanager
def capture() -> Iterator[Graph]:
    """Capture the block on a stream of its own, as `torch.cuda.graph` does."""
    graph = Graph()
    gc.collect()
    synchronize()
    extension().begin_capture()
    try:
        yield graph
    finally:
        graph._id = extension().end_capture()


# -- faults on purpose: what the tests must notice ---------------------------------------------------------------------


@contextlib.contextmanager
def reusing_pinned_memory_at_once() -> Iterator[None]:
    """Pinned memory is handed out again while copies of it are in flight."""
    extension().set_reuses_pinned_at_once(True)
    try:
        yield
    finally:
        extension().set_reuses_pinned_at_once(False)


@contextlib.contextmanager
def uploading_after_the_launch() -> Iterator[None]:
    """Copies from pinned memory to the device run after the next kernel, which is to read what they bring."""
    extension().set_holds_uploads(True)
    try:
        yield
    finally:
        extension().set_holds_uploads(False)
