"""torch.distributed.checkpoint: saved by some ranks, resumed by as many or others, in either mode.

What can break it: the fake step by which it makes a state to load into, numbers beside the sharded buffers, shards that
are cut anew, and whole tensors that somebody loads into sharded parameters.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import PLAIN, small_model, train_step
from ranks import on_ranks, run, share, whole
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from xgrad_optim import XAdamW

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0}


def make(case, **options):
    model = small_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model, case.make(model.parameters(), **OPTIONS, **options)


def content(model, optimizer):
    """All that a run holds, whole: by position, since the keys of a state have no order."""
    states = [optimizer.state[param] for param in model.parameters()]
    return [whole(each) for each in (*model.parameters(), *(state[key] for state in states for key in sorted(state)))]


def assert_same(ours, others):
    assert all(map(torch.equal, content(*ours), content(*others)))


def train(ours, steps):
    for step in steps:
        train_step(*ours, step, share())


RUNS = [(case, predicted) for case in PLAIN for predicted in (True, False)]


def save_and_go_on(folder):
    """Leaves checkpoints, what each run held then, and what it held three steps later."""
    held = []
    for index, (case, predicted) in enumerate(RUNS):
        ours = model, optimizer = make(case)
        train(ours, range(3))
        optimizer.train(predicted)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder / str(index))
        then = content(*ours)
        train(ours, range(3, 6))
        held.append((then, content(*ours)))
    if dist.get_rank() == 0:
        torch.save(held, folder / "held.pt")


def resume(folder, tolerance):
    for index, (then, later) in enumerate(torch.load(folder / "held.pt")):
        case, predicted = RUNS[index]
        ours = model, optimizer = make(case)
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder / str(index))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        assert optimizer.predicted is predicted, RUNS[index]
        assert all(map(torch.equal, content(*ours), then)), RUNS[index]
        train(ours, range(3, 6))
        for value, expected in zip(content(*ours), later, strict=True):
            torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance / 1000)


@pytest.mark.parametrize(("saved_by", "resumed_by"), [(2, 2), (2, 4), (4, 1)])
def test_a_resume_goes_on(saved_by, resumed_by, tmp_path):
    """Every optimizer in either mode: from the same bits, and with the same bits where the shards are the same."""
    run(save_and_go_on, saved_by, folder=tmp_path)
    run(resume, resumed_by, folder=tmp_path, tolerance=0.0 if saved_by == resumed_by else 1e-9)


LAYOUTS = {
    "default": {},
    "flat": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full on the CPU": {"full_state_dict": True, "cpu_offload": True},
}


def load(model, optimizer, model_state, optimizer_state, options, optimizer_first):
    """Model and optimizer apart, in either order."""
    if not optimizer_first:
        set_model_state_dict(model, model_state, options=options)
    set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    if optimizer_first:
        set_model_state_dict(model, model_state, options=options)


@pytest.mark.parametrize("layout", LAYOUTS)
@on_ranks(2)
def test_every_layout_of_the_state_dict(layout):
    for predicted, optimizer_first, is_attached in itertools.product((True, False), repeat=3):
        saved, resumed = make(PLAIN[2]), make(PLAIN[2])
        if is_attached:
            for model, optimizer in (saved, resumed):
                optimizer.attach(model)
        train(saved, range(3))
        saved[1].train(predicted)
        options = StateDictOptions(**LAYOUTS[layout])
        states = [get_model_state_dict(saved[0], options=options), get_optimizer_state_dict(*saved, options=options)]
        if options.cpu_offload:  # rank 0 alone has it then
            dist.broadcast_object_list(states)
        load(*resumed, *states, options, optimizer_first)
        assert resumed[1].predicted is (predicted and not is_attached), "an attached model's files hold theta"
        for ours in (saved, resumed):
            train(ours, range(3, 5))
        assert_same(resumed, saved)


@on_ranks(2)
def test_the_fake_step_moves_nothing_in_either_mode():
    for case in PLAIN:
        for master_weights in (False, True):
            model, optimizer = make(case, master_weights=master_weights)
            before = [whole(param) for param in model.parameters()]
            get_optimizer_state_dict(model, optimizer)
            for mode in (optimizer.eval, optimizer.train, optimizer.eval):
                assert all(map(torch.equal, map(whole, model.parameters()), before))
                mode()
            assert all(map(torch.equal, map(whole, model.parameters()), before))


@on_ranks(2)
def test_whole_tensors_load_into_sharded_parameters():
    """A checkpoint of one process, through load_state_dict itself."""
    model, optimizer = make(PLAIN[2])
    twin = small_model()
    expected = XAdamW(twin.parameters(), **OPTIONS)
    for step in range(2):
        train_step(twin, expected, step)
    set_model_state_dict(model, twin.state_dict(), options=StateDictOptions(full_state_dict=True))
    optimizer.load_state_dict(expected.state_dict())
    assert_same((model, optimizer), (twin, expected))
    train_step(model, optimizer, 2, share())
    train_step(twin, expected, 2)
    for value, other in zip(content(model, optimizer), content(twin, expected), strict=True):
        torch.testing.assert_close(value, other)


@on_ranks(2)
def test_what_does_not_belong_to_the_shards_is_refused():
    model, optimizer = make(PLAIN[2])
    train((model, optimizer), range(2))
    twin = small_model()
    expected = XAdamW(twin.parameters(), **OPTIONS)
    with pytest.raises(ValueError, match="full_state_dict=True"):
        expected.load_state_dict(optimizer.state_dict())
    before = content(model, optimizer)
    state = optimizer.state[model[0].weight]
    sharded, state["exp_avg"] = state["exp_avg"], whole(state["exp_avg"])
    for act in (optimizer.step, optimizer.eval):
        with pytest.raises(RuntimeError, match="replace or move both"):
            act()
    state["exp_avg"] = sharded
    assert all(map(torch.equal, content(model, optimizer), before))
