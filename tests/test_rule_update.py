"""A rule's own update takes the gradient; predictions, and what undoes them, take the state alone."""

import dataclasses

import pytest
import torch
from cases import CASES
from twins import needs_library, same_bits

from xgrad_optim import XAdaPlus

WITH_UPDATE = [case for case in CASES if case.optimizer.rule.update is not None]
every_update = pytest.mark.parametrize("case", WITH_UPDATE, ids=lambda case: case.id)


def trained(make, n_steps=3):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((40, 3), (5,), ())]
    optimizer = make(params)
    for _ in range(n_steps):
        feed(params, generator)
        optimizer.step()
    return optimizer, params


def feed(params, generator):
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def test_undoing_never_calls_it():
    calls = []

    def update(*args):
        calls.append("update")
        return rule.update(*args)

    def direction(*args):
        calls.append("direction")
        return rule.direction(*args)

    rule = XAdaPlus.rule

    class Counting(XAdaPlus):
        rule = dataclasses.replace(XAdaPlus.rule, update=update, direction=direction)

    optimizer, params = trained(lambda params: Counting(params, backend="torch"), n_steps=1)
    assert calls == ["direction", "update"]  # one bundle of small tensors, at theta
    calls.clear()
    for _ in range(3):
        optimizer.eval()
        optimizer.train()
    assert calls == ["direction"] * 6
    calls.clear()
    feed(params, torch.Generator().manual_seed(1))
    optimizer.step()
    assert calls == ["direction", "direction", "update"]  # to undo, to predict, to update


@needs_library
@every_update
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_step_undoes_by_the_state_whatever_its_gradient(case, backend):
    """A step that moves nothing returns the very theta that the last one made."""
    optimizer, params = trained(lambda params: case.make(params, lr=0.05, backend=backend))
    with optimizer.true_weights():
        theta = [param.detach().clone() for param in params]
    assert optimizer.predicted and not all(map(same_bits, params, theta))
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    feed(params, torch.Generator().manual_seed(2))
    optimizer.step()
    assert all(map(same_bits, params, theta))


@needs_library
@every_update
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_update_is_not_the_prediction(case, backend):
    """theta differs from one step along what is predicted of the same state."""
    optimizer, params = trained(lambda params: case.make(params, lr=0.05, weight_decay=0.0, backend=backend))
    optimizer.eval()
    before = [param.detach().clone() for param in params]
    feed(params, torch.Generator().manual_seed(3))
    optimizer.step()
    theta_hat = [param.detach().clone() for param in params]
    optimizer.eval()
    moved = [was - now for was, now in zip(before, params, strict=True)]
    ahead = [now - there for now, there in zip(params, theta_hat, strict=True)]
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in zip(moved, ahead, strict=True))
