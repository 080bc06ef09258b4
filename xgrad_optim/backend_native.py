"""The native CPU back end: one operator call over the addresses of all tensors of a Launch."""

import functools
import os
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim import backend_torch, build_native
from xgrad_optim.launch import Launch
from xgrad_optim.layout import plain

ISA = os.environ.get("XGRAD_CPU_ISA", "")
"""The instruction set to use, "avx512", "avx2" or "baseline"; empty for the best one. It changes no bit."""

_SLOTS = {"exp_avg": 2, "momentum_buffer": 2, "exp_avg_sq": 3, "max_exp_avg_sq": 4, "master_weights": 5}
"""Columns of the address table by state key (csrc/launch.h); the parameter's is 0, the gradient's 1."""

_PLAIN_CLASSES = {Tensor, torch.nn.Parameter}
"""Classes whose instances are the memory at their address."""

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

    @torch.library.register_fake("xgrad_optim::fill_addresses")
    def fill_addresses(tensors: Any, slots: Any, dtypes: Any, numels: Any, addresses: Any) -> int:
        return len(tensors)  # refused, every one

    @torch.library.register_fake("xgrad_optim::multi_tensor_cpu")
    def multi_tensor_cpu(*tables_and_options: Any) -> None:
        return None


def why_not(launch: Launch) -> str | None:
    if launch.device.type != "cpu":
        return f"parameters are on {launch.device}, it runs on cpu"
    if launch.state_dtype not in (launch.dtype, launch.compute_dtype):
        return f"it does not combine parameters of {launch.dtype} with state of {launch.state_dtype}"
    for tensor in chain(launch.params, *launch.state.values()):
        if not _owns_memory(plain(tensor)):
            return f"a {type(tensor).__name__} has no memory of its own"
    return None


def _owns_memory(tensor: Tensor) -> bool:
    cls = type(tensor)
    return cls in _PLAIN_CLASSES or cls.__torch_dispatch__ is Tensor.__torch_dispatch__


def prepare(launch: Launch) -> bool:
    """Read every address, dtype, size and stride again: tensors may have been moved, replaced or resized."""
    try:
        launch.tables.n_refused = _fill_addresses(launch)
    except RuntimeError:  # a sparse gradient, say: the optimizer's own checks find the words for it
        return False
    return launch.tables.n_refused == 0 or launch.fits()


def run(launch: Launch) -> None:
    """Restore, update where there are gradients, and predict every tensor of the launch.

    What is not flat takes the torch back end.
    """
    tables = launch.tables
    n_refused = tables.n_refused
    if n_refused < 0:
        _run_apart(launch, _lazy_members(launch))
        return
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
    _bump_versions(launch)
    if n_refused:
        refused = torch.nonzero(tables.addresses[:, 0] == 0).flatten().tolist()
        backend_torch.run(launch.part(refused))


def _fill_addresses(launch: Launch) -> int:
    """Write the table of addresses. Returns how many tensors are not flat, or -1 where some are not yet computed."""
    slots, lists, dtypes = [0], [launch.params], [launch.dtype]
    if launch.grads is not None:
        slots.append(1)
        lists.append(launch.grads)
        dtypes.append(launch.dtype)
    for key, buffers in launch.state.items():
        slots.append(_SLOTS[key])
        lists.append(buffers)
        dtypes.append(launch.compute_dtype if key == "master_weights" else launch.state_dtype)
    tensors = list(chain(*lists))
    if not _PLAIN_CLASSES.issuperset(map(type, tensors)):
        tensors = [plain(tensor) for tensor in tensors]
    tables = launch.tables
    return torch.ops.xgrad_optim.fill_addresses(tensors, slots, dtypes, tables.numels, tables.addresses)


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


def _bump_versions(launch: Launch) -> None:
    """Tell autograd what was written, as torch's own in-place operators do."""
    written = [launch.params, *launch.state.values()]
    if launch.grads is None:
        written = [launch.params, launch.state.get("master_weights", [])]
    tensors = list(chain(*written))
    if not _PLAIN_CLASSES.issuperset(map(type, tensors)):
        tensors += [plain(tensor) for tensor in tensors]
    increment_version(tensors)
