"""torch.distributed.pipelining with one optimizer per stage: it must train as a single process with one optimizer does.

What can break it: forwards and backwards of micro-batches take turns, and the weights may not change between them,
although `attach` looks at each.
"""

import pytest
import torch
import torch.distributed as dist
from cases import PLAIN
from ranks import on_ranks
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0}
BLOCKS, WIDTH, MICRO_BATCHES = 4, 6, 4


def blocks():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(BLOCKS)]
    return [torch.nn.Sequential(layer, torch.nn.Tanh()) for layer in layers]


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(2, 16, WIDTH, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B], ids=["GPipe", "1F1B"])
@on_ranks(2, 4)
def test_a_pipeline_trains_as_one_process(schedule):
    """With attach, and with an evaluation through the pipeline after every step."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * BLOCKS // size, (rank + 1) * BLOCKS // size)
    module, twin = torch.nn.Sequential(*blocks()[mine]), torch.nn.Sequential(*blocks())
    stage = PipelineStage(module, rank, size, torch.device("cpu"))
    pipeline = schedule(stage, MICRO_BATCHES, loss_fn=torch.nn.functional.mse_loss)
    for case in PLAIN:
        optimizer, expected = (case.make(each.parameters(), **OPTIONS) for each in (module, twin))
        handle, twin_handle = optimizer.attach(module), expected.attach(twin)
        for step in range(3):
            x, y = batch(step)
            for each in (module, twin):
                each.train()
            optimizer.zero_grad()
            expected.zero_grad()
            torch.nn.functional.mse_loss(twin(x), y).backward()
            args, kwargs = ((x,) if rank == 0 else ()), ({"target": y} if rank == size - 1 else {})
            pipeline.step(*args, **kwargs)
            optimizer.step()
            expected.step()
            for each in (module, twin):
                each.eval()
            output, expected_output = pipeline.eval(*args, **kwargs), twin(x)
            if rank == size - 1:
                torch.testing.assert_close(output, expected_output, rtol=1e-9, atol=1e-12)
            assert not optimizer.predicted
            for param, other in zip(module.parameters(), twin[mine].parameters(), strict=True):
                torch.testing.assert_close(param, other, rtol=1e-9, atol=1e-12)
        handle.remove()
        twin_handle.remove()
