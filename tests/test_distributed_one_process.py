"""ZeRO, DDP and DCP in a process group of one: what they copy, replace and write around a step."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import every_class
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from training import (
    PARAM,
    assert_all_same_bits,
    assert_same,
    clones,
    either_mode,
    either_precision,
    make_params,
    options,
    thetas,
    torch_may_warn,
    train,
    trained,
)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    except RuntimeError as error:
        pytest.skip(f"gloo finds no network interface here: {error}")
    yield
    dist.destroy_process_group()


@every_class
@either_precision
@torch_may_warn
def test_zero_redundancy_optimizer(cls, master_weights, process_group):
    """It copies its own group entries into ours at every step and load, and swaps state[param] for its own."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    twin, twin_params = trained(cls, master_weights=master_weights)

    def build(values):
        params = [PARAM(value.detach().clone()) for value in values]
        return ZeroRedundancyOptimizer(params, cls, **options(cls, master_weights=master_weights)), params

    zero, params = build(make_params())
    train(zero, params, range(3))
    assert_same(zero.optim, params, twin, twin_params)

    zero.optim.eval()
    zero._sync_params()
    assert_all_same_bits(params, thetas(twin, twin_params))
    assert not zero.optim.predicted
    zero.consolidate_state_dict()
    saved_at_theta = copy.deepcopy(zero.state_dict())
    assert not zero.optim.predicted, "its stale group entries must not bring the old mode back"
    resumed, resumed_params = build(params)
    resumed.load_state_dict(saved_at_theta)
    assert not resumed.optim.predicted

    zero.optim.train()
    for each, its_params in ((zero, params), (resumed, resumed_params), (twin, twin_params)):
        each.param_groups[0]["lr"] = 0.03
        train(each, its_params, range(3, 5))
    assert_same(zero.optim, params, twin, twin_params)
    assert_same(resumed.optim, resumed_params, twin, twin_params)


@every_class
def test_wrapping_in_ddp_after_loading_raises_no_false_alarm(cls, process_group):
    """Its constructor broadcasts, which writes to every parameter what is there already."""
    saved, saved_params = trained(cls, shapes=((2, 4), (2,)))
    model = torch.nn.Linear(4, 2)
    model.load_state_dict({"weight": saved_params[0].detach(), "bias": saved_params[1].detach()})
    optimizer = cls(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*predicted weights.*")
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        params = list(ddp.parameters())
        train(optimizer, params, [3])
        train(saved, saved_params, [3])
    assert_same(optimizer, params, saved, saved_params)


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


either_layout = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])


@every_class
@either_precision
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
@torch_may_warn
def test_the_fake_step_of_dcp_moves_nothing_in_either_mode(cls, master_weights, lr):
    """torch fills an empty state by stepping with zero gradients at lr=0, and then puts the old lr back."""
    model = small_model()
    optimizer = cls(model.parameters(), lr=lr, weight_decay=0.1, prediction_steps=3.0, master_weights=master_weights)
    params = list(model.parameters())
    before = clones(params)
    assert get_optimizer_state_dict(model, optimizer)["state"]
    assert optimizer.param_groups[0]["lr"] is lr
    for mode in (optimizer.eval, optimizer.train, optimizer.eval):
        assert_all_same_bits(params, before)
        mode()
    assert_all_same_bits(params, before)
    assert all(torch.isfinite(value).all() for state in optimizer.state.values() for value in state.values())


@every_class
@either_precision
@either_layout
@either_mode
@torch_may_warn
def test_a_resume_through_dcp_continues_bit_for_bit(cls, master_weights, flatten, predicted, tmp_path):
    kwargs = options(cls, master_weights=master_weights)
    layout = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = small_model()
    optimizer = cls(model.parameters(), **kwargs)
    train(optimizer, list(model.parameters()), range(3))
    optimizer.train(predicted)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=layout)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    resumed_model = small_model()
    resumed = cls(resumed_model.parameters(), **kwargs)
    # dcp.load writes into the tensors of this dict, which are the optimizer's own.
    loaded = {
        "model": resumed_model.state_dict(),
        "optimizer": get_optimizer_state_dict(resumed_model, resumed, options=layout),
    }
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    resumed_model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(resumed_model, resumed, loaded["optimizer"], options=layout)

    params, resumed_params = list(model.parameters()), list(resumed_model.parameters())
    assert resumed.predicted is predicted
    assert_same(optimizer, params, resumed, resumed_params)
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(resumed, resumed_params, [step])
        assert_same(optimizer, params, resumed, resumed_params)
    assert_all_same_bits(thetas(optimizer, params), thetas(resumed, resumed_params))
