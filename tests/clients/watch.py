"""Which weights a client's forwards run at, and which its files hold."""

import copy

import pytest
import torch
from family import MEMBERS
from torch import nn
from xgrad_bases import around_adamw

from xgrad_optim import XSGDM, XAdamW, XAdaPlus, XRMSprop
from xgrad_optim.modes import PredictingOptimizer

NATIVE = [XSGDM, XAdamW, XAdaPlus, XRMSprop]
every_native = pytest.mark.parametrize("cls", NATIVE, ids=lambda cls: cls.__name__)
every_kind = pytest.mark.parametrize("cls", [*NATIVE, around_adamw], ids=lambda cls: cls.__name__)
"""One of each shape: one buffer and two, an update of its own, a buffer that the base need not have, the wrapper."""


def lr_of(cls) -> float:
    return MEMBERS[cls].lr if cls in MEMBERS else 0.003


def clones(params) -> list[torch.Tensor]:
    return [param.detach().clone() for param in params]


def equal(tensors, others) -> bool:
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


def weights_in_mode(optimizer: PredictingOptimizer, predicted: bool) -> list[torch.Tensor]:
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

    def __init__(self, module: nn.Module, optimizer: PredictingOptimizer) -> None:
        self.counts = {True: 0, False: 0}
        self.wrong = 0
        self._optimizer = optimizer
        module.register_forward_pre_hook(self._look)

    def _look(self, module: nn.Module, args: object) -> None:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        self.counts[module.training] += 1
        self.wrong += not equal(params, weights_in_mode(self._optimizer, module.training))
