"""XAdaM3: step sizes adapted by the second moment of the momentum, at predicted weights."""

import torch
from torch import Tensor

from xgrad_optim.adam import AMSGRAD, AdamVariant, adam_coefficients, keep_largest, second_moment
from xgrad_optim.numeric import sqrt
from xgrad_optim.rule import Blocks, Hyper, Rule, takes_common


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """exp_avg    <- exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * exp_avg^2 + eps"""
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.add_(torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1))
    momentum_sq = torch.mul(exp_avg, exp_avg, out=scratch).mul_(hyper.one_minus_beta2)
    exp_avg_sq.mul_(hyper.beta2).add_(momentum_sq).add_(hyper.eps)
    keep_largest(state)


def direction(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """delta = exp_avg / sqrt(exp_avg_sq / bias_correction2), and 0 where exp_avg is 0"""
    exp_avg = state["exp_avg"]
    denom = sqrt(second_moment(state), out=scratch).mul_(hyper.rsqrt_bias_correction2)
    denom.masked_fill_(exp_avg == 0, 1.0)  # zero momentum stays zero, over a second moment of zero too
    return torch.div(exp_avg, denom, out=scratch)


ADAM3 = Rule(
    name="adam3",
    state_keys=("exp_avg", "exp_avg_sq"),
    required_state=("step", "exp_avg", "exp_avg_sq"),
    required_options=("rule", "lr", "betas", "eps", "amsgrad"),  # no class of torch.optim has this state
    options=("lr", "beta1", "beta2", "eps"),
    accumulate_columns=("one_minus_beta1", "beta2", "one_minus_beta2", "eps"),
    direction_columns=("rsqrt_bias_correction2",),
    coefficients=adam_coefficients,
    accumulate=accumulate,
    direction=direction,
    optional=AMSGRAD,
    positive_options=("eps",),  # without it a momentum whose square is 0 would be divided by 0
    stored_options=("eps",),
)


@takes_common
class XAdaM3(AdamVariant):
    """AdaM3 whose gradients are taken at the weights that it is about to reach.

    With theta the weights and g the gradient at theta_hat::

        theta      <- theta * (1 - lr * weight_decay)       (decoupled; else g <- g + weight_decay * theta)
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * exp_avg^2 + eps
        delta       = exp_avg / sqrt(exp_avg_sq / (1 - beta2^t))       (0 where exp_avg is 0)
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * delta
        theta_hat   = theta - prediction_steps * step_size * delta

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in delta.

    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter. Pure float16
    state can't hold the default eps: use ``master_weights=True`` there.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; AdaM3, which its authors also call AdaMomentum, arXiv 2106.11514.

    Args:
        params: parameters, named parameters or param groups, as every torch optimizer takes them.
        lr (float or 1-element Tensor): learning rate, >= 0.
        betas (pair of floats): decay rates of exp_avg and exp_avg_sq, each in [0, 1).
        eps (float): added to exp_avg_sq at every step, > 0.
        weight_decay (float): weight decay, >= 0.
        amsgrad (bool): use the running maximum of exp_avg_sq.
        decoupled_weight_decay (bool): decay the weights as AdamW does; False adds an L2 penalty to the gradient.
    """

    rule = ADAM3
