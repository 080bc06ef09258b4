"""A state that somebody writes to while it holds a prediction can't undo it, and says so; nothing else is touched.

A reset of the momentum, a decay of it, a checkpoint copied into it in place. What the parameter holds is taken for
theta then, unless there is a master copy. What undoes the prediction all the same, what is written at theta, and
parameters beside it, are as ever.
"""

import copy
import warnings

import pytest
import torch
from attached import equal
from cases import every_optimizer
from training import clones, either_precision
from twins import needs_library

pytestmark = needs_library
either_backend = pytest.mark.parametrize("backend", ["torch", "cpu"])
WRITES = {
    "zero": lambda buffer: buffer.zero_(),
    "decay": lambda buffer: buffer.mul_(0.5),
    "in a view": lambda buffer: buffer.view(5, 8)[2].add_(1.0),
}
ACTS = {
    "step": lambda optimizer: optimizer.step(),
    "eval": lambda optimizer: optimizer.eval(),
    "train": lambda optimizer: (optimizer.eval(), optimizer.train()),
}


def trained(case, **options):
    """An optimizer in mid-training, its parameters at theta_hat with gradients for a further step, and both weights."""
    generator = torch.Generator().manual_seed(4)
    params = [torch.nn.Parameter(torch.randn(40, generator=generator)) for _ in range(3)]
    optimizer = case.make(params, lr=0.1, prediction_steps=2.0, **options)
    for _ in range(4):
        for param in params:
            param.grad = torch.randn(40, generator=generator)
        optimizer.step()
    optimizer.eval()
    theta = clones(params)
    optimizer.train()
    return optimizer, params, theta, clones(params)


def state_of(optimizer, param):
    return optimizer.state[param][optimizer.rule.state_keys[0]]


@every_optimizer
@either_backend
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("act", ACTS)
def test_what_it_held_is_theta(case, backend, write, act):
    optimizer, params, theta, theta_hat = trained(case, backend=backend)
    twin, twin_params, *_ = trained(case, backend=backend)
    WRITES[write](state_of(optimizer, params[1]))
    with pytest.warns(UserWarning, match="the state of 1 parameters was written to") as record:
        ACTS[act](optimizer)
    assert len(record) == 1
    twin.eval()  # where it may be written to, and to the parameter too
    WRITES[write](state_of(twin, twin_params[1]))
    with torch.no_grad():
        twin_params[1].copy_(theta_hat[1])
    if act == "step":
        twin.step()
        assert equal(params, twin_params)
        assert equal(optimizer.state[params[1]].values(), twin.state[twin_params[1]].values())
    elif act == "eval":
        assert equal(params, [theta[0], theta_hat[1], theta[2]])
    else:
        assert equal(params, theta_hat)
    optimizer.eval()
    twin.eval()
    assert equal(params, twin_params)


@every_optimizer
@either_backend
@pytest.mark.parametrize("act", ACTS)
def test_a_master_copy_knows_theta(case, backend, act):
    optimizer, params, theta, theta_hat = trained(case, backend=backend, master_weights=True)
    twin, twin_params, *_ = trained(case, backend=backend, master_weights=True)
    state_of(optimizer, params[1]).mul_(0.5)
    twin.eval()
    state_of(twin, twin_params[1]).mul_(0.5)
    ACTS[act](optimizer)
    if act == "train":
        assert equal(params, [theta_hat[0], theta[1], theta_hat[2]])
    if act == "step":
        twin.step()
    optimizer.eval()
    twin.eval()
    assert equal(params, twin_params)


@every_optimizer
@either_backend
@either_precision
@pytest.mark.parametrize("act", ACTS)
def test_what_undoes_it_all_the_same_is_silent(case, backend, master_weights, act):
    """As load_state_dict of old does it, tensor by tensor."""
    optimizer, params, theta, theta_hat = trained(case, backend=backend, master_weights=master_weights)
    twin, twin_params, *_ = trained(case, backend=backend, master_weights=master_weights)
    for key in optimizer.rule.state_keys:
        optimizer.state[params[1]][key].copy_(optimizer.state[params[1]][key].clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (optimizer, twin):
            ACTS[act](each)
    assert equal(params, twin_params)
    if act != "step":
        assert equal(params, theta if act == "eval" else theta_hat)


@every_optimizer
@either_backend
@either_precision
def test_at_theta_it_is_free(case, backend, master_weights):
    optimizer, params, theta, _ = trained(case, backend=backend, master_weights=master_weights)
    optimizer.eval()
    state_of(optimizer, params[1]).mul_(0.5)
    before = copy.deepcopy(state_of(optimizer, params[1]))
    optimizer.train()
    optimizer.eval()
    for param, values in zip(params, theta, strict=True):  # a new prediction moves theta by a rounding
        torch.testing.assert_close(param.detach(), values, rtol=0, atol=0 if master_weights else 1e-6)
    assert torch.equal(state_of(optimizer, params[1]), before)
