"""What is saved of an attached model is theta, what is loaded is theta, and a resume changes no bit of training.

Trainers save at the end of a training step, model first and optimizer second, or the other way round: the hooks must
make every order right. Names say which trap of clients.md a test is about.
"""

import copy
import io
import warnings

import pytest
import torch
from attached import X, attached, both_weights, either_mode, equal, go_on
from cases import every_optimizer, small_model, train_step
from torch import nn
from training import clones, either_precision

from xgrad_optim import XAdamW


class Tied(nn.Module):
    """A language model's shape: the head's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.embedding(tokens))


def through_file(*state_dicts):
    """What torch.save and a safe torch.load make of them."""
    file = io.BytesIO()
    torch.save(state_dicts, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- trap 5: what a file holds ---------------------------------------------------------------------------------------


@every_optimizer
@either_precision
@either_mode
def test_state_dicts_hold_theta(case, master_weights, mode):
    model, optimizer = attached(case.optimizer, master_weights=master_weights)
    theta, theta_hat = both_weights(optimizer)
    optimizer.train(mode)
    assert equal(model[2].state_dict().values(), theta[2:])
    optimizer.train(mode)
    assert equal(model.state_dict().values(), theta)
    model(X)
    assert equal(model.parameters(), theta_hat)


def test_a_tied_weight_is_saved_and_swapped_once():
    """Trap 17: two names on one storage, else a saver writes the tensor twice."""
    model = Tied()
    optimizer = XAdamW(model.parameters(), lr=0.01)
    optimizer.attach(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(11)).square().mean().backward()
        optimizer.step()
    version = model.head.weight._version
    saved = model.state_dict()
    assert model.head.weight._version == version + 1
    pointers = {value.data_ptr() for value in saved.values()}
    assert len(saved) == 2 and pointers == {model.head.weight.data_ptr()}


@every_optimizer
def test_an_attached_optimizer_says_theta(case):
    """Trap 6: the file of the optimizer tells what the file of the model holds."""
    model, optimizer = attached(case.optimizer)
    theta, _ = both_weights(optimizer)
    saved = optimizer.state_dict()
    assert not any(state["predicted"] for state in saved["state"].values())
    assert equal(model.parameters(), theta)


# -- trap 6: orders and modes of saving and loading ------------------------------------------------------------------


@every_optimizer
@either_precision
@pytest.mark.parametrize("saves_model_first", [True, False], ids=["saves model first", "saves optimizer first"])
@pytest.mark.parametrize("loads_model_first", [True, False], ids=["loads model first", "loads optimizer first"])
@either_mode
def test_every_order_resumes_bit_for_bit(case, master_weights, saves_model_first, loads_model_first, mode):
    model, optimizer = attached(case.optimizer, master_weights=master_weights)
    optimizer.train(mode)
    if saves_model_first:
        model_file, optimizer_file = through_file(model.state_dict(), optimizer.state_dict())
    else:
        optimizer_file, model_file = through_file(optimizer.state_dict(), model.state_dict())
    expected = go_on(model, optimizer)

    resumed, resumed_optimizer = attached(case.optimizer, model=small_model(torch.float32, seed=9), steps=2)
    resumed_optimizer.train(mode)
    loads = [lambda: resumed.load_state_dict(model_file), lambda: resumed_optimizer.load_state_dict(optimizer_file)]
    for load in loads if loads_model_first else reversed(loads):
        load()
    assert not resumed_optimizer.predicted
    assert equal(go_on(resumed, resumed_optimizer), expected)
    assert resumed_optimizer.state_dict().keys() == optimizer.state_dict().keys()


@either_mode
def test_a_checkpoint_of_a_run_that_was_not_attached(mode):
    """It may hold theta_hat, if both of its files do; the model must be there before the optimizer says so."""
    model = small_model(torch.float32)
    optimizer = XAdamW(model.parameters(), lr=0.01)
    for step in range(3):
        train_step(model, optimizer, step)
    optimizer.train(mode)
    model_file, optimizer_file = through_file(model.state_dict(), optimizer.state_dict())
    optimizer.train()
    expected = go_on(model, optimizer)

    resumed, resumed_optimizer = attached(model=small_model(torch.float32, seed=9), steps=2)
    resumed.load_state_dict(model_file)
    resumed_optimizer.load_state_dict(optimizer_file)
    assert resumed_optimizer.predicted is mode
    resumed.eval()(X)
    assert not resumed_optimizer.predicted
    assert equal(go_on(resumed, resumed_optimizer), expected)

    resumed, resumed_optimizer = attached(model=small_model(torch.float32, seed=9), steps=2)
    resumed_optimizer.load_state_dict(optimizer_file)
    if mode:
        with pytest.warns(UserWarning, match="load the model first"):
            resumed.load_state_dict(model_file)
    else:
        resumed.load_state_dict(model_file)
        assert equal(go_on(resumed, resumed_optimizer), expected)


@every_optimizer
@either_precision
def test_reloading_ones_own_state_in_mid_training_changes_no_bit(case, master_weights):
    """accelerate.prepare() does it at the start of every run."""
    twin, twin_optimizer = attached(case.optimizer, master_weights=master_weights)
    model, optimizer = attached(case.optimizer, master_weights=master_weights)
    optimizer.load_state_dict(optimizer.state_dict())
    assert equal(go_on(model, optimizer), go_on(twin, twin_optimizer))


def test_loading_an_optimizer_alone_keeps_theta():
    model, optimizer = attached()
    saved = copy.deepcopy(optimizer.state_dict())
    model(X)
    train_step(model, optimizer, 3)
    theta, _ = both_weights(optimizer)
    optimizer.load_state_dict(saved)
    model.eval()(X)
    assert equal(model.parameters(), theta)


@either_mode
def test_a_state_dict_that_does_not_fit_changes_nothing(mode):
    model, optimizer = attached()
    optimizer.train(mode)
    before = clones(model.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert optimizer.predicted is mode
    assert equal(model.parameters(), before)


# -- trap 4: what is loaded is theta ---------------------------------------------------------------------------------


@every_optimizer
@either_precision
@either_mode
def test_loaded_weights_are_the_true_ones(case, master_weights, mode):
    """The best model comes back before an evaluation, or a warm restart goes on from it."""
    model, optimizer = attached(case.optimizer, master_weights=master_weights)
    best = copy.deepcopy(model.state_dict())
    for step in range(3, 6):
        model.train()
        train_step(model, optimizer, step)
    optimizer.train(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(best)
        model.eval()(X)
        assert equal(model.parameters(), best.values())
        model.train()(X)
        assert not equal(model.parameters(), best.values())
        model.eval()(X)
        for param, value in zip(model.parameters(), best.values(), strict=True):
            assert torch.allclose(param, value, rtol=1e-6, atol=1e-7), "theta moves by the rounding of one addition"


def test_loading_a_part_loads_theta_of_it():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    value = torch.full_like(model[2].bias, 0.25)
    model[2].load_state_dict({"weight": theta[2], "bias": value})
    model.eval()(X)
    assert equal(model.parameters(), [*theta[:3], value])
