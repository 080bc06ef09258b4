"""Numbers that schedules and hands move while training goes on: out of their range too, as torch.optim lets them.

A script that ran must not die at the end of its schedule, which rounding may put below 0, nor when it is resumed there.
"""

import copy

import pytest
import torch
from cases import every_class
from family import FAMILY, MEMBERS, taking
from training import filled

from xgrad_optim import XAdam, XAdamW

lr_scheduler = torch.optim.lr_scheduler
ENDS_BELOW_0 = {
    "linear": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 0.0, total_iters=4),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - 0.3 * epoch),
    "polynomial": lambda optimizer: lr_scheduler.PolynomialLR(optimizer, 4),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 4, eta_min=-1e-19),
}


def run(optimizer, param, schedule, steps):
    for seed in steps:
        param.grad = filled(*param.shape, seed=20 + seed).grad
        optimizer.step()
        schedule.step()


@every_class
@pytest.mark.parametrize("name", ENDS_BELOW_0)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("lr", [1e-3, torch.tensor(1e-3, dtype=torch.float64)], ids=["float", "tensor"])
def test_a_schedule_that_ends_below_0_goes_on_and_resumes(cls, name, backend, lr):
    param = filled(4)
    optimizer = cls([param], lr=copy.deepcopy(lr), backend=backend)
    schedule = ENDS_BELOW_0[name](optimizer)
    run(optimizer, param, schedule, range(8))
    assert param.isfinite().all()

    resumed = torch.nn.Parameter(param.detach().clone())
    other = cls([resumed], lr=copy.deepcopy(lr), backend=backend)
    other_schedule = ENDS_BELOW_0[name](other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other_schedule.load_state_dict(schedule.state_dict())
    # A group of its own, as fine-tuning scripts copy it.
    copied = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    if name != "lambda":  # a rounding error is let through, a learning rate of -0.5 not
        cls([{"params": [filled(2)], **copied}])
    for each in ((optimizer, param, schedule), (other, resumed, other_schedule)):
        run(*each, range(8, 11))
    assert torch.equal(param, resumed)


SET_BY_HAND = {
    "lr": [-1e-3, 0, True],
    "weight_decay": [-0.1, -1e-20],
    "momentum": [-0.1, 1.5],
    "dampening": [2, -3.0],
    "betas": [[0.5, 0.9], (-0.1, 0.9), torch.tensor([0.5, 0.9])],
    "eps": [-1e-9, 1],
    "maximize": [True, 1, None],
    "decoupled_weight_decay": [True, 1],
    "foreach": [False, 0],
}
OTHER_NUMBERS = dict.fromkeys(name for member in FAMILY for name in member.numbers if name not in SET_BY_HAND)
SET_BY_HAND |= {name: [0.5] for name in OTHER_NUMBERS}
SET_BY_HAND = [
    (member.cls, name, value)
    for member in FAMILY
    if member.is_base
    for name, values in SET_BY_HAND.items()
    if member.takes(name)
    for value in values
]


@pytest.mark.parametrize("predicts", [False, True], ids=["base", "predicting"])
@pytest.mark.parametrize("cls, name, value", SET_BY_HAND, ids=lambda value: getattr(value, "__name__", str(value)))
def test_an_option_that_is_set_by_hand_is_obeyed_as_by_torch_optim(cls, name, value, predicts):
    ours, theirs = filled(5), filled(5)
    like, training = MEMBERS[cls].like, MEMBERS[cls].training
    optimizers = [
        (cls([ours], lr=0.01, weight_decay=0.1, prediction_steps=2.0 if predicts else 0.0, **training), ours),
        (like([theirs], lr=0.01, weight_decay=0.1, **training), theirs),
    ]
    for optimizer, param in optimizers:
        for seed in range(4):
            if seed == 2:
                optimizer.param_groups[0][name] = value
            param.grad = filled(5, seed=20 + seed).grad
            optimizer.step()
    optimizers[0][0].eval()
    # The gradients are given, so that the base optimizer's theta is ours.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", taking("betas"))
@pytest.mark.parametrize("betas", [[0.9, 0.99], torch.tensor([0.9, 0.99])], ids=["list", "tensor"])
def test_schedules_that_move_betas(cls, betas):
    """Tensors are moved in place."""
    param = filled(3)
    optimizer = cls([param], betas=betas)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6, base_momentum=0.5, max_momentum=0.8)
    run(optimizer, param, schedule, range(5))
    assert float(optimizer.param_groups[0]["betas"][0]) != 0.9


# -- weight decay ----------------------------------------------------------------------------------------------------


def pair_after_loading(source, target, decoupled, weight_decay=0.3):
    """torch.optim's Adam of this decay that goes on, and `target` with its checkpoint, after some further steps."""
    theirs = filled(50, seed=3)
    base = torch.optim.Adam([theirs], lr=0.05, weight_decay=weight_decay, decoupled_weight_decay=decoupled)
    if source is torch.optim.AdamW:
        base = source([theirs], lr=0.05, weight_decay=weight_decay)
    schedule = lr_scheduler.ConstantLR(base, 1.0)
    run(base, theirs, schedule, range(3))
    ours = torch.nn.Parameter(theirs.detach().clone())
    optimizer = target([ours], lr=0.05, prediction_steps=0)
    optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
    optimizer.param_groups[0]["prediction_steps"] = 0
    run(base, theirs, schedule, range(3, 6))
    run(optimizer, ours, schedule, range(3, 6))
    return ours, theirs, optimizer


ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize("source, decoupled", [(ADAM, True), (ADAM, False), (ADAMW, True)])
def test_xadam_decays_as_the_checkpoint_did(source, decoupled):
    ours, theirs, optimizer = pair_after_loading(source, XAdam, decoupled)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is decoupled


@pytest.mark.parametrize("in_group", [False, True], ids=["constructor", "group"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_xadam_takes_decoupled_weight_decay(in_group, decoupled):
    ours, theirs = filled(6), filled(6)
    option = {"decoupled_weight_decay": decoupled}
    for cls, param in ((XAdam, ours), (torch.optim.Adam, theirs)):
        groups = [{"params": [param], **(option if in_group else {})}]
        optimizer = cls(groups, lr=0.05, weight_decay=0.3, **({} if in_group else option))
        run(optimizer, param, lr_scheduler.ConstantLR(optimizer, 1.0), range(4))
        if cls is XAdam:
            optimizer.eval()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_xadamw_says_that_a_checkpoint_has_another_decay():
    """It decays decoupled whatever a file says, as torch.optim.AdamW does, which says nothing."""
    with pytest.warns(UserWarning, match=r"decoupled_weight_decay=False.* always has decoupled_weight_decay=True"):
        _, _, optimizer = pair_after_loading(torch.optim.Adam, XAdamW, False)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("source, decoupled, weight_decay", [(ADAM, False, 0.0), (ADAM, True, 0.3), (ADAMW, True, 0.3)])
def test_xadamw_is_silent_where_nothing_changes(source, decoupled, weight_decay):
    ours, theirs, _ = pair_after_loading(source, XAdamW, decoupled, weight_decay)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_xadamw_takes_no_decoupled_weight_decay():
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        XAdamW([filled(2)], decoupled_weight_decay=True)
