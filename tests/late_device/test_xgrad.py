"""XGrad around an optimizer of torch.optim: its swaps run in the kernels of the late device, and wait for nothing."""

import pytest
import torch

from late_device import device
from late_device.twins import ChangingStreams, OneStream, SideStreams, Twins
from xgrad_optim import XGrad


def around_sgd(params, backend, **options):
    return XGrad(torch.optim.SGD(params, lr=0.05, momentum=0.9, foreach=False), backend=backend, **options)


@pytest.mark.parametrize("delivery", [OneStream, ChangingStreams, SideStreams], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_equals_the_cpu(dtype, delivery):
    twins, deliver = Twins(around_sgd, dtype), delivery()
    for step in range(6):
        twins.step(step, deliver, without=1 if step == 3 else None)
        twins.look(f"step {step}")
        if step % 2:
            for mode in ("eval", "train"):
                twins.do(lambda optimizer, mode=mode: getattr(optimizer, mode)())
                twins.look(f"{mode} after step {step}")
    twins.check()


def test_a_steady_step_waits_for_nothing_and_adds_four_operations_a_parameter_at_most():
    """Beside the base's: two swaps, of one launch each with its uploads; a copy and a difference of each parameter."""
    twins = Twins(around_sgd)
    base = torch.optim.SGD([torch.nn.Parameter(param.detach().clone()) for param in twins.late], lr=0.05, momentum=0.9,
                           foreach=False)  # fmt: skip
    for step in range(4):
        twins.step(step, OneStream())
        for param, grad in zip(base.param_groups[0]["params"], twins.late, strict=True):
            param.grad = grad.grad.clone()
        with device.counting() as alone:
            base.step()
        with device.counting() as counts:
            twins.late_optimizer.step()
        twins.host_optimizer.step()
        assert counts.synchronizations == 0
    assert counts.operations.total() - alone.operations.total() <= 4 * len(twins.late)
    twins.check()


def test_a_capture_is_refused_and_nothing_has_changed():
    twins = Twins(around_sgd)
    twins.step(0, OneStream())
    twins.look("before")
    with pytest.raises(RuntimeError, match="XGrad can't be captured"), device.capture():
        twins.late_optimizer.step()
    twins.look("after")
    twins.step(1, OneStream())
    twins.check()
