"""An interrupt at any line of ours leaves XGrad's parameters at the theta of one step, and its base in line with it."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from interrupts import is_interrupted, visits
from twins import same_bits
from xgrad_bases import BASES, give, values

import xgrad_optim
from xgrad_optim import XAdamW, XGrad

PACKAGE = str(Path(xgrad_optim.__file__).resolve().parent)
SHAPES = [(40, 3), (5,), (), (0,)]
MAKERS = {"adamw": BASES["AdamW"], "ours": partial(XAdamW, lr=0.05)}


def is_ours(code):
    return code.co_filename.startswith(PACKAGE)


class Training:
    """Parameters of two dtypes in two groups; one has no gradient in the step that is interrupted."""

    def __init__(self, make, n_steps=2):
        start = [value.to(torch.bfloat16) if i % 2 else value for i, value in enumerate(values(SHAPES, torch.float32))]
        self.params = [torch.nn.Parameter(value) for value in start]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.01}]
        self.optimizer = XGrad(make(groups), 2.0)
        for step in range(n_steps):
            self.feed(step)
            self.optimizer.step()
        self.saved = copy.deepcopy(self.optimizer.state_dict())
        self.feed(7)
        if n_steps:
            self.params[0].grad = None

    def feed(self, seed):
        grads = values(SHAPES, torch.float32, seed + 1)
        give(self.params, [grad.to(param.dtype) for grad, param in zip(grads, self.params, strict=True)])

    def theta(self):
        self.optimizer.eval()
        return [param.detach().clone() for param in self.params]

    def go_on(self):
        """theta_hat and theta after two more steps, and what the groups say."""
        for seed in (8, 9):
            self.feed(seed)
            self.optimizer.step()
        theta_hat = [param.detach().clone() for param in self.params]
        steps = [torch.tensor(float(group["prediction_steps"])) for group in self.optimizer.param_groups]
        return theta_hat + self.theta() + steps


ACTIONS = {
    "step": lambda training: training.optimizer.step(),
    "eval": lambda training: training.optimizer.eval(),
    "state_dict": lambda training: training.optimizer.state_dict(),
    "load_state_dict": lambda training: training.optimizer.load_state_dict(training.saved),
}


def same(tensors, others):
    return all(map(same_bits, tensors, others))


def check(make, act, every):
    before, after = make(), make()
    act(after)
    thetas = [before.theta(), after.theta()]
    later = [before.go_on(), after.go_on()]
    found = set()
    for at in visits(partial(act, make()), is_ours, every):
        training = make()
        if not is_interrupted(at, partial(act, training), is_ours):
            break
        matching = [index for index in range(2) if same(training.theta(), thetas[index])]
        assert matching, f"interrupted at line {at}"
        rest = training.go_on()
        assert any(same(rest, later[index]) for index in matching), f"interrupted at line {at}"
        found |= set(matching)
    assert found == {0, 1}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("base", MAKERS)
def test_an_interrupt_leaves_whole_steps(base, action, every_interrupt):
    check(lambda: Training(MAKERS[base]), ACTIONS[action], every_interrupt)


@pytest.mark.parametrize("base", MAKERS)
def test_an_interrupt_of_the_first_step(base, every_interrupt):
    check(lambda: Training(MAKERS[base], n_steps=0), ACTIONS["step"], every_interrupt)
