"""Copies and pickles of an attached model are at theta and carry no hook, so that nothing in them needs this library.

A hook that is a closure would swap the original's weights when the copy runs, a bound method would copy the optimizer
with the model (trap 8 of clients.md). A shallow copy shares the weights, so it must share the hooks.
"""

import copy
import io
import pickle
import pickletools
import warnings

import pytest
import torch
from attached import Normalized, Watch, X, attached, both_weights, either_mode, equal, go_on, hooks_of
from cases import small_model, train_step
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import clones

from xgrad_optim import XAdamW


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


every_copy = pytest.mark.parametrize("make_copy", [copy.deepcopy, pickled, torch_saved])


@every_copy
@either_mode
def test_a_copy_is_at_theta_and_as_if_nothing_was_ever_attached(make_copy, mode):
    model, optimizer = attached(model=Normalized())
    theta, _ = both_weights(optimizer)
    optimizer.train(mode)
    copied = make_copy(model)
    assert equal(copied.parameters(), theta)
    never = Normalized()
    assert hooks_of(copied) == hooks_of(never)
    assert [vars(module).keys() for module in copied.modules()] == [vars(module).keys() for module in never.modules()]


@every_copy
def test_a_copy_leaves_the_original_alone(make_copy):
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    copied = make_copy(model)
    optimizer.train()
    for the_copy in (copied, make_copy(copied)):
        for mode in (True, False):
            the_copy.train(mode)(X)
            the_copy.load_state_dict(the_copy.state_dict())
            assert equal(the_copy.parameters(), theta)
            assert equal(model.parameters(), theta_hat)
        assert model.training


@every_copy
def test_a_copy_can_be_attached_to_an_optimizer_of_its_own(make_copy):
    model, optimizer = attached()
    copied = make_copy(model)
    copied_optimizer = XAdamW(copied.parameters())
    copied_optimizer.load_state_dict(optimizer.state_dict())
    copied_optimizer.attach(copied)
    assert equal(go_on(copied, copied_optimizer), go_on(model, optimizer))


@every_copy
def test_a_copy_keeps_the_hooks_of_others(make_copy):
    model = small_model(torch.float32)
    model[0].register_forward_pre_hook(doubled)
    model, _ = attached(model=model)
    copied = make_copy(model.eval())
    assert torch.equal(copied(X), model(X))
    assert list(copied[0]._forward_pre_hooks.values()) == [doubled]


def doubled(module, args):
    return (2 * args[0],)


def test_a_pickle_names_nothing_of_this_library():
    """Who loads it may not have it."""
    model, _ = attached()
    names = [argument for _, argument, _ in pickletools.genops(pickle.dumps(model)) if isinstance(argument, str)]
    assert not any("xgrad" in name for name in names)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: nn.ModuleDict({"inner": model})])
def test_a_model_inside_of_another_is_copied_at_theta(wrap):
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    assert equal(copy.deepcopy(wrap(model)).parameters(), theta)


@pytest.mark.parametrize("model_first", [True, False])
@every_copy
def test_a_model_copied_together_with_its_optimizer_agrees_with_it(make_copy, model_first):
    """As a checkpoint of whole objects holds them: the copy of the optimizer says what the copied model holds."""
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    pair = make_copy((model, optimizer) if model_first else (optimizer, model))
    copied, copied_optimizer = pair if model_first else reversed(pair)
    copied_optimizer.eval()
    assert equal(copied.parameters(), theta)
    copied_optimizer.attach(copied)
    assert equal(go_on(copied, copied_optimizer), go_on(model, optimizer))


def test_a_shallow_copy_shares_weights_and_hooks():
    """Somebody looks at the model's features through a copy without the head."""
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)
    shallow = copy.copy(model)
    shallow.head = nn.Identity()
    watch = Watch(shallow)
    shallow.train()(X)
    shallow.eval()
    assert model.training and not shallow.training and not model.encoder.training, "its parts are the model's"
    shallow(X)
    assert watch.saw(theta_hat[:4], theta[:4])
    model.train()
    shallow.encoder[1].eval()
    shallow.training = True
    shallow(X).sum().backward()
    assert optimizer.predicted, "the frozen BatchNorm follows the copy that runs it"
    assert len(copy.deepcopy(shallow)._forward_pre_hooks) == 1, "the watch"


def parametrized():
    return parametrizations.weight_norm(nn.Linear(5, 3))


@pytest.mark.parametrize(
    ("make", "make_copy"),
    [
        (parametrized, copy.deepcopy),
        (lambda: nn.Sequential(parametrized()), copy.deepcopy),
        (lambda: torch.fx.symbolic_trace(small_model()), copy.deepcopy),
        (lambda: torch.fx.symbolic_trace(small_model()), pickled),
        (lambda: torch.compile(small_model(), backend="eager"), copy.deepcopy),
    ],
    ids=["parametrized", "with a parametrized part", "torch.fx", "torch.fx pickled", "compiled"],
)
def test_classes_that_copy_by_code_of_their_own(make, make_copy):
    """They copy a module's attributes one by one, hooks and all, and would mix the weights of two modes."""
    model, optimizer = attached(model=make().float())
    theta, theta_hat = both_weights(optimizer)
    copied = make_copy(model)
    assert equal(copied.parameters(), theta)
    optimizer.train()
    for mode in (False, True):
        copied.train(mode)(X)
        assert copied.training is mode
    assert equal(model.parameters(), theta_hat) and model.training


def test_attributes_copied_behind_our_back_warn():
    model, optimizer = attached()
    with pytest.warns(UserWarning, match="copy it inside `with optimizer.true_weights") as record:
        copied = copy.deepcopy(vars(model))
    assert [warning.filename for warning in record] == [__file__]
    optimizer.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(vars(model))
    assert copied["training"]


def test_a_copy_can_be_scripted():
    """torch.jit.script compiles a module's hooks, so it takes a copy of an attached model."""
    model, _ = attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that scripting is deprecated
        scripted = torch.jit.script(copy.deepcopy(model.eval()))
    assert torch.equal(scripted(X), model(X))


def test_averages_of_an_attached_model_are_of_theta():
    """Trap 9, the recipe: update inside true_weights()."""
    model, optimizer = attached(steps=0)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = None
    for step in range(4):
        train_step(model, optimizer, step)
        with optimizer.true_weights():
            averaged.update_parameters(model)
            theta = clones(model.parameters())
        expected = theta if expected is None else [e.lerp(t, 0.5) for e, t in zip(expected, theta, strict=True)]
        before = clones(model.parameters())
        averaged.eval()(X)
        averaged.train()(X)
        assert equal(model.parameters(), before)
        assert equal(averaged.parameters(), expected)


def test_an_average_that_begins_in_mid_training_begins_at_theta():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    assert equal(AveragedModel(model).module.parameters(), theta)


def test_a_copy_of_the_optimizer_is_not_attached():
    _, optimizer = attached()
    for copied in (copy.deepcopy(optimizer), pickled(optimizer)):
        assert copied.predicted
        assert copied.state_dict()["state"][0]["predicted"]
        copied.eval()
        copied.train()
    assert optimizer.predicted
    assert not optimizer.state_dict()["state"][0]["predicted"]
