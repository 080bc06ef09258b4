"""XAdaM3: step sizes adapted by the second moment of the momentum, at predicted weights."""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from xgrad_optim.adam import adam_coefficients
from xgrad_optim.docs import ADAM_ARGS_DOC, COMMON_DOC, DECOUPLED_DOC
from xgrad_optim.numeric import sqrt
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Blocks, Hyper, Rule


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """exp_avg    <- exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * exp_avg^2 + eps"""
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.add_(torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1))
    momentum_sq = torch.mul(exp_avg, exp_avg, out=scratch).mul_(hyper.one_minus_beta2)
    exp_avg_sq.mul_(hyper.beta2).add_(momentum_sq).add_(hyper.eps)


def direction(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """delta = exp_avg / sqrt(exp_avg_sq / bias_correction2)"""
    denom = sqrt(state["exp_avg_sq"], out=scratch).mul_(hyper.rsqrt_bias_correction2)
    return torch.div(state["exp_avg"], denom, out=scratch)


ADAM3 = Rule(
    name="adam3",
    state_keys=("exp_avg", "exp_avg_sq"),
    required_state=("step", "exp_avg", "exp_avg_sq"),
    required_options=("rule", "lr", "betas", "eps", "amsgrad"),  # no class of torch.optim has this state
    accumulate_columns=("one_minus_beta1", "beta2", "one_minus_beta2", "eps"),
    direction_columns=("rsqrt_bias_correction2",),
    coefficients=adam_coefficients,
    accumulate=accumulate,
    direction=direction,
    positive_options=("eps",),  # it alone keeps a zero gradient from 0 / 0
)


class XAdaM3(XGradOptimizer):
    __doc__ = f"""AdaM3 whose gradients are taken at the weights that it is about to reach.

    With theta the weights and g the gradient at theta_hat::

        theta      <- theta * (1 - lr * weight_decay)       (decoupled; else g <- g + weight_decay * theta)
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * exp_avg^2 + eps
        delta       = exp_avg / sqrt(exp_avg_sq / (1 - beta2^t))
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * delta
        theta_hat   = theta - prediction_steps * step_size * delta

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in delta.
{ADAM_ARGS_DOC.format(eps="added to exp_avg_sq at every step, > 0", weight_decay="weight decay, >= 0")}
{DECOUPLED_DOC}
{COMMON_DOC}
    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter, and
    0-dim numbers. Pure float16 state can't hold the default eps: use ``master_weights=True`` there.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; AdaM3, which its authors also call AdaMomentum, arXiv 2106.11514.
    """

    rule = ADAM3

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
        prediction_steps: float = 1.0,
        master_weights: bool = False,
        backend: str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "amsgrad": amsgrad,
                "decoupled_weight_decay": decoupled_weight_decay,
                "prediction_steps": prediction_steps,
                "master_weights": master_weights,
                "backend": backend,
                "maximize": maximize,
                "foreach": foreach,
                "capturable": capturable,
                "differentiable": differentiable,
                "fused": fused,
            },
        )
