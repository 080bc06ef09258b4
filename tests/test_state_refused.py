"""A state_dict that does not fit raises ValueError before anything has changed."""

import copy
import math

import pytest
import torch
from cases import every_class
from family import CLASSES, FAMILY, RULES, keeping, taking
from training import (
    assert_goes_on_alike,
    assert_unchanged,
    either_mode,
    make_params,
    name_of,
    options,
    snapshot,
    train,
    trained,
)


def _on_state(change):
    """A corruption of the second parameter's state."""
    return lambda saved: change(saved["state"][1])


def _set(key, value):
    return _on_state(lambda state: state.__setitem__(key, value))


def _first_group(change):
    return lambda saved: change(saved["param_groups"][0])


def _state_of_no_dict(saved):
    saved["state"][1] = [1.0]


def _needing(kind, key):
    """The classes without whose `key` a loaded state, or param group, can't go on."""
    return tuple(member.cls for member in FAMILY if key in getattr(member.rule, f"required_{kind}"))


STATE_KEYS = dict.fromkeys(key for rule in RULES.values() for key in rule.state_keys)
REQUIRED_STATE = dict.fromkeys(key for rule in RULES.values() for key in rule.required_state)
REQUIRED_OPTIONS = dict.fromkeys(key for rule in RULES.values() for key in rule.required_options)

MISFITS = {  # name: (change of a good state_dict, classes)
    "no state": (lambda saved: saved.pop("state"), CLASSES),
    "no param_groups": (lambda saved: saved.pop("param_groups"), CLASSES),
    "one group more": (lambda saved: saved["param_groups"].append({"params": []}), CLASSES),
    "one group less": (lambda saved: saved["param_groups"].pop(), CLASSES),
    "one parameter more": (_first_group(lambda group: group["params"].append(7)), CLASSES),
    "one parameter less": (_first_group(lambda group: group["params"].pop()), CLASSES),
    "a group without params": (_first_group(lambda group: group.pop("params")), CLASSES),
    "a group whose lr is nan": (_first_group(lambda group: group.__setitem__("lr", math.nan)), CLASSES),
    "a group whose lr is text": (_first_group(lambda group: group.__setitem__("lr", "0.1")), CLASSES),
    **{
        f"a group without {name}": (_first_group(lambda group, name=name: group.pop(name)), _needing("options", name))
        for name in REQUIRED_OPTIONS
    },
    "a group with nesterov": (_first_group(lambda group: group.__setitem__("nesterov", True)), taking("nesterov")),
    "state that is no dict": (_state_of_no_dict, CLASSES),
    **{
        f"no {key}": (_on_state(lambda state, key=key: state.pop(key)), _needing("state", key))
        for key in REQUIRED_STATE
    },
    **{f"{key} of another shape": (_set(key, torch.zeros(5, 1)), keeping(key)) for key in STATE_KEYS},
    **{f"{key} of another size": (_set(key, torch.zeros(6)), keeping(key)) for key in STATE_KEYS},
    "exp_avg is None": (_set("exp_avg", None), keeping("exp_avg")),
    "exp_avg is a number": (_set("exp_avg", 0.5), keeping("exp_avg")),
    "exp_avg is a list": (_set("exp_avg", [0.0] * 5), keeping("exp_avg")),
    "step of three elements": (_set("step", torch.ones(3)), CLASSES),
    "step is text": (_set("step", "3"), CLASSES),
    "max_exp_avg_sq of another size": (_set("max_exp_avg_sq", torch.zeros(())), taking("amsgrad")),
    "master_weights of another shape": (_set("master_weights", torch.zeros(4)), CLASSES),
    "prediction_shift of two elements": (_set("prediction_shift", torch.zeros(2)), CLASSES),
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


def _strangers(optimizer):
    """Our classes that are of another rule than this class, which may be torch.optim's."""
    kin = {member.rule for member in FAMILY if optimizer in (member.cls, member.base)}
    return [member.cls for member in FAMILY if member.rule not in kin]


OTHERS = [  # (name, what builds it, its class)
    ("SGD", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), torch.optim.SGD),
    ("SGD without momentum", lambda params: torch.optim.SGD(params, lr=0.1), torch.optim.SGD),
    ("RMSprop", lambda params: torch.optim.RMSprop(params, momentum=0.9), torch.optim.RMSprop),
    *(
        (name, getattr(torch.optim, name), getattr(torch.optim, name))
        for name in ("Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")
    ),
    *((cls.__name__, lambda params, cls=cls: cls(params, lr=0.1), cls) for cls in CLASSES),
]


@pytest.mark.parametrize(
    "name, make, cls", [(name, make, cls) for name, make, source in OTHERS for cls in _strangers(source)], ids=name_of
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
