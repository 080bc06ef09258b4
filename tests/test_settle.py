"""What takes no more steps holds theta from the next step or swap on, also where that has nothing else to do."""

import pytest
import torch
from cases import every_optimizer
from twins import needs_library

pytestmark = needs_library
either_backend = pytest.mark.parametrize("backend", ["torch", "cpu"])
acts = pytest.mark.parametrize("act", ["step", "train", "eval"])


def trained(case, backend):
    """An optimizer in mid-training; theta of each parameter, and the parameters, which hold theta_hat."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(3)]
    optimizer = case.make([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones(9)
    optimizer.step()
    with optimizer.true_weights():
        theta = [param.detach().clone() for param in params]
    assert not torch.equal(theta[2], params[2])
    for param in params:
        param.grad = None
    return optimizer, theta, params


def run(optimizer, params, act):
    if act == "step":
        params[0].grad = torch.ones(9)
    getattr(optimizer, act)()


def freeze_an_idle_one(optimizer, params):
    """The step before had no gradient for it either, so that nothing else tells the next one of it."""
    run(optimizer, params, "step")
    params[2].requires_grad_(False)


def freeze_one_with_loaded_state(optimizer, params):
    optimizer.load_state_dict(optimizer.state_dict())
    params[2].requires_grad_(False)


def remove_its_group(optimizer, params):
    optimizer.param_groups.pop()


def take_its_state_away(optimizer, params):
    del optimizer.state[params[2]]


LEAVING = (freeze_an_idle_one, freeze_one_with_loaded_state, remove_its_group, take_its_state_away)


@every_optimizer
@either_backend
@acts
@pytest.mark.parametrize("leave", LEAVING, ids=lambda leave: leave.__name__)
def test_what_leaves_holds_theta(case, backend, act, leave):
    optimizer, theta, params = trained(case, backend)
    leave(optimizer, params)
    run(optimizer, params, act)
    assert torch.equal(params[2], theta[2])


@every_optimizer
@either_backend
def test_parameters_that_were_in_step_when_a_swap_was_planned(case, backend):
    """The plan of a swap is used again; the two of them have taken as many steps when it is made, and not later."""
    first, second = params = [torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2)]
    optimizer = case.make(params, lr=0.1, backend=backend)

    def step(param):
        param.grad = torch.ones(9)
        optimizer.step()
        param.grad = None

    step(first)
    step(second)
    optimizer.eval()
    optimizer.train()
    theta_hat = first.detach().clone()
    step(second)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(first, theta_hat)
    assert [int(optimizer.state[param]["step"]) for param in params] == [1, 2]


@every_optimizer
@either_backend
def test_two_halves_that_are_frozen_in_turn(case, backend):
    """Each step's gradient is one at theta_hat, though zero_grad() leaves a frozen half without a gradient."""
    halves = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
    model = torch.nn.Sequential(*halves)
    optimizers = [case.make(half.parameters(), lr=0.1, backend=backend) for half in halves]
    for optimizer in optimizers:
        optimizer.attach(model)
    for _ in range(3):
        model.eval()(torch.ones(2, 3))
        model.train()
        for half, other, optimizer in zip(halves, reversed(halves), optimizers, strict=True):
            half.requires_grad_(True)
            other.requires_grad_(False)
            model(torch.ones(2, 3)).sum().backward()
            assert next(half.parameters()) not in optimizer.state or optimizer.predicted
            optimizer.step()
            optimizer.zero_grad()
            assert optimizer.predicted
            theta_hat = [param.detach().clone() for param in half.parameters()]
            optimizer.eval()
            assert not all(map(torch.equal, theta_hat, half.parameters()))
            optimizer.train()
            assert all(map(torch.equal, theta_hat, half.parameters()))


@every_optimizer
@either_backend
@acts
def test_a_frozen_parameter_whose_state_is_a_copy(case, backend, act):
    """The copy says that the parameter holds theta_hat, which is undone by then."""
    optimizer, theta, params = trained(case, backend)
    optimizer.state[params[2]] = {key: value.clone() for key, value in optimizer.state[params[2]].items()}
    params[2].requires_grad_(False)
    run(optimizer, params, act)
    assert torch.equal(params[2], theta[2])
    for mode in (False, True, False):
        optimizer.train(mode)
        assert torch.equal(params[2], theta[2])


@every_optimizer
@either_backend
@acts
def test_a_frozen_parameter_behind_one_of_which_nothing_is_predicted(case, backend, act):
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 9)) for _ in range(2)]
    groups = [{"params": params[:1], "prediction_steps": 0.0}, {"params": params[1:]}]
    optimizer = case.make(groups, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones(9)
    optimizer.step()
    theta_hat = params[1].detach().clone()
    params[1].grad = None
    params[1].requires_grad_(False)
    run(optimizer, params, act)
    theta = params[1].detach().clone()
    assert not torch.equal(theta, theta_hat)
    optimizer.eval()
    assert torch.equal(params[1], theta)
