"""Algorithm 1 of XGrad (arXiv 2305.18240) as it is written: three passes over the weights and a cached copy of them.

It is what the fused step is compared with, built of torch's own multi-tensor operations around any base optimizer.
"""

from collections.abc import Callable

import torch

from xgrad_optim.optimizer import XGradOptimizer


class LiteralProcedure:
    """Before each step the weights come back from the copy; after it they are copied, and then moved ahead.

    One group, no amsgrad, prediction_steps 1.

    Args:
        move_ahead: `(params, states, group, step)` moves the weights along the direction of the state, as in
            tests/family.py.
    """

    def __init__(self, base: torch.optim.Optimizer, move_ahead: Callable[..., None]) -> None:
        assert not isinstance(base, XGradOptimizer) or base.param_groups[0]["prediction_steps"] == 0
        (self._group,) = base.param_groups
        self._base, self._move_ahead, self._params = base, move_ahead, self._group["params"]
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
        states = [self._base.state[param] for param in self._params]
        self._move_ahead(self._params, states, self._group, self._steps)
