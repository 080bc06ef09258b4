"""A swap between forward and backward must not hide from autograd, which would use weights of another forward."""

import pytest
import torch
from cases import every_class
from training import PARAM, either_precision, train, trained

SWAPS = {
    "eval": lambda optimizer: optimizer.eval(),
    "true_weights": lambda optimizer: optimizer.true_weights().__enter__(),
    "there and back": lambda optimizer: (optimizer.eval(), optimizer.train()),
    "step": lambda optimizer: optimizer.step(),
}


@every_class
@either_precision
@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("shape", [(), (7,), (130, 130), (3, 2, 4, 4)], ids=str)
def test_a_swap_between_forward_and_backward_raises_in_autograd(cls, master_weights, name, shape):
    """A swap through .data or raw memory would give a silently wrong gradient instead."""
    params = [PARAM(torch.randn(shape))]
    if len(shape) == 4:
        params = [PARAM(torch.randn(shape).to(memory_format=torch.channels_last))]
    optimizer = cls(params, lr=0.1, master_weights=master_weights)
    train(optimizer, params, range(1))
    loss = (params[0] ** 2).sum()
    SWAPS[name](optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_a_swap_of_complex_parameters_raises_in_autograd_too(cls):
    param = PARAM(torch.randn(5, dtype=torch.complex64))
    optimizer = cls([param], lr=0.1)
    param.grad = torch.randn(5, dtype=torch.complex64)
    optimizer.step()
    loss = (param**2).abs().sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_a_swap_that_changes_nothing_leaves_autograd_in_peace(cls):
    """train() before each micro-batch is what trainers do; so is any mode without a prediction."""
    for kwargs, mode in (({}, "train"), ({"prediction_steps": 0}, "eval"), ({"prediction_steps": 0}, "train")):
        optimizer, params = trained(cls, **kwargs)
        loss = sum((param**2).sum() for param in params)
        getattr(optimizer, mode)()
        loss.backward()
