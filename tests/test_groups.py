"""decay_groups: weight decay for matrices alone, every parameter once, with its name, for any optimizer."""

import pytest
import torch
from torch import nn

from xgrad_optim import XAdamW, XGrad, decay_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4), nn.LayerNorm([4, 3]))
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight


def test_matrices_decay_and_vectors_do_not():
    first, second = decay_groups(Model(), 0.1)
    names = [[name for name, _ in group["params"]] for group in (first, second)]
    assert names[0] == ["embedding.weight", "body.0.weight"]
    assert names[1] == [
        "scale",
        "body.0.bias",
        "body.1.weight",
        "body.1.bias",
        "body.2.weight",
        "body.2.bias",
        "head.bias",
    ]
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("make", [torch.optim.AdamW, XAdamW, lambda groups: XGrad(torch.optim.SGD(groups, lr=0.1))])
def test_optimizers_take_them(make):
    model = Model()
    optimizer = make(decay_groups(model, 0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    names = [name for group in optimizer.state_dict()["param_groups"] for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


def test_a_group_that_would_be_empty_is_left_out():
    assert [group["weight_decay"] for group in decay_groups(nn.Linear(2, 2, bias=False), 0.1)] == [0.1]
    XAdamW(decay_groups(nn.Linear(2, 2, bias=False), 0.1))
