"""What several of these tests run over."""

import torch
from torch import Tensor

MODES = {"default": {}, "fused": {"fused": True}, "capturable": {"capturable": True}}
"""Where an optimizer's numbers live, and who may read them."""


class Net(torch.nn.Module):
    """A forward that gives what it saw."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.params = torch.nn.ParameterList(params)

    def forward(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.params]
