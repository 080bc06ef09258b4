"""The coefficients of a launch, computed in float64 before every run from param groups and the state's numbers.

On the host they are Python numbers. On a device (capturable, fused) they are tensors there and nothing is read back, so
that a CUDA graph can replay a step; the formulas are the same text.
"""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from xgrad_optim.numeric import Number
from xgrad_optim.rule import Options, Rule
from xgrad_optim.scalars import PREDICTED, SHIFT, STEP, Columns, DeviceScalars, HostScalars, Scalars, upload


class Scaling(NamedTuple):
    """What a GradScaler asks of a fused step: to divide the gradients by `grad_scale`, and to do nothing on infs."""

    grad_scale: float | Tensor = 1.0
    found_inf: float | Tensor = 0.0

    @property
    def is_skipped_on_host(self) -> bool:
        """Whether the step is skipped, as far as this can be known without waiting for a device."""
        return bool(self.found_inf) if not isinstance(self.found_inf, Tensor) or self.found_inf.is_cpu else False


UNSCALED = Scaling()


class HostRows:
    """Rows of a launch whose numbers the host knows. Tensors of one group that are in step share one.

    Attributes:
        row_of: each tensor's row.
    """

    def __init__(self, rule: Rule, options: Sequence[Options], columns: list[int], scalars: HostScalars) -> None:
        self._rule, self._table = rule, scalars.table
        self._members = consecutive(columns)
        rows: dict[tuple[float, ...], int] = {}
        self.row_of: list[int] = []
        self._options: list[Options] = []
        representatives: list[int] = []
        for group, column in zip(options, columns, strict=True):
            # While their group and all their numbers are equal, they stay equal.
            key = (id(group), *self._table[:, column].tolist())
            if key not in rows:
                rows[key] = len(rows)
                self._options.append(group)
                representatives.append(column)
            self.row_of.append(rows[key])
        self._representatives = numpy.array(representatives)
        self._members_row = numpy.array(self.row_of)
        self._values = torch.empty((len(rows), len(rule.columns)), dtype=torch.float64, device="cpu")

    def compute(self, dtype: torch.dtype, to_predicted: bool | None, scaling: Scaling) -> Tensor:
        """The rows of a step, or of a swap to these weights. Each number is rounded once."""
        scaling = Scaling(*map(float, scaling))
        numbers = self._table[:, self._representatives].T.tolist()
        rows = [
            make_row(self._rule, as_numbers(options), row, to_predicted, scaling)
            for options, row in zip(self._options, numbers, strict=True)
        ]
        self._values.numpy()[:] = [[row[column] for column in self._rule.columns] for row in rows]
        columns = ("shift", *self._rule.direction_columns)
        self._next_prediction = numpy.array([[row[column] for column in columns] for row in rows])
        self._to_predicted, self._is_skipped = to_predicted, bool(scaling.found_inf)
        return self._values.to(dtype, copy=True)

    def advance(self) -> None:
        """Note in the state's numbers what has run."""
        if self._is_skipped:
            return
        self._table[PREDICTED, self._members] = self._to_predicted is not False
        if self._to_predicted is None:
            self._table[STEP, self._members] += 1.0
            self._table[SHIFT:, self._members] = self._next_prediction[self._members_row].T


class DeviceRows:
    """Rows of a launch whose numbers live on its device, one for each tensor: nobody here knows which are in step."""

    def __init__(self, rule: Rule, options: Sequence[Options], columns: list[int], scalars: DeviceScalars) -> None:
        self._rule, self._scalars = rule, scalars
        self.row_of = list(range(len(columns)))
        self._columns = members = consecutive(columns)
        on_device = members if isinstance(members, slice) else upload(torch.from_numpy(members), scalars.device)
        self._members: slice | Tensor = on_device
        starts = [i for i in self.row_of if i == 0 or options[i] is not options[i - 1]]
        ends = [*starts[1:], len(columns)]
        self._parts = [(options[start], slice(start, end)) for start, end in zip(starts, ends, strict=True)]

    def compute(self, dtype: torch.dtype, to_predicted: bool | None, scaling: Scaling) -> Tensor:
        """As `HostRows.compute`, without reading a number."""
        columns, device = self._rule.columns, self._scalars.device
        scaling = Scaling(*(as_number(value, device) for value in scaling))
        self._to_predicted, self._found_inf = to_predicted, scaling.found_inf
        numbers = self._scalars.tensor[:, self._members]
        self._values = torch.empty((len(columns), len(self.row_of)), dtype=torch.float64, device=device)
        for options, part in self._parts:
            row = make_row(self._rule, as_numbers(options, device), numbers[:, part].unbind(), to_predicted, scaling)
            for column, values in zip(columns, self._values, strict=True):
                values[part] = row[column]
        return self._values.T.to(dtype).contiguous()

    def advance(self) -> None:
        """Note in the state's numbers what has run, unless it was skipped."""
        if not isinstance(self._found_inf, Tensor) and self._found_inf:
            return
        scalars, before = self._scalars, self._scalars.tensor[:, self._members]
        is_predicted = self._to_predicted is not False
        after = before.clone()
        after[PREDICTED] = float(is_predicted)
        if self._to_predicted is None:
            after[STEP] += 1.0
            for key, name in enumerate(("shift", *self._rule.direction_columns), start=SHIFT):
                after[key] = self._values[self._rule.columns.index(name)]
        scalars.write(self._members, before, after, self._found_inf)
        scalars.note_mode(self._columns, is_predicted, self._found_inf)


def make_rows(rule: Rule, options: Sequence[Options], columns: list[int], scalars: Scalars) -> HostRows | DeviceRows:
    """The rows of these parameters, each with its group's options and its column of the numbers."""
    if isinstance(scalars, HostScalars):
        return HostRows(rule, options, columns, scalars)
    assert isinstance(scalars, DeviceScalars)
    return DeviceRows(rule, options, columns, scalars)


def make_row(
    rule: Rule, options: Options, numbers: Sequence[Number], to_predicted: bool | None, scaling: Scaling
) -> dict[str, Number]:
    """One row by column name; `numbers` are those of `rule.number_keys`."""
    step, predicted, shift, *direction = numbers
    if to_predicted is None:
        row = _step_row(rule, options, step, scaling.grad_scale)
        row["shift_prev"] = _where(predicted, shift)
    else:
        # The other way of a swap has a shift of 0, which does nothing.
        row = dict.fromkeys(rule.columns, 0.0) | dict(zip(rule.direction_columns, direction, strict=True))
        row["shift"] = _where(1.0 - predicted, shift) if to_predicted else 0.0
        row["shift_prev"] = 0.0 if to_predicted else _where(predicted, shift)
    row["is_skipped"] = scaling.found_inf
    row.update({f"{name}_prev": value for name, value in zip(rule.direction_columns, direction, strict=True)})
    return row


def _step_row(rule: Rule, options: Options, step: Number, grad_scale: Number) -> dict[str, Number]:
    """Update and predict with today's hyperparameters."""
    row = rule.coefficients(options, step + 1.0)
    weight_decay, is_decoupled = options["weight_decay"], options.get("decoupled_weight_decay", False)
    row["grad_factor"] = (-1.0 if options["maximize"] else 1.0) / grad_scale
    row["weight_decay"] = 0.0 if is_decoupled else weight_decay
    row["decay_factor"] = 1.0 - options["lr"] * weight_decay if is_decoupled else 1.0
    row["shift"] = options["prediction_steps"] * row["step_size"]
    return row


def _where(is_set: Number, value: Number) -> Number:
    """The value where the flag is set, else 0, whatever the value is."""
    if isinstance(is_set, Tensor):
        return torch.where(is_set != 0, value, 0.0)
    return value if is_set else 0.0


def as_numbers(options: Options, device: torch.device | None = None) -> dict[str, Any]:
    """The options with every hyperparameter as a float, or as a tensor on `device` where it is one there."""
    numbers = {name: as_number(value, device) for name, value in options.items() if name not in ("params", "betas")}
    if "betas" in options:
        numbers["betas"] = tuple(as_number(beta, device) for beta in options["betas"])
    return numbers


def as_number(value: Any, device: torch.device | None = None) -> Any:
    """A tensor as a float, which is free on the CPU only; or, where it lives on a device, as float64 on `device`."""
    if type(value) is float:  # nearly all are, and to ask for a Real takes long
        return value
    if not isinstance(value, Tensor):
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
    if device is None or value.device.type == "cpu":
        return float(value)
    return value.reshape(()).to(device, torch.float64, non_blocking=True)


def consecutive(columns: list[int]) -> Columns:
    """The columns as a slice where they stand side by side, which is read without a copy."""
    first = columns[0]
    is_range = columns == list(range(first, first + len(columns)))
    return slice(first, first + len(columns)) if is_range else numpy.array(columns)
