"""The same training on two back ends, torch and the native one unless told, compared bit by bit after every move."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xgrad_optim.backends import cpu

REASON = cpu.unavailable()
needs_library = pytest.mark.skipif(REASON is not None, reason=f"no native library: {REASON}")


def runs(optimizer: torch.optim.Optimizer) -> list:
    """The launches of the last step, with their numbers and what ran them."""
    return optimizer._planner.last_step.runs


def launches(optimizer: torch.optim.Optimizer) -> list:
    return [run.launch for run in runs(optimizer)]


INTS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether the tensors hold the same bits; every NaN counts as the same, IEEE 754 leaves its bits open."""
    a, b = (t.detach().cpu() for t in (a, b))
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (a, b))
    if a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
        return False
    a, b = (t.nan_to_num(0.0, float("inf"), -float("inf")).contiguous().view(INTS[t.element_size()]) for t in (a, b))
    return torch.equal(a, b)


class Twins:
    """The same parameters under the same optimizer twice, once on each back end, compared after every move."""

    def __init__(
        self,
        make: Callable[..., torch.optim.Optimizer],
        tensors: list[Tensor],
        names: tuple[str, str] = ("torch", "cpu"),
        devices: tuple[str, str] = ("cpu", "cpu"),
        **options,
    ) -> None:
        self.params = {
            name: [torch.nn.Parameter(_copy(t, device)) for t in tensors]
            for name, device in zip(names, devices, strict=True)
        }
        self.optimizers = {name: make(params, backend=name, **options) for name, params in self.params.items()}

    def step(self, grads: list[Tensor | None]) -> None:
        for name, params in self.params.items():
            for param, grad in zip(params, grads, strict=True):
                param.grad = None if grad is None else _copy(grad, param.device)
            self.optimizers[name].step()
        self.check()

    def do(self, action: Callable[[torch.optim.Optimizer], object]) -> None:
        for optimizer in self.optimizers.values():
            action(optimizer)
        self.check()

    def check(self) -> None:
        first, second = self.optimizers.values()
        assert first.predicted == second.predicted
        for index, pair in enumerate(zip(*self.params.values(), strict=True)):
            assert same_bits(*pair), f"parameter {index}"
            states = [self.optimizers[name].state[param] for name, param in zip(self.params, pair, strict=True)]
            assert states[0].keys() == states[1].keys()
            for key in states[0]:
                assert same_bits(states[0][key], states[1][key]), f"{key} of parameter {index}"


def _copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy with the same strides, gaps between elements included."""
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    copy = torch.empty(max(0, reach + 1), dtype=tensor.dtype, device=device).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor.detach())


def train(twins: Twins, tensors: list[Tensor], steps: int = 4) -> None:
    """Steps with changing lr, a skipped gradient, swaps in between, and a step from evaluation mode."""
    for step in range(steps):
        grads: list[Tensor | None] = [torch.randn_like(t) * 10.0 ** (1 - step) for t in tensors]
        if step == 1:
            grads[0] = None
        twins.step(grads)
        for optimizer in twins.optimizers.values():
            optimizer.param_groups[0]["lr"] *= 0.7
        if step != 0:
            twins.do(lambda optimizer: optimizer.eval())
        if step != 1:
            twins.do(lambda optimizer: optimizer.train())
