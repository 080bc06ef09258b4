"""XAdaBelief: step sizes adapted by the belief in the gradient, at predicted weights."""

import torch
from torch import Tensor

from xgrad_optim.adam import AMSGRAD, AdamVariant, adam_coefficients, direction, keep_largest
from xgrad_optim.rule import Blocks, Hyper, Rule, takes_common


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """exp_avg    <- exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * (grad - exp_avg)^2 + eps"""
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.add_(torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1))
    surprise = torch.sub(grad, exp_avg, out=scratch)
    surprise_sq = torch.mul(surprise, surprise, out=scratch).mul_(hyper.one_minus_beta2)
    exp_avg_sq.mul_(hyper.beta2).add_(surprise_sq).add_(hyper.eps)
    keep_largest(state)


ADABELIEF = Rule(
    name="adabelief",
    state_keys=("exp_avg", "exp_avg_sq"),
    required_state=("step", "exp_avg", "exp_avg_sq"),
    required_options=("rule", "lr", "betas", "eps", "amsgrad"),  # no class of torch.optim has this state
    options=("lr", "beta1", "beta2", "eps"),
    accumulate_columns=("one_minus_beta1", "beta2", "one_minus_beta2"),
    direction_columns=("rsqrt_bias_correction2", "eps"),
    coefficients=adam_coefficients,
    accumulate=accumulate,
    direction=direction,
    optional=AMSGRAD,
    stored_options=("eps",),
)


@takes_common
class XAdaBelief(AdamVariant):
    """AdaBelief whose gradients are taken at the weights that it is about to reach.

    With theta the weights and g the gradient at theta_hat::

        theta      <- theta * (1 - lr * weight_decay)       (decoupled; else g <- g + weight_decay * theta)
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * (g - exp_avg)^2 + eps
        delta       = exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * delta
        theta_hat   = theta - prediction_steps * step_size * delta

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in delta. No rectification.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter. Pure float16
    state can't hold the default eps: use ``master_weights=True`` there.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; AdaBelief, arXiv 2010.07468, Algorithm 2.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        betas (pair of floats): decay rates of exp_avg and exp_avg_sq, each in [0, 1).
        eps (float): added to exp_avg_sq at every step and to its root, >= 0.
        weight_decay (float): weight decay, >= 0.
        amsgrad (bool): use the running maximum of exp_avg_sq.
        decoupled_weight_decay (bool): decay the weights as AdamW does; False adds an L2 penalty to the gradient.
    """

    rule = ADABELIEF
