"""Parameters that are not the predicted weights which a loaded state says they are get noticed.

Training would go on from weights that are off by a displacement, without an error. A round trip through theta tells: it
returns the bits of the right weights only (but theta itself, one step ahead, is consistent: the theta before predicted
just that; hence two steps here). A false alarm would be as bad, so the right pairs are silent in every mode, order and
precision, and true weights may be anything.
"""

import copy
import math
import warnings

import pytest
import torch
from attached import equal
from cases import every_optimizer
from training import clones, either_precision
from wrappers import either_wrapper

from xgrad_optim import XAdamW

either_mode = pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
DTYPES = [torch.float32, torch.bfloat16, torch.complex128]
USES = {
    "step": lambda optimizer: optimizer.step(),
    "swap": lambda optimizer: optimizer.train(not optimizer.predicted),
}


def random(shape, dtype, seed):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def new_model(dtype=torch.float32, seed=0):
    return torch.nn.ParameterList([random(shape, dtype, seed + index) for index, shape in enumerate(((60, 90), (70,)))])


def train(model, optimizer, steps):
    for step in steps:
        for index, param in enumerate(model):
            param.grad = random(param.shape, param.dtype, 100 + 2 * step + index)
        optimizer.step()


def saved_run(case, model_mode, optimizer_mode, dtype=torch.float32, master_weights=False):
    """The two files, each saved in a mode of its own."""
    model = new_model(dtype)
    optimizer = case.make(model.parameters(), lr=0.01, prediction_steps=2.0, master_weights=master_weights)
    train(model, optimizer, range(4))
    optimizer.train(model_mode)
    model_file = copy.deepcopy(model.state_dict())
    optimizer.train(optimizer_mode)
    return model_file, copy.deepcopy(optimizer.state_dict())


def load(case, model_file, optimizer_file, loads_model_first=True, **options):
    model = new_model(next(iter(model_file.values())).dtype, seed=9)
    optimizer = case.make(model.parameters(), **options)
    loads = [lambda: model.load_state_dict(model_file), lambda: optimizer.load_state_dict(optimizer_file)]
    for one in loads if loads_model_first else reversed(loads):
        one()
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return model, optimizer


@every_optimizer
@either_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_true_weights_under_a_state_that_calls_them_predicted_warn_once(case, master_weights, dtype, use):
    files = saved_run(case, False, True, dtype, master_weights)
    _, optimizer = load(case, *files)
    with pytest.warns(UserWarning, match="do not hold the predicted weights") as record:
        USES[use](optimizer)
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    assert len(record) == 1


@every_optimizer
@either_precision
@either_mode
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loads_model_first", [True, False], ids=["model first", "optimizer first"])
@pytest.mark.parametrize("use", USES)
def test_a_pair_that_agrees_is_silent(case, master_weights, predicted, dtype, loads_model_first, use):
    files = saved_run(case, predicted, predicted, dtype, master_weights)
    _, optimizer = load(case, *files, loads_model_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        USES[use](optimizer)


@every_optimizer
def test_an_optimizer_without_its_model_warns(case):
    _, optimizer_file = saved_run(case, True, True)
    _, optimizer = load(case, new_model(seed=9).state_dict(), optimizer_file)
    with pytest.warns(UserWarning, match="of another mode or moment"):
        optimizer.step()


@every_optimizer
@either_precision
def test_looking_changes_nothing(case, master_weights):
    files = saved_run(case, False, True, torch.float32, master_weights)
    (model, optimizer), (twin, twin_optimizer) = load(case, *files), load(case, *files)
    twin_optimizer._exchange.is_loaded = False
    with pytest.warns(UserWarning, match="another mode"):
        optimizer._check_loaded()
    assert equal(model.parameters(), twin.parameters())
    optimizer.step()
    twin_optimizer.step()
    assert equal(model.parameters(), twin.parameters())
    for state, twin_state in zip(optimizer.state.values(), twin_optimizer.state.values(), strict=True):
        assert equal(state.values(), twin_state.values())


@either_wrapper
def test_a_wrapper_of_our_class_looks_as_well(wrap):
    """And is not touched itself: the class that it has made for itself would be given hooks of its own."""
    model = new_model()
    optimizer = XAdamW(model.parameters(), lr=0.01, prediction_steps=2.0)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.eval()
    wrapper = wrap(optimizer)
    step_of_wrapper = type(wrapper).step
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match="do not hold the predicted weights"):
        wrapper.eval()
    assert type(wrapper).step is step_of_wrapper


@every_optimizer
@either_precision
def test_true_weights_may_have_been_changed(case, master_weights):
    """A model that was loaded or clipped in evaluation mode, and saved as it then was."""
    model_file, optimizer_file = saved_run(case, False, False, torch.float32, master_weights)
    model, optimizer = load(case, {name: value.clamp(-0.5, 0.5) for name, value in model_file.items()}, optimizer_file)
    optimizer.train()
    train(model, optimizer, [4])


@pytest.mark.parametrize("foreign", [{}, {"note": "of somebody else"}], ids=["plain", "foreign key"])
def test_a_checkpoint_without_predictions_is_silent(foreign):
    """torch.optim's: there is only one kind of weights."""
    model = new_model()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, base, [0])
    saved = base.state_dict()
    saved["state"][0] |= foreign
    optimizer = XAdamW(model.parameters())
    optimizer.load_state_dict(saved)
    before = clones(model.parameters())
    optimizer.train()
    assert equal(model.parameters(), before)
    train(model, optimizer, [1])


def test_a_state_that_was_only_reloaded_is_silent():
    """accelerate.prepare() does it, with whatever the parameters hold."""
    model = new_model()
    optimizer = XAdamW(model.parameters(), lr=0.01)
    for step in range(4):
        train(model, optimizer, [step])
        optimizer.train(step % 2 == 0)
        optimizer.load_state_dict(optimizer.state_dict())


@every_optimizer
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_have_overflowed_are_silent(case, value):
    """A run that has diverged is told by its loss; its files do agree."""
    model = new_model()
    optimizer = case.make(model.parameters(), lr=0.01)
    train(model, optimizer, [0])
    model[0].grad[0] = value
    optimizer.step()
    assert not model[0].isfinite().all()
    files = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    _, loaded = load(case, *files)
    loaded.eval()
