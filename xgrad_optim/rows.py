"""The rows of coefficients that a launch reads: of the options of its param groups, and of the state's numbers.

They are computed in float64 and rounded once. Back ends whose kernels write the numbers make them by the same text in
their own language (csrc/rows.h, kernels/rows.py), of an `OptionArray`.
"""

import struct
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xgrad_optim.options import hyperparameters, number
from xgrad_optim.rule import COMMON_OPTIONS, Options, Rule

HOST = torch.device("cpu")

KINDS = {torch.float64: 1, torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}
"""How a kernel reads an option from an address (csrc/rows.h); kind 0 is a float64's own bits."""

GROUP_OPTIONS = COMMON_OPTIONS[:4]
"""Those that a param group has; the others come with each launch."""


class Scaling(NamedTuple):
    """What a GradScaler asks of a fused step: to divide the gradients by `grad_scale`, and to do nothing on infs."""

    grad_scale: float | Tensor = 1.0
    found_inf: float | Tensor = 0.0

    def is_skipped(self, waits: bool) -> bool:
        """Whether the step is skipped; a flag on a device is left to the kernels there, unless the host `waits`."""
        return (waits or not is_remote(self.found_inf)) and bool(self.found_inf)


UNSCALED = Scaling()

Target = bool | Tensor | None
"""The weights that a swap leaves, theta_hat or theta; a flag on the device where only that knows; None for a step."""


class HostRows(NamedTuple):
    """The rows of a launch, computed on the host."""

    rows: Tensor
    """`[n_rows, n_columns]`, in the launch's compute dtype."""
    next_numbers: Tensor
    """float64 `[n_rows, n_numbers]`: the numbers once the launch has run."""


class OptionArray:
    """What a kernel makes the rows of beside the numbers: the options of each param group.

    Args:
        groups: whose options are read at each use.
        device: where the kernel runs. Tensors there are read there; on the CPU every number is known here.
    """

    def __init__(self, rule: Rule, groups: list[Options], device: torch.device) -> None:
        self._rule, self._groups, self._device = rule, groups, device
        names = (*rule.options, *GROUP_OPTIONS)
        self._names = tuple(dict.fromkeys("betas" if name in ("beta1", "beta2") else name for name in names))
        self._seen: list[object] = []
        self._table: Tensor
        self._held: list[Tensor] = []

    def read(self, target: Target, scaling: Scaling) -> Tensor:
        """int64 `[n_groups, n_options, 2]` on the host, in the order of `Rule.all_options`.

        Of each option the kind, and a number's bits or the address of the tensor that holds it. While nothing changes,
        the same table.
        """
        found = [group.get(name) for group in self._groups for name in self._names]
        found += (target, *scaling)
        if len(found) != len(self._seen) or not all(map(is_, found, self._seen)):
            self._held = []
            self._table = self._made(target, scaling)
            # What may change in place is read anew.
            self._seen = found if all(map(_is_fixed, found)) else []
        return self._table

    def _made(self, target: Target, scaling: Scaling) -> Tensor:
        of_launch = {**scaling._asdict(), "to_predicted": 0.0 if target is None else target}
        table = [
            [self._entry(name, value) for name, value in (of_group(self._rule, options) | of_launch).items()]
            for options in self._groups
        ]
        return torch.tensor(table, dtype=torch.int64, device=HOST)

    def _entry(self, name: str, value: Any) -> tuple[int, int]:
        known = number(name, name, value)
        if known is None and self._device.type == "cpu":
            known = _fetched(name, value)
        if known is not None:
            return 0, struct.unpack("<q", struct.pack("<d", known))[0]
        if value.device != self._device or value.dtype not in KINDS:
            value = value.to(self._device, torch.float64, non_blocking=True)
        self._held.append(value)
        return KINDS[value.dtype], value.data_ptr()


def _is_fixed(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_fixed, value))
    return value is None or type(value) in (float, int, bool)


def make_row(
    rule: Rule,
    options: Mapping[str, float],
    numbers: Sequence[float],
    mode: bool | None,
    grad_scale: float,
    found_inf: float,
) -> tuple[list[float], list[float]]:
    """One row in the order of `rule.columns`, and the numbers once it has run. The text of csrc/rows.h."""
    step, predicted, shift, *direction = numbers
    previous = dict(zip(rule.direction_columns, direction, strict=True))
    if mode is None:
        row = _coefficients(rule, options, int(step) + 1)
        weight_decay, is_decoupled = options["weight_decay"], options["decoupled_weight_decay"]
        row["grad_factor"] = (-1.0 if options["maximize"] else 1.0) / grad_scale
        row["weight_decay"] = 0.0 if is_decoupled else weight_decay
        row["decay_factor"] = 1.0 - options["lr"] * weight_decay if is_decoupled else 1.0
        row["shift"] = options["prediction_steps"] * row["step_size"]
        row["shift_prev"] = shift if predicted else 0.0
        after = [step + 1.0, 1.0, row["shift"], *(row[name] for name in rule.direction_columns)]
    else:
        # The other way of a swap has a shift of 0, which does nothing.
        row = dict.fromkeys(rule.columns, 0.0) | previous
        row["shift"] = shift if mode and not predicted else 0.0
        row["shift_prev"] = shift if predicted and not mode else 0.0
        after = [step, float(mode), shift, *direction]
    # What is in place stays untouched: with a shift of 0 the master would take theta_hat for a foreign write.
    row["is_skipped"] = 1.0 if mode is not None and mode == bool(predicted) else found_inf
    row.update({f"{name}_prev": value for name, value in previous.items()})
    return [row[column] for column in rule.columns], after


def _coefficients(rule: Rule, options: Mapping[str, float], step: int) -> dict[str, float]:
    try:
        return rule.coefficients(options, step)
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"an option has left its range, there is no step {step} with {dict(options)}") from error


def of_group(rule: Rule, options: Options) -> dict[str, Any]:
    """What a param group says of each option of a row."""
    values = hyperparameters(rule, options)
    values |= {name: float(options.get(name, False)) for name in ("decoupled_weight_decay", "maximize")}
    return {name: values.get(name, 0.0) for name in (*rule.options, *GROUP_OPTIONS)}


def as_floats(rule: Rule, options: Options) -> dict[str, float]:
    """The same as floats; what lives on a device is waited for."""
    return {name: _fetched(name, value) for name, value in of_group(rule, options).items()}


def _fetched(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor):
        known = number(name, name, value.item())
        assert known is not None
        return known
    return value


def is_remote(value: Any) -> bool:
    """Whether to know it would be to wait for a device."""
    return isinstance(value, Tensor) and not value.is_cpu
