"""What a step reads of DTensors: their local shards, in C++ and in Python alike, and the counters of both."""

import pytest
import torch
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from twins import launches, needs_library, runs

from xgrad_optim import XAdamW
from xgrad_optim.backends import addresses
from xgrad_optim.backends.addresses import NativeReader, PythonReader, ShardReader
from xgrad_optim.layout import local

needs_tensors = pytest.mark.skipif(addresses.unavailable() is not None, reason="no library for tensors")


def sharded(*shape: int) -> DTensor:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return DTensor.from_local(torch.randn(shape), mesh, [Shard(0)])


def trained() -> tuple[XAdamW, list[Tensor]]:
    """A DTensor and a plain tensor in one launch."""
    params = [sharded(4, 3).requires_grad_(), torch.randn(4, 3).requires_grad_()]
    optimizer = XAdamW(params)
    step(optimizer, params)
    return optimizer, params


def step(optimizer: XAdamW, params: list[Tensor]) -> None:
    params[0].grad, params[1].grad = sharded(4, 3), torch.randn(4, 3)
    optimizer.step()


def counters(launch) -> list[tuple[int, int]]:
    """Of each tensor of the launch and of its shard."""
    return [(each._version, local(each)._version) for slot in launch.slots.values() for each in slot]


@needs_library
@needs_tensors
@on_ranks(1, 2)
def test_local_shards_are_read_in_cpp():
    optimizer, params = trained()
    step(optimizer, params)
    (run,) = runs(optimizer)
    assert isinstance(run.runner._reader, ShardReader) and isinstance(run.runner._reader._reader, NativeReader)
    builds = optimizer._planner.builds
    for _ in range(3):
        step(optimizer, params)
    assert optimizer._planner.builds == builds


@needs_tensors
@on_ranks(2)
def test_both_readers_read_shards_and_count_for_the_dtensor_too():
    optimizer, params = trained()
    (launch,) = launches(optimizer)
    given = [sharded(4, 3), torch.randn(4, 3)]
    tables = []
    for cls in (NativeReader, PythonReader):
        reader = ShardReader(launch, cls(launch, True))
        assert reader.read(given)
        tables.append([launch.tables.table.tolist(), launch.tables.grads.tolist()])
        counts = launch.tables.versions.tolist()
        with torch.no_grad():
            local(params[0]).mul_(1)
            params[0].detach().mul_(1)  # moves both
            launch.state["exp_avg"][0].mul_(1)
        assert reader.versions()[1].tolist() == counts[1]
        outer, inner = params[0]._version, local(params[0])._version
        assert reader.versions()[0, 0] == outer + inner > counts[0][0] + 1 and reader.versions()[0, 1] > counts[0][1]
        before, counts = counters(launch), reader.versions().tolist()
        reader.finish()
        # A plain tensor has one counter, a DTensor and its shard have two.
        assert counters(launch) == [(outer + 1, inner + 1) for outer, inner in before]
        assert reader.versions().tolist() == [
            [counts[0][0] + 2, counts[0][1] + 4],
            [counts[1][0] + 1, counts[1][1] + 2],
        ]
    assert tables[0] == tables[1]
    assert tables[0][1] == [local(grad).data_ptr() for grad in given]
    assert [line[0] for line in tables[0][0]] == [local(param).data_ptr() for param in params]


@needs_tensors
@on_ranks(2)
def test_a_replaced_shard_is_noticed_and_stepped():
    for of in ("params", "exp_avg"):
        optimizer, params = trained()
        (launch,) = launches(optimizer)
        for cls in (NativeReader, PythonReader):
            reader = ShardReader(launch, cls(launch, True))
            assert reader.read([sharded(4, 3), torch.randn(4, 3)])
            tensor = params[0] if of == "params" else launch.state["exp_avg"][0]
            tensor._local_tensor = tensor._local_tensor.detach().clone()
            assert not reader.read([sharded(4, 3), torch.randn(4, 3)])
        shard = local(params[0])
        before = shard.clone()
        step(optimizer, params)
        assert local(params[0]) is shard and not torch.equal(shard, before)
