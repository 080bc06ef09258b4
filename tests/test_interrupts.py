"""An interrupt at any line of the library leaves whole steps: all parameters at the theta of one step, numbers in line.

Ctrl-C, a signal's handler, an error in the midst of the work. A tracing function raises at the n-th line that the
library runs, at the first and the last visit of each line (--every-interrupt: at all of them); then theta is compared
bit for bit, and training goes on as if nothing had been.
"""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import PLAIN
from interrupts import is_interrupted, visits
from twins import needs_library, same_bits

import xgrad_optim
from xgrad_optim import XAdamW

PACKAGE = str(Path(xgrad_optim.__file__).resolve().parent)


def is_ours(code) -> bool:
    return code.co_filename.startswith(PACKAGE)


SHAPES = ((40, 3), (5,), (), (0,), (7, 2))


class Training:
    """Parameters of two dtypes in three groups. One has no gradient in some steps, of one nothing is predicted."""

    def __init__(self, case, **options) -> None:
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(shape, generator=generator) for shape in SHAPES]
        self.params = [torch.nn.Parameter(v.to(torch.bfloat16) if i % 2 else v) for i, v in enumerate(values)]
        groups = [{"params": self.params[:2]}, {"params": self.params[2:4], "lr": 0.01}]
        groups.append({"params": self.params[4:], "prediction_steps": 0.0})
        self.optimizer = case.make(groups, lr=0.05, **options)
        for step in range(2):
            self.feed(step)
            self.optimizer.step()

    def feed(self, step: int) -> None:
        generator = torch.Generator().manual_seed(step + 1)
        for param in self.params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if step % 3 == 2:
            self.params[0].grad = None

    def theta(self) -> list[torch.Tensor]:
        self.optimizer.eval()
        assert not self.optimizer.predicted
        return [param.detach().clone() for param in self.params]

    def go_on(self) -> list[torch.Tensor]:
        """theta after two more steps, the numbers of the state, and theta_hat."""
        for step in (7, 8):
            self.feed(step)
            self.optimizer.step()
        theta_hat = [param.detach().clone() for param in self.params]
        numbers = [self.optimizer.state[param]["step"].clone() for param in self.params]
        return theta_hat + self.theta() + numbers


ACTIONS = {
    "step": lambda training: training.optimizer.step(),
    "eval": lambda training: training.optimizer.eval(),
    "train": lambda training: training.optimizer.train(),
    "state_dict": lambda training: training.optimizer.state_dict(),
    "load_state_dict": lambda training: training.optimizer.load_state_dict(training.saved),
}


def prepared(case, action: str, options) -> Training:
    training = Training(case, **options)
    if action == "train":
        training.optimizer.eval()
    if action == "load_state_dict":
        training.saved = copy.deepcopy(training.optimizer.state_dict())
    training.feed(2)
    return training


def same(tensors, others) -> bool:
    return all(map(same_bits, tensors, others))


def check(make, act, every: bool) -> None:
    """Interrupt the action at its lines in turn: theta and what follows is that of before, or of after."""
    before, after = make(), make()
    act(after)
    theta = [before.theta(), after.theta()]
    later = [before.go_on(), after.go_on()]
    found = set()
    for at in visits(partial(act, make()), is_ours, every):
        training = make()
        if not is_interrupted(at, partial(act, training), is_ours):
            break  # a `with` line that ends is counted once only
        matching = [index for index in range(2) if same(training.theta(), theta[index])]
        assert matching, f"interrupted at line {at}"
        rest = training.go_on()
        assert any(same(rest, later[index]) for index in matching), f"interrupted at line {at}"
        found |= set(matching)
    assert found == {0, 1}


@needs_library
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize(
    ("case", "backend", "master_weights"),
    [(PLAIN[0], "torch", False), (PLAIN[2], "cpu", True)],
    ids=["sgdm-torch", "adamw-cpu-master"],
)
def test_an_interrupt_leaves_whole_steps(case, backend, master_weights, action, every_interrupt):
    options = {"backend": backend, "master_weights": master_weights}
    check(lambda: prepared(case, action, options), ACTIONS[action], every_interrupt)


@needs_library
@pytest.mark.parametrize("action", ["step", "eval"])
def test_an_interrupt_while_a_copy_takes_over_its_state(action, every_interrupt):
    """A copy remembers nothing, so that its first step or swap looks at all and makes its own numbers."""
    options = {"backend": "torch", "master_weights": False}
    check(lambda: copy.deepcopy(prepared(PLAIN[2], action, options)), ACTIONS[action], every_interrupt)


class FirstStep(Training):
    """No state yet."""

    def __init__(self, backend: str) -> None:
        self.params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 300)]
        self.optimizer = XAdamW(self.params, backend=backend)
        self.feed(0)


@needs_library
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_interrupt_of_the_first_step_leaves_no_state_or_all(backend, every_interrupt):
    check(lambda: FirstStep(backend), ACTIONS["step"], every_interrupt)


class Switched(Training):
    """Master weights were switched off after the last step."""

    def __init__(self, backend: str) -> None:
        super().__init__(PLAIN[2], backend=backend, master_weights=True)
        for group in self.optimizer.param_groups:
            group["master_weights"] = False
        self.feed(2)

    def theta(self) -> list[torch.Tensor]:
        masters = [self.optimizer.state[param].get("master_weights", param) for param in self.params]
        return super().theta() + [master.detach().clone() for master in masters]


@needs_library
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_an_interrupt_of_a_step_that_follows_a_switch(backend, every_interrupt):
    check(lambda: Switched(backend), ACTIONS["step"], every_interrupt)


def test_a_switch_after_a_skipped_step_and_an_interrupt_finds_no_state_to_follow():
    """The skipped step was to make the state; nothing of it is left, and nothing is taken for it."""
    training = FirstStep("torch")
    optimizer, group = training.optimizer, training.optimizer.param_groups[0]
    optimizer.found_inf = torch.ones(())
    was_interrupted, at = True, 0
    while was_interrupted:
        optimizer.step()
        group["amsgrad"] = not group["amsgrad"]
        was_interrupted = is_interrupted(at, optimizer.step, is_ours)
        assert not optimizer.state
        at += 1
    del optimizer.found_inf
    optimizer.step()
    assert all(("max_exp_avg_sq" in state) == group["amsgrad"] for state in optimizer.state.values())
