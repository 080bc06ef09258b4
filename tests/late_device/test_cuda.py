"""nvcc's kernels take the same path as Triton's: uploaded tables, streams, memory that is handed out again."""

import pytest
import torch
from cases import PLAIN
from cuda_kernels import needs_nvcc

from late_device import cuda_operators
from late_device.captured import Captured
from late_device.device import NAME
from late_device.models import MODES
from late_device.twins import ChangingStreams, Freed, Twins, train
from xgrad_optim import XAdamW
from xgrad_optim.backends import cuda

pytestmark = needs_nvcc


@pytest.fixture(autouse=True)
def _this_is_a_cuda_device(monkeypatch) -> None:
    """What the back end asks torch.cuda for. All else of it runs as it is."""
    cuda_operators.register()
    monkeypatch.setattr(cuda, "DEVICE", NAME)
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    monkeypatch.setattr(cuda, "why_no_library", lambda: None)
    monkeypatch.setattr(cuda, "stream_of", lambda device: torch.accelerator.current_stream(device).stream_id)


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.id)
@pytest.mark.parametrize("options", [*MODES.values(), {"master_weights": True}], ids=[*MODES, "master weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_cpu(case, options, dtype):
    for deliver in (ChangingStreams(), Freed()):
        twins = Twins(case.make, dtype, backend="cuda", **options)
        assert train(twins, deliver, steps=4).synchronizations == 0
        twins.check()


def test_a_captured_step_follows_the_lr_tensor():
    pair = Captured(XAdamW, backend="cuda")
    pair.warm_up()
    graph = pair.capture()
    for step in range(2, 6):
        pair.replayed_step(step, graph)
    pair.check("after the replays")
