"""The configurations of tests/family.py that every test of behaviour runs over, and a small training."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from family import CLASSES, FAMILY, MEMBERS, Member
from reference import Reference

from xgrad_optim.optimizer import XGradOptimizer


@dataclass(frozen=True)
class Case:
    """One optimizer in one configuration, with what to compare it to."""

    optimizer: type[XGradOptimizer]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def member(self) -> Member:
        return MEMBERS[self.optimizer]

    @property
    def rule(self) -> str:
        return self.optimizer.rule.name

    @property
    def id(self) -> str:
        text = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.optimizer.__name__}({text})"

    def takes(self, *names: str) -> bool:
        return self.member.takes(*names)

    def make(self, params, **more: Any) -> XGradOptimizer:
        return self.optimizer(params, **{**self.options, **more})

    def reference(self, thetas, rounding: dict[str, Any] | None = None, **more: Any) -> Reference:
        """The literal optimizer with the same options, the class's defaults included."""
        group = self.make([torch.zeros(1)], **more).param_groups[0]
        decoupled = group.get("decoupled_weight_decay", False)
        return Reference(self.rule, thetas, dict(group), decoupled, **(rounding or {}))


CASES = [Case(member.cls, options) for member in FAMILY for options in ({}, *member.configurations)]
PLAIN = [Case(member.cls) for member in FAMILY]

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
every_optimizer = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)


def small_model(dtype: torch.dtype = torch.float64, seed: int = 0, hidden: int = 7) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 3)).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.5)
    return model


def loss_of(model: torch.nn.Module, step: int, share: slice = slice(None)) -> torch.Tensor:
    """A loss that depends on the weights and on the step's own batch, or a share of it."""
    generator = torch.Generator().manual_seed(1000 + step)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)
    return ((model(x[share]) - y[share]) ** 2).mean()


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, share: slice = slice(None)) -> None:
    optimizer.zero_grad()
    loss_of(model, step, share).backward()
    optimizer.step()
