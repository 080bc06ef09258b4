"""The table of overhead.py for DTensors: a step on local shards, every gradient new, beside torch.optim's on the same.

Each rank of a gloo group on this machine has optimizers of its own, and rank 0 reports what it measured. Steps exchange
nothing; the ranks are there to cut the tensors. torch's fused SGD takes no DTensors, so AdamW alone is measured.
"""

import functools
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing
from measuring import Report, interleave
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from xgrad_optim import XAdamW

SHAPE = (4, 64)
"""Of each local shard."""


def measure_sharded(report: Report, rounds: int, world_sizes: tuple[int, ...] = (1, 2), count: int = 100) -> None:
    """Whole steps, Python included, on one thread of each rank."""
    rows: list[list[object]] = []
    for world_size in world_sizes:
        with tempfile.TemporaryDirectory() as folder:
            measured = Path(folder) / "measured"
            arguments = world_size, rounds, count, Path(folder) / "store", measured
            torch.multiprocessing.spawn(_rank, arguments, world_size)
            medians: dict[str, float] = torch.load(measured)
        for name, own in medians.items():
            ratios = [own / medians[f"AdamW {peer}"] for peer in ("default", "fused")]
            rows.append([world_size, count, name, own * 1e6, *ratios])
    columns = ["ranks", "tensors", "optimizer", "us", "to default", "to fused"]
    report.table(f"steps on DTensors with new gradients, local shards of {SHAPE}", columns, rows)


def _rank(rank: int, world_size: int, rounds: int, count: int, store: Path, measured: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world_size)
    mesh = DeviceMesh("cpu", torch.arange(world_size))
    medians = _medians(mesh, rounds, count)
    if rank == 0:
        torch.save(medians, measured)
    distributed.barrier()
    distributed.destroy_process_group()


def _medians(mesh: DeviceMesh, rounds: int, count: int) -> dict[str, float]:
    """Seconds of a step of each optimizer; gradients are made off the clock."""
    makers = {
        "AdamW default": torch.optim.AdamW,
        "AdamW fused": functools.partial(torch.optim.AdamW, fused=True),
        "XAdamW": XAdamW,
    }
    params = {name: [_sharded(mesh).requires_grad_() for _ in range(count)] for name in makers}
    optimizers = {name: make(params[name]) for name, make in makers.items()}

    def new_gradients(name: str) -> None:
        for param in params[name]:
            param.grad = _sharded(mesh)

    steps = {name: optimizer.step for name, optimizer in optimizers.items()}
    seconds = interleave(steps, rounds, warmup=3, clock=time.thread_time, prepare=new_gradients)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _sharded(mesh: DeviceMesh) -> Tensor:
    return DTensor.from_local(torch.randn(SHAPE), mesh, [Shard(0)], run_check=False)
