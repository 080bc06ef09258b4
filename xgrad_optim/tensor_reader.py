"""What the tensors of a Launch are right before it runs: their addresses, layouts, gradients and version counters.

Read in C++ where that can be built for this torch (csrc/launch_tensors.cpp), else in Python, which also knows DTensors.
"""

from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim import build_native
from xgrad_optim.layout import PLAIN_CLASSES, DTensor, is_dense, local
from xgrad_optim.numeric import real_dtype

if TYPE_CHECKING:
    from xgrad_optim.launch import Launch

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

_LAZINESS = (Tensor.is_neg, Tensor.is_conj, Tensor._is_zerotensor)

_LOOKS = (Tensor.data_ptr, Tensor.stride, Tensor.numel, attrgetter("dtype"), *_LAZINESS)
"""What tells a tensor's memory from other memory, and one way to lie in it from another."""

_version = attrgetter("_version")


def prepare(launch: "Launch") -> bool:
    """Read every address, dtype, size and stride again: tensors may have been moved, replaced or resized.

    Fills `launch.tables.addresses`, zeros where a tensor is not one flat range, and counts these in `n_refused`. False
    where the Launch must be built anew.
    """
    try:
        if launch.reader is None:
            launch.reader = make_reader(launch)
        is_steady = launch.reader.read(launch)
    except RuntimeError:  # a sparse gradient, say: the optimizer's own checks find the words for it
        return False
    return is_steady and (launch.tables.n_refused == 0 or launch.fits())


def make_reader(launch: "Launch") -> "PythonReader | NativeReader":
    tensors = chain(launch.params, *launch.state.values())
    is_native = PLAIN_CLASSES.issuperset(map(type, tensors)) and unavailable() is None
    return NativeReader(launch) if is_native else PythonReader()


@build_native.reason_why_not
def unavailable() -> None:
    """Why tensors are read in Python; the first call may build the C++, which takes some seconds for each torch."""
    build_native.load(build_native.find_or_build(build_native.TENSORS))


def read_versions(params: Sequence[Tensor]) -> numpy.ndarray:
    """The parameters' version counters. A DTensor and its shard have one each, and a write may move either."""
    versions = numpy.fromiter(map(_version, params), numpy.int64, len(params))
    for i, param in enumerate(params):
        if isinstance(param, DTensor):
            versions[i] += local(param)._version
    return versions


class NativeReader:
    """Holds the tensors that live as long as the launch; the gradients it asks the parameters for."""

    def __init__(self, launch: "Launch") -> None:
        slots = {"param": launch.params, **launch.state}
        self._tensors: Any = torch.classes.xgrad_optim.LaunchTensors(
            list(chain(*slots.values())),
            [SLOTS[name] for name in slots],
            launch.dtype,
            launch.state_dtype,
            launch.tables.numels,
            launch.has_grad,
        )
        self._versions = torch.empty_like(launch.tables.numels)

    def read(self, launch: "Launch") -> bool:
        """Fill the tables; False where a gradient is missing, or anything but a gradient is not what it was."""
        launch.tables.n_refused = self._tensors.read(launch.tables.addresses, self._versions)
        return launch.tables.n_refused >= 0

    def versions(self, launch: "Launch") -> numpy.ndarray:
        """The parameters' version counters when the tensors were read."""
        return self._versions.numpy().copy()

    def finish(self, launch: "Launch") -> None:
        """Tell autograd of a run, as torch's own in-place operators do, and let the gradients go."""
        self._tensors.finish()


class PythonReader:
    """As `NativeReader`, for local shards too; what is as it was at the last look costs comparisons only."""

    def __init__(self) -> None:
        self._seen: dict[str, list[list[object]]] = {}
        self._written: list[Tensor] | None = None

    def read(self, launch: "Launch") -> bool:
        slots = {"param": launch.params, **launch.state}
        if launch.grads is not None:
            if any(grad is None for grad in launch.grads):
                return False
            slots["grad"] = launch.grads
        tensors = {name: [local(tensor) for tensor in slot] for name, slot in slots.items()}
        seen = {name: [list(map(look, slot)) for look in _LOOKS] for name, slot in tensors.items()}
        if seen == self._seen:
            return True
        is_first, before = not self._seen, self._seen
        _fill_addresses(launch, tensors)
        self._seen = seen
        return is_first or all(seen[name] == before[name] for name in ("param", *launch.state))

    def versions(self, launch: "Launch") -> numpy.ndarray:
        return read_versions(launch.params)

    def finish(self, launch: "Launch") -> None:
        if self._written is None:
            slots = {"param": launch.params, **launch.state}
            names = [name for name in slots if launch.has_grad or name in ("param", "master_weights")]
            tensors = list(chain(*(slots[name] for name in names)))
            self._written = tensors + [local(tensor) for tensor in tensors if isinstance(tensor, DTensor)]
        increment_version(self._written)


def _fill_addresses(launch: "Launch", tensors: dict[str, list[Tensor]]) -> None:
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
            and not any(is_lazy(tensor) for is_lazy in _LAZINESS)
            and (numel == 0 or tensor.data_ptr() != 0)
            for name, tensor in member.items()
        )
    )


def _steps(tensor: Tensor) -> list[int]:
    """The strides that matter: a dimension of one element has none."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]
