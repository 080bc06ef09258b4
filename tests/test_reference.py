"""Every optimizer follows the literal Algorithm 1.

With a master copy it is Algorithm 1 and must have the same bits in float32: any other order of operations, a fused
multiply-add, an inexact root or a coefficient rounded twice shows. Without, theta may move by the rounding of the
one addition that makes the swap exact (docs/numerics.md), and by no more. Hand-computed numbers catch a mistake
that the reference and the code share.
"""

import numpy as np
import pytest
import torch
from cases import every_case, every_class, every_optimizer, loss_of, small_model, train_step
from family import MEMBERS
from reference import algorithm_1

STEPS = 30


def numpy_params(model: torch.nn.Module) -> list[np.ndarray]:
    return [param.detach().numpy().copy() for param in model.parameters()]


def ulp_of(*arrays: np.ndarray) -> np.ndarray:
    """One unit in the last place of the largest of these numbers, per element."""
    return np.spacing(np.maximum.reduce([np.abs(array) for array in arrays]))


@every_case
@pytest.mark.parametrize("prediction_steps", [1.0, 2.5])
def test_follows_algorithm_1_bit_for_bit_with_master_weights(case, prediction_steps):
    options = {"prediction_steps": prediction_steps, "master_weights": True}
    model, other = small_model(torch.float32), small_model(torch.float32)
    reference = case.reference(numpy_params(other), **options)
    optimizer = case.make(model.parameters(), **options)
    for step in range(STEPS):
        train_step(model, optimizer, step)
        algorithm_1(reference, other, loss_of, step)
        for theta_hat, expected in zip(numpy_params(model), reference.predicted(), strict=True):
            np.testing.assert_array_equal(theta_hat, expected)
        with optimizer.true_weights():
            for theta, expected in zip(numpy_params(model), reference.thetas, strict=True):
                np.testing.assert_array_equal(theta, expected)


@every_case
def test_stays_within_two_ulp_a_step_without_master_weights(case):
    """Each step starts the reference from our own theta, theta_hat and state: one step's rounding is compared."""
    model, other = small_model(torch.float32), small_model(torch.float32)
    reference = case.reference(numpy_params(other), master_weights=True)
    literal_prediction = reference.predicted
    optimizer = case.make(model.parameters())
    for step in range(STEPS):
        train_step(model, optimizer, step)
        algorithm_1(reference, other, loss_of, step)
        theta_hats = numpy_params(model)
        with optimizer.true_weights():
            thetas = numpy_params(model)
        predicted = literal_prediction()
        for index, (theta, theta_hat) in enumerate(zip(thetas, theta_hats, strict=True)):
            ulp = ulp_of(theta, theta_hat, theta - theta_hat)
            assert (np.abs(theta - reference.thetas[index]) <= 2 * ulp).all()
            assert (np.abs(theta_hat - predicted[index]) <= 2 * ulp).all()
        for state, param in zip(reference.states, model.parameters(), strict=True):
            for key in state:
                np.testing.assert_array_equal(optimizer.state[param][key].numpy(), state[key])
        reference.thetas = thetas
        reference.predicted = lambda theta_hats=theta_hats: theta_hats


@every_case
def test_follows_algorithm_1_in_float64(case):
    model, other = small_model(), small_model()
    reference = case.reference(numpy_params(other), master_weights=True)
    optimizer = case.make(model.parameters())
    for step in range(STEPS):
        train_step(model, optimizer, step)
        algorithm_1(reference, other, loss_of, step)
        with optimizer.true_weights():
            for theta, expected in zip(numpy_params(model), reference.thetas, strict=True):
                np.testing.assert_allclose(theta, expected, rtol=1e-12, atol=1e-13)


@every_optimizer
def test_first_step_starts_from_the_true_weights(case):
    """Before the first update delta is 0: the first gradient is taken at theta, and nothing is predicted."""
    model = small_model()
    optimizer = case.make(model.parameters())
    before = numpy_params(model)
    optimizer.eval()
    optimizer.train()
    for param, expected in zip(numpy_params(model), before, strict=True):
        np.testing.assert_array_equal(param, expected)
    assert not optimizer.predicted


@every_class
@pytest.mark.parametrize("master_weights", [False, True])
def test_two_steps_by_hand(cls, master_weights):
    options, expected = MEMBERS[cls].by_hand
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = cls([param], lr=0.1, master_weights=master_weights, **options)
    for grad, (theta, theta_hat) in zip((0.5, -0.25), expected, strict=True):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
        assert param.item() == pytest.approx(theta_hat, abs=2e-7)
        optimizer.eval()
        assert param.item() == pytest.approx(theta, abs=1e-7)
        optimizer.train()
