"""What torch.optim takes is taken, and trains as there: any kind of number and pair, in the constructor and in groups.

A configuration library, numpy or a schedule hands over what is no plain float. Where we differ on purpose stands in
`REFUSED` with the reason, and is tested from both sides, so that the list stays true.
"""

import inspect
import math
import pickle
from collections import UserList, deque
from decimal import Decimal
from fractions import Fraction

import numpy
import pytest
import torch
from cases import every_class
from family import FAMILY, MEMBERS, taking
from training import filled

from xgrad_optim import XSGDM, XAdam


def _defaults(cls):
    return {name: parameter.default for name, parameter in inspect.signature(cls).parameters.items()}


BASES = {member.cls: member for member in FAMILY if member.is_base}
FLAGS = {
    cls: [
        name
        for name, default in _defaults(member.like).items()
        if name not in member.lacks and (default is None or isinstance(default, bool))
    ]
    for cls, member in BASES.items()
}
every_base = pytest.mark.parametrize("cls", BASES, ids=lambda cls: cls.__name__)
either_place = pytest.mark.parametrize("in_group", [False, True], ids=["constructor", "group"])


class Floats:
    """Only what torch.optim asks of a number: comparisons and arithmetic."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


class Indexed:
    """What omegaconf.ListConfig looks like to an optimizer."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


ODD_NUMBERS = {
    "int 0": 0,
    "int 1": 1,
    "True": True,
    "False": False,
    "-0.0": -0.0,
    "residue of a schedule": -5.551115123125784e-21,
    "float16": numpy.float16(0.1),
    "float32": numpy.float32(0.1),
    "float64": numpy.float64(0.1),
    "int64": numpy.int64(1),
    "bool_": numpy.bool_(True),
    "0-dim array": numpy.array(0.1),
    "array": numpy.array([0.1]),
    "array of a column": numpy.array([[0.1]]),
    "Fraction": Fraction(1, 10),
    "Decimal": Decimal("0.1"),
    "Floats": Floats(0.1),
    "0-dim tensor": torch.tensor(0.1),
    "tensor": torch.tensor([0.1]),
    "tensor of a column": torch.tensor([[0.1]]),
    "int tensor": torch.tensor(1),
    "bool tensor": torch.tensor(True),
    "bfloat16 tensor": torch.tensor(0.1, dtype=torch.bfloat16),
    "float64 tensor": torch.tensor(0.1, dtype=torch.float64),
    "tensor with a gradient": torch.tensor(0.1, requires_grad=True),
    "parameter": torch.nn.Parameter(torch.tensor(0.1)),
}
ODD_PAIRS = {
    "list": [0.8, 0.95],
    "UserList": UserList([0.8, 0.95]),
    "deque": deque([0.8, 0.95]),
    "Indexed": Indexed(0.8, 0.95),
    "array": numpy.array([0.8, 0.95]),
    "float32 array": numpy.array([0.8, 0.95], dtype=numpy.float32),
    "tensor": torch.tensor([0.8, 0.95]),
    "float64 tensor": torch.tensor([0.8, 0.95], dtype=torch.float64),
    "tensors": (torch.tensor(0.8), torch.tensor(0.95)),
    "1-element tensors": (torch.tensor([0.8]), torch.tensor([[0.95]])),
    "float64 numbers": (numpy.float64(0.8), numpy.float64(0.95)),
    "float32 numbers": (numpy.float32(0.8), numpy.float32(0.95)),
    "float and tensor": (0.8, torch.tensor(0.95)),
    "fraction": (Fraction(8, 10), 0.95),
    "zeros": (0.0, 0.0),
    "int zeros": [0, 0],
    "bools": (False, False),
}
ODD_FLAGS = {
    "True": True,
    "False": False,
    "1": 1,
    "0": 0,
    "2": 2,
    "1.0": 1.0,
    "None": None,
    "bool_ True": numpy.bool_(True),
    "bool_ False": numpy.bool_(False),
    "tensor True": torch.tensor(True),
    "tensor 0": torch.tensor([0.0]),
    "array": numpy.array(False),
}


def steps(cls, option, in_group, **kwargs):
    """The parameter after three steps, or None where torch.optim or we refuse."""
    params = [filled(5, seed=1), filled(2, 3, seed=2)]
    try:
        optimizer = cls([{"params": params[:1]}, {"params": params[1:], **(option if in_group else {})}],
                        **kwargs, **({} if in_group else option))  # fmt: skip
        for seed in range(3):
            for param in params:
                param.grad = filled(*param.shape, seed=10 + seed).grad
            optimizer.step()
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError, AssertionError):
        return None
    return params


def assert_taken_as_by_torch_optim(cls, option, in_group):
    theirs = steps(BASES[cls].make_base, option, in_group)
    ours = steps(cls, option, in_group, prediction_steps=0)
    if theirs is not None:
        assert ours is not None, "torch.optim takes it"
        # torch.optim computes with the number as it is, in 16 bits where it has no more.
        is_narrow = getattr(next(iter(option.values())), "dtype", None) in (torch.bfloat16, numpy.float16)
        tolerance = 2e-2 if is_narrow else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert steps(cls, option, in_group) is not None  # with a prediction


@every_base
@either_place
@pytest.mark.parametrize("value", ODD_NUMBERS.values(), ids=ODD_NUMBERS)
def test_numbers(cls, in_group, value):
    for name in BASES[cls].numbers:
        if not (name == "eps" and isinstance(value, float) and value < 0):  # no schedule moves eps
            assert_taken_as_by_torch_optim(cls, {name: value}, in_group)


@pytest.mark.parametrize("cls", [cls for cls in taking("betas") if cls in BASES], ids=lambda cls: cls.__name__)
@either_place
@pytest.mark.parametrize("value", ODD_PAIRS.values(), ids=ODD_PAIRS)
def test_pairs(cls, in_group, value):
    assert_taken_as_by_torch_optim(cls, {"betas": value}, in_group)


@every_base
@either_place
@pytest.mark.parametrize("value", ODD_FLAGS.values(), ids=ODD_FLAGS)
def test_flags(cls, in_group, value):
    for name in FLAGS[cls]:
        if name not in ("nesterov", "differentiable") or not value:
            assert_taken_as_by_torch_optim(cls, {name: value}, in_group)


NOT_FINITE = (math.inf, math.nan)  # no weight survives a step with it
NEGATIVE = (-1, -1e-3)  # torch.optim checks the range in the constructor only
TEXT_AND_CONTAINERS = ("", "yes", [], [0])  # "False" would be True
REFUSED = [  # (class, option, values that torch.optim takes)
    *((cls, name, NOT_FINITE + NEGATIVE) for cls in BASES for name in BASES[cls].numbers if name != "dampening"),
    (XSGDM, "dampening", (*NOT_FINITE, "0.1", None)),  # which is not read where momentum is 0
    (XAdam, "betas", ((0.9, 1.0), (math.nan, 0.9), {0: 0.9, 1: 0.999}, {0.9, 0.999})),
    *((cls, name, TEXT_AND_CONTAINERS) for cls in BASES for name in FLAGS[cls]),
    (XSGDM, "nesterov", (True, 1)),  # prediction_steps=momentum is that
    *((cls, "differentiable", (True, 1)) for cls in BASES),  # a step restores weights bit by bit
]


@pytest.mark.parametrize("cls, name, values", REFUSED, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_refused_on_purpose(cls, name, values):
    """In both places, though torch.optim takes it in one of them at least."""
    for value in values:
        is_taken = [steps(BASES[cls].like, {name: value}, in_group) is not None for in_group in (False, True)]
        assert any(is_taken) or name == "capturable", value
        assert [steps(cls, {name: value}, in_group) for in_group in (False, True)] == [None, None], value


# -- what is kept ----------------------------------------------------------------------------------------------------


@every_class
def test_a_checkpoint_holds_plain_values(cls, tmp_path):
    """torch.load(weights_only=True), the default, knows neither numpy's numbers nor fractions."""
    odd = {"lr": numpy.float32(0.1), "weight_decay": Fraction(1, 8)}
    odd |= {"maximize": numpy.bool_(False), "prediction_steps": 2}
    if MEMBERS[cls].takes("betas", "amsgrad"):
        odd |= {"betas": Indexed(numpy.float64(0.8), 0.95), "amsgrad": numpy.bool_(True)}
    optimizer = cls([{"params": [filled(3)]}, {"params": [filled(2)], **odd}], **odd)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "file")
    loaded = torch.load(tmp_path / "file")
    for group in (optimizer.defaults, *loaded["param_groups"]):
        assert type(group["lr"]) is float and group["lr"] == numpy.float32(0.1)
        assert group["weight_decay"] == 0.125 and type(group["weight_decay"]) is float
        assert group["maximize"] is False and group["prediction_steps"] == 2
        assert "betas" not in odd or (group["betas"] == (0.8, 0.95) and type(group["betas"]) is tuple)
    pickle.loads(pickle.dumps(optimizer))


@every_class
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_tensor_stays_the_user_s_own(cls, shape):
    """Schedules fill it in place."""
    as_tensor, as_float = filled(6), filled(6)
    lr = torch.full(shape, 0.03, dtype=torch.float64)
    optimizer, expected = cls([as_tensor], lr, weight_decay=0.1), cls([as_float], 0.03, weight_decay=0.1)
    assert optimizer.param_groups[0]["lr"] is lr
    for _ in range(3):
        optimizer.step()
        expected.step()
        assert torch.equal(as_tensor, as_float)
        lr.mul_(0.5)
        expected.param_groups[0]["lr"] *= 0.5


ACCEPTED = [
    {"prediction_steps": 0},
    {"prediction_steps": 12.5},
    {"prediction_steps": torch.tensor(2.0)},
    {"prediction_steps": numpy.float32(0.5)},
    {"master_weights": 1},
    {"master_weights": None},
    {"momentum": 1.25},
    {"dampening": -0.5},
    {"betas": [0.8, 0.9]},
    {"decoupled_weight_decay": 0},
    {"eps": 0.0},
]
ACCEPTED = [
    (cls, kwargs)
    for kwargs in ACCEPTED
    for cls in taking(*kwargs)
    if not (kwargs == {"eps": 0.0} and "eps" in cls.rule.positive_options)
]


@pytest.mark.parametrize("cls, kwargs", ACCEPTED, ids=str)
def test_our_own_options_are_as_easy(cls, kwargs):
    param = filled(5)
    before = param.detach().clone()
    cls([param], **kwargs).step()
    assert torch.isfinite(param).all()
    assert not torch.equal(param, before)
