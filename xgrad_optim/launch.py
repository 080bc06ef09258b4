"""The description of one multi-tensor launch that every back end reads. Data only: it chooses and runs nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy
import torch
from torch import Tensor

from xgrad_optim.layout import local, owns_memory, plain
from xgrad_optim.numeric import COMPUTE_DTYPES, real_dtype
from xgrad_optim.rule import Options, Rule
from xgrad_optim.state import State

CHUNK, GPU_CHUNK = 1 << 14, 1 << 12
"""Elements of a chunk, the unit in which native back ends divide a tensor; on a GPU a thousand run at a time."""

CHUNK_COST = 128
"""What it costs to begin a chunk, in elements; it keeps thousands of tiny tensors from counting as no work."""

PARAM, STATE, MASTER_WEIGHTS, NUMEL, ROW, NUMBERS, LINE_LENGTH = 0, 1, 4, 5, 6, 7, 8
"""The columns of a tensor's line of the table, and how many there are (csrc/launch.h). The states begin at STATE."""


def columns_of(rule: Rule) -> dict[str, int]:
    """Where the address of each buffer stands in a tensor's line of the table."""
    states = {key: STATE + index for index, key in enumerate(rule.buffer_keys)}
    return states | {"param": PARAM, "master_weights": MASTER_WEIGHTS}


@dataclass(frozen=True, slots=True)
class Member:
    """One parameter that takes part in a step or a swap."""

    param: Tensor
    options: Options
    state: State
    index: int
    """Of its numbers among those of all parameters."""


@dataclass(frozen=True, slots=True)
class RowSources:
    """What the rows of a launch are made of.

    Attributes:
        row_of: each tensor's row.
        options: on the host those of each row; on a device those of each param group.
        members: on the host, for each row, the first of the launch's members that has it.
        group_of: on a device, for each tensor, which of `options` are its own.
    """

    row_of: list[int]
    options: list[Options]
    members: list[int]
    group_of: list[int]


class Tables:
    """A Launch as tables on the CPU, which is what native back ends read.

    Attributes:
        table: int64 `[n_tensors, LINE_LENGTH]`: addresses by `columns_of`, the number of real elements, the row, and
            the address of the numbers where the kernel is to write them. The reader of addresses fills in these.
        grads: int64 `[n_tensors]`, addresses; empty for a swap.
        chunks: int32 `[n_chunks, 2]`: tensor, and index of the chunk in it. An empty tensor has one, too.
        chunk_size: elements of a chunk, the last one of a tensor may have fewer.
        tasks: int64 `[n_tasks + 1]`: bounds in `chunks` of about equal portions of work.
        versions: int64 `[n_tensors, 2]`: version counters of the parameter, and of its state buffers (a sum).
        counts: the same for numpy.
    """

    def __init__(self, numels: Sequence[int], row_of: Sequence[int], chunk_size: int, has_grad: bool) -> None:
        sizes = numpy.array(numels, dtype=numpy.int64)
        counts = numpy.maximum(-(-sizes // chunk_size), 1)
        tensors = numpy.repeat(numpy.arange(len(sizes)), counts)
        indices = numpy.arange(len(tensors)) - numpy.repeat(numpy.cumsum(counts) - counts, counts)
        costs = numpy.minimum(sizes[tensors] - indices * chunk_size, chunk_size) + CHUNK_COST
        task_of = (numpy.cumsum(costs) - costs) // (chunk_size + CHUNK_COST)
        tasks = numpy.flatnonzero(numpy.diff(task_of, prepend=-1, append=numpy.iinfo(numpy.int64).max))
        self.table = torch.zeros((len(sizes), LINE_LENGTH), dtype=torch.int64, device="cpu")
        self.table[:, NUMEL] = torch.from_numpy(sizes)
        self.table[:, ROW] = torch.tensor(row_of, device="cpu")
        self.grads = torch.zeros(len(sizes) if has_grad else 0, dtype=torch.int64, device="cpu")
        self.chunks = torch.from_numpy(numpy.stack((tensors, indices), axis=1).astype(numpy.int32))
        self.chunk_size = chunk_size
        self.tasks = torch.from_numpy(tasks)
        self.versions = torch.zeros((len(sizes), 2), dtype=torch.int64, device="cpu")
        self.counts = self.versions.numpy()


class Launch:
    """All tensors of one device, parameter dtype, state dtype and set of buffers.

    The same launch steps and swaps. With gradients it restores theta, updates it and predicts; without, it only
    restores and predicts, and one of the two is a shift of 0, which does nothing.

    Attributes:
        rule: the math to plug in.
        params, state: the tensors by slot; `state` holds the rule's buffers and, where in use, its optional one and
            "master_weights".
        has_grad: whether it steps.
        grad_indices: where the gradients of its members are among those of all that take the step.
        numbers: each member's vector of numbers, and the view of its beginning that is the state's step count.
        indices: each member's, as a slice where they are side by side.
        sources: what its rows are made of.
    """

    def __init__(
        self,
        rule: Rule,
        members: Sequence[Member],
        grad_indices: list[int],
        numbers: list[tuple[Tensor, Tensor]],
        sources: RowSources,
        has_grad: bool,
    ) -> None:
        first = members[0]
        self.rule = rule
        self.params = [member.param for member in members]
        self.state = {key: [member.state[key] for member in members] for key in rule.buffer_keys if key in first.state}
        self.has_grad, self.grad_indices = has_grad, grad_indices
        self.numbers, self.sources = numbers, sources
        self.indices = consecutive([member.index for member in members])
        self.device, self.dtype = first.param.device, plain(first.param).dtype
        self.state_dtype = real_dtype(first.state[rule.state_keys[0]].dtype)
        self.compute_dtype = COMPUTE_DTYPES[self.dtype]
        self.is_capturable = bool(first.options["capturable"])

    @property
    def slots(self) -> dict[str, list[Tensor]]:
        """The tensors that live as long as the launch."""
        return {"param": self.params, **self.state}

    @property
    def written(self) -> list[Tensor]:
        """Those that a run writes: a swap changes no state but the master weights."""
        names = [name for name in self.slots if self.has_grad or name in ("param", "master_weights")]
        return [tensor for name in names for tensor in self.slots[name]]

    @cached_property
    def tables(self) -> Tables:
        chunk_size = CHUNK if self.device.type == "cpu" else GPU_CHUNK
        return Tables([plain(param).numel() for param in self.params], self.sources.row_of, chunk_size, self.has_grad)

    def why_no_kernel(self, device_types: Sequence[str]) -> str | None:
        """Why a kernel over addresses, on devices of these types, can't run this launch; None where it can."""
        if self.device.type not in device_types:
            return f"parameters are on {self.device}, it runs on {' and '.join(device_types)}"
        room = MASTER_WEIGHTS - STATE - (self.rule.optional is not None)
        if len(self.rule.state_keys) > room:
            return f"the rule {self.rule.name} has {len(self.rule.state_keys)} states, it has room for {room}"
        if self.state_dtype not in (self.dtype, self.compute_dtype):
            return f"it does not combine parameters of {self.dtype} with state of {self.state_dtype}"
        for tensor in chain(self.params, *self.state.values()):
            if not owns_memory(local(tensor)):
                return f"a {type(tensor).__name__} has no memory of its own"
        return None


def consecutive(indices: list[int]) -> numpy.ndarray | slice:
    """The indices as a slice where they stand side by side, which is read without a copy."""
    first = indices[0]
    is_range = indices == list(range(first, first + len(indices)))
    return slice(first, first + len(indices)) if is_range else numpy.array(indices)
