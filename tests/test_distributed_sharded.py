"""Parameters that are DTensors: FSDP2 on one- and two-dimensional meshes, tensor parallelism, and both together.

The rule runs on the local shards, which may be uneven or empty; the whole must train as a single process does. What can
break it: DTensor operations in a step (slow, and each is a chance for a collective), state that lies otherwise than its
parameter, and gathered copies of the weights that a swap does not reach.
"""

import pytest
import torch
import torch.distributed as dist
from cases import loss_of, small_model, train_step
from ranks import assert_close, assert_ranks_agree, on_ranks, share, state_tensors, whole, with_every_optimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

from xgrad_optim import XAdamW

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0}


def sharded(model, **options):
    """As users do it: every layer, then the root."""
    for layer in (model[0], model[2], model):
        fully_shard(layer, **options)
    return model


def assert_trains_alike(model, optimizer, twin, expected, share, steps=5):
    """Steps with changing lr and with evaluation in between, compared in both modes."""
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = 0.02 / (step + 1)
        train_step(model, optimizer, step, share)
        train_step(twin, expected, step)
        for each in (optimizer, expected):
            each.eval()
        assert_close(model, twin)
        if step != 2:
            for each in (optimizer, expected):
                each.train()
            assert_close(model, twin)
    assert optimizer._planner.builds == 1
    for param in model.parameters():
        assert isinstance(param, DTensor)
        for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
            if key in (state := optimizer.state[param]):
                assert state[key].placements == param.placements


@on_ranks(2)
@with_every_optimizer
def test_fsdp_trains_as_one_process(case):
    """Uneven shards: 7 rows and 3 rows over 2 ranks."""
    model, twin = sharded(small_model()), small_model()
    optimizer, expected = (case.make(each.parameters(), **OPTIONS) for each in (model, twin))
    assert_trains_alike(model, optimizer, twin, expected, share())


@on_ranks(4)
def test_fsdp_with_shards_that_are_empty():
    """The last of 4 ranks has none of the 3 rows."""
    model, twin = sharded(small_model()), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    assert_trains_alike(model, optimizer, twin, expected, share())


@pytest.mark.parametrize("backend", ["torch", None], ids=["torch", "best"])
@on_ranks(4)
def test_hsdp(backend):
    """Shards within pairs, replicas across: the replicas of a shard hold the same bits."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, twin = sharded(small_model(), mesh=mesh), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS, backend=backend) for each in (model, twin))
    assert_trains_alike(model, optimizer, twin, expected, share())
    held = (*model.parameters(), *state_tensors(optimizer))
    replicas = mesh["replicate"].get_group()
    assert_ranks_agree([each.to_local() if isinstance(each, DTensor) else each for each in held], replicas)


@on_ranks(2)
def test_master_weights_and_amsgrad_of_shards():
    model, twin = sharded(small_model(torch.bfloat16)), small_model(torch.bfloat16)
    more = {"master_weights": True, "amsgrad": True}
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS, **more) for each in (model, twin))
    for _ in range(4):
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = torch.randn_like(other)
            param.grad = torch.distributed.tensor.distribute_tensor(other.grad, param.device_mesh, param.placements)
        optimizer.step()
        expected.step()
    assert all(map(torch.equal, map(whole, model.parameters()), twin.parameters()))
    assert all(map(torch.equal, map(whole, state_tensors(optimizer)), state_tensors(expected)))


@on_ranks(2)
def test_fsdp_with_a_mixed_precision_policy():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    model, twin = sharded(small_model(torch.float32), mp_policy=policy), small_model(torch.float32)
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    for step in range(4):
        train_step(model, optimizer, step, share())
        train_step(twin, expected, step)
    assert all(param.dtype == param.grad.dtype == torch.float32 for param in model.parameters())
    assert_close(model, twin, 0.05)


@on_ranks(2)
def test_fsdp_with_cpu_offload():
    model, twin = sharded(small_model(), offload_policy=CPUOffloadPolicy(pin_memory=False)), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    assert_trains_alike(model, optimizer, twin, expected, share())


@on_ranks(2)
def test_fsdp_clips_gradients_to_the_norm_of_one_process():
    model, twin = sharded(small_model()), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    for step in range(3):
        for each, of, part in ((model, optimizer, share()), (twin, expected, slice(None))):
            of.zero_grad()
            loss_of(each, step, part).backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            of.step()
    assert_close(model, twin)


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


@on_ranks(2)
@with_every_optimizer
def test_tensor_parallel_trains_as_one_process(case):
    """The last bias is replicated: it must be the same bits on every rank."""
    model, twin = parallelize_module(small_model(hidden=8), init_device_mesh("cpu", (2,)), PLAN), small_model(hidden=8)
    optimizer, expected = (case.make(each.parameters(), **OPTIONS) for each in (model, twin))
    assert_trains_alike(model, optimizer, twin, expected, slice(None))
    assert_ranks_agree([model[2].bias.to_local()])


@on_ranks(4)
def test_tensor_parallel_and_fsdp_together():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, twin = mesh["data"], small_model(hidden=8)
    model = sharded(parallelize_module(small_model(hidden=8), mesh["tensor"], PLAN), mesh=data)
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    assert_trains_alike(model, optimizer, twin, expected, slice(data.get_local_rank(), None, data.size()))


@pytest.mark.parametrize("backend", ["torch", None], ids=["torch", "best"])
@on_ranks(2)
def test_gradients_that_are_sums_still_to_do(backend):
    """Sequence parallelism leaves each rank its part of a norm's gradient; the weights are the same on all ranks."""
    twin = torch.nn.LayerNorm(6, dtype=torch.float64)
    model = torch.nn.LayerNorm(6, dtype=torch.float64)
    parallelize_module(model, init_device_mesh("cpu", (2,)), SequenceParallel())
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS, backend=backend) for each in (model, twin))
    positions = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    for _ in range(4):
        x = torch.randn(2, 6, 6, dtype=torch.float64)
        optimizer.zero_grad()
        expected.zero_grad()
        (model(x[:, positions]).to_local() ** 3).sum().backward()
        (twin(x) ** 3).sum().backward()
        assert model.weight.grad.placements[0].is_partial()
        optimizer.step()
        expected.step()
        assert_close(model, twin)
        assert_ranks_agree([param.to_local() for param in model.parameters()])
    assert optimizer._planner.builds == 1
    assert model.weight.grad.placements[0].is_partial(), "gradients are read only"
