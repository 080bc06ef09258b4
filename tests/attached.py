"""What the tests of `attach` share: trained models with their optimizer attached, and a watch on what forwards see."""

import pytest
import torch
from cases import small_model, train_step
from torch import nn
from training import clones

from xgrad_optim import XAdamW

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(7))
either_mode = pytest.mark.parametrize("mode", [True, False], ids=["predicted", "true"])


def equal(tensors, others):
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


def both_weights(optimizer):
    """Copies of theta and of theta_hat; the optimizer holds theta_hat afterwards."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.eval()
    theta = clones(params)
    optimizer.train()
    assert not equal(theta, params)
    return theta, clones(params)


class Watch:
    """What the parameters of a module held whenever its forward ran."""

    def __init__(self, *modules):
        self.seen = []
        for module in modules:
            module.register_forward_pre_hook(lambda module, _: self.seen.append(clones(module.parameters())))

    def saw(self, *expected):
        seen, self.seen = self.seen, []
        return len(seen) == len(expected) and all(map(equal, seen, expected))


def attached(make=XAdamW, model=None, steps=3, partial=False, **options):
    """A trained model and its optimizer, attached."""
    model = small_model(torch.float32) if model is None else model
    optimizer = make(model.parameters(), **{"lr": 0.01, "prediction_steps": 2.0} | options)
    optimizer.attach(model, partial)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def set_mode(model, mode):
    """The mode without a call of train() or eval(), as Lightning puts it back after an evaluation."""
    for module in model.modules():
        module.training = mode


def go_on(model, optimizer):
    """A few steps more; the weights of the next forward."""
    for step in range(10, 14):
        model.train()
        train_step(model, optimizer, step)
    model(X)
    return clones(model.parameters())


class Normalized(nn.Module):
    """An encoder with a BatchNorm, and a head; like a LightningModule it is trained without a call of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh())
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, x):
        return self.head(self.encoder(x)).square().mean()


def hooks_of(model):
    """Every table of hooks of every module."""
    return [
        {name: dict(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}
        for module in model.modules()
    ]
