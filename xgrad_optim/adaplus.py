"""XAdaPlus: AdaBelief's step sizes and Nesterov's momentum on AdamW's basis, at predicted weights."""

from dataclasses import replace

import torch
from torch import Tensor

from xgrad_optim.adabelief import ADABELIEF
from xgrad_optim.adam import XAdamW, denominator
from xgrad_optim.rule import Blocks, Hyper, takes_common


def update(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor, other: Tensor) -> Tensor:
    """delta = (exp_avg + (1 - beta1) * (grad - exp_avg)) / (sqrt(exp_avg_sq / bias_correction2) + eps)"""
    exp_avg = state["exp_avg"]
    ahead = torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1).add_(exp_avg)
    return torch.div(ahead, denominator(state, hyper, other), out=scratch)


ADAPLUS = replace(ADABELIEF, name="adaplus", update=update)


@takes_common
class XAdaPlus(XAdamW):
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
