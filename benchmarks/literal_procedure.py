"""Algorithm 1 of XGrad (arXiv 2305.18240) as it is written: three passes over the weights and a cached copy of them.

It is what the fused step is compared with, built of torch's own multi-tensor operations around any base optimizer.
"""

import math

import torch

from xgrad_optim.optimizer import XGradOptimizer


class LiteralProcedure:
    """Before each step the weights come back from the copy; after it they are copied, and then moved ahead.

    One group, no amsgrad, prediction_steps 1.
    """

    def __init__(self, base: torch.optim.Optimizer) -> None:
        assert not isinstance(base, XGradOptimizer) or base.param_groups[0]["prediction_steps"] == 0
        (self._group,) = base.param_groups
        self._base, self._params = base, self._group["params"]
        self._cached: list[torch.Tensor] = []
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:
        if self._cached:
            torch._foreach_copy_(self._params, self._cached)
        self._base.step()
        self._steps += 1
        if self._cached:
            torch._foreach_copy_(self._cached, self._params)
        else:
            self._cached = [param.clone() for param in self._params]
        self._predict()

    def _predict(self) -> None:
        states = [self._base.state[param] for param in self._params]
        lr, is_sgd = self._group["lr"], "momentum_buffer" in states[0]
        if is_sgd:
            torch._foreach_add_(self._params, [state["momentum_buffer"] for state in states], alpha=-lr)
            return
        beta1, beta2 = self._group["betas"]
        denominators = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_mul_(denominators, 1 / math.sqrt(1 - beta2**self._steps))
        if self._group.get("rule") != "adam3":
            torch._foreach_add_(denominators, self._group["eps"])
        moments = [state["exp_avg"] for state in states]
        torch._foreach_addcdiv_(self._params, moments, denominators, value=-lr / (1 - beta1**self._steps))
