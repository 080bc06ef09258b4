"""Where the optimizer does not know which weights are in place it looks, and gives everybody the right ones.

It does not know right after attach, a load, a copy, or a step that was skipped. Each of these, in either mode, before
each of those who ask for weights.
"""

import copy
import pickle

import pytest
import torch
from attached import Watch, X, attached, both_weights, either_mode, equal
from cases import train_step
from training import clones, either_precision

from xgrad_optim import XAdamW


def attach_again(model, optimizer):
    optimizer.attach(model).remove()
    optimizer.attach(model)


def attach_a_wrapper(model, optimizer):
    optimizer.attach(torch.nn.Sequential(model))


def load(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_and_attach(model, optimizer):
    """What is not attached is saved, and loaded, in either mode."""
    optimizer.attach(model).remove()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.attach(model)


def skip_a_step(model, optimizer):
    """As a GradScaler skips it, with the weights that are in place."""
    for param in model.parameters():
        param.grad = torch.full_like(param, torch.inf)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    optimizer.zero_grad()


def step_without_gradients(model, optimizer):
    """It moves nothing, and puts theta_hat in place."""
    optimizer.zero_grad()
    optimizer.step()


def write_numbers(model, optimizer):
    """Equal ones, but the optimizer has to look again."""
    for state in optimizer.state.values():
        state["step"].add_(0.0)


WAYS = {
    "attached again": attach_again,
    "attached in a wrapper": attach_a_wrapper,
    "loaded": load,
    "loaded, then attached": load_and_attach,
    "a skipped step": skip_a_step,
    "a step without gradients": step_without_gradients,
    "numbers written to": write_numbers,
}


def forward(model, is_training):
    watch = Watch(model)
    model.train(is_training)
    model(X)
    (seen,) = watch.seen
    return seen


def in_true_weights(model, optimizer):
    with optimizer.true_weights():
        return clones(model.parameters())


def held_after(call):
    def held(model, optimizer):
        call(model, optimizer)
        return clones(model.parameters())

    return held


THETA = {
    "eval()": held_after(lambda model, optimizer: optimizer.eval()),
    "model.eval()": held_after(lambda model, optimizer: model.eval()),
    "true_weights()": in_true_weights,
    "a forward in evaluation": lambda model, optimizer: forward(model, False),
    "model.state_dict()": lambda model, optimizer: clones(model.state_dict().values()),
    "a submodule's state_dict()": lambda model, optimizer: [
        *clones(model[0].state_dict().values()),
        *clones([*model.parameters()][2:]),
    ],
    "optimizer.state_dict()": held_after(lambda model, optimizer: optimizer.state_dict()),
    "a copy": lambda model, optimizer: clones(copy.deepcopy(model).parameters()),
    "a pickle": lambda model, optimizer: clones(pickle.loads(pickle.dumps(model)).parameters()),
    "optimizer.load_state_dict()": held_after(load),
}
THETA_HAT = {
    "train()": held_after(lambda model, optimizer: optimizer.train()),
    "a forward in training": lambda model, optimizer: forward(model, True),
    "eval() and train()": held_after(lambda model, optimizer: (optimizer.eval(), optimizer.train())),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ask", [*THETA, *THETA_HAT])
@either_mode
@either_precision
def test_who_asks_gets_the_right_weights(way, ask, mode, master_weights):
    model, optimizer = attached(XAdamW, master_weights=master_weights)
    theta, theta_hat = both_weights(optimizer)
    optimizer.train(mode)
    WAYS[way](model, optimizer)
    wanted = theta if ask in THETA else theta_hat
    assert equal((THETA | THETA_HAT)[ask](model, optimizer), wanted)
    assert equal(both_weights(optimizer)[0], theta) and equal(model.parameters(), theta_hat)


@pytest.mark.parametrize("way", WAYS)
@either_mode
@either_precision
def test_who_asks_for_the_mode_is_told_and_training_goes_on(way, mode, master_weights):
    model, optimizer = attached(XAdamW, master_weights=master_weights)
    twin, twin_optimizer = attached(XAdamW, master_weights=master_weights)
    theta, theta_hat = both_weights(optimizer)
    optimizer.train(mode)
    WAYS[way](model, optimizer)
    assert equal(model.parameters(), theta_hat if optimizer.predicted else theta)
    for step in range(5, 8):
        for each in ((model, optimizer), (twin, twin_optimizer)):
            train_step(each[0].train(), each[1], step)
        assert equal(model.parameters(), twin.parameters())
