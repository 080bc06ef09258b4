"""Checkpoints go from torch.optim to its X class and back. A loaded state without prediction numbers means theta."""

import copy
import dataclasses
import inspect

import pytest
import torch
from family import FAMILY, MEMBERS
from training import (
    PARAM,
    assert_goes_on_alike,
    assert_same_bits,
    cloned_params,
    feed,
    make_params,
    name_of,
    through_a_file,
    train,
    trained,
)

from xgrad_optim import XAdam, XAdamW

CASES = [
    {},
    {"momentum": 0.0},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.0, "weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.05},
    {"betas": (0.7, 0.9), "eps": 1e-3, "maximize": True},
    {"maximize": True},
    {"foreach": True},
    {"fused": True},
    {"fused": True, "amsgrad": True},
]
BASES = {member.base: member for member in FAMILY if member.base}
EXCHANGES = [
    (base, member.cls, {**member.defaults, **case})
    for base, member in BASES.items()
    for case in CASES
    if {*case} <= {*inspect.signature(base).parameters} and member.takes(*case)
]
exchange = pytest.mark.parametrize("base, cls, case", EXCHANGES, ids=name_of)


def assert_close(params, expected):
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-14)


@exchange
def test_a_torch_checkpoint_goes_on_in_its_x_class(base, cls, case):
    """With prediction_steps=0, which no torch group holds and loading therefore keeps, as torch would have gone on."""
    params = make_params(dtype=torch.float64)
    theirs = base(params, lr=0.02, **case)
    train(theirs, params, range(4))
    our_params = cloned_params(params)
    ours = cls(our_params, prediction_steps=0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert not ours.predicted
    for step in range(4, 24):
        train(theirs, params, [step])
        train(ours, our_params, [step])
        assert_close(our_params, params)


@exchange
def test_a_torch_checkpoint_goes_on_with_prediction(base, cls, case):
    """The loaded parameters are theta: after one step, theta is where torch's step with that gradient goes."""
    params = make_params(dtype=torch.float64)
    theirs = base(params, lr=0.02, **case)
    train(theirs, params, range(4))
    our_params = cloned_params(params)
    ours = cls(our_params, prediction_steps=1.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["prediction_steps"] == 1.5
    for step in range(4, 8):
        train(theirs, params, [step])
        train(ours, our_params, [step])
        assert ours.predicted
        assert not torch.equal(our_params[0], params[0])
        with ours.true_weights():
            assert_close(our_params, params)


@exchange
def test_the_way_back_to_torch(base, cls, case):
    """At eval() the parameters are theta and the state is torch's."""
    case = {key: value for key, value in case.items() if key not in ("foreach", "fused")}
    params = make_params(dtype=torch.float64)
    ours = cls(params, lr=0.02, **case)
    train(ours, params, range(4))
    ours.eval()
    their_params = cloned_params(params)
    theirs = base(their_params, lr=0.5)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for step in range(4, 14):
        train(theirs, their_params, [step])
        train(ours, params, [step])
        with ours.true_weights():
            assert_close(params, their_params)


def test_a_checkpoint_of_an_old_torch_counts_steps_in_python_numbers():
    params = make_params(dtype=torch.float64)
    theirs = torch.optim.Adam(params, lr=0.02)
    train(theirs, params, range(4))
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    our_params = cloned_params(params)
    ours = XAdam(our_params, prediction_steps=0)
    ours.load_state_dict(saved)
    train(theirs, params, range(4, 8))
    train(ours, our_params, range(4, 8))
    assert_close(our_params, params)


@pytest.mark.parametrize("base, cls", [(base, member.cls) for base, member in BASES.items()], ids=name_of)
def test_a_torch_checkpoint_of_a_16_bit_model_goes_on_with_master_weights(base, cls):
    """The master starts as exactly the loaded weights; from there it is a float32 run on the same gradients."""
    params = make_params(dtype=torch.bfloat16)
    theirs = MEMBERS[cls].make_base(params, lr=0.02, weight_decay=0.1)
    train(theirs, params, range(3))
    saved = through_a_file(theirs.state_dict())

    our_params = cloned_params(params)
    ours = cls(our_params, master_weights=True, prediction_steps=0)
    ours.load_state_dict(saved)
    wide_params = [PARAM(param.detach().float()) for param in params]
    wide = cls(wide_params, prediction_steps=0)
    wide.load_state_dict(saved)
    for step in range(3, 8):
        feed(our_params, step)
        for param, wide_param in zip(our_params, wide_params, strict=True):
            wide_param.grad = param.grad.float()
        ours.step()
        wide.step()
        for param, wide_param in zip(our_params, wide_params, strict=True):
            assert_same_bits(ours.state[param]["master_weights"], wide_param)
            assert_same_bits(param, wide_param.to(torch.bfloat16))


def test_a_buffer_that_a_rule_can_do_without_is_zero_where_a_checkpoint_lacks_it(monkeypatch):
    """As torch.optim.RMSprop has no momentum_buffer where momentum is 0."""
    saved, params = trained(XAdam)
    saved.eval()
    lacking = copy.deepcopy(saved.state_dict())
    for state in lacking["state"].values():
        state["exp_avg"].zero_()
    monkeypatch.setattr(XAdam, "rule", dataclasses.replace(XAdam.rule, required_state=("step", "exp_avg_sq")))
    resumed = [(XAdam(its_params), its_params) for its_params in (cloned_params(params), cloned_params(params))]
    resumed[0][0].load_state_dict(lacking)
    for state in lacking["state"].values():
        del state["exp_avg"]
    resumed[1][0].load_state_dict(lacking)
    assert_goes_on_alike(*resumed[0], *resumed[1])


@pytest.mark.parametrize("source, target", [(XAdam, XAdamW), (XAdamW, XAdam)], ids=name_of)
@pytest.mark.filterwarnings("ignore:the loaded state dict has decoupled_weight_decay=False")
def test_xadam_and_xadamw_exchange_checkpoints_as_their_bases_do(source, target):
    """Their state is the same. XAdam decays as the file says, XAdamW always decoupled."""
    saved, params = trained(source, dtype=torch.float64)
    saved.eval()
    their_params, our_params = cloned_params(params), cloned_params(params)
    base = torch.optim.AdamW if target is XAdamW else torch.optim.Adam
    theirs, ours = base(their_params), target(our_params)
    for each in (theirs, ours):
        each.load_state_dict(copy.deepcopy(saved.state_dict()))
        each.param_groups[0]["prediction_steps"] = 0
    assert ours.param_groups[0]["decoupled_weight_decay"] is True
    train(theirs, their_params, range(5, 9))
    train(ours, our_params, range(5, 9))
    assert_close(our_params, their_params)
