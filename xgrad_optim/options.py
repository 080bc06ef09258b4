"""The checks of what users pass: of an option's kind wherever it is used, of its range where a user sets it.

torch.optim takes what it can compute with, and so do these checks: any real number (numpy's, a 1-element tensor, a
bool) and any pair. Like there, a schedule or a user may move a number out of its range afterwards.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import Module

from xgrad_optim import backends
from xgrad_optim.rule import BETAS, Options, Rule

EXECUTION_OPTIONS = ("backend", "foreach", "fused", "capturable", "differentiable")
"""Which code runs, not what it computes: these belong to the machine, so a checkpoint does not change them."""

FLAGS = (
    "amsgrad",
    "centered",
    "decoupled_weight_decay",
    "master_weights",
    "maximize",
    "nesterov",
    "capturable",
    "differentiable",
)

LAUNCH_OPTIONS = (*FLAGS, "foreach", "fused", "backend")
"""Options that are no numbers. They are checked when launches are built, which a change of one brings about."""

ROUNDING = 1e-12
"""How far below 0 rounding may leave a schedule that ends at 0."""

TITLES = {"lr": "learning rate", "eps": "epsilon value"}
"""The words of torch.optim's errors; any other number is "<name> value"."""

BETAS_TITLES = ("beta parameter at index 0", "beta parameter at index 1")


def checked_options(rule: Rule, options: Options, *, check_ranges: bool = True) -> dict[str, Any]:
    """The options as a param group keeps them: tensors as they are, other numbers and flags as Python's own.

    Args:
        check_ranges: False for options that a run has used: what schedules made of them stands.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: for the first option whose kind or range is wrong, or
            that contradicts another one.
    """
    kept = dict(options)
    for name in rule.number_options:
        if name in options:
            title = _title(name)
            value = number(name, title, options[name])
            kept[name] = _kept(options[name], value)
            if check_ranges and value is not None and value < _least(rule, name):
                raise ValueError(f"Invalid {title}: {value} ({name} must be >= 0)")
            if check_ranges and value == 0 and name in rule.positive_options:
                raise ValueError(f"Invalid {title}: {value} ({name} must be > 0)")
    if "betas" in options:
        betas = _pair(options["betas"])
        values = [number(f"betas[{index}]", title, betas[index]) for index, title in enumerate(BETAS_TITLES)]
        kept["betas"] = tuple(map(_kept, betas, values))
        for title, value in zip(BETAS_TITLES, values, strict=True):
            if check_ranges and value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"Invalid {title}: {value} (betas must be in [0, 1))")
    for name in FLAGS:
        if name in options:
            kept[name] = options[name] is not None and _flag(name, options[name])
    for name in ("foreach", "fused"):
        if options.get(name) is not None:
            kept[name] = _flag(name, options[name])
    _check_flags(kept)
    return kept


def hyperparameters(rule: Rule, options: Options) -> dict[str, float | Tensor]:
    """The numbers by the names that rules have for them: as floats, or the tensor of one that lives on a device."""
    found = {name: _known(name, options[name]) for name in rule.number_options if name in options}
    if "betas" in options:
        betas = map(_known, ("betas[0]", "betas[1]"), _pair(options["betas"]), BETAS_TITLES)
        found |= zip(BETAS, betas, strict=True)
    return found


def _title(name: str) -> str:
    return TITLES.get(name, f"{name} value")


def _least(rule: Rule, name: str) -> float:
    """The least value that a user may set; no schedule moves eps."""
    return -math.inf if name in rule.signed_options else 0.0 if name == "eps" else -ROUNDING


def _known(name: str, value: Any, title: str | None = None) -> float | Tensor:
    if type(value) is float and value - value == 0.0:  # neither inf nor NaN, as nearly all are
        return value
    known = number(name, title or _title(name), value)
    return value if known is None else known


def number(name: str, title: str, value: object) -> float | None:
    """The value as a float, or None where it lives on a device: to know it would be to wait for it.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite, or does not have one element.
    """
    if isinstance(value, (Tensor, numpy.ndarray)):
        if math.prod(value.shape) != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        if isinstance(value, Tensor) and not value.is_cpu:
            return None
        value = value.item()
    if not hasattr(value, "__float__") or isinstance(value, (complex, numpy.complexfloating)):
        raise TypeError(f"{name} must be a real number or a 1-element Tensor, got {value!r}")
    try:
        result = float(value)
    except OverflowError:  # an int beyond the range of floats
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"Invalid {title}: {result} ({name} must be finite)")
    return result


def _kept(value: object, known: float | None) -> object:
    """Tensors may be changed in place; what a checkpoint is not to hold (numpy's types, fractions) becomes a float."""
    return value if isinstance(value, (Tensor, int)) else known


def _pair(value: Any) -> tuple[object, object]:
    try:
        if len(value) == 2 and not isinstance(value, (Mapping, str, bytes)):
            return value[0], value[1]
    except (TypeError, LookupError):
        pass
    raise TypeError(f"betas must be a pair of numbers, got {value!r}")


def _flag(name: str, value: object) -> bool:
    try:
        result = number(name, name, value)
    except (TypeError, ValueError):
        result = None
    if result is None:
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(result)


def _check_flags(options: Options) -> None:
    if options.get("nesterov"):
        raise ValueError(
            "nesterov=True is not an option of XSGDM: prediction_steps=momentum is Nesterov momentum as the model "
            "sees it. Use XSGDM(..., prediction_steps=momentum) and leave nesterov=False"
        )
    if options.get("differentiable"):
        raise NotImplementedError(
            "differentiable=True is not supported: prediction restores weights bit by bit, which has no derivative. "
            "Use the base optimizer of torch.optim to differentiate through a step"
        )
    backend = options.get("backend")
    if backend is not None and backend not in backends.NAMES:
        names = ", ".join(repr(known) for known in backends.NAMES)
        raise ValueError(f"Invalid backend: {backend!r} (expected None or one of {names})")
    if options.get("fused") and options.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if backend == "torch" and options.get("fused"):
        raise RuntimeError('fused=True demands a native back end, backend="torch" is none: leave one of them out')
    if backend not in (None, "torch") and (options.get("foreach") or options.get("fused") is False):
        raise RuntimeError(
            f'foreach=True and fused=False mean backend="torch", got backend={backend!r}: leave one of them out'
        )


def listed_params(params: Any) -> Any:
    """The parameters, named parameters or param groups as a list. What torch.optim refuses itself is passed on to it.

    Raises:
        TypeError: something else was passed, with what to pass instead.
    """
    if isinstance(params, (Tensor, set)):
        return params
    if isinstance(params, Mapping) or not isinstance(params, Iterable):
        raise TypeError(
            "params argument given to the optimizer should be an iterable of Tensors or dicts, but got "
            f"{torch.typename(params)}{_advice(params)}"
        )
    listed = list(params)
    for param in listed:
        value = param[1] if isinstance(param, tuple) and len(param) == 2 else param
        if not isinstance(value, (Tensor, dict)):
            advice = _advice(params if isinstance(params, Module) else value)
            raise TypeError(
                f"optimizer can only optimize Tensors, but one of the params is {torch.typename(value)}{advice}"
            )
    return listed


def _advice(value: object) -> str:
    """What to pass instead of this."""
    if isinstance(value, Module):
        return ": pass model.parameters()"
    if isinstance(value, Mapping):
        is_group = "params" in value
        return ": param groups go in a list, [{'params': ...}]" if is_group else ": pass model.parameters()"
    if callable(value):
        is_of_a_model = isinstance(getattr(value, "__self__", None), Module)
        return ": pass model.parameters(), with the parentheses" if is_of_a_model else ": call it"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ": put the parameters in one list, or each part in a group of its own, {'params': part}"
    return ""
