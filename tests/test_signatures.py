"""Signatures equal those of torch.optim, and what the classes share is spelled where tools and readers look for it.

A drop-in replacement breaks where a positional argument or a default moves; a configuration tool where it finds only
`**common`.
"""

import inspect
from typing import get_type_hints

import pytest
from cases import every_class
from family import FAMILY, MEMBERS
from training import filled

from xgrad_optim.rule import COMMON, Common

OWN_DEFAULTS = {
    "prediction_steps": 1.0,
    "master_weights": False,
    "backend": None,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def _arguments(cls, kind):
    parameters = inspect.signature(cls).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is kind}


@every_class
def test_positional_arguments_are_those_of_torch_optim(cls):
    kind, member = inspect.Parameter.POSITIONAL_OR_KEYWORD, MEMBERS[cls]
    theirs = _arguments(member.like, kind)
    expected = {name: theirs[name] for name in theirs if name not in (*member.lacks, *OWN_DEFAULTS)}
    expected |= member.defaults
    assert list(_arguments(cls, kind).items()) == list(expected.items())
    optimizer = cls([filled(2)], *list(expected.values())[1:])
    assert {name: optimizer.defaults[name] for name in list(expected)[1:]} == dict(list(expected.items())[1:])


@every_class
def test_keyword_arguments_and_their_defaults(cls):
    assert _arguments(cls, inspect.Parameter.KEYWORD_ONLY) == OWN_DEFAULTS | MEMBERS[cls].keywords
    assert not _arguments(cls, inspect.Parameter.VAR_KEYWORD)
    assert inspect.signature(cls.__init__).parameters.keys() == {"self", *inspect.signature(cls).parameters}


@every_class
def test_every_keyword_of_torch_optim_is_taken(cls):
    theirs = _arguments(MEMBERS[cls].like, inspect.Parameter.KEYWORD_ONLY)
    optimizer = cls([filled(2)], **theirs)
    assert {name: optimizer.defaults[name] for name in theirs} == theirs


@every_class
def test_every_argument_reaches_the_groups(cls):
    parameters = inspect.signature(cls).parameters
    group = cls([filled(2)]).param_groups[0]
    for name in set(parameters) - {"params"}:
        assert group[name] == parameters[name].default


@every_class
def test_the_common_arguments_are_those_of_the_typed_dict(cls):
    assert COMMON.keys() == get_type_hints(Common).keys() == OWN_DEFAULTS.keys()
    parameters = inspect.signature(cls).parameters
    assert {name: parameters[name].annotation for name in COMMON} == get_type_hints(Common)


@every_class
@pytest.mark.parametrize("name", ["lr_dekay", "decay", "differentiabel", "beta1", "weigth_decay", "rule", "common"])
def test_an_unknown_keyword_raises_as_python_does(cls, name):
    with pytest.raises(TypeError, match=rf"{cls.__name__}.__init__\(\) got an unexpected keyword argument '{name}'"):
        cls([filled(2)], **{name: 0.1})


@every_class
@pytest.mark.parametrize("name", ["lr", "prediction_steps"])
def test_an_argument_cannot_be_given_twice(cls, name):
    with pytest.raises(TypeError, match="argument"):
        cls([filled(2)], 0.1, *([0.1] * 9), **{name: 0.1})


@pytest.mark.parametrize("cls", [m.cls for m in FAMILY if not m.cls.fixed_options], ids=lambda cls: cls.__name__)
def test_defaults_make_another_optimizer(cls):
    """Wrappers do this, and torch.optim's SGD and Adam can."""
    optimizer = cls([filled(2)], lr=0.5)
    assert cls([filled(2)], **optimizer.defaults).defaults == optimizer.defaults


@every_class
def test_every_argument_is_documented_once(cls):
    lines = inspect.getdoc(cls).splitlines()
    arguments = lines[lines.index("Args:") :]
    for name in inspect.signature(cls).parameters:
        assert len([line for line in arguments if line.startswith((f"    {name} (", f"    {name}:"))]) == 1, name
    assert lines.count("Args:") == lines.count("Raises:") == 1


@every_class
def test_weight_decay_is_coupled_or_decoupled_as_in_the_base(cls):
    group = cls([filled(2)]).param_groups[0]
    assert group.get("decoupled_weight_decay", False) == MEMBERS[cls].is_decoupled
