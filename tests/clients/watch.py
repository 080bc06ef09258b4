"""Which weights a client's forwards run at, and which its files hold."""

import copy

import torch
from torch import nn

from xgrad_optim.optimizer import XGradOptimizer


def clones(params) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


def equal(tensors, others) -> bool:
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


def weights_in_mode(optimizer: XGradOptimizer, predicted: bool) -> list[torch.Tensor]:
    """theta_hat or theta, made in a copy."""
    copied = copy.deepcopy(optimizer)
    params = [param for group in copied.param_groups for param in group["params"]]
    for param in params:
        param.requires_grad_(True)  # forwards leave the prediction of what is frozen as it is, `train()` does not
    copied.train(predicted)
    return [param.detach() for param in params]


class Watch:
    """Counts the forwards of a module by mode, and the ones that find other weights in place than their mode asks for.

    The module may be a part of what is attached: the model's mode is that of its parts.
    """

    def __init__(self, module: nn.Module, optimizer: XGradOptimizer) -> None:
        self.counts = {True: 0, False: 0}
        self.wrong = 0
        self._optimizer = optimizer
        module.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, args: object) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        self.counts[module.training] += 1
        self.wrong += not equal(params, weights_in_mode(self._optimizer, module.training))
