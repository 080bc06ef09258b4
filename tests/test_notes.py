"""A warning names the line of the user's that it is about, whatever of torch and of this library lies between."""

import contextlib
import warnings

import pytest
import torch
from attached import X, attached, set_mode
from cases import loss_of, small_model, train_step
from torch import nn
from twins import needs_library

from xgrad_optim import XAdamW, backends, notes
from xgrad_optim.backends import addresses, cpu


def lines_of(act):
    """Where the warnings of an action point to, in lines from the one that calls it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    assert caught and {warning.filename for warning in caught} == {__file__}
    return [warning.lineno - act.__code__.co_firstlineno for warning in caught]


def written_to():
    """A model whose parameters somebody has clipped while they held theta_hat."""
    model, optimizer = attached()
    with torch.no_grad():
        model[0].weight.clamp_(-0.01, 0.01)
    loss_of(model, 3).backward()
    return model, optimizer


def step(model, optimizer):
    optimizer.step()


def step_of_fewer(model, optimizer):
    """Planned anew, since a gradient is missing."""
    model[0].bias.grad = None
    optimizer.step()


def step_of_a_schedule(model, optimizer):
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    schedule.step()


def step_of_a_scaler(model, optimizer):
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


def evaluate(model, optimizer):
    set_mode(model, False)
    with torch.no_grad():
        model(X)


def go_to_evaluation(model, optimizer):
    nn.Sequential(model).eval()


def save(model, optimizer):
    model.state_dict()


def true_weights(model, optimizer):
    with optimizer.true_weights():
        pass


def true_weights_by_a_stack(model, optimizer):
    with contextlib.ExitStack() as stack:
        stack.enter_context(optimizer.true_weights())


@pytest.mark.parametrize(
    ("act", "line"),
    [
        (step, 1),
        (step_of_fewer, 3),
        (step_of_a_schedule, 2),
        (step_of_a_scaler, 1),
        (evaluate, 3),
        (go_to_evaluation, 1),
        (save, 1),
        (true_weights, 1),
        (true_weights_by_a_stack, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_write_to_predicted_weights(act, line):
    model, optimizer = written_to()

    def call():
        act(model, optimizer)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    first = act.__code__.co_firstlineno
    assert [(warning.filename, warning.lineno - first) for warning in caught] == [(__file__, line)]


def test_weights_of_another_moment():
    model, optimizer = small_model(torch.float32), None
    optimizer = XAdamW(model.parameters())
    for i in range(2):
        train_step(model, optimizer, i)
    saved = optimizer.state_dict()
    other = XAdamW(small_model(torch.float32, seed=1).parameters())

    def act():
        other.load_state_dict(saved)
        other.eval()

    assert lines_of(act) == [2]


def test_parameters_that_were_replaced():
    model, optimizer = small_model(torch.float32), None
    optimizer = XAdamW(model.parameters())
    train_step(model, optimizer, 0)
    optimizer.param_groups[0]["params"] = list(small_model(torch.float32).parameters())
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)

    def act():
        optimizer.step()

    assert lines_of(act) == [1]


def test_weights_that_are_loaded_after_their_optimizer():
    model, optimizer = attached()
    optimizer.train()
    saved = torch.optim.Optimizer.state_dict(optimizer)
    weights = {name: value.clone() for name, value in model.named_parameters()}
    other, other_optimizer = attached(steps=0)
    other_optimizer.load_state_dict(saved)

    def act():
        other.load_state_dict(weights)

    assert 1 in lines_of(act)


def test_a_back_end_that_is_missing(monkeypatch):
    backends._note.cache_clear()
    monkeypatch.setattr(cpu, "unavailable", lambda: "it is a test")
    params = [nn.Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)

    def act():
        XAdamW(params).step()

    if backends.NAMES == ("torch",):
        pytest.skip("there is no other one")
    assert lines_of(act) == [1]
    backends._note.cache_clear()


def test_each_line_is_shown_by_the_filter_that_shows_each_once():
    def act():
        for _ in range(2):
            _, optimizer = written_to()
            optimizer.eval()
            optimizer.train()
        _, optimizer = written_to()
        optimizer.eval()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        act()
    first = act.__code__.co_firstlineno
    assert [warning.lineno - first for warning in caught] == [3, 6]


def test_a_warning_of_nobody_else_s_code_names_the_outermost_line():
    """A thread that runs a method of the optimizer has no frame of the user's."""
    scope = {"__name__": "xgrad_optim.somewhere", "warn": notes.warn}
    with pytest.warns(UserWarning, match="a message") as caught:
        exec(compile("warn('a message')", "somewhere.py", "exec"), scope)
    assert caught[0].filename == __file__, "here there is one"


# -- errors ----------------------------------------------------------------------------------------------------------


class Unreadable(torch.Tensor):
    """A parameter whose reading fails."""

    is_readable = True

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.stride and not cls.is_readable:
            raise RuntimeError("the disk is gone")
        return super().__torch_function__(func, types, args, kwargs or {})


@needs_library
@pytest.mark.filterwarnings("ignore:xgrad_optim reads tensors in Python:UserWarning")  # said once in a process
def test_an_error_while_tensors_are_read_is_not_hidden(monkeypatch):
    """It was reported as tensors that another thread replaces."""
    monkeypatch.setattr(addresses, "unavailable", lambda: "Python is to read them")
    param = nn.Parameter(torch.ones(3).as_subclass(Unreadable))
    optimizer = XAdamW([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    monkeypatch.setattr(Unreadable, "is_readable", False)
    before = param.detach().clone()
    for act in (optimizer.step, optimizer.eval):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            act()
    monkeypatch.undo()
    assert torch.equal(param, before) and optimizer.predicted
    optimizer.step()
