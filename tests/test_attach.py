"""A forward of an attached model sees theta_hat in training mode and theta in evaluation mode, however it is called.

A hook on the outer module alone misses `module.training_step`; a hook that asks each module swaps in the middle of a
forward with a frozen BatchNorm; one that counts is off for good after a forward that raised. Names say which trap of
clients.md a test is about.
"""

import pytest
import torch
from attached import Normalized, Watch, X, attached, both_weights, equal
from cases import every_optimizer, loss_of, small_model, train_step
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint
from training import clones, either_precision

from xgrad_optim import XAdamW

# -- which weights a forward sees ------------------------------------------------------------------------------------


@every_optimizer
@either_precision
def test_the_mode_of_the_model_decides(case, master_weights):
    model, optimizer = attached(case.optimizer, master_weights=master_weights)
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    for mode, weights in ((True, theta_hat), (False, theta), (False, theta), (True, theta_hat), (False, theta)):
        model.train(mode)
        model(X)
        assert watch.saw(weights)
        assert optimizer.predicted is mode


@every_optimizer
@either_precision
def test_evaluating_and_saving_changes_no_bit_of_training(case, master_weights):
    twin = small_model(torch.float32)
    twin_optimizer = case.make(twin.parameters(), lr=0.01, master_weights=master_weights)
    model, optimizer = attached(case.optimizer, steps=0, master_weights=master_weights, prediction_steps=1.0)
    for step in range(6):
        train_step(twin, twin_optimizer, step)
        train_step(model, optimizer, step)
        if step % 2:
            model.state_dict()
            optimizer.state_dict()
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
        if step % 3 == 0:
            model(X)
    model(X)
    assert equal(model.parameters(), twin.parameters())


def test_no_grad_forwards_in_training_mode_see_the_predicted_weights():
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    optimizer.eval()
    watch = Watch(model)
    with torch.no_grad():
        model(X)
    with torch.inference_mode():
        model(X)
    assert watch.saw(theta_hat, theta_hat)


def test_a_steady_forward_asks_nobody(monkeypatch):
    model, optimizer = attached()
    model(X)
    for name in ("_put", "_predict", "train", "eval", "step"):
        monkeypatch.setattr(optimizer, name, lambda *args: pytest.fail("a steady forward called the optimizer"))
    for _ in range(3):
        model(X)
        model[0](X)


def test_the_closure_of_a_step_runs_at_the_predicted_weights():
    """Trap 11: Lightning's forward and backward are inside the closure."""
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    optimizer.eval()
    watch = Watch(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 3)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert watch.saw(theta_hat)
    assert optimizer.predicted


def test_a_model_in_evaluation_mode_trains_and_evaluates_at_the_true_weights():
    model, optimizer = attached()
    model.eval()
    for step in range(3, 6):
        train_step(model, optimizer, step)
        assert optimizer.predicted
        theta_hat = clones(model.parameters())
        model(X)
        assert not optimizer.predicted
        assert not equal(model.parameters(), theta_hat)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_at_the_same_weights(use_reentrant):
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    optimizer.eval()
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    assert watch.saw(theta_hat, theta_hat)


def test_autocast_does_not_reuse_the_cast_of_the_other_weights():
    """Autocast keeps the bfloat16 copies of parameters until its block ends."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    expected = {}
    for weights in (theta, theta_hat):
        copy = small_model(torch.float32)
        with torch.no_grad():
            for param, value in zip(copy.parameters(), weights, strict=True):
                param.copy_(value)
        with torch.autocast("cpu", torch.bfloat16):
            expected[weights is theta_hat] = copy(X)
    assert not torch.equal(expected[True], expected[False])
    with torch.autocast("cpu", torch.bfloat16):
        for mode in (True, False, True):
            assert torch.equal(model.train(mode)(X), expected[mode])


# -- trap 7: submodules, and modules of another mode inside ----------------------------------------------------------


def test_a_call_of_any_submodule_is_covered():
    model = Normalized()
    optimizer = XAdamW(model.parameters(), lr=0.01)
    optimizer.attach(model)
    for _ in range(3):
        optimizer.zero_grad()
        model.training_step(X).backward()
        optimizer.step()
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model.encoder[0])
    for mode, weights in ((False, theta), (True, theta_hat)):
        for call in (lambda: model.training_step(X), lambda: model.encoder[0](X)):
            optimizer.train(not mode)
            model.train(mode)
            call()
            assert watch.saw(weights[:2])


@pytest.mark.parametrize("outer", [True, False], ids=["frozen BatchNorm", "BatchNorm left in training mode"])
def test_the_outermost_running_module_decides(outer):
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)
    optimizer.train(not outer)
    model.train(outer)
    model.encoder[1].train(not outer)
    watch = Watch(model.encoder[0], model.encoder[1], model.head)
    loss = model(X).sum()
    expected = theta_hat if outer else theta
    assert watch.saw(expected[:2], expected[2:4], expected[4:])
    loss.backward()


def test_a_teacher_in_evaluation_mode_beside_the_model_swaps_nothing():
    """It has no parameter of the optimizer, so its mode is none of its business."""
    model = nn.ModuleDict({"student": small_model(torch.float32), "teacher": small_model(torch.float32, seed=1)})
    model["teacher"].requires_grad_(False)
    optimizer = XAdamW(model["student"].parameters())
    optimizer.attach(model)
    for _ in range(3):
        model["teacher"].eval()
        optimizer.zero_grad()
        student = model["student"](X)
        (student - model["teacher"](X)).square().mean().backward()
        optimizer.step()
    assert optimizer.predicted


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_trace(error):
    """always_call hooks see to a ValueError; nobody calls them for a KeyboardInterrupt."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)

    def interrupt(module, args):
        raise error

    for mode, weights in ((True, theta), (False, theta_hat)):
        optimizer.train(mode)
        model.train(mode)
        handle = model[2].register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(X)
        handle.remove()
        watch = Watch(model[0])
        model.train(not mode)
        model(X)
        assert watch.saw(weights[:2])


def test_a_forward_that_raises_does_not_speak_for_the_next_module():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X.T)
    watch = Watch(model[0])
    model.eval()[0](X)
    assert watch.saw(theta[:2])


def test_the_hook_comes_ahead_of_those_that_were_there():
    """FSDP's all-gather is a pre-hook that was prepended."""
    model = small_model(torch.float32)
    optimizer = XAdamW(model.parameters())
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(optimizer.predicted), prepend=True)
    optimizer.attach(model)
    train_step(model, optimizer, 0)
    model.eval()(X)
    model.train()(X)
    assert seen == [False, False, True]


# -- trap 13: autograd -----------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("disturb", ["evaluate", "save", "save the optimizer"])
def test_a_swap_between_forward_and_backward_raises(case, disturb):
    model, optimizer = attached(case.optimizer)
    loss = loss_of(model, 3)
    if disturb == "evaluate":
        model.eval()(X)
    elif disturb == "save":
        model.state_dict()
    else:
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- true_weights() pins ---------------------------------------------------------------------------------------------


def test_true_weights_pins_forwards_in_training_mode():
    """update_bn puts the model into training mode to collect statistics."""
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model.head)
    with optimizer.true_weights():
        update_bn([X, X], model)
        with optimizer.true_weights():
            model.train()(X)
        model(X)
        assert watch.saw(*[theta[4:]] * 4)
    assert optimizer.predicted
    model(X)
    assert watch.saw(theta_hat[4:])


def test_true_weights_that_fail_release_the_pin():
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    with pytest.raises(KeyError), optimizer.true_weights():
        raise KeyError
    optimizer.eval()
    watch = Watch(model)
    model(X)
    assert watch.saw(theta_hat)
