"""Whoever replaces or edits state, parameters' memory or gradients between steps is obeyed.

Cached launches and the table behind the 0-dim numbers must notice. The witness, a copy of the optimizer, has no cache:
both go on alike.
"""

import copy
import math
from collections import defaultdict

import pytest
import torch
from cases import every_class
from training import (
    SHAPES,
    assert_goes_on_alike,
    assert_same,
    assert_same_bits,
    assert_unchanged,
    either_mode,
    either_precision,
    feed,
    make_params,
    name_of,
    options,
    snapshot,
    train,
    trained,
)


def _move_as_lightning(optimizer, params):
    """lightning.fabric's _optimizer_to_device: every value but "step" moved, the dict itself replaced."""
    for param, state in optimizer.state.items():
        optimizer.state[param] = {key: value if key == "step" else value.clone() for key, value in state.items()}


def _clone_one_buffer(optimizer, params):
    state, key = optimizer.state[params[0]], optimizer.rule.state_keys[0]
    state[key] = state[key].clone()


def _clone_every_value_in_place(optimizer, params):
    for state in optimizer.state.values():
        for key in state:
            state[key] = state[key].clone()


def _shallow_dicts(optimizer, params):
    for param in params:
        optimizer.state[param] = dict(optimizer.state[param])


def _another_state_object(optimizer, params):
    optimizer.state = defaultdict(dict, {param: dict(optimizer.state[param]) for param in params})


def _other_strides(optimizer, params):
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if value.dim() == 2 and value.shape == param.shape:
                state[key] = value.t().contiguous().t()


def _plain_numbers(optimizer, params):
    """What a user's own checkpoint code may leave: python numbers for 0-dim tensors."""
    for state in optimizer.state.values():
        for key, value in state.items():
            if key == "step" or key.startswith("predict"):
                state[key] = value.item()


def _new_memory(optimizer, params):
    """ZeRO's buckets, FSDP and Module.to() give parameters other memory under the same object."""
    for param in params:
        param.data = param.data.clone()


def _new_memory_of_other_strides(optimizer, params):
    params[0].data = params[0].data.t().contiguous().t()


def _new_groups(optimizer, params):
    """ZeRO and accelerate write group entries, lists included."""
    optimizer.param_groups = [dict(group, params=list(group["params"])) for group in optimizer.param_groups]


REPLACEMENTS = (
    _move_as_lightning,
    _clone_one_buffer,
    _clone_every_value_in_place,
    _shallow_dicts,
    _another_state_object,
    _other_strides,
    _plain_numbers,
    _new_memory,
    _new_memory_of_other_strides,
    _new_groups,
)


@every_class
@either_precision
@either_mode
@pytest.mark.parametrize("replace", REPLACEMENTS, ids=lambda function: function.__name__.strip("_"))
def test_equal_replacements_between_steps_change_no_bit(cls, master_weights, predicted, replace):
    optimizer, params = trained(cls, master_weights=master_weights)
    twin, twin_params = trained(cls, master_weights=master_weights)
    for step in range(3, 6):
        replace(optimizer, params)
        for each in (optimizer, twin):
            each.train(predicted)
        for param, twin_param in zip(params, twin_params, strict=True):
            assert_same_bits(param, twin_param)
        replace(optimizer, params)
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        for param, twin_param in zip(params, twin_params, strict=True):
            assert_same_bits(param, twin_param)


def _set_steps(optimizer, params):
    optimizer.state[params[0]]["step"].fill_(40)


def _new_step(optimizer, params):
    optimizer.state[params[0]]["step"] = torch.tensor(40.0)


def _step_of_all_but_one(optimizer, params):
    for param in params[1:]:
        optimizer.state[param]["step"].add_(7)


def _double_the_buffers(optimizer, params):
    for state in optimizer.state.values():
        for key in optimizer.rule.state_keys:
            state[key].mul_(2)


def _other_buffer(optimizer, params):
    state, key = optimizer.state[params[1]], optimizer.rule.state_keys[-1]
    state[key] = torch.full_like(state[key], 0.25)


def _torchs_keys_only(optimizer, params):
    """State put there by code that knows torch.optim's keys: without a prediction, the parameters hold theta."""
    for param in params:
        optimizer.state[param] = {
            key: value.clone() for key, value in optimizer.state[param].items() if not key.startswith("predict")
        }


def _forget_one(optimizer, params):
    del optimizer.state[params[0]]


def _forget_all(optimizer, params):
    optimizer.state.clear()


def _drop_a_parameter(optimizer, params):
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]


EDITS = (
    _set_steps,
    _new_step,
    _step_of_all_but_one,
    _double_the_buffers,
    _other_buffer,
    _torchs_keys_only,
    _forget_one,
    _forget_all,
    _drop_a_parameter,
)


@every_class
@either_precision
@pytest.mark.parametrize("edit", EDITS, ids=lambda function: function.__name__.strip("_"))
def test_edits_between_steps_are_obeyed(cls, master_weights, edit):
    """At theta, where editing is defined. The witness, a copy made after the edit, cannot have cached anything."""
    optimizer, params = trained(cls, master_weights=master_weights)
    optimizer.eval()
    unedited, unedited_params = copy.deepcopy((optimizer, params))
    edit(optimizer, params)
    witness, witness_params = copy.deepcopy((optimizer, params))
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(witness, witness_params, [step])
        for param, witness_param in zip(params, witness_params, strict=True):
            assert_same_bits(param, witness_param)
    train(unedited, unedited_params, range(3, 6))
    rows = [cls.rule.coefficients(dict.fromkeys(cls.rule.options, 0.5), step) for step in (7, 40)]
    counts = rows[0] != rows[1]  # or a step is like any other
    if (counts or "step" not in edit.__name__) and edit is not _torchs_keys_only:
        assert any(not torch.equal(param, other) for param, other in zip(params, unedited_params, strict=True))


@every_class
def test_a_parameter_that_moves_to_the_next_group_takes_its_options(cls):
    """Freezing schemes do this; the order of all parameters stays the same, only the border between groups moves."""
    params = make_params()
    groups = [{"params": params[:2], "lr": 0.01}, {"params": params[2:], "lr": 0.5, "weight_decay": 0.3}]
    optimizer = cls(groups, **options(cls))
    train(optimizer, params, range(3))
    optimizer.param_groups[1]["params"].insert(0, optimizer.param_groups[0]["params"].pop())
    witness, witness_params = copy.deepcopy((optimizer, params))
    assert_goes_on_alike(optimizer, params, witness, witness_params)


@every_class
@either_precision
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
def test_parameters_that_change_their_dtype_between_steps(cls, master_weights, dtype):
    """model.double() keeps the Parameter objects. The step computes in the new dtype, or refuses."""
    optimizer, params = trained(cls, master_weights=master_weights)
    optimizer.eval()
    for param in params:
        param.data, param.grad = param.data.to(dtype), None
    witness, witness_params = copy.deepcopy((optimizer, params))
    feed(params, 3)
    before = snapshot(optimizer)
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        assert "dtype" in str(error)
        assert_unchanged(optimizer, before)
        return
    train(witness, witness_params, [3])
    for param, witness_param in zip(params, witness_params, strict=True):
        assert_same_bits(param, witness_param)


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 5), ()], ids=str)
@every_class
def test_replaced_state_that_does_not_fit_raises_in_step_and_changes_nothing(cls, shape):
    """Flat kernels would run over the wrong elements, or past the end of the memory."""
    optimizer, params = trained(cls)
    feed(params, 3)
    state = optimizer.state[params[0]]
    state[cls.rule.state_keys[0]] = torch.zeros(shape)
    before = snapshot(optimizer)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert_unchanged(optimizer, before)


@every_class
def test_gradients_may_be_removed_replaced_or_zeroed(cls):
    """zero_grad in both ways, and a gradient that keeps its address (a DDP bucket view) or gets a new one each time."""
    runs = []
    for style in ("new", "in place", "bucket", "zero_grad"):
        params = make_params()
        optimizer = cls(params, **options(cls))
        bucket = [torch.zeros_like(param) for param in params]
        for step in range(4):
            if style == "zero_grad":
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            values = [param.detach() for param in make_params(shapes=SHAPES, seed=100 + step)]
            for place, (param, value) in enumerate(zip(params, values, strict=True)):
                if style == "bucket":
                    param.grad = bucket[place].copy_(value)
                elif style == "new" or param.grad is None:
                    param.grad = value
                else:
                    param.grad.zero_().add_(value)
            addresses = [param.grad.data_ptr() for param in params]
            optimizer.step()
            assert addresses == [param.grad.data_ptr() for param in params]
        runs.append((optimizer, params))
    for optimizer, params in runs[1:]:
        assert_same(*runs[0], optimizer, params)


@every_class
def test_the_best_so_far_comes_back(cls):
    """A deepcopy of weights and state, taken in mid-training and loaded in this order, and no false alarm about it."""
    optimizer, params = trained(cls)
    best = copy.deepcopy(([param.detach() for param in params], optimizer.state_dict()))
    train(optimizer, params, range(3, 6))
    with torch.no_grad():
        for param, value in zip(params, best[0], strict=True):
            param.copy_(value)
    optimizer.load_state_dict(best[1])
    twin, twin_params = trained(cls)
    assert_same(optimizer, params, twin, twin_params)
    assert_goes_on_alike(optimizer, params, twin, twin_params)


@every_class
def test_nan_in_the_numbers_of_a_prediction_that_is_not_there_reaches_no_weight(cls):
    """At theta there is nothing to undo, whatever the saved coefficients say."""
    optimizer, params = trained(cls)
    optimizer.eval()
    twin, twin_params = copy.deepcopy((optimizer, params))
    for state in optimizer.state.values():
        for key in state:
            if key.startswith("prediction_"):
                state[key].fill_(math.nan)
    train(optimizer, params, [3])
    train(twin, twin_params, [3])
    assert_same(optimizer, params, twin, twin_params)


@every_class
def test_parameters_that_are_exchanged_before_the_first_step(cls):
    """accelerate puts FSDP2's DTensors into group["params"] after the optimizer was made."""
    replaced = make_params(seed=7)
    optimizer = cls(make_params(), lr=0.01)
    optimizer.param_groups[0]["params"] = replaced
    train(optimizer, replaced, range(3))
    expected_params = make_params(seed=7)
    expected = cls(expected_params, lr=0.01)
    train(expected, expected_params, range(3))
    assert_same(optimizer, replaced, expected, expected_params)
