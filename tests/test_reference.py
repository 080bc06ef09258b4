"""Every optimizer follows the literal Algorithm 1.

With a master copy it is Algorithm 1 and must have the same bits in float32: any other order of operations, a fused
multiply-add, an inexact root or a coefficient rounded twice shows. Without, theta may move by the rounding of the
one addition that makes the swap exact (docs/numerics.md), and by no more. Hand-computed numbers catch a mistake
that the reference and the code share.
"""

import numpy as np
import pytest
import torch
from cases import every_case, every_optimizer, loss_of, small_model, train_step
from reference import algorithm_1

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW

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


# theta_0 = 1; the gradients are 0.5 and then -0.25. Everything below is worked out by hand, in exact fractions where
# there are any: m_1 = 0.05, m_2 = 0.9 * 0.05 + 0.1 * -0.25 = 0.02; bias corrections 0.1 and 0.19, 0.001 and 0.001999.
HAND = {
    # buf: 0.5, then 0.9 * 0.5 - 0.25 = 0.2.  theta: 1 - 0.05 = 0.95, then 0.95 - 0.02 = 0.93.  hat: 0.90, 0.91
    XSGDM: ({"momentum": 0.9}, [(0.95, 0.90), (0.93, 0.91)]),
    # v: 0.00025, then 0.00024975 + 0.0000625 = 0.00031225.  delta: 0.05/0.1 / 0.5 = 1, so step 0.1 * 1
    # delta_2 * step_size = 0.1 * (0.02 / 0.19) / sqrt(0.00031225 / 0.001999) = 0.1 * 0.10526316 / 0.39522500
    XAdam: ({}, [(0.9, 0.8), (0.9 - 0.02663373, 0.9 - 2 * 0.02663373)]),
    # the same with theta first multiplied by 1 - 0.1 * 0.5 = 0.95: 0.95 - 0.1 = 0.85, then 0.8075 - 0.02663373
    XAdamW: ({"weight_decay": 0.5}, [(0.85, 0.75), (0.8075 - 0.02663373, 0.8075 - 2 * 0.02663373)]),
    # surprise 0.45: v = 0.001 * 0.2025 = 0.0002025, root of v / 0.001 is 0.45; step 0.1 * 0.5 / 0.45 = 0.11111111
    # surprise -0.27: v = 0.0002022975 + 0.0000729 = 0.0002751975; / 0.001999 = 0.13766758, root 0.37103582
    XAdaBelief: ({}, [(1 - 1 / 9, 1 - 2 / 9), (8 / 9 - 0.02837008, 8 / 9 - 2 * 0.02837008)]),
    # v = 0.001 * 0.0025 = 0.0000025, root of v / 0.001 is 0.05; step 0.1 * 0.5 / 0.05 = 1
    # v = 0.0000024975 + 0.0000004 = 0.0000028975; / 0.001999 = 0.00144947474, root 0.03807196; 0.010526316 / that
    XAdaM3: ({}, [(0.0, -1.0), (-0.27648473, -2 * 0.27648473)]),
}


@pytest.mark.parametrize("optimizer_class", HAND, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("master_weights", [False, True])
def test_two_steps_by_hand(optimizer_class, master_weights):
    options, expected = HAND[optimizer_class]
    param = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = optimizer_class([param], lr=0.1, master_weights=master_weights, **options)
    for grad, (theta, theta_hat) in zip((0.5, -0.25), expected, strict=True):
        param.grad = torch.full_like(param, grad)
        optimizer.step()
        assert param.item() == pytest.approx(theta_hat, abs=2e-7)
        optimizer.eval()
        assert param.item() == pytest.approx(theta, abs=1e-7)
        optimizer.train()
