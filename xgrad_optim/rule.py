"""What one optimizer declares: its state, its coefficients and its math; nothing else tells two of them apart."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from xgrad_optim.numeric import Number

Options = Mapping[str, Any]
"""A param group's hyperparameters by name."""

Blocks = Mapping[str, Tensor]
"""State buffers by name, in the compute type: one block of one tensor each."""

Hyper = SimpleNamespace
"""One row of coefficients by column name: 0-dim tensors of the compute type, which torch takes faster than numbers."""

STEP_COLUMNS = ("is_skipped", "grad_factor", "weight_decay", "decay_factor", "step_size", "shift", "shift_prev")
"""Coefficients that every rule has. A row with `is_skipped` leaves its tensors untouched; `grad_factor` negates for
maximize and unscales; `weight_decay` is the L2 penalty, `decay_factor` the decoupled decay."""


@dataclass(frozen=True)
class Rule:
    """The math of one optimizer, of one element, free of lr, weight decay and prediction.

    Attributes:
        name: stands in checkpoints and names the kernels.
        state_keys: the state buffers, shaped like the parameter.
        required_state: keys without which a loaded state can't go on; torch.optim.SGD keeps no "step", for one.
        required_options: hyperparameters without which a loaded param group is another optimizer's.
        positive_options: those that may not be 0.
        accumulate_columns: coefficients of `accumulate`.
        direction_columns: coefficients of `direction`; a prediction is undone with the ones that made it.
        coefficients: `(options, step) -> {column: value}` in float64, `step_size` included; `step` counts from 1. Plain
            arithmetic, because each number may be a tensor on a device (capturable, fused).
        accumulate: `(grad, state, hyper, scratch)` advances `state` in place; `grad` is read only.
        direction: `(state, hyper, scratch) -> delta`, either in `scratch` or a buffer of `state`.
    """

    name: str
    state_keys: tuple[str, ...]
    required_state: tuple[str, ...]
    required_options: tuple[str, ...]
    accumulate_columns: tuple[str, ...]
    direction_columns: tuple[str, ...]
    coefficients: Callable[[Options, Number], dict[str, Number]]
    accumulate: Callable[[Tensor, Blocks, Hyper, Tensor], None]
    direction: Callable[[Blocks, Hyper, Tensor], Tensor]
    positive_options: tuple[str, ...] = ()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of a Launch's rows, in the order that every back end reads."""
        previous = tuple(f"{name}_prev" for name in self.direction_columns)
        return STEP_COLUMNS + self.accumulate_columns + self.direction_columns + previous

    @cached_property
    def number_keys(self) -> tuple[str, ...]:
        """State keys of the 0-dim numbers: the step count, and all that it takes to undo the prediction."""
        return ("step", "predicted", "prediction_shift", *(f"prediction_{name}" for name in self.direction_columns))

    @cached_property
    def buffer_keys(self) -> tuple[str, ...]:
        """State keys of all tensors that are shaped like the parameter, those of options included."""
        return (*self.state_keys, "max_exp_avg_sq", "master_weights")
