"""The native CPU back end: one operator call over the addresses of all tensors of a Launch."""

import functools
import os
import threading
import weakref
from itertools import chain
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim import backend_torch, build_native
from xgrad_optim.launch import Launch
from xgrad_optim.layout import PLAIN_CLASSES, local

ISA = os.environ.get("XGRAD_CPU_ISA", "")
"""The instruction set to use, "avx512", "avx2" or "baseline"; empty for the best one. It changes no bit."""

_SLOTS = {"exp_avg": 2, "momentum_buffer": 2, "exp_avg_sq": 3, "max_exp_avg_sq": 4, "master_weights": 5}
"""Columns of the address table by state key (csrc/launch.h); the parameter's is 0, the gradient's 1."""

_LAZY, _CHANGED = -1, -2
"""Answers of read_addresses in place of the number of refused tensors (csrc/tensor_table.h)."""

_BATCH = 1024
"""Gradients handed to the library at a time: torch makes a copy of each reference, which stays in a cache so."""

_lock = threading.Lock()


def unavailable() -> str | None:
    """Why the library can't be had; the first call may build it, which takes some seconds once for each machine."""
    with _lock:
        return _load()


@functools.cache
def _load() -> str | None:
    try:
        path = build_native.find_or_build()
        loaded = [Path(other) for other in torch.ops.loaded_libraries if "libxgrad_optim-" in str(other)]
        if any(other.name != path.name for other in loaded):
            return f"this process has loaded another version of the library, {loaded[0]}"
        if not loaded:
            torch.ops.load_library(path)
            _register_fakes()
    except (RuntimeError, OSError) as error:
        return str(error)
    return None


def _register_fakes() -> None:
    """Shapes without data have no addresses: under FakeTensorMode and torch.compile the operators do nothing."""

    @torch.library.register_fake("xgrad_optim::bind_tensors")
    def bind_tensors(tensors: Any, slots: Any, dtypes: Any, numels: Any) -> int:
        return _LAZY

    @torch.library.register_fake("xgrad_optim::read_addresses")
    def read_addresses(binding: int, grads: Any, first: int, count: int, addresses: Any) -> int:
        return _LAZY

    @torch.library.register_fake("xgrad_optim::multi_tensor_cpu")
    def multi_tensor_cpu(*tables_and_options: Any) -> None:
        return None


def why_not(launch: Launch) -> str | None:
    return launch.why_no_kernel(("cpu",))


class _Binding:
    """The library's hold on the tensors of a launch that live as long as it does: all but the gradients.

    torch.utils.swap_tensors refuses tensors that are held so; where modules convert by it, none is held between steps.
    """

    def __init__(self, launch: Launch) -> None:
        slots, lists, dtypes = [0], [launch.params], [launch.dtype]
        for key, buffers in launch.state.items():
            slots.append(_SLOTS[key])
            lists.append(buffers)
            dtypes.append(launch.compute_dtype if key == "master_weights" else launch.state_dtype)
        self._owners = list(chain(*lists))
        self._is_plain = PLAIN_CLASSES.issuperset(map(type, self._owners))
        self._tensors = self._locals()
        self._name = torch.ops.xgrad_optim.bind_tensors(self._tensors, slots, dtypes, launch.tables.numels)
        weakref.finalize(self, torch.ops.xgrad_optim.release_tensors, self._name)

    def _locals(self) -> list[Tensor]:
        return self._owners if self._is_plain else [local(tensor) for tensor in self._owners]

    def is_current(self) -> bool:
        """Whether the DTensors among the tensors still have the shards that were bound."""
        return self._is_plain or all(map(is_, self._locals(), self._tensors))

    def read(self, grads: list[Tensor] | None, addresses: Tensor) -> int:
        grads = grads or []
        if not PLAIN_CLASSES.issuperset(map(type, grads)):
            grads = [local(grad) for grad in grads]
        if self._name == _LAZY:
            return _LAZY
        n_refused = 0
        for first in range(0, len(addresses), _BATCH):
            batch, count = grads[first : first + _BATCH], min(_BATCH, len(addresses) - first)
            answer = torch.ops.xgrad_optim.read_addresses(self._name, batch, first, count, addresses)
            if answer < 0:
                return answer
            n_refused += answer
        return n_refused


def prepare(launch: Launch) -> bool:
    """Read every address, dtype, size and stride again: tensors may have been moved, replaced or resized."""
    try:
        launch.bound = launch.bound or _Binding(launch)
        if not launch.bound.is_current():
            return False
        n_refused = launch.bound.read(launch.grads, launch.tables.addresses)
    except RuntimeError:  # a sparse gradient, say: the optimizer's own checks find the words for it
        return False
    launch.tables.n_refused = n_refused
    return n_refused == 0 or (n_refused != _CHANGED and launch.fits())


def run(launch: Launch) -> bool:
    """Restore, update where there are gradients, and predict every tensor of the launch.

    What is not flat takes the torch back end.
    """
    tables = launch.tables
    n_refused = tables.n_refused
    if n_refused < 0:
        _run_apart(launch, _lazy_members(launch))
        return False
    torch.ops.xgrad_optim.multi_tensor_cpu(
        tables.addresses,
        tables.numels,
        tables.row_of,
        launch.rows,
        tables.chunks,
        tables.tasks,
        tables.chunk_size,
        launch.trusts_master,
        launch.rule.name,
        launch.dtype,
        launch.state_dtype,
        ISA,
    )
    increment_version(launch.written)
    if n_refused:
        refused = torch.nonzero(tables.addresses[:, 0] == 0).flatten().tolist()
        backend_torch.run(launch.part(refused))
    if torch.__future__.get_swap_module_params_on_conversion():
        launch.bound = None
    return n_refused == 0


def _lazy_members(launch: Launch) -> list[int]:
    """Tensors whose negation or conjugation, or whose zeros, are not yet in their memory."""
    slots = [launch.params, *launch.state.values(), *([] if launch.grads is None else [launch.grads])]
    return [
        index
        for index, tensors in enumerate(zip(*slots, strict=True))
        if any(tensor.is_neg() or tensor.is_conj() or tensor._is_zerotensor() for tensor in tensors)
    ]


def _run_apart(launch: Launch, members: list[int]) -> None:
    """These members on the torch back end, the others here."""
    others = sorted(set(range(len(launch.params))).difference(members))
    backend_torch.run(launch.part(members))
    if others:
        part = launch.part(others)
        prepare(part)
        run(part)
