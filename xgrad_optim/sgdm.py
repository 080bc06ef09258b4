"""XSGDM: stochastic gradient descent with momentum, at predicted weights."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Blocks, Common, Hyper, Rule, takes_common


def coefficients(options: Mapping[str, float], step: int) -> dict[str, float]:
    """The columns of SGD with momentum."""
    return {
        "step_size": options["lr"],
        "momentum": options["momentum"] if step > 1 else 0.0,  # the first step has no buffer yet
        "one_minus_dampening": 1.0 - options["dampening"],
    }


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """momentum_buffer <- momentum * momentum_buffer + (1 - dampening) * grad"""
    momentum_buffer = state["momentum_buffer"]
    if not hyper.momentum:  # plain SGD, which knows no dampening
        momentum_buffer.copy_(grad)
        return
    if hyper.one_minus_dampening.item() != 1:
        grad = torch.mul(grad, hyper.one_minus_dampening, out=scratch)
    momentum_buffer.mul_(hyper.momentum).add_(grad)


def direction(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """delta = momentum_buffer"""
    return state["momentum_buffer"]


SGDM = Rule(
    name="sgdm",
    state_keys=("momentum_buffer",),
    required_state=("momentum_buffer",),
    required_options=("lr", "momentum", "dampening"),
    options=("lr", "momentum", "dampening"),
    accumulate_columns=("momentum", "one_minus_dampening"),
    direction_columns=(),
    coefficients=coefficients,
    accumulate=accumulate,
    direction=direction,
    signed_options=("dampening",),
)


@takes_common
class XSGDM(XGradOptimizer):
    """SGD with momentum whose gradients are taken at the weights that it is about to reach.

    A drop-in replacement for :class:`torch.optim.SGD`. With theta the weights and g the gradient at theta_hat::

        g               <- g + weight_decay * theta
        momentum_buffer <- momentum * momentum_buffer + (1 - dampening) * g      (first step: g)
        theta           <- theta - lr * momentum_buffer
        theta_hat        = theta - prediction_steps * lr * momentum_buffer

    ``prediction_steps=momentum`` is Nesterov momentum as the model sees it; larger values are Overshoot
    (arXiv 2501.09556).

    State per parameter: ``momentum_buffer``, shaped like the parameter.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; Sutskever et al. 2013 for the momentum.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        momentum (float): >= 0.
        dampening (float): any finite number.
        weight_decay (float): L2 penalty, >= 0.
        nesterov (bool): must be False; use ``prediction_steps=momentum``.
    """

    rule = SGDM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**options, "nesterov": nesterov}, **common)
