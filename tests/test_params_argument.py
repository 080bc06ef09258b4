"""What may be passed as params, and what the usual slips are told.

A parameter that is listed twice would be restored twice from one theta_hat. Slips of a first hour (the model, a method
that was not called, a state_dict) raise TypeError with torch.optim's words and with what to pass.
"""

import functools
import itertools

import pytest
import torch
from cases import every_class
from training import assert_unchanged, filled, message_of, snapshot, trained_in_two_groups

from xgrad_optim import XAdamW


@every_class
@pytest.mark.parametrize("wrap", [list, tuple, iter], ids=lambda wrap: wrap.__name__)
def test_a_parameter_twice_in_one_group_raises(cls, wrap):
    """torch.optim only warns; stepping it twice from one theta_hat would restore twice."""
    param = filled(2)
    with pytest.raises(ValueError, match="more than once"):
        cls([{"params": wrap([param, param])}])
    with pytest.raises(ValueError, match="more than once"):
        cls(wrap([param, filled(1), param]))
    with pytest.raises(ValueError, match="more than once"):
        cls(wrap([("a", param), ("b", param)]))


@every_class
def test_a_parameter_in_two_groups_raises(cls):
    optimizer, params = trained_in_two_groups(cls)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [filled(2), params[0]]})
    assert_unchanged(optimizer, before)
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": params}, {"params": params[:1]}])


BAD_PARAMS = [
    (lambda: filled(2), TypeError, "iterable of Tensors or dicts"),
    (lambda: [], ValueError, "empty parameter list"),
    (lambda: [1.0], TypeError, "can only optimize Tensors"),
    (lambda: [filled(2) * 2], ValueError, "non-leaf"),
    (lambda: [{"params": {filled(2)}}], TypeError, "ordered collections"),
    (lambda: [("a", filled(2)), filled(2)], ValueError, "names are missing"),
]


@every_class
@pytest.mark.parametrize("make, error, text", BAD_PARAMS, ids=[row[2] for row in BAD_PARAMS])
def test_parameters_are_refused_as_torch_optim_does(cls, make, error, text):
    assert text in message_of(lambda: cls(make()), error)


BAD_GROUPS = [
    ([filled(2)], TypeError, "param_group must be a dict"),
    ({"params": {filled(2)}}, TypeError, "ordered collections"),
    ({"params": [3.0]}, TypeError, "can only optimize Tensors"),
    ({"params": [("name", filled(2))]}, ValueError, "with/without names"),
]


@every_class
@pytest.mark.parametrize("group, error, text", BAD_GROUPS, ids=[row[2] for row in BAD_GROUPS])
def test_a_refused_group_adds_nothing(cls, group, error, text):
    optimizer, _ = trained_in_two_groups(cls)
    before = snapshot(optimizer)
    group = dict(group) if isinstance(group, dict) else group
    assert text in message_of(lambda: optimizer.add_param_group(group), error)
    assert_unchanged(optimizer, before)


@every_class
def test_named_parameters_are_taken(cls):
    model = torch.nn.Linear(2, 3)
    optimizer = cls(model.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


# -- first mistakes --------------------------------------------------------------------------------------------------

LINEAR, SEQUENTIAL = torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2))
SLIPS = {
    "a model": (lambda: LINEAR, "Linear: pass model.parameters()"),
    "a sequential": (lambda: SEQUENTIAL, "pass model.parameters()"),
    "a module list": (lambda: torch.nn.ModuleList([LINEAR]), "pass model.parameters()"),
    "a module dict": (lambda: torch.nn.ModuleDict({"a": LINEAR}), "pass model.parameters()"),
    "a parameter dict": (lambda: torch.nn.ParameterDict({"a": LINEAR.weight}), "pass model.parameters()"),
    "models": (lambda: [LINEAR, SEQUENTIAL], "Linear: pass model.parameters()"),
    "modules": (lambda: SEQUENTIAL.modules(), "pass model.parameters()"),
    "named modules": (lambda: SEQUENTIAL.named_modules(), "pass model.parameters()"),
    "parameters": (lambda: LINEAR.parameters, "pass model.parameters(), with the parentheses"),
    "named_parameters": (lambda: LINEAR.named_parameters, "pass model.parameters(), with the parentheses"),
    "state_dict": (lambda: LINEAR.state_dict(), "OrderedDict: pass model.parameters()"),
    "a dict by name": (lambda: dict(LINEAR.named_parameters()), "dict: pass model.parameters()"),
    "a group": (lambda: {"params": [LINEAR.weight]}, "param groups go in a list, [{'params': ...}]"),
    "a function": (lambda: lambda: LINEAR.parameters(), "call it"),
    "a partial": (lambda: functools.partial(LINEAR.parameters), "call it"),
    "parts": (lambda: [LINEAR.parameters(), SEQUENTIAL.parameters()], "each part in a group of its own"),
    "lists": (lambda: [list(LINEAR.parameters())], "each part in a group of its own"),
    "a number": (lambda: 0.1, "iterable of Tensors or dicts, but got float"),
    "none": (lambda: None, "iterable of Tensors or dicts, but got NoneType"),
    "text": (lambda: "abc", "can only optimize Tensors, but one of the params is str"),
}
every_slip = pytest.mark.parametrize("name", SLIPS)


@every_slip
def test_a_slip_is_told_what_to_pass(name):
    make, text = SLIPS[name]
    assert text in message_of(lambda: XAdamW(make()), TypeError)


@every_slip
def test_a_slip_in_a_group_is_told_too_and_adds_nothing(name):
    make, text = SLIPS[name]
    assert text in message_of(lambda: XAdamW([{"params": make()}]), TypeError)
    optimizer, _ = trained_in_two_groups(XAdamW)
    before = snapshot(optimizer)
    assert text in message_of(lambda: optimizer.add_param_group({"params": make()}), TypeError)
    assert_unchanged(optimizer, before)


TAKEN = {
    "list": list,
    "tuple": tuple,
    "iterator": iter,
    "generator": lambda params: (param for param in params),
    "filter": lambda params: filter(lambda param: param.requires_grad, params),
    "chain": lambda params: itertools.chain(params[:1], params[1:]),
    "dict values": lambda params: dict(enumerate(params)).values(),
    "parameter list": torch.nn.ParameterList,
    "named": lambda params: [("a", params[0]), ("b", params[1])],
    "items": lambda params: {"a": params[0], "b": params[1]}.items(),
    "set": set,
}


@every_class
@pytest.mark.parametrize("name", TAKEN)
def test_every_iterable_that_torch_optim_takes_is_taken(cls, name):
    params = [filled(2), filled(3)]
    for optimizer in (torch.optim.SGD(TAKEN[name](params)), cls(TAKEN[name](params))):
        assert set(optimizer.param_groups[0]["params"]) == set(params)
    if name != "set":  # whose order changes between runs
        cls([{"params": TAKEN[name](params)}]).step()


@every_class
def test_an_empty_group_and_a_single_tensor_are_taken(cls):
    optimizer = cls([{"params": []}, {"params": filled(3)}])
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 1]
