"""The native CPU back end: one operator call over the addresses of all tensors of a Launch."""

import os
from functools import cache, partial
from typing import Any

import numpy
import torch

from xgrad_optim.backends import addresses, build
from xgrad_optim.launch import Launch
from xgrad_optim.layout import owns_memory
from xgrad_optim.numbers import HostNumbers
from xgrad_optim.rows import HOST, OptionArray, Scaling, Target

ISA = os.environ.get("XGRAD_CPU_ISA", "")
"""The instruction set to use, "avx512", "avx2" or "baseline"; empty for the best one. It changes no bit."""


@build.reason_why_not
def unavailable() -> None:
    """Why the library can't be had; the first call may build it, which takes some seconds once for each machine."""
    if build.load(build.find_or_build(build.KERNELS)):
        _register_fake()


def _register_fake() -> None:
    """Shapes without data have no addresses: under FakeTensorMode and torch.compile the operator does nothing."""

    @torch.library.register_fake("xgrad_optim::multi_tensor_cpu")
    def multi_tensor_cpu(*tables_and_options: Any) -> None:
        return None

    @torch.library.register_fake("xgrad_optim::make_rows_cpu")
    def make_rows_cpu(*tables_and_options: Any) -> bool:
        return True


def why_not(launch: Launch) -> str | None:
    return launch.why_no_kernel(("cpu",))


@cache
def _kernel(rule: str, dtype: torch.dtype, state_dtype: torch.dtype, isa: str) -> int:
    return torch.ops.xgrad_optim.find_kernel_cpu(rule, dtype, state_dtype, isa)


def bind(launch: Launch, numbers: HostNumbers) -> "Runner":
    return Runner(launch, numbers)


class Runner:
    """Runs one launch on torch's threads, by the `rows` that were made last."""

    def __init__(self, launch: Launch, numbers: HostNumbers) -> None:
        self._launch, self._numbers = launch, numbers
        self._reader = addresses.follow(launch, writes_numbers=True)
        self.read, self.versions, self.finish = self._reader.read, self._reader.versions, self._reader.finish
        rule, sources, tables = launch.rule, launch.sources, launch.tables
        self._options = OptionArray(rule, sources.options, launch.device)
        n_rows = len(sources.members)
        self.rows = torch.empty((n_rows, len(rule.columns)), dtype=launch.compute_dtype, device=HOST)
        self._next_numbers = torch.empty((n_rows, len(rule.number_keys)), dtype=torch.float64, device=HOST)
        if not owns_memory(self.rows):
            raise RuntimeError("FakeTensorMode can step fake parameters only, these are real: nothing was changed")
        members = torch.tensor(sources.members, dtype=torch.int64, device=HOST)
        grads = tables.grads if launch.has_grad else None
        kernel = _kernel(rule.name, launch.dtype, launch.state_dtype, ISA)
        made = self.rows, self._next_numbers
        work = tables.chunks, tables.tasks, tables.chunk_size
        # `_op` is what torch's own wrapper calls, in half the time.
        make_rows, multi_tensor = (
            getattr(torch.ops.xgrad_optim, name).default._op for name in ("make_rows_cpu", "multi_tensor_cpu")
        )
        self._make_rows = partial(make_rows, tables.table, members)
        self._made = *made, launch.has_grad, kernel
        # Restores, updates where there are gradients, predicts every tensor of the launch, and writes its numbers.
        self.run = partial(multi_tensor, tables.table, grads, *made, *work, kernel)

    def load(self, target: Target, scaling: Scaling) -> None:
        if not self._make_rows(self._options.read(target, scaling), *self._made):
            self._numbers.rows(self._launch, target, scaling)  # says which option has left its range, if one has

    def resume(self) -> None:
        """Run, unless that has happened."""
        after = self._next_numbers.numpy()[self._launch.sources.row_of]
        if not numpy.array_equal(self._numbers.values[self._launch.indices], after, equal_nan=True):
            self.run()
