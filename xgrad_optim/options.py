"""The checks of every hyperparameter, applied to the defaults and to each param group alike."""

import math
from collections.abc import Callable
from numbers import Real

import torch

from xgrad_optim import backends
from xgrad_optim.rule import Options, Rule

EXECUTION_OPTIONS = ("backend", "foreach", "fused", "capturable", "differentiable")
"""Which code runs, not what it computes: these belong to the machine, so a checkpoint does not change them."""


def _number(name: str, value: object) -> float | None:
    """The number, or None where it lives on a device: to know it would be to wait for it."""
    if type(value) is float:  # nearly all are, and to ask for a Real takes long
        return value
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element, got shape {tuple(value.shape)}")
        if not value.is_cpu:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number or a 1-element Tensor, got {value!r}")
    return float(value)


def _at_least_zero(title: str) -> Callable[[str, object], None]:
    def check(name: str, value: object) -> None:
        number = _number(name, value)
        if number is not None and not (number >= 0.0 and math.isfinite(number)):
            raise ValueError(f"Invalid {title}: {number} ({name} must be finite and >= 0)")

    return check


def _finite(name: str, value: object) -> None:
    number = _number(name, value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"Invalid {name} value: {number} ({name} must be finite)")


def _betas(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"betas must be a pair of numbers, got {value!r}")
    for index, beta in enumerate(value):
        number = _number(f"betas[{index}]", beta)
        if number is not None and not 0.0 <= number < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {number} (betas must be in [0, 1))")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _flag_or_none(name: str, value: object) -> None:
    if value is not None:
        _flag(name, value)


def _nesterov(name: str, value: object) -> None:
    _flag(name, value)
    if value:
        raise ValueError(
            "nesterov=True is not an option of XSGDM: prediction_steps=momentum is Nesterov momentum as the model "
            "sees it. Use XSGDM(..., prediction_steps=momentum) and leave nesterov=False"
        )


def _differentiable(name: str, value: object) -> None:
    _flag(name, value)
    if value:
        raise NotImplementedError(
            "differentiable=True is not supported: prediction restores weights bit by bit, which has no derivative. "
            "Use the base optimizer of torch.optim to differentiate through a step"
        )


def _backend(name: str, value: object) -> None:
    if value is not None and value not in backends.NAMES:
        names = ", ".join(repr(known) for known in backends.NAMES)
        raise ValueError(f"Invalid backend: {value!r} (expected None or one of {names})")


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "lr": _at_least_zero("learning rate"),
    "momentum": _at_least_zero("momentum value"),
    "dampening": _finite,
    "betas": _betas,
    "eps": _at_least_zero("epsilon value"),
    "weight_decay": _at_least_zero("weight_decay value"),
    "prediction_steps": _at_least_zero("prediction_steps value"),
    "nesterov": _nesterov,
    "amsgrad": _flag,
    "decoupled_weight_decay": _flag,
    "master_weights": _flag,
    "maximize": _flag,
    "capturable": _flag,
    "differentiable": _differentiable,
    "foreach": _flag_or_none,
    "fused": _flag_or_none,
    "backend": _backend,
}

def check_options(rule: Rule, options: Options) -> None:
    """Raise for the first option whose type or range is wrong, or that contradicts another one."""
    for name, check in _CHECKS.items():
        if name in options:
            check(name, options[name])
    for name in rule.positive_options:
        if options[name] == 0:
            raise ValueError(f"Invalid epsilon value: {options[name]} ({name} must be > 0)")
    if options.get("fused") and options.get("foreach"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    asked = options.get("backend")
    if asked == "torch" and options.get("fused"):
        raise RuntimeError('fused=True demands a native back end, backend="torch" is none: leave one of them out')
    if asked not in (None, "torch") and (options.get("foreach") or options.get("fused") is False):
        raise RuntimeError(
            f'foreach=True and fused=False mean backend="torch", got backend={asked!r}: leave one of them out'
        )
