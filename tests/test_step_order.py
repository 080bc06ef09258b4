"""Steps in unusual order: in evaluation mode, twice, before any gradient, with none at all."""

import copy

import pytest
import torch
from cases import every_class
from family import MEMBERS
from training import (
    REAL_DTYPES,
    SHAPES,
    assert_all_same_bits,
    assert_same,
    assert_unchanged,
    clones,
    either_mode,
    either_precision,
    feed,
    make_params,
    name_of,
    options,
    snapshot,
    thetas,
    train,
    trained,
)


@every_class
@either_precision
def test_a_step_in_evaluation_mode_updates_theta_and_leaves_theta_hat(cls, master_weights):
    optimizer, params = trained(cls, master_weights=master_weights)
    twin, twin_params = trained(cls, master_weights=master_weights)
    for step in range(3, 6):
        optimizer.eval()
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert optimizer.predicted
        assert_same(optimizer, params, twin, twin_params)
        assert not torch.equal(thetas(optimizer, params)[0], params[0])


@every_class
@either_mode
def test_a_step_twice_in_a_row_takes_the_same_gradient_twice(cls, predicted):
    optimizer, params = trained(cls)
    twin, twin_params = trained(cls)
    feed(params, 3)
    for _ in range(2):
        optimizer.train(predicted)
        optimizer.step()
        feed(twin_params, 3)
        twin.step()
    assert_same(optimizer, params, twin, twin_params)
    assert all(state["step"] == 5 for state in optimizer.state.values())


@every_class
@either_precision
def test_before_any_gradient_nothing_happens(cls, master_weights):
    params = make_params()
    before = clones(params)
    optimizer = cls(params, **options(cls, master_weights=master_weights))
    for call in (optimizer.eval, optimizer.train, optimizer.step, optimizer.step, optimizer.eval, optimizer.step):
        call()
        assert_all_same_bits(params, before)
        assert not optimizer.predicted and not any(optimizer.state.values())
    with optimizer.true_weights():
        assert_all_same_bits(params, before)
    twin, twin_params = trained(cls, master_weights=master_weights)
    train(optimizer, params, range(3))
    assert_same(optimizer, params, twin, twin_params)


@every_class
@either_precision
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=name_of)
@pytest.mark.parametrize("reloaded", [False, True], ids=["same", "reloaded"])
def test_with_all_gradients_none_a_step_only_goes_to_theta_hat(cls, master_weights, dtype, reloaded):
    """At an lr whose predictions are as large as the weights, so that a swap which only nearly undoes itself shows."""
    shapes = ((3, 4), (2000,), ())
    optimizer, _ = trained(cls, shapes=shapes, dtype=dtype, lr=0.5, master_weights=master_weights)
    predicted = snapshot(optimizer)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert_unchanged(optimizer, predicted, but_gradients=True)
    optimizer.eval()
    if reloaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert_unchanged(optimizer, predicted, but_gradients=True)


@every_class
def test_theta_hat_is_theta_minus_the_step_ahead(cls):
    """The direction comes from the state: here in torch's own operations, from the buffers that the step left."""
    optimizer, params = trained(cls, dtype=torch.float64)
    theta_hat, ahead = clones(params), thetas(optimizer, params)
    for _ in range(2):
        MEMBERS[cls].move_ahead(ahead, [optimizer.state[param] for param in params], optimizer.param_groups[0], 3)
    torch.testing.assert_close(theta_hat, ahead, rtol=1e-12, atol=1e-14)


@every_class
def test_zero_gradients_are_gradients(cls):
    """None skips a parameter, zero decays its moments and counts."""
    optimizer, params = trained(cls, shapes=SHAPES[:-1], weight_decay=0)
    before = thetas(optimizer, params)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(state["step"] == 4 for state in optimizer.state.values())
    assert all(not torch.equal(theta, old) for theta, old in zip(thetas(optimizer, params), before, strict=True))
