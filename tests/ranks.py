"""Tests that need several processes: `@on_ranks(2, 4)` runs a test function on every rank of a gloo group.

The processes are forked off a server that has imported torch once, so a group starts in a fraction of a second. When a
rank fails its process ends, which ends the others' waiting; all tracebacks are shown.
"""

import functools
import importlib
import inspect
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import PLAIN
from torch import Tensor
from torch.distributed.tensor import DTensor

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
TEST_TIMEOUT = 180.0
"""Seconds after which a test fails whose ranks hang elsewhere than in a collective."""

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["pytest", "torch.distributed.fsdp", "torch.distributed.checkpoint", "xgrad_optim"])


def on_ranks(*world_sizes: int) -> Callable[[Callable], Callable]:
    """Make the test, with fixtures and parameters that pickle, run on every rank of a group of each of these sizes."""

    def decorate(test: Callable) -> Callable:
        @pytest.mark.parametrize("world_size", world_sizes)
        @functools.wraps(test)
        def spread(world_size: int, **arguments: Any) -> None:
            run(test, world_size, **arguments)

        of_test = inspect.signature(test)
        world_size = inspect.Parameter("world_size", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        spread.__signature__ = of_test.replace(parameters=[world_size, *of_test.parameters.values()])
        return spread

    return decorate


def with_every_optimizer(test: Callable) -> Callable:
    """Under `on_ranks`: the test runs for one optimizer after the other, in one group, which is what takes time."""

    @functools.wraps(test)
    def run_all(**arguments: Any) -> None:
        for case in PLAIN:
            try:
                test(case, **arguments)
            except Exception as error:
                raise AssertionError(f"with {case.id}") from error

    of_test = inspect.signature(test)
    run_all.__signature__ = of_test.replace(parameters=list(of_test.parameters.values())[1:])
    return run_all


def run(function: Callable, world_size: int, is_second: bool = False, **arguments: Any) -> None:
    """Run a module's function on every rank of a new group, and fail with what its ranks raised."""
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with tempfile.TemporaryDirectory() as folder:
        name = (function.__module__, function.__name__)
        places = [(Path(folder), rank, world_size) for rank in range(world_size)]
        members = [_processes.Process(target=_member, args=(name, place, arguments)) for place in places]
        for member in members:
            member.start()
        end = time.monotonic() + TEST_TIMEOUT
        for member in members:
            member.join(max(0.0, end - time.monotonic()))
        exits = [member.exitcode for member in members]
        for member in members:
            member.kill()
            member.join()
        printed = "".join(file.read_text() for file in Path(folder).glob("*.stderr"))
        if -signal.SIGABRT in exits and "gloo" in printed and not is_second:
            # torch's gloo aborts a rank now and then, on a busy machine. Nothing else is tried again.
            run(function, world_size, is_second=True, **arguments)
        elif any(exits) or None in exits:
            texts = [file.read_text() for file in sorted(Path(folder).glob("*.txt"))]
            title = f"exit codes of the ranks: {exits} (None: killed, it hung)"
            pytest.fail("\n".join([title, *texts, printed]), pytrace=False)


def _member(name: tuple[str, str], place: tuple[Path, int, int], arguments: dict[str, Any]) -> None:
    """One rank's part in a test. Where it fails it leaves its traceback and is gone, so that no other waits for it."""
    folder, rank, world_size = place
    os.dup2(os.open(folder / f"{rank}.stderr", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        function = getattr(importlib.import_module(name[0]), name[1])
        function = getattr(function, "__wrapped__", function)  # the test, not what spreads it
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", rendezvous, COLLECTIVE_TIMEOUT, world_size, rank)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(predicted weights|xgrad_optim).*")
            function(**arguments)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
        os._exit(0)  # nothing is left to do but to free, and torch's gloo can hang in that
    except BaseException:
        (folder / f"{rank}.txt").write_text(f"rank {rank} of {world_size}: {traceback.format_exc()}")
        os._exit(1)


def share() -> slice:
    """This rank's part of a batch."""
    return slice(dist.get_rank(), None, dist.get_world_size())


def whole(tensor: Tensor) -> Tensor:
    """A copy of all that the ranks hold of a tensor."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All that the optimizer keeps, in an order that does not depend on how it came to be."""
    states = [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]
    return [state[key] for state in states for key in sorted(state)]


def assert_close(model: torch.nn.Module, twin: torch.nn.Module, tolerance: float = 1e-9) -> None:
    """The model holds, over all ranks, what its twin on one process does."""
    for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(param), expected.detach(), rtol=tolerance, atol=tolerance / 1000)


def assert_ranks_agree(tensors: Iterable[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Every rank of the group holds the same bits."""
    for tensor in tensors:
        mine = tensor.detach().contiguous()
        theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(theirs, mine, group=group)
        assert all(torch.equal(other, mine) for other in theirs)
