"""Whole parameters on every rank: DistributedDataParallel and ZeroRedundancyOptimizer.

The ranks share the batch, so training must be a single process's within the rounding of the gradients' average, and
the ranks must hold the same bits, in either mode. What can break it: gradients that are views of DDP's buckets,
broadcasts that write to parameters behind the optimizer's back, and ZeRO's own copies of groups and state.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from cases import loss_of, small_model, train_step
from ranks import assert_close, assert_ranks_agree, on_ranks, share, state_tensors, with_every_optimizer
from torch.nn.parallel import DistributedDataParallel

from xgrad_optim import XAdamW

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0}


@pytest.mark.parametrize("gradient_as_bucket_view", [False, True], ids=["copies", "bucket_views"])
@on_ranks(2)
@with_every_optimizer
def test_ddp_trains_as_one_process(case, gradient_as_bucket_view):
    """Every third step accumulates two micro-batches; evaluation between the steps leaves no trace."""
    twin = small_model()
    model = DistributedDataParallel(small_model(), gradient_as_bucket_view=gradient_as_bucket_view)
    optimizer, expected = (case.make(each.parameters(), **OPTIONS) for each in (model, twin))
    for step in range(6):
        optimizer.zero_grad()
        expected.zero_grad()
        if step % 3 == 2:
            with model.no_sync():
                loss_of(model, 100 + step, share()).backward()
            loss_of(twin, 100 + step).backward()
        loss_of(model, step, share()).backward()
        loss_of(twin, step).backward()
        optimizer.step()
        expected.step()
        for each in (optimizer.eval, expected.eval):
            each()
        assert_close(model, twin)
        assert_ranks_agree(model.parameters())
        for each in (optimizer.train, expected.train):
            each()
        assert_close(model, twin)
        assert_ranks_agree([*model.parameters(), *state_tensors(optimizer)])
    assert optimizer._planner.builds == 1


@on_ranks(4)
def test_ddp_on_four_ranks():
    twin = small_model()
    model = DistributedDataParallel(small_model(), gradient_as_bucket_view=True)
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    for step in range(4):
        train_step(model, optimizer, step, share())
        train_step(twin, expected, step)
    assert_close(model, twin)
    assert_ranks_agree([*model.parameters(), *state_tensors(optimizer)])


@on_ranks(2)
def test_ddp_clips_gradients_to_the_norm_of_one_process():
    twin = small_model()
    model = DistributedDataParallel(small_model(), gradient_as_bucket_view=True)
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    for step in range(3):
        for each, of, part in ((model, optimizer, share()), (twin, expected, slice(None))):
            of.zero_grad()
            loss_of(each, step, part).backward()
            torch.nn.utils.clip_grad_norm_(each.parameters(), 0.1)
            of.step()
    assert_close(model, twin)


@pytest.mark.parametrize("mode", ["eval", "train"])
@on_ranks(2)
def test_wrapping_again_in_mid_training(mode):
    """The constructor broadcasts rank 0's parameters. It writes what is there: nothing moves, but only where the
    parameters hold theta can the optimizer be sure of that, and be silent."""
    model, twin = small_model(), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    ddp = DistributedDataParallel(model)
    for step in range(2):
        train_step(ddp, optimizer, step, share())
        train_step(twin, expected, step)
    getattr(optimizer, mode)()
    ddp = DistributedDataParallel(model)
    if mode == "train":
        with pytest.warns(UserWarning, match="predicted weights"):
            optimizer.eval()
    optimizer.train()
    train_step(ddp, optimizer, 2, share())
    train_step(twin, expected, 2)
    assert_close(model, twin)
    assert_ranks_agree([*model.parameters(), *state_tensors(optimizer)])


def zero_of(model, case, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own deprecations

    return ZeroRedundancyOptimizer(model.parameters(), case.optimizer, **OPTIONS, **options)


@pytest.mark.parametrize("bucket_view", [False, True], ids=["tensors", "bucket_views"])
@on_ranks(2)
@with_every_optimizer
def test_zero_trains_as_one_process(case, bucket_view):
    """Also with parameters that ZeRO has moved into views of its buckets."""
    twin = small_model()
    model = DistributedDataParallel(small_model())
    zero = zero_of(model, case, parameters_as_bucket_view=bucket_view)
    expected = case.make(twin.parameters(), **OPTIONS)
    for step in range(4):
        zero.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = 0.02 / (step + 1)
        train_step(model, zero, step, share())
        train_step(twin, expected, step)
        assert_close(model, twin)
        assert_ranks_agree(model.parameters())
        for predicted in (False, True) if step % 2 else (False,):
            zero.optim.train(predicted)
            zero._sync_params()
            expected.train(predicted)
            assert_close(model, twin)
            assert_ranks_agree(model.parameters())
    assert 0 < len(zero.optim.state) < len(expected.state), "each rank keeps its part of the state"


@pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
@on_ranks(2)
@with_every_optimizer
def test_a_resume_through_zero_continues_bit_for_bit(case, predicted):
    model, resumed_model = (DistributedDataParallel(small_model()) for _ in range(2))
    zero, resumed = zero_of(model, case), zero_of(resumed_model, case)
    for step in range(3):
        train_step(model, zero, step, share())
    zero.optim.train(predicted)
    zero._sync_params()
    zero.consolidate_state_dict(to=0)
    saved = [(model.state_dict(), zero.state_dict()) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(saved)
    resumed_model.load_state_dict(saved[0][0])
    resumed.load_state_dict(copy.deepcopy(saved[0][1]))
    assert resumed.optim.predicted is zero.optim.predicted is predicted
    for step in range(3, 6):
        for each, optimizer in ((model, zero), (resumed_model, resumed)):
            train_step(each, optimizer, step, share())
        assert all(map(torch.equal, model.parameters(), resumed_model.parameters()))
        assert all(map(torch.equal, state_tensors(zero.optim), state_tensors(resumed.optim)))
