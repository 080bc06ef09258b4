"""What the constructors refuse before anything has changed, and what a step refuses of options changed by hand.

- A wrong kind raises TypeError, a value out of range ValueError in torch.optim's words, options that exclude each
  other RuntimeError. Breaks where a check is missing or forgets NaN.
- The same holds for a param group and for `add_param_group`. Breaks where only `defaults` are checked; and a refused
  group breaks the optimizer where it is added first and checked afterwards.
- What can't be computed with raises in `step()`, which must find out before it writes. A number out of range can be.
"""

import math

import numpy
import pytest
import torch
from cases import every_class
from family import CLASSES, FAMILY, taking
from training import assert_unchanged, filled, message_of, snapshot, trained_in_two_groups

from xgrad_optim import XAdaBelief, XAdam, XAdaM3, XAdamW

NOT_A_NUMBER = (TypeError, "must be a real number")
TWO_NUMBERS = torch.tensor([0.1, 0.2])


def _bad_numbers(name, words, values=(-1e-3, math.nan, math.inf, -math.inf)):
    """Rows for a number that must be finite and, as `values` has it, >= 0."""
    wrong_kinds = ("0.1", b"0.1", None, 1j, numpy.complex64(1), torch.tensor(1j), [0.1], (0.1,), {0.1: 0.1}, object)
    return [({name: value}, ValueError, words) for value in (*values, torch.tensor(math.nan))] + [
        ({name: value}, *NOT_A_NUMBER) for value in wrong_kinds
    ]


def _bad_flags(name):
    """torch.optim takes them by their truth: "False" would be True."""
    wrong = ("yes", "", "False", [], [0], (), {}, object, TWO_NUMBERS, math.nan)
    return [({name: value}, TypeError, f"{name} must be True or False") for value in wrong]


NAMED = ("lr", "weight_decay", "dampening", "eps")
OTHER_NUMBERS = dict.fromkeys(name for member in FAMILY for name in member.numbers if name not in NAMED)

BAD_ARGUMENTS = [  # (classes, rows of (kwargs, error, text))
    (
        CLASSES,
        [
            *_bad_numbers("lr", "Invalid learning rate"),
            ({"lr": TWO_NUMBERS}, ValueError, "Tensor lr must be 1-element"),
            ({"lr": torch.empty(0)}, ValueError, "Tensor lr must be 1-element"),
            ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
            ({"lr": numpy.array([0.1, 0.2])}, ValueError, "Tensor lr must be 1-element"),
            ({"lr": 10**400}, ValueError, "Invalid learning rate: inf"),
            *_bad_numbers("weight_decay", "Invalid weight_decay value"),
            *_bad_numbers("prediction_steps", "Invalid prediction_steps value"),
            ({"prediction_steps": TWO_NUMBERS}, ValueError, "prediction_steps"),
            *_bad_flags("master_weights"),
            *_bad_flags("maximize"),
            *_bad_flags("capturable"),
            *_bad_flags("differentiable"),
            *_bad_flags("foreach"),
            *_bad_flags("fused"),
            ({"differentiable": True}, NotImplementedError, "differentiable=True is not supported"),
            ({"foreach": True, "fused": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together."),
            ({"backend": "torch", "fused": True}, RuntimeError, "leave one of them out"),
            ({"backend": "cpu", "foreach": True}, RuntimeError, "leave one of them out"),
            ({"backend": "triton", "fused": False}, RuntimeError, "leave one of them out"),
            ({"backend": "cublas"}, ValueError, "Invalid backend: 'cublas'"),
            ({"backend": ""}, ValueError, "Invalid backend: ''"),
            ({"backend": 3}, (TypeError, ValueError), "backend"),
            ({"backend": ["torch"]}, (TypeError, ValueError), "backend"),
        ],
    ),
    (taking("dampening"), _bad_numbers("dampening", "Invalid dampening value", values=(math.nan, math.inf))),
    (taking("eps"), _bad_numbers("eps", "Invalid epsilon value")),
    *((taking(name), _bad_numbers(name, f"Invalid {name} value")) for name in OTHER_NUMBERS),
    (taking("nesterov"), [*_bad_flags("nesterov"), ({"nesterov": True}, ValueError, "prediction_steps=momentum")]),
    (taking("amsgrad"), _bad_flags("amsgrad")),
    (
        taking("betas"),
        [
            ({"betas": 0.9}, TypeError, "betas must be a pair"),
            ({"betas": None}, TypeError, "betas must be a pair"),
            ({"betas": "ab"}, TypeError, "betas must be a pair"),
            ({"betas": b"\0\0"}, TypeError, "betas must be a pair"),
            ({"betas": {0: 0.9, 1: 0.999}}, TypeError, "betas must be a pair"),
            ({"betas": {0.9, 0.999}}, TypeError, "betas must be a pair"),
            ({"betas": iter((0.9, 0.999))}, TypeError, "betas must be a pair"),
            ({"betas": torch.tensor([[0.9, 0.999]])}, TypeError, "betas must be a pair"),
            ({"betas": torch.tensor(0.9)}, TypeError, "betas must be a pair"),
            ({"betas": (0.9,)}, TypeError, "betas must be a pair"),
            ({"betas": (0.9, 0.99, 0.999)}, TypeError, "betas must be a pair"),
            ({"betas": ("0.9", 0.999)}, TypeError, "betas[0] must be a real number"),
            ({"betas": (0.9, None)}, TypeError, "betas[1] must be a real number"),
            ({"betas": (1.0, 0.999)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
            ({"betas": (-0.1, 0.999)}, ValueError, "Invalid beta parameter at index 0: -0.1"),
            ({"betas": (0.9, 1.0)}, ValueError, "Invalid beta parameter at index 1: 1.0"),
            ({"betas": (0.9, math.nan)}, ValueError, "Invalid beta parameter at index 1: nan"),
            ({"betas": (math.nan, 0.999)}, ValueError, "Invalid beta parameter at index 0: nan"),
            ({"betas": (torch.tensor(0.9), torch.tensor(1.5))}, ValueError, "Invalid beta parameter at index 1: 1.5"),
            ({"betas": (TWO_NUMBERS, torch.tensor(0.9))}, ValueError, "betas[0] must be 1-element"),
        ],
    ),
    (taking("decoupled_weight_decay"), _bad_flags("decoupled_weight_decay")),
    # A momentum whose square is 0 would be divided by 0; the docstring says > 0.
    *(
        ((member.cls,), [({name: 0.0}, ValueError, "must be > 0")])
        for member in FAMILY
        for name in member.rule.positive_options
    ),
]


def _id(value):
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return "-".join(f"{key}={_id(item)}" for key, item in value.items())
    text = repr(value).replace("\n", "")
    return type(value).__name__ if " at 0x" in text or len(text) > 60 else text


bad_argument = pytest.mark.parametrize(
    "cls, kwargs, error, text",
    [(cls, *row) for classes, rows in BAD_ARGUMENTS for cls in classes for row in rows],
    ids=_id,
)


# -- refused arguments -----------------------------------------------------------------------------------------------


@bad_argument
def test_a_bad_argument_is_refused_wherever_it_is_set_and_changes_nothing(cls, kwargs, error, text):
    param = filled(2)
    before = param.detach().clone()
    assert text in message_of(lambda: cls([param], **kwargs), error)
    assert text in message_of(lambda: cls([{"params": [filled(2)]}, {"params": [param], **kwargs}]), error)
    assert torch.equal(param, before)
    optimizer, _ = trained_in_two_groups(cls)
    before = snapshot(optimizer)
    assert text in message_of(lambda: optimizer.add_param_group({"params": [filled(2)], **kwargs}), error)
    assert_unchanged(optimizer, before)


@every_class
def test_options_of_a_group_and_of_the_defaults_exclude_each_other_too(cls):
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        cls([{"params": [filled(2)], "fused": True}], foreach=True)


@every_class
@pytest.mark.parametrize("name", ["lr_decay", "decay", "differentiabel", "beta1"])
def test_an_unknown_keyword_raises(cls, name):
    with pytest.raises(TypeError, match=name):
        cls([filled(2)], **{name: 0.1})


@every_class
def test_unknown_keys_of_a_group_are_kept(cls):
    """Schedulers and users put names and scales there, as torch.optim allows."""
    optimizer = cls([{"params": [filled(2)], "name": "head", "lr_scale": 0.5}])
    assert optimizer.param_groups[0]["name"] == "head"
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


def test_a_group_cannot_turn_xadamw_into_xadam():
    """Were the option taken, a copy or a reload, which sets the class's own, would train on differently."""
    optimizer = XAdamW([{"params": [filled(2)], "decoupled_weight_decay": False, "weight_decay": 0.1}])
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True


@pytest.mark.parametrize("source, target", [(XAdam, XAdaBelief), (XAdaM3, XAdam), (XAdam, XAdamW)], ids=_id)
def test_groups_of_another_optimizer_are_adopted_as_our_own(source, target):
    """`XAdaBelief(xadam.param_groups)` must not save files that say "adam" and cannot be loaded again."""
    optimizer, params = trained_in_two_groups(source)
    adopted = target([dict(group) for group in optimizer.param_groups])
    adopted.step()
    fresh = target([{"params": [param]} for param in params])
    fresh.load_state_dict(adopted.state_dict())
    own = [{key: group[key] for key in ("lr", "decoupled_weight_decay")} for group in adopted.param_groups]
    assert own == [{key: group[key] for key in own[0]} for group in fresh.param_groups]


# -- options that change between steps -------------------------------------------------------------------------------

BAD_LATER = {
    "lr": [math.nan, math.inf, "0.1", None, TWO_NUMBERS, torch.tensor(math.nan), 1j],
    "weight_decay": [math.nan, "0.1"],
    "prediction_steps": [math.nan, math.inf, None],
    "maximize": ["yes", [0]],
    "master_weights": ["no"],
    "differentiable": [True],
    "backend": ["cublas"],
    "fused": ["yes"],
    "dampening": [math.nan, "0"],
    "nesterov": [True, 1],
    "betas": [(1.0, 0.999), (0.9, 1.0), (0.9, 1.5), (0.9,), 0.9, (math.nan, 0.9), ("0.9", 0.9)],
    "eps": [math.nan, "1e-8"],
    "amsgrad": ["yes"],
    "decoupled_weight_decay": ["no"],
    **{name: [math.nan, math.inf, "0.9"] for name in OTHER_NUMBERS},
}


@pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
@pytest.mark.parametrize(
    "cls, name, value",
    [(cls, name, value) for name, values in BAD_LATER.items() for cls in taking(name) for value in values],
    ids=_id,
)
def test_what_cannot_be_computed_with_raises_in_step_and_changes_nothing(cls, name, value, predicted):
    optimizer, params = trained_in_two_groups(cls)
    undisturbed, expected = trained_in_two_groups(cls)
    for each in (optimizer, undisturbed):
        each.train(predicted)
    good = optimizer.param_groups[1][name]
    before = snapshot(optimizer)
    optimizer.param_groups[1][name] = value
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError), match=name.removesuffix("s")):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    assert_unchanged(optimizer, before)
    assert optimizer.predicted is predicted

    optimizer.step()
    undisturbed.step()
    assert all(map(torch.equal, params, expected))


@every_class
def test_a_tensor_lr_that_becomes_nan_in_place_raises_in_step_and_changes_nothing(cls):
    optimizer, params = trained_in_two_groups(cls, lr=torch.tensor(0.1))
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["lr"].fill_(math.nan)
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(state["step"] == 1 for state in optimizer.state.values())
