"""XRMSprop: gradients divided by a running average of their size, at predicted weights."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from xgrad_optim.numeric import sqrt
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Blocks, Common, Hyper, OptionalBuffer, Rule, takes_common


def coefficients(options: Mapping[str, float], step: int) -> dict[str, float]:
    """The columns of RMSprop."""
    return {
        "step_size": options["lr"],
        "momentum": options["momentum"] if options["momentum"] > 0 else 0.0,  # as torch.optim.RMSprop takes it
        "alpha": options["alpha"],
        "one_minus_alpha": 1.0 - options["alpha"],
        "eps": options["eps"],
    }


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """square_avg      <- alpha * square_avg + (1 - alpha) * grad^2
    grad_avg        <- grad_avg + (1 - alpha) * (grad - grad_avg)                     (centered)
    variance         = square_avg, centered max(square_avg - grad_avg^2, 0)
    momentum_buffer <- momentum * momentum_buffer + grad / (sqrt(variance) + eps)"""
    momentum_buffer, square_avg = state["momentum_buffer"], state["square_avg"]
    grad_sq = torch.mul(grad, grad, out=scratch).mul_(hyper.one_minus_alpha)
    variance = square_avg.mul_(hyper.alpha).add_(grad_sq)
    if "grad_avg" in state:
        grad_avg = state["grad_avg"]
        grad_avg.add_(torch.sub(grad, grad_avg, out=scratch).mul_(hyper.one_minus_alpha))
        variance = torch.sub(square_avg, torch.mul(grad_avg, grad_avg, out=scratch), out=scratch).clamp_(min=0)
    denom = sqrt(variance, out=scratch).add_(hyper.eps)
    quotient = torch.div(grad, denom, out=scratch)
    if hyper.momentum:
        momentum_buffer.mul_(hyper.momentum).add_(quotient)
    else:
        momentum_buffer.copy_(quotient)


def direction(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """delta = momentum_buffer"""
    return state["momentum_buffer"]


RMSPROP = Rule(
    name="rmsprop",
    state_keys=("momentum_buffer", "square_avg"),
    required_state=("step", "square_avg"),
    required_options=("lr", "alpha", "eps", "momentum", "centered"),
    options=("lr", "alpha", "eps", "momentum"),
    accumulate_columns=("momentum", "alpha", "one_minus_alpha", "eps"),
    direction_columns=(),
    coefficients=coefficients,
    accumulate=accumulate,
    direction=direction,
    optional=OptionalBuffer("centered", "grad_avg"),
)


@takes_common
class XRMSprop(XGradOptimizer):
    """RMSprop whose gradients are taken at the weights that it is about to reach.

    A drop-in replacement for :class:`torch.optim.RMSprop`. With theta the weights and g the gradient at theta_hat::

        g               <- g + weight_decay * theta
        square_avg      <- alpha * square_avg + (1 - alpha) * g^2
        momentum_buffer <- momentum * momentum_buffer + g / (sqrt(square_avg) + eps)
        theta           <- theta - lr * momentum_buffer
        theta_hat        = theta - prediction_steps * lr * momentum_buffer

    With ``centered`` the variance stands under the root::

        grad_avg        <- alpha * grad_avg + (1 - alpha) * g
        variance         = max(square_avg - grad_avg^2, 0)

    torch.optim's variance may get a little below 0, by rounding, and its root is then NaN.

    State per parameter: ``momentum_buffer``, ``square_avg`` (and ``grad_avg``), shaped like the parameter. With
    ``momentum=0`` the momentum_buffer is the last quotient; torch.optim keeps none there, and a prediction needs it.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; RMSprop, Tieleman and Hinton 2012; centered, Graves, arXiv 1308.0850.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        alpha (float): decay rate of square_avg and grad_avg, >= 0.
        eps (float): added to the root, >= 0.
        weight_decay (float): L2 penalty, >= 0.
        momentum (float): >= 0.
        centered (bool): divide by the root of the variance, not of the second moment.
    """

    rule = RMSPROP

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**options, "centered": centered}, **common)
