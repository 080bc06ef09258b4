"""The host never waits, and a step or a swap is one launch and little else."""

import pytest

from late_device import device
from late_device.device import KERNEL, UPLOAD
from late_device.models import MODES, Net
from late_device.twins import Twins, gradients, upload
from xgrad_optim import XAdamW

MOST_OPERATIONS = 3
"""Of a step: the launch, an upload of what has changed, the numbers where they live on the device."""


@pytest.fixture(params=MODES.values(), ids=MODES)
def optimizer(request):
    """One that has taken steps and swaps, whose parameters have gradients that stay where they are."""
    twins = Twins(XAdamW, **request.param)
    for param, grad in zip(twins.late, gradients(twins.host, 0), strict=True):
        param.grad = upload(grad)
    late = twins.late_optimizer
    for _ in range(2):
        late.step()
        late.eval()
        late.train()
    late.step()
    return late


ACTIONS = {
    "step": lambda optimizer: optimizer.step(),
    "eval": lambda optimizer: optimizer.eval(),
    "eval and train": lambda optimizer: (optimizer.eval(), optimizer.train()),
    "predicted": lambda optimizer: optimizer.predicted,
    "eval and predicted": lambda optimizer: (optimizer.eval(), optimizer.predicted),
    "state_dict": lambda optimizer: optimizer.state_dict(),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_the_host_does_not_wait(action, optimizer):
    with device.counting() as counts:
        action(optimizer)
    assert counts.synchronizations == 0


def test_the_host_does_not_wait_for_true_weights(optimizer):
    with device.counting() as counts, optimizer.true_weights():
        pass
    assert counts.synchronizations == 0


def test_the_host_does_not_wait_in_an_attached_forward(optimizer):
    net = Net(optimizer.param_groups[0]["params"])
    optimizer.attach(net)
    with device.counting() as counts:
        net.train()()
        net.eval()()
        net.state_dict()
        net.train()()
    assert counts.synchronizations == 0


def test_a_steady_step_is_few_operations(optimizer):
    with device.counting() as counts:
        optimizer.step()
    assert counts.operations[KERNEL] >= 1
    assert counts.operations.total() <= MOST_OPERATIONS, counts.operations


def test_a_steady_swap_is_few_operations(optimizer):
    for swap in (optimizer.eval, optimizer.train):
        with device.counting() as counts:
            swap()
        assert counts.operations[KERNEL] >= 1
        assert counts.operations.total() <= MOST_OPERATIONS, counts.operations


def test_gradients_that_have_moved_are_an_upload(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = param.grad.clone()
    with device.counting() as counts:
        optimizer.step()
    assert counts.operations[UPLOAD] == 1
    assert counts.operations.total() <= MOST_OPERATIONS, counts.operations
