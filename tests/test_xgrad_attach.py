"""XGrad attached to a model: the mode decides which weights a forward sees, as with the native classes."""

import copy

import pytest
import torch
from attached import Watch, both_weights, clones, equal
from cases import small_model, train_step
from xgrad_bases import BASES

from xgrad_optim import XAdamW, XGrad

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(7))
NAMES = ["SGD momentum", "AdamW", "Adam fused", "Adafactor", "RMSprop"]
some_bases = pytest.mark.parametrize("name", NAMES)


def attached(name="AdamW", steps=3, **options):
    model = small_model(torch.float32)
    optimizer = XGrad(BASES[name](model.parameters()), **{"prediction_steps": 2.0} | options)
    optimizer.attach(model)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


@some_bases
def test_the_model_s_mode_decides_which_weights_a_forward_sees(name):
    model, optimizer = attached(name)
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    model.eval()
    assert equal(model.parameters(), theta)
    model(X)
    model.train()(X)
    with optimizer.true_weights():
        model(X)
    model(X)
    assert watch.saw(theta, theta_hat, theta, theta_hat)


@some_bases
def test_what_is_saved_and_copied_is_theta_and_training_goes_on(name):
    model, optimizer = attached(name)
    plain, other = attached(name)
    theta, _ = both_weights(optimizer)
    for save in (model.state_dict, lambda: copy.deepcopy(model).state_dict()):
        optimizer.train()
        assert equal(save().values(), theta)
    optimizer.train()
    optimizer.state_dict()
    assert equal(model.parameters(), theta)
    for step in range(5, 8):
        model.eval()(X)
        model.train()
        train_step(model, optimizer, step)
        train_step(plain, other, step)
    assert all(map(equal, both_weights(optimizer), both_weights(other)))


def test_loaded_weights_are_theta():
    model, optimizer = attached()
    weights = {name: value + 1 for name, value in model.state_dict().items()}
    model.train()(X)
    model.load_state_dict(weights)
    assert not optimizer.predicted and equal(model.parameters(), weights.values())


def test_two_optimizers_for_one_model():
    """Muon for the matrices, AdamW for the rest, both predicted."""
    model = small_model(torch.float32)
    matrices = [param for param in model.parameters() if param.dim() == 2]
    rest = [param for param in model.parameters() if param.dim() != 2]
    optimizers = XGrad(torch.optim.Muon(matrices, lr=0.05)), XAdamW(rest, lr=0.05)
    for optimizer in optimizers:
        optimizer.attach(model)
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = model.train()(X).square().mean() + step
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert all(optimizer.predicted for optimizer in optimizers)
    model.eval()
    assert not any(optimizer.predicted for optimizer in optimizers)


def test_a_new_one_takes_the_model_over_and_a_trained_one_does_not():
    model, old = attached()
    new = XGrad(torch.optim.AdamW(model.parameters()))
    theta, _ = both_weights(old)
    new.attach(model)
    assert equal(model.parameters(), theta)
    with pytest.raises(RuntimeError, match="only one of them can predict"):
        old.step()


def test_a_group_that_joins_is_covered():
    model = small_model(torch.float32)
    first, *rest = model.parameters()
    optimizer = XGrad(torch.optim.SGD([first], lr=0.1))
    optimizer.attach(model)
    optimizer.add_param_group({"params": rest})
    for step in range(2):
        train_step(model, optimizer, step)
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    model.eval()(X)
    model.train()(X)
    assert watch.saw(theta, theta_hat)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("tracer", ["export", "jit", "fx", "func"])
def test_tracers_see_no_swap_and_a_step_inside_raises(tracer):
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    model.eval()
    expected = model(X)
    model.training = True
    model(X)
    model.training = False
    if tracer == "export":
        model.eval()
        assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
    elif tracer == "jit":
        assert torch.equal(torch.jit.trace(model, X)(X), expected)
    elif tracer == "fx":
        from torch.fx.experimental.proxy_tensor import make_fx

        traced = make_fx(lambda x: model(x))(X)
        assert torch.equal(traced(X), expected)
        with pytest.raises(RuntimeError, match="called inside"):
            make_fx(lambda x: optimizer.step() or x)(X)
    else:
        torch.testing.assert_close(torch.func.vmap(lambda x: model(x))(X), expected)
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.vmap(lambda x: optimizer.step() or x)(X)
    assert equal(model.parameters(), theta)


def test_a_swap_between_forward_and_backward_raises_autograd_s_error():
    model, optimizer = attached()
    loss = model.train()(X).square().mean()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_steps_and_models():
    model, optimizer = attached()
    twin, other = attached()
    step = torch.compile(optimizer.step, backend="eager")
    for index in range(3):
        optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.05 / (index + 1)
        optimizer.zero_grad()
        other.zero_grad()
        for each in (model, twin):
            each.train()(X).square().mean().backward()
        step()
        other.step()
    assert all(map(equal, both_weights(optimizer), both_weights(other)))


def test_averages_inside_true_weights():
    model, optimizer = attached()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    theta, _ = both_weights(optimizer)
    with optimizer.true_weights():
        averaged.update_parameters(model)
    assert equal(clones(averaged.module.parameters()), theta)
