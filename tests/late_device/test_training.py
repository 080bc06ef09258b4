"""Whole trainings on the late device equal the CPU back end in every bit, whatever streams and memory do.

Nothing waits: the host has run all steps before the device has begun.
"""

import ptxsim
import pytest
import torch
from cases import PLAIN
from twins import same_bits

from late_device import device
from late_device.models import MODES
from late_device.twins import DELIVERIES, ChangingStreams, Freed, OneStream, Twins, train, upload
from xgrad_optim import XAdamW

OPTIONS = {
    "default": {},
    "fused": {"fused": True},
    "capturable": {"capturable": True},
    "amsgrad": {"amsgrad": True},
    "master weights": {"master_weights": True},
    "maximize": {"maximize": True},
}
DTYPES = (torch.float32, torch.bfloat16)

CONFIGURATIONS = {
    f"{case.optimizer.__name__} {name}": (case.make, options)
    for case in PLAIN
    for name, options in OPTIONS.items()
    if case.takes(*options)
}

every_optimizer = pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
every_configuration = pytest.mark.parametrize(("make", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)


@every_configuration
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("delivery", DELIVERIES.values(), ids=DELIVERIES)
def test_equals_the_cpu(make, options, dtype, delivery):
    twins, deliver = Twins(make, dtype, **options), delivery()
    assert train(twins, deliver).synchronizations == 0
    twins.check()
    if isinstance(deliver, Freed):
        deliver.check()


@every_optimizer
@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"master_weights": True, "fused": True}], ids=str)
def test_float16(case, options):
    twins = Twins(case.make, torch.float16, **options)
    assert train(twins, OneStream()).synchronizations == 0
    twins.check()


@every_optimizer
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_the_host_runs_20_steps_ahead(case, options):
    twins = Twins(case.make, **options)
    assert train(twins, OneStream(), steps=20).synchronizations == 0
    assert device.pending() > 100
    twins.check()


def test_groups_with_options_of_their_own():
    """Other rows, other dtypes and state in one optimizer: several launches in a step."""

    def make(params, **options):
        groups = [
            {"params": params[:1], "lr": 0.1, "prediction_steps": 3},
            {"params": params[1:2], "weight_decay": 0.2, "amsgrad": True},
            {"params": params[2:], "betas": (0.5, 0.9), "prediction_steps": 0},
        ]
        return XAdamW(groups, **options)

    for options in ({}, {"fused": True}):
        twins = Twins(make, **options)
        assert train(twins, OneStream()).synchronizations == 0
        twins.check()


def test_tensors_that_no_kernel_takes():
    """A parameter with gaps, and a gradient that lies otherwise than its parameter."""
    pairs = []
    for place, backend in ((upload, "triton"), (torch.clone, "cpu")):
        generator = torch.Generator().manual_seed(3)
        params = [
            torch.nn.Parameter(place(torch.randn(6, 8, generator=generator))[:, ::2]),
            torch.nn.Parameter(place(torch.randn(4, 5, generator=generator))),
            torch.nn.Parameter(place(torch.randn(30, generator=generator))),
        ]
        optimizer = XAdamW(params, backend=backend)
        for _ in range(3):
            for param in params:
                param.grad = place(torch.randn(param.shape, generator=generator))
            params[1].grad = place(torch.randn(5, 4, generator=generator)).t()
            optimizer.step()
        pairs.append(params)
    for late, host in zip(*pairs, strict=True):
        assert same_bits(late, host)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_a_step_on_another_stream_reads_tables_of_its_own(options):
    """The first stream goes on by itself: what was allocated on it and is freed now is a stranger's before the step on
    the other stream has run."""
    twins = Twins(XAdamW, **options)
    twins.step(0, OneStream())
    other = torch.Stream(device=device.NAME)
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        twins.step(1, OneStream())
    twins.late_optimizer._planner.clear()  # as load_state_dict does, but the state's memory stays
    strangers = [torch.full((size,), 7, dtype=torch.int64, device=device.NAME) for size in (8, 32, 128, 512) * 8]
    torch.accelerator.current_stream().wait_stream(other)
    twins.check()
    assert all(bool((stranger.cpu() == 7).all()) for stranger in strangers)


# -- controls: what these tests can notice -----------------------------------------------------------------------------


def test_reused_pinned_memory_is_noticed():
    twins = Twins(XAdamW)
    with device.reusing_pinned_memory_at_once(), pytest.raises((AssertionError, ptxsim.MemoryFault)):
        train(twins, OneStream())
        twins.check()
    device.abandon()


def test_tables_that_are_uploaded_after_the_launch_are_noticed():
    twins = Twins(XAdamW)
    device.synchronize()
    with device.uploading_after_the_launch(), pytest.raises((AssertionError, ptxsim.MemoryFault)):
        train(twins, OneStream())
        twins.check()
    device.abandon()


def test_streams_that_do_not_wait_are_noticed():
    class Careless(ChangingStreams):
        def __call__(self, optimizer, params, grads):
            with torch.Stream(device=device.NAME):
                OneStream()(optimizer, params, grads)

    twins = Twins(XAdamW)
    device.synchronize()
    with pytest.raises((AssertionError, ptxsim.MemoryFault)):
        train(twins, Careless())
        twins.check()
    device.abandon()
