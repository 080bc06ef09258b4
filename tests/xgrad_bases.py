"""The optimizers of torch that XGrad is tested around, and the two explicit copies that it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from xgrad_optim import XGrad

Make = Callable[[list], torch.optim.Optimizer]
OPTIM = torch.optim
# eps that float16 can hold; shapes are matrices where the base takes nothing else
BASES: dict[str, Make] = {
    "SGD": partial(OPTIM.SGD, lr=0.1),
    "SGD momentum": partial(OPTIM.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": partial(OPTIM.SGD, lr=0.1, momentum=0.9, foreach=True),
    "Adam": partial(OPTIM.Adam, lr=0.05, eps=1e-3, amsgrad=True),
    "Adam fused": partial(OPTIM.Adam, lr=0.05, eps=1e-3, fused=True),
    "AdamW": partial(OPTIM.AdamW, lr=0.05, eps=1e-3, weight_decay=0.1),
    "AdamW foreach": partial(OPTIM.AdamW, lr=0.05, eps=1e-3, foreach=True),
    "NAdam": partial(OPTIM.NAdam, lr=0.05, eps=1e-3),
    "RAdam": partial(OPTIM.RAdam, lr=0.05, eps=1e-3),
    "RMSprop": partial(OPTIM.RMSprop, lr=0.05, eps=1e-3, momentum=0.5),
    "Adagrad": partial(OPTIM.Adagrad, lr=0.1, eps=1e-3),
    "Adadelta": partial(OPTIM.Adadelta, lr=1.0, eps=1e-3),
    "Adamax": partial(OPTIM.Adamax, lr=0.05, eps=1e-3),
    "Adafactor": partial(OPTIM.Adafactor, lr=0.05),
    "ASGD": partial(OPTIM.ASGD, lr=0.1),
    "Rprop": partial(OPTIM.Rprop, lr=0.05),
    "Muon": partial(OPTIM.Muon, lr=0.05),
    "LBFGS": partial(OPTIM.LBFGS, lr=1.0, max_iter=1),
    "SparseAdam": partial(OPTIM.SparseAdam, lr=0.05, eps=1e-3),
}
MATRICES_ONLY = ("Muon",)


def around_adamw(params, lr: float = 0.003, prediction_steps: float = 1.0, **options) -> XGrad:
    """For who takes a class and its options: ZeroRedundancyOptimizer, the tests of clients."""
    return XGrad(torch.optim.AdamW(params, lr=lr, **options), prediction_steps)


NEEDS_CLOSURE = ("LBFGS",)
every_base = pytest.mark.parametrize("name", BASES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def shapes_for(name: str) -> list[tuple[int, ...]]:
    if name == "LBFGS":  # the sum of all gradients is a number of float16
        return [(6, 4), (7,)]
    return [(6, 4), (40, 3)] if name in MATRICES_ONLY else [(6, 4), (7,), (), (300, 70)]


def values(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def as_given(name: str, grad: Tensor) -> Tensor:
    """SparseAdam takes sparse gradients alone."""
    if name != "SparseAdam":
        return grad.clone()
    kept = torch.zeros_like(grad)
    if grad.dim():
        kept[::2] = grad[::2]
    else:
        kept.copy_(grad)
    return kept.to_sparse()


def stepper(name: str) -> Callable[[torch.optim.Optimizer], object]:
    """How to step the base: with a closure where it needs one, whose gradients have been set before."""
    if name in NEEDS_CLOSURE:
        return lambda optimizer: optimizer.step(lambda: torch.ones(()))
    return lambda optimizer: optimizer.step()


@dataclass
class TwoCopies:
    """The base around explicit copies: theta, which it steps, and theta_hat, made from the last update.

    It rounds as the contract of docs/numerics.md says, in torch's own operations.
    """

    make: Make
    start: list[Tensor]
    steps: float = 1.0

    def __post_init__(self) -> None:
        self.thetas = [torch.nn.Parameter(value.clone()) for value in self.start]
        self.base = self.make(self.thetas)
        self.shifted = [torch.zeros_like(value) for value in self.start]

    def step(self, grads: list[Tensor | None], act: Callable = lambda optimizer: optimizer.step()) -> None:
        before = [theta.detach().clone() for theta in self.thetas]
        for theta, grad in zip(self.thetas, grads, strict=True):
            theta.grad = None if grad is None else grad
        act(self.base)
        with torch.no_grad():
            for index, theta in enumerate(self.thetas):
                if grads[index] is not None:
                    self.shifted[index] = self.displacement(before[index], theta)
                theta.sub_(self.shifted[index]).add_(self.shifted[index])

    def displacement(self, before: Tensor, theta: Tensor) -> Tensor:
        """d = R(s * R(theta_old - theta)), the product in the compute type."""
        compute = torch.promote_types(theta.dtype, torch.float32)
        return ((before - theta).to(compute) * torch.tensor(self.steps, dtype=compute)).to(theta.dtype)

    def held(self, is_predicted: bool) -> list[Tensor]:
        pairs = zip(self.thetas, self.shifted, strict=True)
        return [theta.detach() - d if is_predicted else theta.detach() for theta, d in pairs]


def wrapped(make: Make, start: list[Tensor], **options: object) -> tuple[XGrad, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(value.clone()) for value in start]
    return XGrad(make(params), **options), params


def give(params: list, grads: list[Tensor | None]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()
