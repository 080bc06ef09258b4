"""XAdam and XAdamW: one rule at predicted weights; XAdamW always decouples the weight decay."""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from xgrad_optim.numeric import power, sqrt
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Blocks, Common, Hyper, OptionalBuffer, Rule, takes_common

AMSGRAD = OptionalBuffer("amsgrad", "max_exp_avg_sq", initial="exp_avg_sq")


def adam_coefficients(options: Mapping[str, float], step: int) -> dict[str, float]:
    """The columns of the whole Adam family; each of its rules lists those that it reads."""
    beta1, beta2 = options["beta1"], options["beta2"]
    return {
        "step_size": options["lr"] / (1.0 - power(beta1, step)),
        "one_minus_beta1": 1.0 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1.0 - beta2,
        "rsqrt_bias_correction2": 1.0 / math.sqrt(1.0 - power(beta2, step)),
        "eps": options["eps"],
    }


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """exp_avg    <- exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2"""
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.add_(torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1))
    grad_sq = torch.mul(grad, grad, out=scratch).mul_(hyper.one_minus_beta2)
    exp_avg_sq.mul_(hyper.beta2).add_(grad_sq)
    keep_largest(state)


def keep_largest(state: Blocks) -> None:
    """max_exp_avg_sq <- max(max_exp_avg_sq, exp_avg_sq), with amsgrad"""
    if AMSGRAD.key in state:
        torch.maximum(state[AMSGRAD.key], state["exp_avg_sq"], out=state[AMSGRAD.key])


def second_moment(state: Blocks) -> Tensor:
    """exp_avg_sq; with amsgrad its running maximum stands in for it."""
    return state[AMSGRAD.key if AMSGRAD.key in state else "exp_avg_sq"]


def denominator(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """sqrt(exp_avg_sq / bias_correction2) + eps"""
    return sqrt(second_moment(state), out=scratch).mul_(hyper.rsqrt_bias_correction2).add_(hyper.eps)


def direction(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """delta = exp_avg / (sqrt(exp_avg_sq / bias_correction2) + eps)"""
    return torch.div(state["exp_avg"], denominator(state, hyper, scratch), out=scratch)


ADAM = Rule(
    name="adam",
    state_keys=("exp_avg", "exp_avg_sq"),
    required_state=("step", "exp_avg", "exp_avg_sq"),
    required_options=("lr", "betas", "eps", "amsgrad"),
    options=("lr", "beta1", "beta2", "eps"),
    accumulate_columns=("one_minus_beta1", "beta2", "one_minus_beta2"),
    direction_columns=("rsqrt_bias_correction2", "eps"),
    coefficients=adam_coefficients,
    accumulate=accumulate,
    direction=direction,
    optional=AMSGRAD,
)


@takes_common
class XAdam(XGradOptimizer):
    """Adam whose gradients are taken at the weights that it is about to reach.

    A drop-in replacement for :class:`torch.optim.Adam`. With theta the weights and g the gradient at theta_hat::

        g          <- g + weight_decay * theta      (decoupled: theta <- theta * (1 - lr * weight_decay))
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2
        delta       = exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * delta
        theta_hat   = theta - prediction_steps * step_size * delta

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in delta.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; Adam, arXiv 1412.6980; AMSGrad, Reddi et al. 2018.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        betas (pair of floats): decay rates of exp_avg and exp_avg_sq, each in [0, 1).
        eps (float): added to the root, >= 0.
        weight_decay (float): L2 penalty, >= 0.
        amsgrad (bool): use the running maximum of exp_avg_sq.
        decoupled_weight_decay (bool): decay the weights as AdamW does; False adds an L2 penalty to the gradient.
    """

    rule = ADAM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**options, "decoupled_weight_decay": decoupled_weight_decay}, **common)


@takes_common
class XAdamW(XAdam):
    """Adam with decoupled weight decay whose gradients are taken at the weights that it is about to reach.

    A drop-in replacement for :class:`torch.optim.AdamW`. With theta the weights and g the gradient at theta_hat::

        theta      <- theta * (1 - lr * weight_decay)
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2
        delta       = exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * delta
        theta_hat   = theta - prediction_steps * step_size * delta

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in delta.
    Weight decay is not part of the prediction.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; AdamW, arXiv 1711.05101, Algorithm 2; AMSGrad, Reddi et al. 2018.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        betas (pair of floats): decay rates of exp_avg and exp_avg_sq, each in [0, 1).
        eps (float): added to the root, >= 0.
        weight_decay (float): decoupled weight decay, >= 0.
        amsgrad (bool): use the running maximum of exp_avg_sq.
    """

    fixed_options: ClassVar = {"decoupled_weight_decay": True}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        # As an argument too, so that one in `common` is a TypeError.
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **common)


class AdamVariant(XGradOptimizer):
    """The constructor of XAdaBelief and XAdaM3, whose eps is added to exp_avg_sq: Adam's arguments, other defaults."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = True,
        **common: Unpack[Common],
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**options, "decoupled_weight_decay": decoupled_weight_decay}, **common)
