"""What raises in a hook, in a forward or in attach() leaves no hook behind, no mark of a running module and no lock.

Every line of the hooks is made to raise once, as Ctrl-C or a signal can: the weights are then those of one mode, and
what comes next is as if it had not happened.
"""

import copy
import sys
import threading
from functools import partial
from itertools import count

import pytest
import torch
from attached import Normalized, Watch, X, attached, both_weights, equal, hooks_of, set_mode
from cases import small_model, train_step
from interrupts import Interrupt, in_modules, is_interrupted
from torch import nn
from training import clones

from xgrad_optim import XSGDM, XAdamW

HOOKS = ("hooks", "attach", "covers", "exchange", "recorders")


def is_free(lock):
    """Whether another thread could take it."""
    result = []

    def take():
        if lock.acquire(timeout=10):
            lock.release()
            result.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(result)


def assert_sound(model, optimizer, theta, theta_hat):
    """Whole weights now, and the right ones in every forward from here on."""
    assert is_free(optimizer._exchange.lock)
    assert equal(model.parameters(), theta_hat if optimizer.predicted else theta)
    watch = Watch(model[0], model[2])
    for mode, weights in ((False, theta), (True, theta_hat), (False, theta)):
        set_mode(model, mode)
        model(X)
        model[2](torch.ones(1, 7))
        assert watch.saw(weights[:2], weights[2:], weights[2:])


def under_a_device(act):
    with torch.device("cpu"):
        act()


ACTS = {
    "training forward": (False, lambda model, optimizer: model.train()(X)),
    "evaluation forward": (True, lambda model, optimizer: (set_mode(model, False), model(X))),
    "eval": (True, lambda model, optimizer: model.eval()),
    "state_dict": (True, lambda model, optimizer: model.state_dict()),
    "load_state_dict": (False, lambda model, optimizer: model.load_state_dict(model.state_dict())),
    "attach again": (True, lambda model, optimizer: optimizer.attach(model)),
    "copy": (True, lambda model, optimizer: copy.deepcopy(model)),
    "inside a transform": (True, lambda model, optimizer: (set_mode(model, False), torch.func.vmap(model)(X))),
    "under a mode": (True, lambda model, optimizer: under_a_device(optimizer.eval)),
}


@pytest.mark.parametrize(("predicted", "act"), ACTS.values(), ids=ACTS.keys())
def test_an_interrupt_in_any_line_of_the_hooks(predicted, act):
    for n in count():
        model, optimizer = attached()
        theta, theta_hat = both_weights(optimizer)
        model(X)
        optimizer.train(predicted)
        if not is_interrupted(n, partial(act, model, optimizer), in_modules(*HOOKS)):
            break
        assert torch._C._len_torch_function_stack() == 0
        assert_sound(model, optimizer, theta, theta_hat)


@pytest.mark.parametrize("has_rival", [False, True])
def test_an_attach_that_fails_leaves_no_hook(has_rival):
    """At whatever line. Of an old optimizer some may be left that do nothing, where they were just being removed."""
    for n in count():
        model = nn.Linear(5, 3)
        before, names = hooks_of(model), [vars(module).keys() for module in model.modules()]
        theta, old = clones(model.parameters()), XSGDM(model.parameters(), lr=0.01)
        if has_rival:
            handle = old.attach(model)
            train_step(model, old, 0)
            theta, _ = both_weights(old)
        new = XAdamW(model.parameters())
        if not is_interrupted(n, partial(new.attach, model), in_modules("hooks", "attach", "covers", "exchange")):
            break
        owners = {hook.__self__.optimizer for hook in model._forward_pre_hooks.values()}
        assert owners <= {old, None} and not new._exchange.attachments
        if has_rival:
            old.eval()
            handle.remove()
        assert equal(model.parameters(), theta)
        assert hooks_of(model) == before and [vars(module).keys() for module in model.modules()] == names


def test_an_optimizer_that_fails_to_leave_theta_keeps_its_model(monkeypatch):
    model, old = attached()
    before = hooks_of(model)
    new = XSGDM(model.parameters())
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(old, "eval", lambda: 1 / 0)
        new.attach(model)
    assert hooks_of(model) == before
    train_step(model, old, 3)
    new.attach(model)


def test_a_handle_whose_removal_was_interrupted_is_removed_again():
    for n in count():
        model = Normalized()
        before = hooks_of(model)
        handle = XAdamW(model.parameters()).attach(model)
        if not is_interrupted(n, handle.remove, in_modules("hooks", "covers")):
            break
        handle.remove()
        assert hooks_of(model) == before


# -- a forward that raises -------------------------------------------------------------------------------------------


def test_a_training_forward_that_was_interrupted_does_not_speak_for_a_part():
    """A module's hooks are not called for an interrupt: nobody would take back a mark of the running one."""
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)

    def interrupt(module, args):
        raise Interrupt

    for mode, weights in ((True, theta), (False, theta_hat)):
        set_mode(model, mode)
        handle = model.head.register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupt):
            model(X)
        handle.remove()
        watch = Watch(model.encoder[0])
        set_mode(model.encoder, not mode)
        model.encoder(X)
        assert watch.saw(weights[:2])


def test_a_traceback_that_is_kept_keeps_no_forward_running():
    """Notebooks keep the last one, and with it the frames of the forward."""
    model, optimizer = attached(model=Normalized())
    theta, _ = both_weights(optimizer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as kept:
        model(X.T)
    watch = Watch(model.encoder[0])
    set_mode(model.encoder, False)
    model.encoder(X)
    assert watch.saw(theta[:2]) and kept.tb is not None


@pytest.mark.filterwarnings("ignore")  # torch's own
@pytest.mark.skipif(not hasattr(torch._dynamo.config, "nested_graph_breaks"), reason="this torch has no such breaks")
def test_an_interrupted_compiled_forward_does_not_speak_for_a_part():
    """Where dynamo breaks a graph inside of an inlined forward, what it noted of the running one stands by then."""

    @torch.compiler.disable
    def interrupt():
        noted.append(optimizer._exchange.traced)
        raise Interrupt

    class Interrupted(Normalized):
        def forward(self, x):
            hidden = self.encoder(x)
            interrupt()
            return self.head(hidden)

    noted = []
    model, optimizer = attached(model=Normalized())
    model.__class__ = Interrupted
    theta, _ = both_weights(optimizer)
    compiled, part = torch.compile(model, backend="eager"), torch.compile(model.encoder, backend="eager")
    with torch._dynamo.config.patch(nested_graph_breaks=True), pytest.raises(Interrupt):
        compiled(X)
    assert noted == [id(model)]
    optimizer.eval()
    optimizer.train()
    set_mode(model.encoder, False)
    part(X)
    assert equal(model.parameters(), theta)
    torch._dynamo.reset()


def test_an_error_of_a_swap_reaches_the_forward_and_the_next_one_tries_again(monkeypatch):
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    set_mode(model, False)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(optimizer._planner, "swap", lambda *_: 1 / 0)
        model(X)
    assert equal(model.parameters(), theta_hat) and is_free(optimizer._exchange.lock)
    model(X)
    assert equal(model.parameters(), theta)


def test_a_block_of_true_weights_that_was_interrupted_pins_nothing():
    """At any line of its entry and its exit."""
    names, file = {"true_weights", "_open", "_close", "alone"}, sys.modules["xgrad_optim.modes"].__file__

    def act(optimizer):
        with optimizer.true_weights():
            pass

    for n in count():
        model, optimizer = attached()
        _, theta_hat = both_weights(optimizer)
        is_ours = lambda code: code.co_name in names and code.co_filename == file  # noqa: E731
        if not is_interrupted(n, partial(act, optimizer), is_ours):
            break
        assert not optimizer._exchange.pins
        model(X)
        assert equal(model.parameters(), theta_hat) and optimizer.predicted


def test_an_error_in_a_nested_model_swaps_nothing_else():
    model = nn.ModuleDict({"a": small_model(torch.float32), "b": small_model(torch.float32, 1)})
    optimizer = XAdamW(model.parameters(), lr=0.01)
    optimizer.attach(model)
    (model["a"](X) + model["b"](X)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model["a"](X.T)
    assert optimizer.predicted
    model["b"].eval()(X)
    assert not optimizer.predicted
