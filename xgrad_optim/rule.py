"""What one optimizer declares: its state, its coefficients and its math; nothing else tells two of them apart."""

import inspect
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple, TypedDict, TypeVar, get_type_hints

from torch import Tensor

Options = Mapping[str, Any]
"""A param group's hyperparameters by name."""

Blocks = Mapping[str, Tensor]
"""State buffers by name, in the compute type: one block of one tensor each."""

Hyper = SimpleNamespace
"""One row of coefficients by column name: 0-dim tensors of the compute type, which torch takes faster than numbers."""

BETAS = ("beta1", "beta2")
"""What a rule calls the two numbers of a param group's "betas"."""

COMMON_OPTIONS = (
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "prediction_steps",
    "grad_scale",
    "found_inf",
    "to_predicted",
)
"""What a row is made of beside the rule's own options (csrc/rows.h); a GradScaler and the mode bring the last three."""

STEP_COLUMNS = ("is_skipped", "grad_factor", "weight_decay", "decay_factor", "step_size", "shift", "shift_prev")
"""Coefficients that every rule has. A row with `is_skipped` leaves its tensors untouched; `grad_factor` negates for
maximize and unscales; `weight_decay` is the L2 penalty, `decay_factor` the decoupled decay."""


class OptionalBuffer(NamedTuple):
    """A state buffer that a rule has where a flag of the param group asks for it, behind the rule's two others.

    Attributes:
        option: the flag.
        key: the buffer.
        initial: the buffer that it begins as a copy of where the flag is switched on in mid-training; else with zeros.
    """

    option: str
    key: str
    initial: str | None = None


@dataclass(frozen=True)
class Rule:
    """The math of one optimizer, of one element, free of lr, weight decay and prediction.

    Attributes:
        name: stands in checkpoints and names the kernels.
        state_keys: the state buffers, shaped like the parameter; the first is the momentum, without which there is
            no displacement.
        required_state: keys without which a loaded state can't go on; torch.optim.SGD keeps no "step", for one.
        required_options: hyperparameters without which a loaded param group is another optimizer's.
        positive_options: those that may not be 0.
        signed_options: those that may be negative.
        options: hyperparameters that `coefficients` reads; `betas` are "beta1" and "beta2" here.
        stored_options: those that `accumulate` adds to the state, whose dtype may round them to 0.
        accumulate_columns: coefficients of `accumulate`.
        direction_columns: coefficients of `direction`; a prediction is undone with the ones that made it.
        coefficients: `(options, step) -> {column: value}` in float64, `step_size` included; `step` counts from 1.
        accumulate: `(grad, state, hyper, scratch)` advances `state` in place; `grad` is read only.
        direction: `(state, hyper, scratch) -> delta`, either in `scratch` or a buffer of `state`.
        update: `(grad, state, hyper, scratch, other) -> delta` in `scratch`, where an update moves along another delta
            than a prediction, for it takes the gradient; it may write to `other`. It is never undone.
        optional: a buffer that not all states have. `accumulate`, `direction` and `update` find it in `state`, or not.
    """

    name: str
    state_keys: tuple[str, ...]
    required_state: tuple[str, ...]
    required_options: tuple[str, ...]
    options: tuple[str, ...]
    accumulate_columns: tuple[str, ...]
    direction_columns: tuple[str, ...]
    coefficients: Callable[[Mapping[str, float], int], dict[str, float]]
    accumulate: Callable[[Tensor, Blocks, Hyper, Tensor], None]
    direction: Callable[[Blocks, Hyper, Tensor], Tensor]
    update: Callable[[Tensor, Blocks, Hyper, Tensor, Tensor], Tensor] | None = None
    optional: OptionalBuffer | None = None
    positive_options: tuple[str, ...] = ()
    signed_options: tuple[str, ...] = ()
    stored_options: tuple[str, ...] = ()

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns of a Launch's rows, in the order that every back end reads."""
        previous = tuple(f"{name}_prev" for name in self.direction_columns)
        return STEP_COLUMNS + self.accumulate_columns + self.direction_columns + previous

    @cached_property
    def all_options(self) -> tuple[str, ...]:
        """Everything that a row is made of, in the order that the kernels read."""
        return self.options + COMMON_OPTIONS

    @cached_property
    def number_options(self) -> tuple[str, ...]:
        """Hyperparameters that are one number each: a param group has those of BETAS as a pair, "betas"."""
        return (*(name for name in self.options if name not in BETAS), "weight_decay", "prediction_steps")

    @cached_property
    def number_keys(self) -> tuple[str, ...]:
        """State keys of the 0-dim numbers: the step count, and all that it takes to undo the prediction."""
        return ("step", "predicted", "prediction_shift", *(f"prediction_{name}" for name in self.direction_columns))

    @cached_property
    def buffer_keys(self) -> tuple[str, ...]:
        """State keys of all tensors that are shaped like the parameter, those of options included."""
        optional = () if self.optional is None else (self.optional.key,)
        return (*self.state_keys, *optional, "master_weights")

    def has_optional(self, state: Container[str]) -> bool:
        """Whether the optional buffer is among these."""
        return self.optional is not None and self.optional.key in state

    def asks_for_optional(self, options: Options) -> bool:
        """Whether a param group's flag asks for the optional buffer."""
        return self.optional is not None and bool(options.get(self.optional.option))


class Common(TypedDict, total=False):
    """The keyword arguments of every class; `COMMON` has their defaults."""

    prediction_steps: float
    master_weights: bool
    backend: str | None
    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None


COMMON: Common = {
    "prediction_steps": 1.0,
    "master_weights": False,
    "backend": None,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}

COMMON_DOC = """
        prediction_steps (float): how many steps ahead the weights are predicted, >= 0; 0 is the base optimizer.
            A param-group option: a scheduler may change it, and groups may differ.
        master_weights (bool): keep theta in float32 (float64 for float64 parameters) in ``state``, and the other
            state likewise: mixed precision for bfloat16 and float16 parameters.
        backend (str, optional): "triton", "cuda", "cpu", "torch", or None for the best that can run.
        maximize (bool): ascend instead of descend.
        foreach (bool, optional): True means ``backend="torch"``.
        capturable (bool): for CUDA graphs; needs parameters on a GPU.
        differentiable (bool): must be False.
        fused (bool, optional): True demands a native back end, False means ``backend="torch"``.

    Numbers may be of any real type, 1-element tensors included. Parameters are float64, float32, bfloat16, float16,
    complex128 or complex64, of any shape and strides, and no two of them share memory. After :meth:`step` they hold
    theta_hat; :meth:`eval` puts theta into them, :meth:`train` theta_hat back.

    State beside the buffers named above: 0-dim numbers, which belong to the parameter as a whole. A loop that cuts or
    extends rows of the state takes the tensors of the parameter's shape only.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: a value out of its range.
        RuntimeError: options that exclude each other, or a demanded back end that this machine lacks.
        NotImplementedError: ``differentiable=True``.
    """

Class = TypeVar("Class", bound=type)


def takes_common(cls: Class) -> Class:
    """Class decorator: what its constructor takes as `**common` is documented, and spelled in its signature."""
    cls.__doc__ = (cls.__doc__ or "").rstrip() + COMMON_DOC
    init: Any = inspect.getattr_static(cls, "__init__")
    signature = inspect.signature(init)
    *own, last = signature.parameters.values()
    if last.kind is last.VAR_KEYWORD:
        hints = get_type_hints(Common)
        spelled = [
            last.replace(name=name, kind=last.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in COMMON.items()
        ]
        init.__signature__ = signature.replace(parameters=[*own, *spelled])
    return cls
