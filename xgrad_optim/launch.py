"""The description of one multi-tensor launch that every back end consumes, and how a step is divided into them."""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from xgrad_optim import backends
from xgrad_optim.layout import DTensor, plain
from xgrad_optim.numeric import COMPUTE_DTYPES, real_dtype
from xgrad_optim.rule import Options, Rule
from xgrad_optim.scalars import PREDICTED, SHIFT, STEP, Scalars
from xgrad_optim.state import State, matches

if TYPE_CHECKING:
    from xgrad_optim.device_tables import DeviceTables

CHUNK = 1 << 14
"""Elements of a chunk: the unit in which native back ends divide a tensor."""

CHUNK_COST = 128
"""What it costs to begin a chunk, in elements; it keeps thousands of tiny tensors from counting as no work."""


@dataclass(frozen=True)
class Entry:
    """One parameter that takes part in a step (with its gradient) or in a swap (without)."""

    param: Tensor
    grad: Tensor | None
    options: Options
    column: int
    """Its column in the table of `Scalars`."""
    state: State


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
        n_refused: how many tensors the back end could not take, or -1 where it has to look at each.
        on_device: what a GPU back end keeps of them on the device (device_tables.py).
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
        self.on_device: DeviceTables | None = None


class Launch:
    """All tensors of one device, parameter dtype, state dtype and set of buffers, for one launch.

    The same launch steps and swaps. With gradients it restores theta, updates it and predicts; without, it only
    restores and predicts, and one of the two is a shift of 0, which does nothing.

    Attributes:
        rule: the math to plug in.
        params, grads, state: the tensors by slot, `grads` is None for a swap; `state` holds the rule's buffers and,
            where in use, "max_exp_avg_sq" and "master_weights".
        rows: `[n_rows, len(rule.columns)]` in the compute dtype, on the CPU. Tensors of one group that are in step
            share a row.
        row_of: each tensor's row.
        trusts_master: whether every parameter still holds what was made of its master weights, so that none is read.
    """

    def __init__(self, rule: Rule, entries: list[Entry], positions: list[int], scalars: Scalars) -> None:
        self.rule = rule
        self.params = [entry.param for entry in entries]
        grads = [entry.grad for entry in entries if entry.grad is not None]
        self.grads: list[Tensor] | None = grads or None
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
        self._scalars = scalars
        self._positions = positions
        self._members = numpy.array([entry.column for entry in entries])
        # A DTensor's version counter is not that of the shard that is written.
        self._has_version = numpy.array([not isinstance(param, DTensor) for param in self.params])
        self._group_into_rows(entries)
        self.rows = torch.empty(0)
        self.trusts_master = False
        self._tables: Tables | None = None
        self.backend = backends.choose(self, entries[0].options)

    def _group_into_rows(self, entries: list[Entry]) -> None:
        """Tensors share a row while their group and all their numbers are equal: they then stay equal."""
        rows: dict[tuple[float, ...], int] = {}
        self.row_of: list[int] = []
        self._row_options: list[Options] = []
        representatives: list[int] = []
        for entry in entries:
            key = (id(entry.options), *self._scalars.table[:, entry.column].tolist())
            if key not in rows:
                rows[key] = len(rows)
                self._row_options.append(entry.options)
                representatives.append(entry.column)
            self.row_of.append(rows[key])
        self._representatives = numpy.array(representatives)
        self._members_row = numpy.array(self.row_of)

    def prepare(self, grads: list[Tensor] | None) -> bool:
        """Take a step's gradients. False where a tensor is no longer what the launch was built for."""
        if grads is not None:
            is_all = len(grads) == len(self._positions)
            self.grads = grads if is_all else [grads[position] for position in self._positions]
        return self.backend.prepare(self)

    def fits(self) -> bool:
        """Whether every tensor still has the dtype, shape and device that the launch was built for."""
        for key, tensors in (("params", self.params), *self.state.items()):
            dtype = self._dtypes[key]
            for tensor, param in zip(tensors, self.params, strict=True):
                if tensor.dtype != dtype or tensor.device != self.device or tensor.shape != param.shape:
                    return False
        return self.grads is None or all(map(matches, self.params, self.grads))

    def refresh(self) -> None:
        """Compute the rows, in float64, from the groups' present hyperparameters; each number is rounded once."""
        self._scalars.warn_of_foreign_writes(self._members, self.params)
        make_row = _swap_row if self.grads is None else _step_row
        numbers = self._scalars.table[:, self._representatives].T.tolist()
        hypers = [
            make_row(self.rule, options, *row) for options, row in zip(self._row_options, numbers, strict=True)
        ]
        values = [[hyper[column] for column in self.rule.columns] for hyper in hypers]
        self.rows = torch.tensor(values, dtype=torch.float64, device="cpu").to(self.compute_dtype)
        columns = ("shift", *self.rule.direction_columns)
        self._next_prediction = numpy.array([[hyper[column] for column in columns] for hyper in hypers])

    @property
    def tables(self) -> Tables:
        """The tables for native back ends, made when they are first asked for."""
        if self._tables is None:
            numels = [plain(param).numel() for param in self.params]
            self._tables = Tables(numels, self.row_of, CHUNK)
        return self._tables

    def part(self, members: list[int]) -> "Launch":
        """These tensors of the launch alone, for a back end to run; the rows are shared."""
        part = copy.copy(self)
        part.params = [self.params[i] for i in members]
        part.grads = None if self.grads is None else [self.grads[i] for i in members]
        part.state = {key: [tensors[i] for i in members] for key, tensors in self.state.items()}
        part.row_of = [self.row_of[i] for i in members]
        part._tables = None
        return part

    def run(self) -> None:
        """Run on the chosen back end, then note in the state what the parameters now hold."""
        self.backend.run(self)
        table, members = self._scalars.table, self._members
        if self.grads is None:
            table[PREDICTED, members] = 1.0 - table[PREDICTED, members]
        else:
            table[STEP, members] += 1.0
            table[PREDICTED, members] = 1.0
            table[SHIFT:, members] = self._next_prediction[self._members_row].T
            self.grads = []  # the cache must not keep them alive
        self._scalars.note_writes(members, self.params, self._has_version)


def _step_row(rule: Rule, options: Options, step: float, predicted: float, *prediction: float) -> dict[str, float]:
    """Undo the last prediction with the numbers that made it, then update and predict with today's."""
    row = rule.coefficients(options, step + 1)
    weight_decay = float(options["weight_decay"])
    is_decoupled = options.get("decoupled_weight_decay", False)
    row["is_skipped"] = 0.0
    row["grad_factor"] = -1.0 if options["maximize"] else 1.0
    row["weight_decay"] = 0.0 if is_decoupled else weight_decay
    row["decay_factor"] = 1.0 - float(options["lr"]) * weight_decay if is_decoupled else 1.0
    row["shift"] = float(options["prediction_steps"]) * row["step_size"]
    row["shift_prev"] = prediction[0] if predicted else 0.0
    row.update({f"{name}_prev": value for name, value in zip(rule.direction_columns, prediction[1:], strict=True)})
    return row


def _swap_row(rule: Rule, options: Options, step: float, predicted: float, *prediction: float) -> dict[str, float]:
    """Go to the other weights, with the numbers of the last prediction either way."""
    row = dict.fromkeys(rule.columns, 0.0)
    row["shift_prev" if predicted else "shift"] = prediction[0]
    for name, value in zip(rule.direction_columns, prediction[1:], strict=True):
        row[name] = row[f"{name}_prev"] = value
    return row


def build_launches(rule: Rule, entries: list[Entry], scalars: Scalars) -> list[Launch]:
    """Divide the entries into launches: as few as devices, dtypes, buffers and demanded back ends allow."""
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
    return [Launch(rule, [entries[i] for i in positions], positions, scalars) for positions in launches.values()]
