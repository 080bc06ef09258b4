"""What the constructors accept, and what they refuse before anything has changed.

- A wrong kind raises TypeError, a value out of range ValueError in torch.optim's words, options that exclude each
  other or a back end that is not there RuntimeError. Breaks where a check is missing or forgets NaN.
- The same holds for a param group and for `add_param_group`. Breaks where only `defaults` are checked; and a refused
  group breaks the optimizer where it is added first and checked afterwards.
- Numbers that a scheduler or a user has moved out of range raise in `step()`: it must check before it writes.
- Signatures equal those of torch.optim: a drop-in replacement breaks where a positional argument or default moves.
"""

import copy
import inspect
import math

import numpy
import pytest
import torch

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW, available_backends, backends

FAMILY = (XSGDM, XAdam, XAdamW, XAdaBelief, XAdaM3)
ADAMS = FAMILY[1:]
SGD_ONLY = (XSGDM,)
TORCH_BASES = {
    XSGDM: torch.optim.SGD,
    XAdam: torch.optim.Adam,
    XAdamW: torch.optim.AdamW,
    XAdaBelief: torch.optim.Adam,
    XAdaM3: torch.optim.Adam,
}
PARAM = torch.nn.Parameter

every_class = pytest.mark.parametrize("cls", FAMILY, ids=lambda cls: cls.__name__)

NOT_A_NUMBER = (TypeError, "must be a real number")
TWO_NUMBERS = torch.tensor([0.1, 0.2])


def _bad_numbers(name, words, values=(-1e-3, math.nan, math.inf, -math.inf)):
    """Rows for a number that must be finite and, as `values` has it, >= 0."""
    wrong_kinds = ("0.1", None, True, 1j, [0.1], torch.tensor(True))
    return [({name: value}, ValueError, words) for value in (*values, torch.tensor(math.nan))] + [
        ({name: value}, *NOT_A_NUMBER) for value in wrong_kinds
    ]


def _bad_flags(name, wrong=(1, 0, "yes", None)):
    return [({name: value}, TypeError, f"{name} must be True or False") for value in wrong]


BAD_ARGUMENTS = [  # (classes, rows of (kwargs, error, text))
    (
        FAMILY,
        [
            *_bad_numbers("lr", "Invalid learning rate"),
            ({"lr": TWO_NUMBERS}, ValueError, "Tensor lr must be 1-element"),
            ({"lr": torch.empty(0)}, ValueError, "Tensor lr must be 1-element"),
            ({"lr": torch.tensor(-1.0)}, ValueError, "Invalid learning rate: -1.0"),
            *_bad_numbers("weight_decay", "Invalid weight_decay value"),
            *_bad_numbers("prediction_steps", "Invalid prediction_steps value"),
            ({"prediction_steps": TWO_NUMBERS}, ValueError, "prediction_steps"),
            *_bad_flags("master_weights"),
            *_bad_flags("maximize"),
            *_bad_flags("capturable"),
            *_bad_flags("differentiable"),
            *_bad_flags("foreach", wrong=(1, 0, "yes")),
            *_bad_flags("fused", wrong=(1, 0, "yes")),
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
    (
        SGD_ONLY,
        [
            *_bad_numbers("momentum", "Invalid momentum value"),
            *_bad_numbers("dampening", "Invalid dampening value", values=(math.nan, math.inf)),
            *_bad_flags("nesterov"),
            ({"nesterov": True}, ValueError, "prediction_steps=momentum"),
        ],
    ),
    (
        ADAMS,
        [
            *_bad_numbers("eps", "Invalid epsilon value"),
            ({"betas": 0.9}, TypeError, "betas must be a pair"),
            ({"betas": None}, TypeError, "betas must be a pair"),
            ({"betas": "ab"}, TypeError, "betas must be a pair"),
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
            *_bad_flags("amsgrad"),
        ],
    ),
    ((XAdaBelief, XAdaM3), _bad_flags("decoupled_weight_decay")),
    # Its eps is the only thing that keeps 0 / 0 out of the weights; the docstring says > 0.
    ((XAdaM3,), [({"eps": 0.0}, ValueError, "Invalid epsilon value: 0.0")]),
]


def _id(value):
    if isinstance(value, type):
        return value.__name__
    if isinstance(value, dict):
        return "-".join(f"{key}={item!r}".replace("\n", "") for key, item in value.items())
    return None


bad_argument = pytest.mark.parametrize(
    "cls, kwargs, error, text",
    [(cls, *row) for classes, rows in BAD_ARGUMENTS for cls in classes for row in rows],
    ids=_id,
)


def filled(*shape, seed=0):
    """A parameter with a gradient, both from this seed."""
    generator = torch.Generator().manual_seed(seed)
    param = PARAM(torch.randn(*shape, generator=generator))
    param.grad = torch.randn(*shape, generator=generator)
    return param


def trained(cls, **kwargs):
    """An optimizer in mid-training, with two groups, and its parameters."""
    params = [filled(3, 2, seed=1), filled(4, seed=2)]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], **kwargs)
    optimizer.step()
    return optimizer, params


def snapshot(optimizer):
    """Every bit of an optimizer: options, parameters, gradients and state."""
    groups = [
        {
            key: [id(param) for param in value] if key == "params" else copy.deepcopy(value)
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = [param.detach().clone() for param in params] + [param.grad.clone() for param in params]
    state = [
        (place, key, value.clone())
        for place, param in enumerate(params)
        for key, value in optimizer.state.get(param, {}).items()
    ]
    return groups, tensors, state


def assert_unchanged(optimizer, before):
    groups, tensors, state = snapshot(optimizer)
    assert groups == before[0]
    assert all(map(torch.equal, tensors, before[1]))
    assert [entry[:2] for entry in state] == [entry[:2] for entry in before[2]]
    assert all(torch.equal(now[2], then[2]) for now, then in zip(state, before[2], strict=True))


def message_of(call, error):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


# -- refused arguments -----------------------------------------------------------------------------------------------


@bad_argument
def test_constructor_refuses(cls, kwargs, error, text):
    param = filled(2)
    before = param.detach().clone()
    assert text in message_of(lambda: cls([param], **kwargs), error)
    assert torch.equal(param, before)


@bad_argument
def test_param_group_refuses(cls, kwargs, error, text):
    groups = [{"params": [filled(2)]}, {"params": [filled(2)], **kwargs}]
    assert text in message_of(lambda: cls(groups), error)


@bad_argument
def test_add_param_group_refuses_and_adds_nothing(cls, kwargs, error, text):
    optimizer, _ = trained(cls)
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


@pytest.mark.parametrize("cls, value", [(XAdam, True), (XAdamW, False)], ids=_id)
def test_a_group_cannot_turn_xadam_into_xadamw(cls, value):
    """Were the option taken, a copy or a reload, which sets the class's own, would train on differently."""
    param = filled(2)
    groups = [{"params": [param], "decoupled_weight_decay": value, "weight_decay": 0.1}]
    try:
        optimizer = cls(groups)
    except ValueError as error:
        assert "decoupled_weight_decay" in str(error)
    else:
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is not value


@pytest.mark.parametrize("source, target", [(XAdam, XAdaBelief), (XAdaM3, XAdam), (XAdam, XAdamW)], ids=_id)
def test_groups_of_another_optimizer_are_adopted_as_our_own(source, target):
    """`XAdaBelief(xadam.param_groups)` must not save files that say "adam" and cannot be loaded again."""
    optimizer, params = trained(source)
    adopted = target([dict(group) for group in optimizer.param_groups])
    adopted.step()
    fresh = target([{"params": [param]} for param in params])
    fresh.load_state_dict(adopted.state_dict())
    own = [{key: group[key] for key in ("lr", "decoupled_weight_decay")} for group in adopted.param_groups]
    assert own == [{key: group[key] for key in own[0]} for group in fresh.param_groups]


# -- refused parameters ----------------------------------------------------------------------------------------------


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
    optimizer, params = trained(cls)
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
    optimizer, _ = trained(cls)
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


# -- back ends -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_native_backend(monkeypatch):
    """A machine that has only the torch back end."""
    module = backends._module
    monkeypatch.setattr(
        backends, "_module", lambda name: module(name) if name == "torch" else f"no {name} on this machine"
    )


@every_class
@pytest.mark.parametrize("name", ["triton", "cuda", "cpu"])
def test_a_demanded_backend_that_is_absent_raises_and_says_why(cls, name, no_native_backend):
    message = message_of(lambda: cls([filled(2)], backend=name), RuntimeError)
    assert f"backend={name!r}" in message and f"no {name} on this machine" in message


@every_class
def test_fused_without_any_native_backend_raises_and_names_each_reason(cls, no_native_backend):
    message = message_of(lambda: cls([filled(2)], fused=True), RuntimeError)
    assert "fused=True" in message
    assert all(f"no {name} on this machine" in message for name in ("triton", "cuda", "cpu"))


@every_class
def test_a_group_that_demands_an_absent_backend_is_not_added(cls, no_native_backend):
    optimizer, _ = trained(cls)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no cuda on this machine"):
        optimizer.add_param_group({"params": [filled(2)], "backend": "cuda"})
    assert_unchanged(optimizer, before)


@every_class
def test_a_group_that_is_moved_to_an_absent_backend_raises_in_step_and_changes_nothing(cls, no_native_backend):
    optimizer, _ = trained(cls)
    optimizer.param_groups[1]["backend"] = "cuda"
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="no cuda on this machine"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_class
@pytest.mark.parametrize("kwargs", [{"backend": "torch"}, {"foreach": True}, {"fused": False}], ids=_id)
def test_the_torch_backend_can_always_be_demanded(cls, kwargs, no_native_backend):
    _, params = trained(cls, **kwargs)
    _, expected = trained(cls)
    assert all(map(torch.equal, params, expected))


def test_available_backends_gives_a_reason_for_each_absent_one():
    reasons = available_backends()
    assert list(reasons) == ["triton", "cuda", "cpu", "torch"]
    assert reasons["torch"] is None
    assert all(reason is None or reason.strip() for reason in reasons.values())


@every_class
def test_capturable_on_the_cpu_raises_and_changes_nothing(cls):
    param = filled(3)
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer = cls([param], capturable=True)
        assert not optimizer.state
        optimizer.step()
    assert torch.equal(param, before)


# -- accepted arguments ----------------------------------------------------------------------------------------------

ACCEPTED = [
    (FAMILY, {"lr": 0.0}),
    (FAMILY, {"lr": 1}),
    (FAMILY, {"lr": numpy.float32(0.1)}),
    (FAMILY, {"lr": numpy.float64(0.1)}),
    (FAMILY, {"weight_decay": 1}),
    (FAMILY, {"prediction_steps": 0}),
    (FAMILY, {"prediction_steps": 12.5}),
    (FAMILY, {"prediction_steps": torch.tensor(2.0)}),
    (SGD_ONLY, {"momentum": 0}),
    (SGD_ONLY, {"momentum": 1.25}),
    (SGD_ONLY, {"dampening": -0.5}),
    (SGD_ONLY, {"dampening": 1}),
    (ADAMS, {"betas": [0.8, 0.9]}),
    (ADAMS, {"betas": (0, 0.0)}),
    (ADAMS, {"betas": (torch.tensor(0.5), torch.tensor([0.75]))}),
    ((XAdam, XAdamW, XAdaBelief), {"eps": 0.0}),
]


@pytest.mark.parametrize("cls, kwargs", [(cls, kwargs) for classes, kwargs in ACCEPTED for cls in classes], ids=_id)
def test_values_at_the_edges_of_their_range_are_taken_and_train(cls, kwargs):
    param = filled(5)
    before = param.detach().clone()
    optimizer = cls([param], **kwargs)
    optimizer.step()
    assert torch.isfinite(param).all()
    assert torch.equal(param, before) == (kwargs.get("lr") == 0.0)


@every_class
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_lr_may_be_a_tensor_of_one_element(cls, shape):
    as_tensor, as_float = filled(6), filled(6)
    optimizer = cls([as_tensor], torch.full(shape, 0.03, dtype=torch.float64), weight_decay=0.1)
    expected = cls([as_float], 0.03, weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
        expected.step()
        assert torch.equal(as_tensor, as_float)
        optimizer.param_groups[0]["lr"].mul_(0.5)
        expected.param_groups[0]["lr"] *= 0.5


# -- signatures ------------------------------------------------------------------------------------------------------

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
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    expected = _arguments(TORCH_BASES[cls], kind)
    if cls is XSGDM:
        expected["momentum"] = 0.9
    if cls in (XAdaBelief, XAdaM3):
        expected["eps"] = 1e-16
    assert list(_arguments(cls, kind).items()) == list(expected.items())


@every_class
def test_keyword_arguments_and_their_defaults(cls):
    expected = dict(OWN_DEFAULTS)
    if cls in (XAdaBelief, XAdaM3):
        expected["decoupled_weight_decay"] = True
    assert _arguments(cls, inspect.Parameter.KEYWORD_ONLY) == expected
    assert not _arguments(cls, inspect.Parameter.VAR_KEYWORD)


@every_class
def test_every_keyword_of_torch_optim_is_taken(cls):
    """But for Adam's decoupled_weight_decay, which is another class here."""
    theirs = _arguments(TORCH_BASES[cls], inspect.Parameter.KEYWORD_ONLY)
    theirs.pop("decoupled_weight_decay", None)
    optimizer = cls([filled(2)], **theirs)
    assert {name: optimizer.defaults[name] for name in theirs} == theirs


@every_class
def test_every_argument_reaches_the_groups(cls):
    parameters = inspect.signature(cls).parameters
    group = cls([filled(2)]).param_groups[0]
    for name in set(parameters) - {"params"}:
        assert group[name] == parameters[name].default


@every_class
def test_weight_decay_is_coupled_or_decoupled_as_in_the_base(cls):
    group = cls([filled(2)]).param_groups[0]
    assert group.get("decoupled_weight_decay", False) == (cls in (XAdamW, XAdaBelief, XAdaM3))


# -- options that change between steps -------------------------------------------------------------------------------

BAD_LATER = [
    (FAMILY, "lr", [-1.0, math.nan, math.inf, "0.1", None, TWO_NUMBERS]),
    (FAMILY, "weight_decay", [-1.0, math.nan, "0.1"]),
    (FAMILY, "prediction_steps", [-1.0, math.nan, math.inf, None]),
    (FAMILY, "differentiable", [True]),
    (FAMILY, "backend", ["cublas"]),
    (SGD_ONLY, "momentum", [-0.1, math.nan, math.inf]),
    (SGD_ONLY, "dampening", [math.nan, "0"]),
    (SGD_ONLY, "nesterov", [True]),
    (ADAMS, "betas", [(1.0, 0.999), (0.9, -0.1), (0.9,), 0.9]),
    (ADAMS, "eps", [-1e-8, math.nan]),
]


@pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
@pytest.mark.parametrize(
    "cls, name, value",
    [(cls, name, value) for classes, name, values in BAD_LATER for cls in classes for value in values],
    ids=lambda value: value.__name__ if isinstance(value, type) else repr(value).replace("\n", ""),
)
def test_an_option_that_leaves_its_range_raises_in_step_and_changes_nothing(cls, name, value, predicted):
    optimizer, params = trained(cls)
    undisturbed, expected = trained(cls)
    for each in (optimizer, undisturbed):
        each.train(predicted)
    good = optimizer.param_groups[1][name]
    before = snapshot(optimizer)
    optimizer.param_groups[1][name] = value
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
        optimizer.step()
    optimizer.param_groups[1][name] = good
    assert_unchanged(optimizer, before)
    assert optimizer.predicted is predicted

    optimizer.step()
    undisturbed.step()
    assert all(map(torch.equal, params, expected))


@every_class
def test_a_tensor_lr_that_leaves_its_range_in_place_raises_in_step_and_changes_nothing(cls):
    optimizer, params = trained(cls, lr=torch.tensor(0.1))
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["lr"].fill_(math.nan)
    with pytest.raises(ValueError, match="Invalid learning rate: nan"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert all(state["step"] == 1 for state in optimizer.state.values())
