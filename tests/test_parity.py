"""prediction_steps=0 is the base optimizer, and XSGDM one momentum ahead is Nesterov momentum.

Recorded gradients, not training, which would amplify a last bit into a difference that hides bugs. What torch.optim
lacks, AdaBelief and AdaM3, is compared with the literal optimizers of reference.py, as are the others.
"""

import numpy as np
import pytest
import torch
from cases import CASES, every_case, loss_of, small_model, train_step

from xgrad_optim import XSGDM

WITH_TORCH_BASE = [case for case in CASES if case.member.is_base]


def recorded_gradients(steps: int, shapes: list[tuple[int, ...]]):
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        scale = 10.0 ** (step % 5 - 3)
        yield [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape in shapes]


@pytest.mark.parametrize("case", WITH_TORCH_BASE, ids=lambda case: case.id)
@pytest.mark.parametrize("master_weights", [False, True])
def test_no_prediction_equals_torch_optim_over_200_steps(case, master_weights):
    shapes = [(6, 4), (3,), ()]
    ours = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    optimizer = case.make(ours, prediction_steps=0, master_weights=master_weights)
    base = case.member.make_base(theirs, **case.options)
    for grads in recorded_gradients(200, shapes):
        for our, their, grad in zip(ours, theirs, grads, strict=True):
            our.grad, their.grad = grad.clone(), grad.clone()
        optimizer.step()
        base.step()
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-12, atol=1e-14)
    for our, their in zip(ours, theirs, strict=True):
        for key, value in base.state[their].items():
            if value is not None:
                torch.testing.assert_close(
                    optimizer.state[our][key], value, rtol=1e-12, atol=1e-15, check_dtype=key != "step"
                )


@every_case
def test_no_prediction_equals_the_literal_optimizer_over_200_steps(case):
    shapes = [(6, 4), (3,)]
    params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    reference = case.reference([param.detach().numpy().copy() for param in params], prediction_steps=0)
    optimizer = case.make(params, prediction_steps=0)
    for grads in recorded_gradients(200, shapes):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        reference.update([grad.numpy() for grad in grads])
        for param, theta in zip(params, reference.thetas, strict=True):
            np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-12, atol=1e-14)


def test_predicting_one_momentum_ahead_is_nesterov_as_the_model_sees_it():
    momentum, lr = 0.85, 0.05
    model, other = small_model(), small_model()
    optimizer = XSGDM(model.parameters(), lr=lr, momentum=momentum, prediction_steps=momentum)
    base = torch.optim.SGD(other.parameters(), lr=lr, momentum=momentum, nesterov=True)
    for step in range(100):
        train_step(model, optimizer, step)
        train_step(other, base, step)
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert loss_of(model, 0).item() < loss_of(small_model(), 0).item()
