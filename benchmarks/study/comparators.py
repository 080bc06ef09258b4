"""Optimizers of other papers that the study compares with, written plainly from their formulas."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class QHM(Optimizer):
    """Quasi-hyperbolic momentum (arXiv 1810.06801, equations 3 and 4).

    Each step::

        m     <- beta * m + (1 - beta) * g
        theta <- theta - lr * ((1 - nu) * g + nu * m)
    """

    def __init__(self, params: Iterable[Tensor], lr: float, beta: float = 0.999, nu: float = 0.7) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "nu": nu})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
                momentum.lerp_(param.grad, 1 - group["beta"])
                param.sub_(torch.lerp(param.grad, momentum, group["nu"]), alpha=group["lr"])


class QHAdam(Optimizer):
    """QHAdam (arXiv 1810.06801, section 4) with nu2 = 1 and AdamW's decoupled weight decay.

    Each step::

        m     <- beta1 * m + (1 - beta1) * g         m' = m / (1 - beta1^t)
        v     <- beta2 * v + (1 - beta2) * g^2       v' = v / (1 - beta2^t)
        theta <- theta * (1 - lr * weight_decay) - lr * ((1 - nu) * g + nu * m') / (sqrt(v') + eps)
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.995, 0.999),
        nu: float = 0.7,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "nu": nu, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state.update(step=0, m=torch.zeros_like(param), v=torch.zeros_like(param))
                state["step"] += 1
                state["m"].lerp_(param.grad, 1 - beta1)
                state["v"].lerp_(param.grad.square(), 1 - beta2)
                mean = state["m"] / (1 - beta1 ** state["step"])
                root = (state["v"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(torch.lerp(param.grad, mean, group["nu"]), root, value=-group["lr"])


class Around(Optimizer):
    """An optimizer that moves the weights of another one, `base`, before or after its steps."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})
        self.param_groups = base.param_groups  # a schedule of ours is the base's

    def params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]


class EMANesterov(Around):
    """EMA-Nesterov (arXiv 2605.25395): the base's step, gradient included, is taken from theta + ahead * m::

        theta' <- base step from theta + ahead * m
        m      <- gamma * m + (1 - gamma) * (theta' - theta)

    Between steps the parameters hold theta + ahead * m; `true_weights()` puts theta into them.
    """

    def __init__(self, base: Optimizer, gamma: float = 0.99, ahead: float = 0.3) -> None:
        super().__init__(base)
        self.gamma, self.ahead = gamma, ahead
        self.theta = [param.detach().clone() for param in self.params()]
        self.mean = [torch.zeros_like(param) for param in self.params()]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.base.step()
        for param, theta, mean in zip(self.params(), self.theta, self.mean, strict=True):
            mean.lerp_(param - theta, 1 - self.gamma)
            theta.copy_(param)
            param.add_(mean, alpha=self.ahead)

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        held = [param.detach().clone() for param in self.params()]
        self._put(self.theta)
        yield
        self._put(held)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        for param, value in zip(self.params(), values, strict=True):
            param.copy_(value)


class Lookahead(Around):
    """Lookahead (arXiv 1907.08610): every `k` steps slow <- slow + alpha * (theta - slow), theta <- slow."""

    def __init__(self, base: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        super().__init__(base)
        self.k, self.alpha, self.count = k, alpha, 0
        self.slow = [param.detach().clone() for param in self.params()]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        self.base.step()
        self.count += 1
        if self.count % self.k == 0:
            for param, slow in zip(self.params(), self.slow, strict=True):
                param.copy_(slow.lerp_(param, self.alpha))
