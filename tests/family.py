"""The family: one row for each public optimizer, which tests, benchmarks and the tables of the docs iterate.

What all optimizers promise is tested of every row; what a test or a benchmark has to know of one of them stands in its
row. tests/test_family.py fails where a public optimizer has none.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW, XAdaPlus, XRMSprop
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import COMMON, Rule

Optimizer = torch.optim.Optimizer
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One optimizer.

    Attributes:
        cls: our class.
        like: the class of torch.optim whose signature and state it has.
        is_base: whether `like` also computes what it computes without prediction.
        defaults: arguments whose defaults are not those of `like`.
        keywords: keyword arguments that no other class need have, with their defaults.
        lacks: arguments of `like` that it does not take.
        is_decoupled: whether its weight decay is decoupled by default.
        configurations: options that the tests of behaviour run over, beside the defaults.
        training: options under which the first steps move every element visibly.
        by_hand: options; then theta and theta_hat after each of two steps with lr 0.1, from theta = 1, on the gradients
            0.5 and -0.25. Worked out by hand, so that the reference and the code can't share a mistake.
        move_ahead: `(params, states, group, step)` moves the weights along the direction of the state by one step, in
            torch's own multi-tensor operations.
        lr: at which small models train.
    """

    cls: type[XGradOptimizer]
    like: type[Optimizer]
    is_base: bool = True
    defaults: Options = field(default_factory=dict)
    keywords: Options = field(default_factory=dict)
    lacks: tuple[str, ...] = ()
    is_decoupled: bool = False
    configurations: tuple[Options, ...]
    training: Options
    by_hand: tuple[Options, list[tuple[float, float]]]
    move_ahead: Callable[[Sequence[Tensor], Sequence[Mapping[str, Tensor]], Mapping[str, Any], int], None]
    lr: float = 0.003

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def rule(self) -> Rule:
        return self.cls.rule

    @property
    def base(self) -> type[Optimizer] | None:
        return self.like if self.is_base else None

    @property
    def base_name(self) -> str:
        """Of what it computes without prediction, in torch.optim or not."""
        return self.like.__name__ if self.is_base else self.name.removeprefix("X")

    @property
    def peer(self) -> type[Optimizer]:
        """The class of torch.optim with a fused step that moves the same bytes, and no fewer operations."""
        if self.is_base and "fused" in inspect.signature(self.like).parameters:
            return self.like
        return torch.optim.SGD if len(self.rule.state_keys) == 1 else torch.optim.AdamW

    def make_peer(self, params: Any, **options: Any) -> Optimizer:
        """That class as a step of ours compares to: SGD with momentum, which has a buffer to move."""
        return self.peer(params, **({"momentum": 0.9} if self.peer is torch.optim.SGD else {}), **options)

    def make_base(self, params: Any, **options: Any) -> Optimizer:
        """`like` with our defaults."""
        return self.like(params, **{**self.defaults, **options})

    @property
    def bytes_per_element(self) -> int:
        """That a step in float32 moves: gradients are read, parameters and states read and written."""
        return 4 * (1 + 2 + 2 * len(self.rule.state_keys))

    @cached_property
    def arguments(self) -> Options:
        """The constructor's own arguments with their defaults, without those that all classes have."""
        parameters = inspect.signature(self.cls).parameters
        return {name: parameters[name].default for name in parameters if name not in ("params", *COMMON)}

    @property
    def numbers(self) -> list[str]:
        """Its own arguments that are single numbers."""
        return [name for name, default in self.arguments.items() if type(default) in (int, float)]

    def takes(self, *names: str) -> bool:
        """Whether its constructor has all of these arguments."""
        return {*names} <= {*self.arguments, *COMMON}

    def has_state(self, key: str) -> bool:
        return key in self.rule.state_keys


# -- one step ahead, for benchmarks/literal_procedure.py ---------------------------------------------------------------


def along_the_buffer(
    params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any], step: int
) -> None:
    """theta - lr * momentum_buffer"""
    torch._foreach_add_(params, [state["momentum_buffer"] for state in states], alpha=-group["lr"])


def along_the_quotient(
    params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any], step: int
) -> None:
    """theta - lr * momentum_buffer; where there is none, at momentum 0, theta - lr * g / (sqrt(square_avg) + eps)"""
    if "momentum_buffer" in states[0]:
        along_the_buffer(params, states, group, step)
        return
    denominators = torch._foreach_sqrt([state["square_avg"] for state in states])
    torch._foreach_add_(denominators, group["eps"])
    torch._foreach_addcdiv_(params, [param.grad for param in params], denominators, value=-group["lr"])


def along_the_moments(
    params: Sequence[Tensor],
    states: Sequence[Mapping[str, Tensor]],
    group: Mapping[str, Any],
    step: int,
    adds_eps: bool = True,
) -> None:
    """theta - lr / (1 - beta1^t) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps), or without eps"""
    beta1, beta2 = group["betas"]
    denominators = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
    torch._foreach_mul_(denominators, 1 / math.sqrt(1 - beta2**step))
    if adds_eps:
        torch._foreach_add_(denominators, group["eps"])
    moments = [state["exp_avg"] for state in states]
    torch._foreach_addcdiv_(params, moments, denominators, value=-group["lr"] / (1 - beta1**step))


# -- the table -------------------------------------------------------------------------------------------------------

# By hand, in exact fractions where there are any: m_1 = 0.05, m_2 = 0.9 * 0.05 + 0.1 * -0.25 = 0.02; bias corrections
# 0.1 and 0.19, 0.001 and 0.001999.
FAMILY = (
    Member(
        cls=XSGDM,
        like=torch.optim.SGD,
        defaults={"momentum": 0.9},
        configurations=({"momentum": 0}, {"dampening": 0.3, "weight_decay": 0.1}, {"maximize": True}),
        training={"momentum": 0.8, "dampening": 0.1},
        # buf: 0.5, then 0.9 * 0.5 - 0.25 = 0.2.  theta: 1 - 0.05 = 0.95, then 0.95 - 0.02 = 0.93.  hat: 0.90, 0.91
        by_hand=({"momentum": 0.9}, [(0.95, 0.90), (0.93, 0.91)]),
        move_ahead=along_the_buffer,
        lr=0.03,
    ),
    Member(
        cls=XAdam,
        like=torch.optim.Adam,
        keywords={"decoupled_weight_decay": False},
        configurations=({"weight_decay": 0.1}, {"amsgrad": True, "betas": (0.8, 0.95)}, {"maximize": True}),
        training={"betas": (0.8, 0.9), "eps": 1e-6},
        # v: 0.00025, then 0.00024975 + 0.0000625 = 0.00031225.  delta: 0.05/0.1 / 0.5 = 1, so step 0.1 * 1
        # delta_2 * step_size = 0.1 * (0.02 / 0.19) / sqrt(0.00031225 / 0.001999) = 0.1 * 0.10526316 / 0.39522500
        by_hand=({}, [(0.9, 0.8), (0.9 - 0.02663373, 0.9 - 2 * 0.02663373)]),
        move_ahead=along_the_moments,
    ),
    Member(
        cls=XAdamW,
        like=torch.optim.AdamW,
        is_decoupled=True,
        configurations=({"weight_decay": 0.1, "lr": 0.01}, {"amsgrad": True, "eps": 1e-4}, {"maximize": True}),
        training={"betas": (0.8, 0.9), "eps": 1e-6},
        # the same with theta first multiplied by 1 - 0.1 * 0.5 = 0.95: 0.95 - 0.1 = 0.85, then 0.8075 - 0.02663373
        by_hand=({"weight_decay": 0.5}, [(0.85, 0.75), (0.8075 - 0.02663373, 0.8075 - 2 * 0.02663373)]),
        move_ahead=along_the_moments,
    ),
    Member(
        cls=XAdaBelief,
        like=torch.optim.Adam,
        is_base=False,
        defaults={"eps": 1e-16},
        keywords={"decoupled_weight_decay": True},
        is_decoupled=True,
        configurations=(
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decoupled_weight_decay": False, "amsgrad": True},
            {"maximize": True, "eps": 1e-8},
        ),
        training={"betas": (0.8, 0.9), "eps": 1e-6},
        # surprise 0.45: v = 0.001 * 0.2025 = 0.0002025, root of v / 0.001 is 0.45; step 0.1 * 0.5 / 0.45 = 0.11111111
        # surprise -0.27: v = 0.0002022975 + 0.0000729 = 0.0002751975; / 0.001999 = 0.13766758, root 0.37103582
        by_hand=({}, [(1 - 1 / 9, 1 - 2 / 9), (8 / 9 - 0.02837008, 8 / 9 - 2 * 0.02837008)]),
        move_ahead=along_the_moments,
    ),
    Member(
        cls=XAdaM3,
        like=torch.optim.Adam,
        is_base=False,
        defaults={"eps": 1e-16},
        keywords={"decoupled_weight_decay": True},
        is_decoupled=True,
        configurations=(
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decoupled_weight_decay": False, "amsgrad": True},
            {"maximize": True, "eps": 1e-8},
        ),
        training={"betas": (0.8, 0.9), "eps": 1e-6},
        # v = 0.001 * 0.0025 = 0.0000025, root of v / 0.001 is 0.05; step 0.1 * 0.5 / 0.05 = 1
        # v = 0.0000024975 + 0.0000004 = 0.0000028975; / 0.001999 = 0.00144947474, root 0.03807196; 0.010526316 / that
        by_hand=({}, [(0.0, -1.0), (-0.27648473, -2 * 0.27648473)]),
        move_ahead=partial(along_the_moments, adds_eps=False),
        lr=0.001,
    ),
    Member(
        cls=XAdaPlus,
        like=torch.optim.AdamW,
        is_base=False,
        is_decoupled=True,
        configurations=(
            {"weight_decay": 0.1},
            {"amsgrad": True, "eps": 1e-4},
            {"maximize": True, "betas": (0.8, 0.95)},
        ),
        training={"betas": (0.8, 0.9), "eps": 1e-6},
        # As XAdaBelief, with the numerators 0.9 * 0.05 + 0.1 * 0.5 = 0.095 and 0.9 * 0.02 + 0.1 * -0.25 = -0.007:
        # theta 1 - 0.095 / 0.45, then + 0.1 / 0.19 * 0.007 / 0.37103582; the displacements are XAdaBelief's
        by_hand=(
            {"eps": 0.0, "weight_decay": 0.0},
            [(0.78888889, 0.78888889 - 1 / 9), (0.79881842, 0.79881842 - 0.02837008)],
        ),
        move_ahead=along_the_moments,
    ),
    Member(
        cls=XRMSprop,
        like=torch.optim.RMSprop,
        configurations=(
            {"momentum": 0.9, "weight_decay": 0.1},
            {"centered": True, "alpha": 0.8},
            {"centered": True, "momentum": 0.5, "maximize": True},
        ),
        training={"alpha": 0.9, "eps": 1e-6, "momentum": 0.8},
        # square_avg: 0.0025, root 0.05; theta: 1 - 0.1 * 0.5 / 0.05 = 0, theta_hat: -1
        # square_avg: 0.002475 + 0.000625 = 0.0031, root 0.05567764; theta: 0 + 0.1 * 0.25 / 0.05567764 = 0.44901326
        by_hand=({"eps": 0.0}, [(0.0, -1.0), (0.44901326, 2 * 0.44901326)]),
        move_ahead=along_the_quotient,
    ),
)

MEMBERS = {member.cls: member for member in FAMILY}
CLASSES = tuple(MEMBERS)
RULES = {member.rule.name: member.rule for member in FAMILY}


def taking(*names: str) -> tuple[type[XGradOptimizer], ...]:
    """The classes whose constructors have all of these arguments."""
    return tuple(member.cls for member in FAMILY if member.takes(*names))


def keeping(key: str) -> tuple[type[XGradOptimizer], ...]:
    """The classes that have this buffer in their state."""
    return tuple(member.cls for member in FAMILY if member.has_state(key))
