"""XAdam and XAdamW: one rule at predicted weights; whether the weight decay is decoupled tells them apart."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from xgrad_optim.docs import ADAM_ARGS_DOC, COMMON_DOC
from xgrad_optim.numeric import Number, sqrt, square_root
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.rule import Blocks, Hyper, Options, Rule


def adam_coefficients(options: Options, step: Number) -> dict[str, Number]:
    """The columns of the whole Adam family; each of its rules lists those that it reads."""
    beta1, beta2 = options["betas"]
    return {
        "step_size": options["lr"] / (1.0 - beta1**step),
        "one_minus_beta1": 1.0 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1.0 - beta2,
        "rsqrt_bias_correction2": 1.0 / square_root(1.0 - beta2**step),
        "eps": options["eps"],
    }


def accumulate(grad: Tensor, state: Blocks, hyper: Hyper, scratch: Tensor) -> None:
    """exp_avg    <- exp_avg + (1 - beta1) * (grad - exp_avg)
    exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * grad^2"""
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.add_(torch.sub(grad, exp_avg, out=scratch).mul_(hyper.one_minus_beta1))
    grad_sq = torch.mul(grad, grad, out=scratch).mul_(hyper.one_minus_beta2)
    exp_avg_sq.mul_(hyper.beta2).add_(grad_sq)


def direction(state: Blocks, hyper: Hyper, scratch: Tensor) -> Tensor:
    """delta = exp_avg / (sqrt(exp_avg_sq / bias_correction2) + eps)"""
    denom = sqrt(state["exp_avg_sq"], out=scratch).mul_(hyper.rsqrt_bias_correction2).add_(hyper.eps)
    return torch.div(state["exp_avg"], denom, out=scratch)


ADAM = Rule(
    name="adam",
    state_keys=("exp_avg", "exp_avg_sq"),
    required_state=("step", "exp_avg", "exp_avg_sq"),
    required_options=("lr", "betas", "eps", "amsgrad"),
    accumulate_columns=("one_minus_beta1", "beta2", "one_minus_beta2"),
    direction_columns=("rsqrt_bias_correction2", "eps"),
    coefficients=adam_coefficients,
    accumulate=accumulate,
    direction=direction,
)

_UPDATE_DOC = """
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2
        delta       = exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
        step_size   = lr / (1 - beta1^t)
        theta      <- theta - step_size * delta
        theta_hat   = theta - prediction_steps * step_size * delta

    With ``amsgrad`` the running maximum of exp_avg_sq replaces it in delta."""


class XAdam(XGradOptimizer):
    __doc__ = f"""Adam whose gradients are taken at the weights that it is about to reach.

    A drop-in replacement for :class:`torch.optim.Adam`. With theta the weights and g the gradient at theta_hat::

        g          <- g + weight_decay * theta{_UPDATE_DOC}
{ADAM_ARGS_DOC.format(eps="added to the root, >= 0", weight_decay="L2 penalty, >= 0")}
{COMMON_DOC}
    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter, and
    0-dim numbers.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; Adam, arXiv 1412.6980; AMSGrad, Reddi et al. 2018.
    """

    rule = ADAM
    fixed_options: ClassVar = {"decoupled_weight_decay": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
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


class XAdamW(XAdam):
    __doc__ = f"""Adam with decoupled weight decay whose gradients are taken at the weights that it is about to reach.

    A drop-in replacement for :class:`torch.optim.AdamW`. With theta the weights and g the gradient at theta_hat::

        theta      <- theta * (1 - lr * weight_decay){_UPDATE_DOC}
    Weight decay is not part of the prediction.
{ADAM_ARGS_DOC.format(eps="added to the root, >= 0", weight_decay="decoupled weight decay, >= 0")}
{COMMON_DOC}
    State per parameter: ``exp_avg``, ``exp_avg_sq`` (and ``max_exp_avg_sq``), shaped like the parameter, and
    0-dim numbers.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; AdamW, arXiv 1711.05101, Algorithm 2; AMSGrad, Reddi et al. 2018.
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
        *,
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
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            prediction_steps=prediction_steps,
            master_weights=master_weights,
            backend=backend,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
