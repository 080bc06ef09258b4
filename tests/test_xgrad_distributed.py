"""XGrad under PyTorch's own engines: replicas agree, shards train as one process does, checkpoints resume on shards."""

import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import small_model, train_step
from ranks import assert_close, assert_ranks_agree, on_ranks, share
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from xgrad_bases import BASES, around_adamw

from xgrad_optim import XGrad

NAMES = ("SGD momentum", "AdamW", "AdamW foreach")


def make(model, name):
    return XGrad(BASES[name](model.parameters()), 2.0)


def sharded():
    model = small_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def assert_trains_alike(model, optimizer, twin, expected):
    optimizer.attach(model)
    for step in range(4):
        model.train()
        train_step(model, optimizer, step, share())
        train_step(twin, expected, step)
        for mode in (True, False):
            for each in (optimizer, expected):
                each.train(mode)
            assert_close(model, twin)
        expected.train()


@on_ranks(2)
def test_replicas_agree_with_each_other_and_with_one_process():
    for name in NAMES:
        model, twin = DistributedDataParallel(small_model()), small_model()
        optimizer, expected = make(model, name), make(twin, name)
        assert_trains_alike(model, optimizer, twin, expected)
        assert_ranks_agree(model.parameters())


@on_ranks(2)
def test_shards_train_as_one_process():
    """Uneven ones: 7 rows and 3 rows over 2 ranks."""
    for name in NAMES:
        model, twin = sharded(), small_model()
        optimizer, expected = make(model, name), make(twin, name)
        assert_trains_alike(model, optimizer, twin, expected)
        for param, own in optimizer._own.items():
            assert own["momentum_buffer"].placements == param.placements


@on_ranks(2)
def test_a_distributed_checkpoint_resumes(tmp_path):
    for mode in (True, False):
        model = sharded()
        optimizer = make(model, "AdamW")
        for step in range(3):
            train_step(model, optimizer, step, share())
        optimizer.train(mode)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / str(mode))
        resumed = sharded()
        other = make(resumed, "AdamW")
        weights, state = get_state_dict(resumed, other)
        saved = {"model": weights, "optimizer": state}
        dcp.load(saved, checkpoint_id=tmp_path / str(mode))
        set_state_dict(resumed, other, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        assert other.predicted is mode
        for step in range(5, 7):
            train_step(model, optimizer, step, share())
            train_step(resumed, other, step, share())
        for each in (True, False):
            optimizer.train(each)
            other.train(each)
            for param, own in zip(model.parameters(), resumed.parameters(), strict=True):
                assert torch.equal(param.to_local(), own.to_local())


@on_ranks(2)
def test_zero_trains_as_one_process_and_resumes():
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own deprecations

    def zero_of(model):
        return ZeroRedundancyOptimizer(model.parameters(), around_adamw, lr=0.02, prediction_steps=2.0)

    model, twin = DistributedDataParallel(small_model()), small_model()
    zero, expected = zero_of(model), around_adamw(twin.parameters(), 0.02, 2.0)
    for step in range(4):
        zero.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = 0.02 / (step + 1)
        train_step(model, zero, step, share())
        train_step(twin, expected, step)
        for mode in (False, True):
            zero.optim.train(mode)
            zero._sync_params()
            expected.train(mode)
            assert_close(model, twin)
            assert_ranks_agree(model.parameters())
    zero.optim.eval()
    zero._sync_params()
    zero.consolidate_state_dict(to=0)
    saved = [(model.state_dict(), zero.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    resumed_model = DistributedDataParallel(small_model())
    resumed = zero_of(resumed_model)
    resumed_model.load_state_dict(saved[0][0])
    resumed.load_state_dict(copy.deepcopy(saved[0][1]))
    for step in range(4, 6):
        for each, optimizer in ((model, zero), (resumed_model, resumed)):
            train_step(each, optimizer, step, share())
        assert all(map(torch.equal, model.parameters(), resumed_model.parameters()))
