"""The numeric contract (docs/numerics.md), in every dtype, bit for bit.

The back ends can only agree with each other if each of them performs exactly the contract's sequence of roundings;
agreeing with a tolerance would hide that theta comes back from theta_hat a bit off.
"""

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import every_case
from hypothesis import given, settings

from xgrad_optim.numeric import sqrt

COMPUTE = {torch.float64: np.float64, torch.float32: np.float32, torch.bfloat16: np.float32, torch.float16: np.float32}
NARROW = [torch.bfloat16, torch.float16]


def rounder(dtype: torch.dtype):
    """Rounds an array of the compute type to what `dtype` can hold."""
    return lambda values: torch.from_numpy(np.asarray(values)).to(dtype).to(torch.float32).numpy()


@every_case
@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
@pytest.mark.parametrize("master_weights", [False, True], ids=["", "master"])
def test_every_operation_rounds_where_the_contract_says(case, dtype, master_weights):
    generator = torch.Generator().manual_seed(3)

    def draw(scale: float) -> torch.Tensor:
        return (torch.randn(257, generator=generator, dtype=torch.float64) * scale).to(dtype)

    options = {"prediction_steps": 1.5, "master_weights": master_weights}
    param = torch.nn.Parameter(draw(1.0))
    rounding = {}
    if dtype in NARROW:
        rounding["write"] = rounder(dtype)
        if not master_weights:
            rounding["store"] = rounder(dtype)
    theta = param.detach().to(torch.float32 if dtype in NARROW else dtype).numpy().copy()
    reference = case.reference([theta], rounding, **options)
    optimizer = case.make([param], **options)
    for step in range(20):
        param.grad = draw(10.0 ** (step % 4 - 2))
        optimizer.param_groups[0]["lr"] = reference.options["lr"] = 0.01 * (1 + step % 3)
        with np.errstate(all="ignore"):
            reference.update([param.grad.to(torch.float32 if dtype in NARROW else dtype).numpy()])
            expected = reference.predicted()[0]
        optimizer.step()
        held = param.detach().to(torch.float32 if dtype in NARROW else dtype).numpy()
        np.testing.assert_array_equal(held, expected)
        for key, value in reference.states[0].items():
            stored = optimizer.state[param][key].to(torch.float32 if dtype in NARROW else dtype).numpy()
            np.testing.assert_array_equal(stored, value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    theta=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
    d=st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
)
@pytest.mark.parametrize("dtype", COMPUTE, ids=str)
def test_drift_theorem(dtype, theta, d):
    """One round trip reaches a theta that all further ones keep."""
    theta, d = torch.tensor(theta).to(dtype), torch.tensor(d).to(dtype)
    theta = (theta - d) + d
    theta_hat = theta - d
    if torch.isfinite(theta_hat) and torch.isfinite(theta):
        assert theta_hat + d == theta
        assert (theta_hat + d) - d == theta_hat


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_square_root_is_correctly_rounded(dtype):
    """Against integer arithmetic: no float is nearer to the true root than the one returned."""
    real = COMPUTE[dtype]
    values = np.concatenate([np.random.default_rng(0).random(2000) * 10.0**e for e in (-30, -8, 0, 8)]).astype(real)
    roots = sqrt(torch.from_numpy(values), out=torch.empty(len(values), dtype=dtype)).numpy()
    for value, root in zip(values.tolist(), roots, strict=True):
        below, above = np.nextafter(root, real(0)), np.nextafter(root, real(np.inf))
        for neighbour in (below, above):
            middle = (Fraction(float(root)) + Fraction(float(neighbour))) / 2
            is_inside = Fraction(float(value)) > middle**2 if neighbour < root else Fraction(float(value)) < middle**2
            assert is_inside


def test_the_root_of_a_negative_number_is_nan_without_a_warning():
    """What warns is an error in these tests, and would be one in a training that runs with -W error."""
    x = torch.tensor([-1.0, 4.0, math.nan, math.inf, -0.0])
    found = sqrt(x, out=torch.empty(5))
    assert found.isnan().tolist() == [True, False, True, False, False]
    assert found[1:].nan_to_num(7.0, posinf=8.0).tolist() == [2.0, 7.0, 8.0, 0.0]
