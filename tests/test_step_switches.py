"""Options that are switched in mid-training: amsgrad, master_weights, prediction_steps."""

import copy

import pytest
import torch
from cases import every_class
from family import MEMBERS
from training import (
    PARAM,
    SHAPES,
    assert_all_same_bits,
    assert_same,
    assert_same_bits,
    clones,
    either_mode,
    either_precision,
    every_class_with_amsgrad,
    feed,
    name_of,
    thetas,
    train,
    trained,
)


def check_switch(cls, optimizer, params, predicted, name, value, follow):
    """A switch goes on like an optimizer that loads the state with the option, and what `follow` makes of its buffers.

    `follow(state, theta)` changes the saved state of one parameter, which holds theta.
    """
    theta = thetas(optimizer, params)
    twin_params = [PARAM(value) for value in theta]
    twin = cls(twin_params)
    optimizer.eval()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0][name] = value
    for place, state in state_dict["state"].items():
        follow(state, theta[place])
    twin.load_state_dict(state_dict)
    optimizer.train(predicted)
    optimizer.param_groups[0][name] = value
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)


@every_class_with_amsgrad
@either_precision
@either_mode
def test_amsgrad_switched_on_starts_its_maximum_from_the_present_second_moment(cls, master_weights, predicted):
    optimizer, params = trained(cls, master_weights=master_weights)

    def follow(state, theta):
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()

    check_switch(cls, optimizer, params, predicted, "amsgrad", True, follow)


@every_class_with_amsgrad
@either_precision
@either_mode
def test_amsgrad_switched_off_goes_on_with_the_second_moment(cls, master_weights, predicted):
    optimizer, params = trained(cls, master_weights=master_weights, amsgrad=True)

    def follow(state, theta):
        del state["max_exp_avg_sq"]

    check_switch(cls, optimizer, params, predicted, "amsgrad", False, follow)


@every_class
@either_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_master_weights_switched_on_start_from_theta(cls, predicted, dtype):
    optimizer, params = trained(cls, dtype=dtype)

    def follow(state, theta):
        state["master_weights"] = theta.float()

    check_switch(cls, optimizer, params, predicted, "master_weights", True, follow)


@every_class
@either_mode
def test_master_weights_switched_off_leave_theta_in_the_parameters(cls, predicted):
    optimizer, params = trained(cls, shapes=SHAPES[:-1], dtype=torch.bfloat16, master_weights=True)
    theta = thetas(optimizer, params)
    assert_all_same_bits(theta, [optimizer.state[param]["master_weights"].to(torch.bfloat16) for param in params])
    optimizer.train(predicted)
    optimizer.param_groups[0].update(master_weights=False, lr=0.0)
    train(optimizer, params, [3])
    assert all("master_weights" not in state for state in optimizer.state.values())
    assert_all_same_bits(thetas(optimizer, params), theta)
    optimizer.param_groups[0]["lr"] = 0.1  # moves bfloat16 in one step, AdaPlus's small numerators included
    train(optimizer, params, [4])
    assert optimizer.predicted
    assert all(not torch.equal(now, then) for now, then in zip(thetas(optimizer, params), theta, strict=True))


@every_class
@either_precision
def test_a_parameter_without_gradient_follows_a_switch_when_it_next_steps(cls, master_weights):
    """The switch is seen while only its neighbour has a gradient; both modes must stay exact meanwhile."""
    optimizer, params = trained(cls, master_weights=master_weights)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    group = optimizer.param_groups[0]
    group["master_weights"] = not master_weights
    if MEMBERS[cls].takes("amsgrad"):
        group["amsgrad"] = True
    feed(params, 3, skip=[1])
    optimizer.step()
    assert_same_bits(params[1], theta_hat[1])
    assert_same_bits(thetas(optimizer, params)[1], theta[1])
    train(optimizer, params, [4])
    assert all(("master_weights" in state) is not master_weights for state in optimizer.state.values())


@every_class
def test_prediction_steps_may_be_scheduled(cls):
    """At 0 the parameters hold theta after the step; theta itself does not depend on the schedule of a fed run."""
    optimizer, params = trained(cls, steps=0, dtype=torch.float64)
    base, base_params = trained(cls, steps=0, dtype=torch.float64, prediction_steps=0)
    for step, ahead in enumerate((0, 1.0, 3.5, 0, 2, 0)):
        optimizer.param_groups[0]["prediction_steps"] = ahead
        train(optimizer, params, [step])
        train(base, base_params, [step])
        for theta, expected in zip(thetas(optimizer, params), base_params, strict=True):
            torch.testing.assert_close(theta, expected.detach(), rtol=1e-13, atol=1e-14)
        if ahead == 0:
            assert_all_same_bits(params, thetas(optimizer, params))
        else:
            assert not torch.equal(params[0], thetas(optimizer, params)[0])
