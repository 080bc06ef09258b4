"""A state_dict that does not fit raises ValueError before anything has changed."""

import copy
import math

import pytest
import torch
from training import (
    ADAMS,
    FAMILY,
    assert_goes_on_alike,
    assert_unchanged,
    either_mode,
    every_class,
    make_params,
    name_of,
    options,
    snapshot,
    train,
    trained,
)

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW


def _on_state(change):
    """A corruption of the second parameter's state."""
    return lambda saved: change(saved["state"][1])


def _set(key, value):
    return _on_state(lambda state: state.__setitem__(key, value))


def _first_group(change):
    return lambda saved: change(saved["param_groups"][0])


def _state_of_no_dict(saved):
    saved["state"][1] = [1.0]


MISFITS = {  # name: (change of a good state_dict, classes)
    "no state": (lambda saved: saved.pop("state"), FAMILY),
    "no param_groups": (lambda saved: saved.pop("param_groups"), FAMILY),
    "one group more": (lambda saved: saved["param_groups"].append({"params": []}), FAMILY),
    "one group less": (lambda saved: saved["param_groups"].pop(), FAMILY),
    "one parameter more": (_first_group(lambda group: group["params"].append(7)), FAMILY),
    "one parameter less": (_first_group(lambda group: group["params"].pop()), FAMILY),
    "a group without params": (_first_group(lambda group: group.pop("params")), FAMILY),
    "a group without lr": (_first_group(lambda group: group.pop("lr")), FAMILY),
    "a group whose lr is nan": (_first_group(lambda group: group.__setitem__("lr", math.nan)), FAMILY),
    "a group whose lr is text": (_first_group(lambda group: group.__setitem__("lr", "0.1")), FAMILY),
    "a group without betas": (_first_group(lambda group: group.pop("betas")), ADAMS),
    "a group without momentum": (_first_group(lambda group: group.pop("momentum")), (XSGDM,)),
    "a group with nesterov": (_first_group(lambda group: group.__setitem__("nesterov", True)), (XSGDM,)),
    "state that is no dict": (_state_of_no_dict, FAMILY),
    "no buffer": (_on_state(lambda state: state.pop("exp_avg", None) or state.pop("momentum_buffer")), (XSGDM,)),
    "no exp_avg": (_on_state(lambda state: state.pop("exp_avg")), ADAMS),
    "no exp_avg_sq": (_on_state(lambda state: state.pop("exp_avg_sq")), ADAMS),
    "exp_avg is None": (_set("exp_avg", None), ADAMS),
    "exp_avg is a number": (_set("exp_avg", 0.5), ADAMS),
    "exp_avg is a list": (_set("exp_avg", [0.0] * 5), ADAMS),
    "no step": (_on_state(lambda state: state.pop("step")), ADAMS),
    "step of three elements": (_set("step", torch.ones(3)), FAMILY),
    "step is text": (_set("step", "3"), FAMILY),
    "exp_avg of another shape": (_set("exp_avg", torch.zeros(5, 1)), ADAMS),
    "exp_avg_sq of another size": (_set("exp_avg_sq", torch.zeros(6)), ADAMS),
    "max_exp_avg_sq of another size": (_set("max_exp_avg_sq", torch.zeros(())), ADAMS),
    "momentum_buffer of another shape": (_set("momentum_buffer", torch.zeros(1, 5)), (XSGDM,)),
    "master_weights of another shape": (_set("master_weights", torch.zeros(4)), FAMILY),
    "prediction_shift of two elements": (_set("prediction_shift", torch.zeros(2)), FAMILY),
}


@pytest.mark.parametrize(
    "cls, name", [(cls, name) for name, (_, classes) in MISFITS.items() for cls in classes], ids=name_of
)
@either_mode
def test_a_state_dict_that_does_not_fit_raises_and_changes_nothing(cls, name, predicted):
    def build():
        params = make_params()
        optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], **options(cls))
        train(optimizer, params, range(2))
        optimizer.train(predicted)
        return optimizer, params

    optimizer, params = build()
    undisturbed, expected = build()
    saved = copy.deepcopy(optimizer.state_dict())
    MISFITS[name][0](saved)
    before = snapshot(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert_goes_on_alike(optimizer, params, undisturbed, expected, range(10, 11))


@every_class
@pytest.mark.parametrize("not_a_state_dict", [None, [], {}, {"state": {}}], ids=repr)
def test_what_is_no_state_dict_raises(cls, not_a_state_dict):
    optimizer, _ = trained(cls)
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(not_a_state_dict)
    assert_unchanged(optimizer, before)


def _x(cls):
    return lambda params: cls(params, lr=0.1)


OTHERS = [  # (name, what builds it, into which classes it must not load)
    ("SGD", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), ADAMS),
    ("SGD without momentum", lambda params: torch.optim.SGD(params, lr=0.1), ADAMS),
    ("Adam", torch.optim.Adam, (XSGDM, XAdaBelief, XAdaM3)),
    ("AdamW", torch.optim.AdamW, (XSGDM, XAdaBelief, XAdaM3)),
    ("Adagrad", torch.optim.Adagrad, FAMILY),
    ("Adadelta", torch.optim.Adadelta, FAMILY),
    ("Adamax", torch.optim.Adamax, FAMILY),
    ("NAdam", torch.optim.NAdam, FAMILY),
    ("RAdam", torch.optim.RAdam, FAMILY),
    ("RMSprop", lambda params: torch.optim.RMSprop(params, momentum=0.9), FAMILY),
    ("Rprop", torch.optim.Rprop, FAMILY),
    ("ASGD", torch.optim.ASGD, FAMILY),
    ("XSGDM", _x(XSGDM), ADAMS),
    ("XAdam", _x(XAdam), (XSGDM, XAdaBelief, XAdaM3)),
    ("XAdamW", _x(XAdamW), (XSGDM, XAdaBelief, XAdaM3)),
    ("XAdaBelief", _x(XAdaBelief), (XSGDM, XAdam, XAdamW, XAdaM3)),
    ("XAdaM3", _x(XAdaM3), (XSGDM, XAdam, XAdamW, XAdaBelief)),
]


@pytest.mark.parametrize(
    "name, make, cls", [(name, make, cls) for name, make, classes in OTHERS for cls in classes], ids=name_of
)
def test_the_state_dict_of_another_optimizer_raises_and_changes_nothing(name, make, cls):
    """AdaBelief's second moment is not Adam's: the keys alone would fit."""
    params = make_params()
    other = make(params)
    train(other, params, range(2))
    optimizer, _ = trained(cls)
    before = snapshot(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(other.state_dict())
    assert_unchanged(optimizer, before)
