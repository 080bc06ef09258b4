"""Reads the tensors of a Launch right before it runs: their addresses, layouts, gradients and version counters.

In C++ where that can be built for this torch (csrc/launch_tensors.cpp), else in Python.
"""

from collections.abc import Sequence
from functools import cache
from operator import attrgetter, is_
from typing import Any, Protocol

import numpy
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim.backends import build
from xgrad_optim.launch import NUMBERS, Launch, columns_of
from xgrad_optim.layout import DTensor, is_lazy, local, matches, steps, versions_of
from xgrad_optim.notes import warn

_LOOKS = (Tensor.data_ptr, Tensor.stride, Tensor.size, attrgetter("dtype"), is_lazy)
"""What tells a tensor's memory from other memory, and one way to lie in it from another."""

_get_shard = attrgetter("_local_tensor")


class Reader(Protocol):
    """Follows the tensors of one launch."""

    def read(self, grads: list[Tensor] | None) -> bool:
        """Fill the launch's tables from the tensors as they now are, with these gradients or the parameters' own.

        False where a gradient is missing or does not fit, or anything but a gradient is not what it was: the launch
        must be built anew then. Gradients that lie in memory otherwise than their parameters are copied.
        """

    def finish(self) -> None:
        """The launch has run: tell autograd, as torch's own in-place operators do, and let the gradients go."""

    def versions(self) -> numpy.ndarray:
        """int64 `[n_tensors, 2]`: the version counters as they now are."""


def follow(launch: Launch, writes_numbers: bool) -> Reader:
    """A reader of the launch; with `writes_numbers` its tables tell the kernel where the numbers are."""
    reason = unavailable()
    if reason is not None:
        _note(reason)
    reader: Reader = (NativeReader if reason is None else PythonReader)(launch, writes_numbers)
    return ShardReader(launch, reader) if any(isinstance(param, DTensor) for param in launch.params) else reader


@cache
def _note(reason: str) -> None:
    """Say once that steps are slower than they need be."""
    warn(f"xgrad_optim reads tensors in Python, which takes a step about twice as long at 200 tensors: {reason}")


@build.reason_why_not
def unavailable() -> None:
    """Why tensors are read in Python; the first call may build the C++, which takes some seconds for each torch."""
    build.load(build.find_or_build(build.TENSORS))


class NativeReader:
    """Holds the tensors, and asks the parameters for their gradients."""

    def __init__(self, launch: Launch, writes_numbers: bool) -> None:
        self._tables, columns = launch.tables, columns_of(launch.rule)
        tensors = [tensor for slot in launch.slots.values() for tensor in slot]
        self._tensors: Any = torch.classes.xgrad_optim.LaunchTensors(
            list(map(local, tensors)),
            tensors,
            [columns[name] for name in launch.slots],
            [vector for vector, _ in launch.numbers],
            [step for _, step in launch.numbers],
            launch.has_grad,
            writes_numbers,
        )

    def read(self, grads: list[Tensor] | None) -> bool:
        tables = self._tables
        return self._tensors.read(tables.table, tables.grads, tables.versions, grads)

    def finish(self) -> None:
        self._tensors.finish()

    def versions(self) -> numpy.ndarray:
        self._tensors.versions(self._tables.versions)
        return self._tables.counts


class PythonReader:
    """The same, where no compiler is."""

    def __init__(self, launch: Launch, writes_numbers: bool) -> None:
        self._launch, self._tables = launch, launch.tables
        self._tensors = {name: list(map(local, slot)) for name, slot in launch.slots.items()}
        self._numbers, self._writes_numbers = launch.numbers, writes_numbers
        self._seen = self._look()
        self._held: list[Tensor] = []
        # A DTensor and its shard have a counter each.
        shards = [local(tensor) for tensor in launch.written if isinstance(tensor, DTensor)]
        self._written = [*launch.written, *shards]
        columns = columns_of(launch.rule)
        for name, slot in self._tensors.items():
            self._tables.table[:, columns[name]] = _addresses(slot)

    def _look(self) -> list[list[object]]:
        return [list(map(look, slot)) for slot in self._tensors.values() for look in _LOOKS]

    def read(self, grads: list[Tensor] | None) -> bool:
        if self._launch.has_grad:
            params = self._tensors["param"]
            given = [param.grad for param in params] if grads is None else grads
            if not all(map(matches, params, given)):
                return False
            self._held = [_lie_like(grad, param) for grad, param in zip(given, params, strict=True) if grad is not None]
            self._tables.grads.copy_(_addresses(self._held))
        if not all(map(_is_whole, self._numbers)) or self._look() != self._seen:
            return False
        if self._writes_numbers:
            self._tables.table[:, NUMBERS] = _addresses([vector for vector, _ in self._numbers])
        self._tables.versions.copy_(torch.from_numpy(self.versions()))
        return True

    def finish(self) -> None:
        increment_version([tensor for tensor in self._written if not tensor.is_inference()])
        self._held = []

    def versions(self) -> numpy.ndarray:
        return versions_of(self._launch.slots)


class ShardReader:
    """Reads the local shards of DTensors, which somebody may replace, through another reader."""

    def __init__(self, launch: Launch, reader: Reader) -> None:
        self._reader, self.finish, self.versions = reader, reader.finish, reader.versions
        self._sharded = [tensor for slot in launch.slots.values() for tensor in slot if isinstance(tensor, DTensor)]
        self._shards = list(map(local, self._sharded))

    def read(self, grads: list[Tensor] | None) -> bool:
        given = None if grads is None else list(map(local, grads))
        return all(map(is_, map(_get_shard, self._sharded), self._shards)) and self._reader.read(given)


def _addresses(tensors: Sequence[Tensor]) -> Tensor:
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device="cpu")


def _lie_like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient with its parameter's strides: itself, or a copy."""
    if not is_lazy(grad) and steps(grad) == steps(param):
        return grad
    return torch.empty_strided(param.shape, param.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)


def _is_whole(numbers: tuple[Tensor, Tensor]) -> bool:
    """Whether the state's step count, which stands for all its numbers, is still the beginning of the vector."""
    vector, step = numbers
    return vector.data_ptr() == step.data_ptr()
