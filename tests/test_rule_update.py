"""A rule's own update takes the gradient; predictions, and what undoes them, take the state alone."""

import dataclasses

import pytest
import torch
from cases import CASES
from training import SHAPES, clones, make_params, thetas, train
from twins import needs_library, same_bits

from xgrad_optim import XAdaPlus

WITH_UPDATE = [case for case in CASES if case.optimizer.rule.update is not None]
every_update = pytest.mark.parametrize("case", WITH_UPDATE, ids=lambda case: case.id)


def trained_by(make, steps=3):
    params = make_params(SHAPES[:-1])
    optimizer = make(params)
    train(optimizer, params, range(steps))
    return optimizer, params


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

    optimizer, params = trained_by(lambda params: Counting(params, backend="torch"), steps=1)
    assert calls == ["direction", "update"]  # one bundle of small tensors, at theta
    calls.clear()
    for _ in range(3):
        optimizer.eval()
        optimizer.train()
    assert calls == ["direction"] * 6
    calls.clear()
    train(optimizer, params, [1])
    assert calls == ["direction", "direction", "update"]  # to undo, to predict, to update


@needs_library
@every_update
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_step_undoes_by_the_state_whatever_its_gradient(case, backend):
    """A step that moves nothing returns the very theta that the last one made."""
    optimizer, params = trained_by(lambda params: case.make(params, lr=0.05, backend=backend))
    theta = thetas(optimizer, params)
    assert optimizer.predicted and not all(map(same_bits, params, theta))
    for group in optimizer.param_groups:
        group.update(lr=0.0)
    train(optimizer, params, [3])
    assert all(map(same_bits, params, theta))


@needs_library
@every_update
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_the_update_is_not_the_prediction(case, backend):
    """theta differs from one step along what is predicted of the same state."""
    optimizer, params = trained_by(lambda params: case.make(params, lr=0.05, weight_decay=0.0, backend=backend))
    optimizer.eval()
    before = clones(params)
    train(optimizer, params, [3])
    theta_hat = clones(params)
    optimizer.eval()
    moved = [was - now for was, now in zip(before, params, strict=True)]
    ahead = [now - there for now, there in zip(params, theta_hat, strict=True)]
    assert not any(torch.allclose(one, other, rtol=1e-3) for one, other in zip(moved, ahead, strict=True))
