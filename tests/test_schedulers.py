"""Options that change between a step and a swap: what undoes a prediction is the numbers that made it.

Schedulers step after the optimizer and move lr, momentum and betas, tensors in place. Undoing a prediction with the
group's numbers of now gives silently wrong weights.
"""

import copy

import pytest
import torch
from cases import every_class
from family import MEMBERS
from torch.optim import lr_scheduler, swa_utils
from training import (
    assert_all_same_bits,
    assert_same,
    clones,
    either_precision,
    feed,
    thetas,
    torch_may_warn,
    train,
    trained,
)

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.7**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.6),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1, 0.3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.1),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.2, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.5),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.1, patience=0),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.05, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, 0.2, 1.0, 3), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.05, anneal_epochs=3),
}


def _advance(scheduler):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def test_no_scheduler_of_torch_is_forgotten():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


@every_class
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02, dtype=torch.float64)], ids=["float", "tensor"])
@torch_may_warn
def test_schedulers_do_not_disturb_the_swap(cls, name, lr):
    """Evaluating after scheduler.step() shows the theta of before it, and leaves the run's bits alone."""
    optimizer, params = trained(cls, steps=0, lr=copy.deepcopy(lr))
    twin, twin_params = trained(cls, steps=0, lr=copy.deepcopy(lr))
    scheduler, twin_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    rates = set()
    for step in range(6):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        theta, theta_hat = thetas(optimizer, params), clones(params)
        _advance(scheduler)
        _advance(twin_scheduler)
        rates.add(float(optimizer.param_groups[0]["lr"]))
        optimizer.eval()
        assert_all_same_bits(params, theta)
        optimizer.train()
        assert_all_same_bits(params, theta_hat)
        if step % 2:
            optimizer.eval()  # and the next step starts from here
        else:
            assert_same(optimizer, params, twin, twin_params)
    assert len(rates) > 1
    optimizer.train()
    assert_same(optimizer, params, twin, twin_params)


@every_class
@pytest.mark.parametrize("make", [SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"]], ids=["CyclicLR", "OneCycleLR"])
@torch_may_warn
def test_momentum_is_cycled(cls, make):
    """Both look into `defaults` for "momentum" or "betas", and then move it in the groups."""
    optimizer, params = trained(cls, steps=0)
    scheduler = make(optimizer)
    seen = set()
    for step in range(4):
        train(optimizer, params, [step])
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.add(float(group["betas"][0] if "betas" in group else group["momentum"]))
    assert len(seen) > 2


CHANGES = {
    "lr": lambda group: group.update(lr=group["lr"] * 7),
    "lr to zero": lambda group: group.update(lr=0.0),
    "weight_decay": lambda group: group.update(weight_decay=0.7),
    "prediction_steps": lambda group: group.update(prediction_steps=9.0),
    "prediction_steps to zero": lambda group: group.update(prediction_steps=0.0),
    "maximize": lambda group: group.update(maximize=True),
    "betas or momentum": lambda group: group.update(betas=(0.1, 0.2), momentum=0.1, dampening=0.5),
    "eps": lambda group: group.update(eps=0.1),
}


@every_class
@either_precision
@pytest.mark.parametrize("name", CHANGES)
def test_no_option_of_now_undoes_a_prediction_of_then(cls, master_weights, name):
    optimizer, params = trained(cls, master_weights=master_weights)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    assert not torch.equal(theta[0], theta_hat[0])
    CHANGES[name](optimizer.param_groups[0])
    optimizer.eval()
    assert_all_same_bits(params, theta)
    optimizer.train()
    assert_all_same_bits(params, theta_hat)


@every_class
def test_tensor_options_that_are_filled_in_place_do_not_undo_a_prediction_wrongly(cls):
    number = torch.tensor
    kwargs = {"lr": number(0.01), "prediction_steps": number(2.0)}
    if MEMBERS[cls].takes("betas"):
        kwargs["betas"] = (number(0.9), number(0.99))
    optimizer, params = trained(cls, **kwargs)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    group = optimizer.param_groups[0]
    for value in (group["lr"], group["prediction_steps"], *group.get("betas", ())):
        value.fill_(0.5)
    optimizer.eval()
    assert_all_same_bits(params, theta)
    optimizer.train()
    assert_all_same_bits(params, theta_hat)


@every_class
def test_a_parameter_without_gradient_keeps_its_own_prediction(cls):
    """Its neighbours were predicted later, with another lr: each is undone with its own numbers."""
    optimizer, params = trained(cls)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    optimizer.param_groups[0].update(lr=0.5, prediction_steps=4.0)
    for step in range(3, 6):
        feed(params, step)
        params[1].grad = None
        optimizer.step()
        assert torch.equal(params[1], theta_hat[1])
    optimizer.eval()
    assert torch.equal(params[1], theta[1])
    optimizer.train()
    assert torch.equal(params[1], theta_hat[1])
