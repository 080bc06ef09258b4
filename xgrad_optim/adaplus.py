"""XAdaPlus: AdaBelief's step sizes and Nesterov's momentum on AdamW's basis, at predicted weights."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from xgrad_optim.adabelief import accumulate
from xgrad_optim.adam import AMSGRAD, adam_coefficients, direction, second_moment
from xgrad_optim.numeric import sqrt
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Blocks, Common, Hyper, Rule, takes_common


def update(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor, other: Tensor) -> Tensor:
    """delta = (exp_avg + (1 - beta1) * (grad - exp_avg)) / (sqrt(exp_avg_sq / bias_correction2) + eps)"""
    exp_avg = state["exp_avg"]
    denom = sqrt(second_moment(state), out=other).mul_(hyper.rsqrt_bias_correction2).add_(hyper.eps)
    ahead = torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1)
    return torch.div(ahead.add_(exp_avg), denom, out=scratch)


ADAPLUS = Rule(
    name="adaplus",
    state_keys=("exp_avg", "exp_avg_sq"),
    required_state=("step", "exp_avg", "exp_avg_sq"),
    required_options=("rule", "lr", "betas", "eps", "amsgrad"),  # no class of torch.optim has this state
    options=("lr", "beta1", "beta2", "eps"),
    accumulate_columns=("one_minus_beta1", "beta2", "one_minus_beta2"),
    direction_columns=("rsqrt_bias_correction2", "eps"),
    coefficients=adam_coefficients,
    accumulate=accumulate,
    direction=direction,
    update=update,
    optional=AMSGRAD,
    stored_options=("eps",),
)


@takes_common
class XAdaPlus(XGradOptimizer):
    """AdaPlus whose gradients are taken at the weights that it is about to reach.

    With theta the weights and g the gradient at theta_hat::

        theta      <- theta * (1 - lr * weight_decay)
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * (g - exp_avg)^2 + eps
        denom       = sqrt(exp_avg_sq / (1 - beta2^t)) + eps
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * (beta1 * exp_avg + (1 - beta1) * g) / denom
        theta_hat   = theta - prediction_steps * step_size * exp_avg / denom

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in denom. ``prediction_steps=0`` is AdaPlus itself,
    whose update has a Nesterov numerator; the prediction knows no gradient yet, and moves by the momentum alone.
    Weight decay is not part of the prediction.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter. eps is added
    to exp_avg_sq at every step and to its root, as in the paper. Pure float16 state can't hold the default eps: use
    ``master_weights=True`` there.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; AdaPlus, arXiv 2309.01966.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        betas (pair of floats): decay rates of exp_avg and exp_avg_sq, each in [0, 1).
        eps (float): added to exp_avg_sq at every step and to its root, >= 0.
        weight_decay (float): decoupled weight decay, >= 0.
        amsgrad (bool): use the running maximum of exp_avg_sq.
    """

    rule = ADAPLUS
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
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, {**options, "decoupled_weight_decay": True}, **common)
