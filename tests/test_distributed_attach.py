"""`attach` on the models that PyTorch's engines make: each forward, on every rank, sees the weights of its mode.

FSDP2 is the one that bites: it keeps gathered weights after a forward without a backward, and a swap of the shards does
not reach those.
"""

import pytest
import torch
import torch.distributed as dist
from cases import loss_of, small_model
from ranks import assert_ranks_agree, on_ranks, share, whole
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from xgrad_optim import XAdamW

OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "prediction_steps": 2.0}


def fsdp(model, **options):
    """The last layer is left to the root, whose weights stay gathered after a forward unless told otherwise."""
    for layer in (model[0], model):
        fully_shard(layer, **options)
    return model


def outputs(model):
    with torch.no_grad():
        return loss_of(model, 50)


def assert_forwards_agree(model, optimizer, twin, expected):
    """Training with evaluations, twice and in between, against explicit swaps of a single process."""
    for step in range(4):
        for mode in (False, True, False, False, True):
            model.train(mode)
            expected.train(mode)
            torch.testing.assert_close(outputs(model), outputs(twin), rtol=1e-9, atol=0)
        for each, of, part in ((model, optimizer, share()), (twin, expected, slice(None))):
            of.zero_grad()
            loss_of(each, step, part).backward()
            of.step()
        torch.testing.assert_close(outputs(model), outputs(twin), rtol=1e-9, atol=0)


def twins(wrap, **options):
    model, twin = wrap(small_model(), **options), small_model()
    return model, twin, *(XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))


@pytest.mark.parametrize("reshard", [None, True, False], ids=["default", "reshard", "keep"])
@on_ranks(2)
def test_attached_fsdp_forwards_see_the_weights_of_their_mode(reshard):
    model, twin, optimizer, expected = twins(fsdp, reshard_after_forward=reshard)
    optimizer.attach(model)
    assert_forwards_agree(model, optimizer, twin, expected)


@pytest.mark.parametrize("reshard", [None, True, False], ids=["default", "reshard", "keep"])
@pytest.mark.parametrize("in_bfloat16", [False, True], ids=["float64", "bfloat16"])
@on_ranks(2)
def test_a_swap_between_forward_and_backward_raises_under_fsdp_too(reshard, in_bfloat16):
    """Its gathers keep the version counters, so that a backward would gather the other weights unnoticed."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if in_bfloat16 else None)
    model = fsdp(small_model(), reshard_after_forward=reshard, mp_policy=policy)
    optimizer = XAdamW(model.parameters(), **OPTIONS)
    optimizer.attach(model)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    loss = loss_of(model, 3)
    model.state_dict()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@on_ranks(2)
def test_without_attach_resharding_does_it():
    """What docs/attach.md tells those to do who call eval() and train() themselves; else the old weights are seen."""
    model, twin, optimizer, expected = twins(fsdp)
    for step in range(2):
        for each, of, part in ((model, optimizer, share()), (twin, expected, slice(None))):
            of.zero_grad()
            loss_of(each, step, part).backward()
            of.step()
    outputs(model)
    optimizer.eval()
    expected.eval()
    assert not torch.allclose(outputs(model), outputs(twin)), "the root has kept its gathered weights"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    torch.testing.assert_close(outputs(model), outputs(twin), rtol=1e-9, atol=0)


@pytest.mark.parametrize("attach_to", ["ddp", "module"])
@on_ranks(2)
def test_attached_ddp_forwards_see_the_weights_of_their_mode(attach_to):
    model, twin, optimizer, expected = twins(DistributedDataParallel)
    optimizer.attach(model if attach_to == "ddp" else model.module)
    assert_forwards_agree(model, optimizer, twin, expected)
    assert_ranks_agree(model.parameters())


@on_ranks(2)
def test_rank_0_alone_saves_what_every_rank_trains():
    """A swap is no collective: one rank may go to theta for its checkpoint, the next forward brings it back."""
    model, twin, optimizer, expected = twins(DistributedDataParallel)
    optimizer.attach(model)
    for step in range(3):
        for each, of, part in ((model, optimizer, share()), (twin, expected, slice(None))):
            of.zero_grad()
            loss_of(each, step, part).backward()
            of.step()
        if dist.get_rank() == 0:
            saved = model.module.state_dict()
            with expected.true_weights():
                for name, value in twin.state_dict().items():
                    torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-12)
    outputs(model)
    assert_ranks_agree(model.parameters())


@on_ranks(2)
def test_the_state_dict_of_an_attached_fsdp_model_is_theta():
    model, twin, optimizer, expected = twins(fsdp)
    optimizer.attach(model)
    assert_forwards_agree(model, optimizer, twin, expected)
    with expected.true_weights():
        for name, value in model.state_dict().items():
            torch.testing.assert_close(whole(value), twin.state_dict()[name], rtol=1e-9, atol=1e-12)
    assert not optimizer.predicted


def trained_twins(wrap):
    model, twin, optimizer, expected = twins(wrap)
    optimizer.attach(model)
    for step in range(3):
        for each, of, part in ((model, optimizer, share()), (twin, expected, slice(None))):
            of.zero_grad()
            loss_of(each, step, part).backward()
            of.step()
    return model, twin, optimizer, expected


@pytest.mark.parametrize("wrap", [fsdp, DistributedDataParallel])
@on_ranks(2)
def test_evaluation_mode_puts_theta_in_place_on_every_rank(wrap):
    """For what reads the weights without a forward; it is no collective, so one rank may do it alone."""
    model, twin, optimizer, expected = trained_twins(wrap)
    if dist.get_rank() == 0:
        model.eval()
        assert not optimizer.predicted
    model.eval()
    expected.eval()
    for param, value in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(whole(param), value, rtol=1e-9, atol=1e-12)


@on_ranks(2)
def test_evaluation_mode_drops_what_fsdp_has_gathered():
    """The root keeps its gathered weights after a forward without a backward."""
    model, twin, optimizer, expected = trained_twins(fsdp)
    outputs(model)
    model.eval()
    expected.eval()
    torch.testing.assert_close(outputs(model), outputs(twin), rtol=1e-9, atol=0)
    assert not optimizer.predicted


@on_ranks(2)
def test_a_model_of_one_group_that_is_gathered_still_has_its_parameters():
    """Between forwards its modules hold the gathered weights, not the optimizer's shards."""
    model, twin, optimizer, expected = trained_twins(lambda model: fully_shard(model))
    outputs(model)
    for module in model.modules():
        module.training = False
    expected.eval()
    torch.testing.assert_close(outputs(model), outputs(twin), rtol=1e-9, atol=0)
    for act in (
        lambda: optimizer.attach(model),
        lambda: optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1, dtype=torch.float64))]}),
    ):
        act()
        for mode in (True, False):
            model.train(mode)
            expected.train(mode)
            torch.testing.assert_close(outputs(model), outputs(twin), rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore")  # torch's, that it is deprecated
@pytest.mark.parametrize(
    ("use_orig_params", "attaches_first"),
    [(False, False), (True, False), (True, True)],
    ids=["flat", "original", "original, attached before"],
)
@on_ranks(2)
def test_fsdp1_is_refused(use_orig_params, attaches_first):
    """It keeps gathered weights too, and would take them again after a swap."""
    model = small_model()
    if attaches_first:
        optimizer = XAdamW(model.parameters(), **OPTIONS)
        optimizer.attach(model)
    sharded = FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
    if attaches_first:
        with pytest.raises(RuntimeError, match="keeps gathered copies of its weights"):
            sharded(torch.ones(1, 5, dtype=torch.float64))
    else:
        optimizer = XAdamW(sharded.parameters(), **OPTIONS)
        with pytest.raises(RuntimeError, match=r"fully_shard .*fsdp_version 2"):
            optimizer.attach(sharded)
        assert not any(module._forward_pre_hooks for module in model.modules())


@on_ranks(2)
def test_the_optimizer_inside_zero_refuses_to_be_attached():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = small_model()
    zero = ZeroRedundancyOptimizer(model.parameters(), XAdamW, **OPTIONS)
    handle = zero.optim.attach(model)
    with pytest.raises(RuntimeError, match=r"zero\._sync_params\(\)"):
        outputs(model)
    handle.remove()
    outputs(model)
