"""The description of one multi-tensor launch that every back end consumes, and how a step is divided into them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy
import torch
from torch import Tensor

from xgrad_optim import backends
from xgrad_optim.layout import local, owns_memory, plain
from xgrad_optim.numeric import COMPUTE_DTYPES, real_dtype
from xgrad_optim.rows import Scaling, consecutive, make_rows
from xgrad_optim.rule import Options, Rule
from xgrad_optim.scalars import Scalars
from xgrad_optim.state import State, matches
from xgrad_optim.tensor_reader import NativeReader, PythonReader, read_versions

CHUNK, GPU_CHUNK = 1 << 14, 1 << 12
"""Elements of a chunk, the unit in which native back ends divide a tensor; on a GPU a thousand run at a time."""

CHUNK_COST = 128
"""What it costs to begin a chunk, in elements; it keeps thousands of tiny tensors from counting as no work."""


@dataclass(frozen=True)
class Entry:
    """One parameter that takes part in a step or a swap."""

    param: Tensor
    options: Options
    state: State
    scalars: Scalars
    column: int
    """Its column in the table of `scalars`."""


class Tables:
    """A Launch's shape as tables on the CPU, which is what native back ends read; the same from step to step.

    Attributes:
        numels: int64 `[n_tensors]`, in real numbers.
        row_of: int32 `[n_tensors]`.
        chunks: int32 `[n_chunks, 2]`: tensor, and index of the chunk in it.
        chunk_size: elements of a chunk, the last one of a tensor may have fewer.
        tasks: int64 `[n_tasks + 1]`: bounds in `chunks` of about equal portions of work.
        addresses: int64 `[n_tensors, 6]`, for the back end to fill: parameter, gradient, two state buffers,
            max_exp_avg_sq, master_weights.
        n_refused: how many tensors are not one flat range each; their addresses are 0.
    """

    def __init__(self, numels: list[int], row_of: list[int], chunk_size: int) -> None:
        sizes = numpy.array(numels, dtype=numpy.int64)
        counts = -(-sizes // chunk_size)
        tensors = numpy.repeat(numpy.arange(len(sizes)), counts)
        indices = numpy.arange(len(tensors)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
        costs = numpy.minimum(sizes[tensors] - indices * chunk_size, chunk_size) + CHUNK_COST
        task_of = (numpy.cumsum(costs) - costs) // (chunk_size + CHUNK_COST)
        tasks = numpy.flatnonzero(numpy.diff(task_of, prepend=-1, append=numpy.iinfo(numpy.int64).max))
        self.numels = torch.from_numpy(sizes)
        self.row_of = torch.tensor(row_of, dtype=torch.int32, device="cpu")
        self.chunks = torch.from_numpy(numpy.stack((tensors, indices), axis=1).astype(numpy.int32))
        self.chunk_size = chunk_size
        self.tasks = torch.from_numpy(tasks)
        self.addresses = torch.zeros((len(sizes), 6), dtype=torch.int64, device="cpu")
        self.n_refused = 0

    def refused(self) -> list[int]:
        """The tensors that are not one flat range each: a kernel over addresses passes over them."""
        return torch.nonzero(self.addresses[:, 0] == 0).flatten().tolist() if self.n_refused else []


class Launch:
    """All tensors of one device, parameter dtype, state dtype and set of buffers, for one launch.

    The same launch steps and swaps. With gradients it restores theta, updates it and predicts; without, it only
    restores and predicts, and one of the two is a shift of 0, which does nothing.

    Attributes:
        rule: the math to plug in.
        params, state: the tensors by slot; `state` holds the rule's buffers and, where in use, "max_exp_avg_sq" and
            "master_weights".
        has_grad: whether it steps.
        rows: `[n_rows, len(rule.columns)]` in the compute dtype, on the CPU. Tensors of one group that are in step
            share a row.
        row_of: each tensor's row.
        trusts_master: whether every parameter still holds what was made of its master weights, so that none is read.
        reader: what a back end over addresses reads the tensors with; None until it has.
        bound: what the back end made of the tables and keeps while the launch lives.
    """

    def __init__(self, rule: Rule, entries: list[Entry], positions: list[int], to_predicted: bool | None) -> None:
        self.rule = rule
        self.params = [entry.param for entry in entries]
        self.has_grad = to_predicted is None
        self._grads: list[Tensor] | None = None
        self.state = {
            key: [entry.state[key] for entry in entries]
            for key in rule.buffer_keys
            if key in entries[0].state
        }
        self._dtypes = {"params": self.params[0].dtype, **{key: slot[0].dtype for key, slot in self.state.items()}}
        self.device = self.params[0].device
        self.dtype = plain(self.params[0]).dtype
        self.state_dtype = real_dtype(self.state[rule.state_keys[0]][0].dtype)
        self.compute_dtype = COMPUTE_DTYPES[self.dtype]
        self.is_capturable = bool(entries[0].options["capturable"])
        self._positions, self._to_predicted = positions, to_predicted
        self._scalars = entries[0].scalars
        columns, options = [entry.column for entry in entries], [entry.options for entry in entries]
        self._members = consecutive(columns)
        self._rows = make_rows(rule, options, columns, self._scalars)
        self.row_of = self._rows.row_of
        self._bumps: numpy.ndarray | None = None
        self._has_run = False
        self.rows = torch.empty(0)
        self.trusts_master = False
        self.reader: NativeReader | PythonReader | None = None
        self.bound: Any = None
        self._tables: Tables | None = None
        self.backend = backends.choose(self, entries[0].options)

    @property
    def grads(self) -> list[Tensor] | None:
        """The gradients of a step, None for a swap. Back ends over addresses need no list of them as a rule."""
        if self._grads is None and self.has_grad:
            self._grads = [param.grad for param in self.params]  # type: ignore[misc]
        return self._grads

    def prepare(self, grads: list[Tensor] | None = None) -> bool:
        """Take a step's gradients: the parameters' own, unless others were made of them, as of DTensors'.

        False where a tensor is no longer what the launch was built for, or a gradient is missing.
        """
        self._grads = None if grads is None else [grads[position] for position in self._positions]
        return self.backend.prepare(self)

    def fits(self) -> bool:
        """Whether every tensor still has the dtype, shape and device that the launch was built for."""
        for key, tensors in (("params", self.params), *self.state.items()):
            dtype = self._dtypes[key]
            for tensor, param in zip(tensors, self.params, strict=True):
                if tensor.dtype != dtype or tensor.device != self.device or tensor.shape != param.shape:
                    return False
        grads = self.grads or []
        return not any(grad is None for grad in grads) and all(map(matches, self.params, grads))

    def why_no_kernel(self, device_types: Sequence[str]) -> str | None:
        """Why a kernel over addresses, on devices of these types, can't run this launch; None where it can."""
        if self.device.type not in device_types:
            return f"parameters are on {self.device}, it runs on {' and '.join(device_types)}"
        if self.state_dtype not in (self.dtype, self.compute_dtype):
            return f"it does not combine parameters of {self.dtype} with state of {self.state_dtype}"
        for tensor in chain(self.params, *self.state.values()):
            if not owns_memory(local(tensor)):
                return f"a {type(tensor).__name__} has no memory of its own"
        return None

    def refresh(self, scaling: Scaling) -> None:
        """Compute the rows from the groups' present hyperparameters."""
        self.rows = self._rows.compute(self.compute_dtype, self._to_predicted, scaling)
        if self.reader is not None and not owns_memory(self.rows):
            raise RuntimeError("FakeTensorMode can step fake parameters only, these are real: nothing was changed")
        reader = self.reader
        self._versions = reader.versions(self) if reader else read_versions(self.params)
        is_unwritten = self._scalars.are_unwritten(self._members, self._versions)
        # Only a launch that has run before knows that no parameter was given other memory since; and a CUDA graph
        # replays a step whatever was written in between.
        may_trust = "master_weights" in self.state and self._has_run and not self.is_capturable
        self.trusts_master = is_unwritten and may_trust

    @property
    def tables(self) -> Tables:
        """The tables for native back ends, made when they are first asked for."""
        if self._tables is None:
            numels = [plain(param).numel() for param in self.params]
            chunk_size = CHUNK if self.device.type == "cpu" else GPU_CHUNK
            self._tables = Tables(numels, self.row_of, chunk_size)
        return self._tables

    def part(self, members: list[int]) -> "Launch":
        """These tensors of the launch alone, for a back end to run; the rows are shared."""
        part = copy.copy(self)
        part.params = [self.params[i] for i in members]
        part._grads = None if self.grads is None else [self.grads[i] for i in members]
        part.state = {key: [tensors[i] for i in members] for key, tensors in self.state.items()}
        part.row_of = [self.row_of[i] for i in members]
        part._tables, part.reader, part.bound = None, None, None
        return part

    def run(self) -> None:
        """Run on the chosen back end, then note in the state what the parameters now hold."""
        self._is_whole = self.backend.run(self)
        self._rows.advance()
        self._grads = None  # the cache must not keep them alive
        self._has_run = True
        if self.reader is not None:
            self.reader.finish(self)
        if isinstance(self.reader, NativeReader) and torch.__future__.get_swap_module_params_on_conversion():
            # torch.utils.swap_tensors refuses tensors that somebody holds. The next reader knows nothing of before.
            self.reader, self._has_run = None, False

    def note_versions(self) -> None:
        """Remember the version counters, when all launches have run: views may share one with another launch's."""
        # Runs of addresses alone move every counter as far as the last ones did.
        is_known = self._is_whole and self._bumps is not None
        versions = self._versions + self._bumps if is_known else read_versions(self.params)
        self._bumps = versions - self._versions if self._is_whole else None
        self._scalars.note_writes(self._members, versions)


def build_launches(rule: Rule, entries: list[Entry], to_predicted: bool | None = None) -> list[Launch]:
    """Divide a step, or a swap to these weights, into as few launches as devices, dtypes, buffers and options allow."""
    launches: dict[tuple[object, ...], list[int]] = {}
    for position, entry in enumerate(entries):
        state, options = entry.state, entry.options
        key = (
            entry.param.device,
            entry.param.dtype,
            state[rule.state_keys[0]].dtype,
            "max_exp_avg_sq" in state,
            "master_weights" in state,
            *(options[name] for name in ("backend", "foreach", "fused", "capturable")),
        )
        launches.setdefault(key, []).append(position)
    return [Launch(rule, [entries[i] for i in positions], positions, to_predicted) for positions in launches.values()]
