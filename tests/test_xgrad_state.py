"""Checkpoints of XGrad and of its base load into either, copies go on alone, and nothing loaded is half of it."""

import copy
import io
import pickle

import pytest
import torch
from twins import same_bits
from xgrad_bases import BASES, as_given, every_base, give, shapes_for, stepper, values, wrapped

from xgrad_optim import XGrad

SHAPES = [(6, 4), (7,)]


def clones(params):
    return [param.detach().clone() for param in params]


def same(tensors, others):
    return all(map(same_bits, tensors, others))


def step(name, optimizer, params, seed):
    give(params, [as_given(name, grad) for grad in values(shapes_for(name), torch.float32, seed)])
    stepper(name)(optimizer)


def trained(name, steps=3, **options):
    optimizer, params = wrapped(BASES[name], values(shapes_for(name), torch.float32), **options)
    for index in range(steps):
        step(name, optimizer, params, index + 1)
    return optimizer, params


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_base
@pytest.mark.parametrize("mode", [True, False], ids=["predicted", "true"])
def test_a_run_resumes_bit_for_bit(name, mode):
    optimizer, params = trained(name, prediction_steps=1.5)
    optimizer.train(mode)
    saved, weights = through_a_file(optimizer.state_dict()), clones(params)
    resumed, others = wrapped(BASES[name], weights)
    resumed.load_state_dict(saved)
    assert resumed.predicted is mode and resumed.param_groups[0]["prediction_steps"] == 1.5
    for index in range(3):
        for own, some in ((optimizer, params), (resumed, others)):
            step(name, own, some, index + 10)
        assert same(params, others)
        for own in (optimizer, resumed):
            own.eval()
        assert same(params, others)


@every_base
def test_a_checkpoint_of_the_base_loads(name):
    params = [torch.nn.Parameter(value) for value in values(shapes_for(name), torch.float32)]
    base = BASES[name](params)
    for index in range(3):
        step(name, base, params, index + 1)
    resumed, others = wrapped(BASES[name], clones(params), prediction_steps=2.0)
    resumed.load_state_dict(through_a_file(base.state_dict()))
    assert not resumed.predicted and resumed.param_groups[0]["prediction_steps"] == 2.0
    assert same(others, params)
    step(name, base, params, 9)
    step(name, resumed, others, 9)
    update_base, update_own = clones(params), clones(others)
    resumed.eval()
    for theta, expected, hat in zip(others, update_base, update_own, strict=True):
        torch.testing.assert_close(theta, expected)
        assert theta.numel() == 1 or name == "SparseAdam" or not torch.equal(theta, hat)


@every_base
def test_its_checkpoint_loads_into_the_base(name):
    optimizer, params = trained(name)
    optimizer.eval()
    others = [torch.nn.Parameter(value) for value in clones(params)]
    base = BASES[name](others)
    base.load_state_dict(through_a_file(optimizer.state_dict()))
    step(name, base, others, 9)
    step(name, optimizer.base, params, 9)  # the base itself, at theta
    assert same(params, others)


def test_state_dict_has_the_base_s_entries_under_their_keys():
    optimizer, params = trained("AdamW")
    saved = optimizer.state_dict()
    theirs = optimizer.base.state_dict()
    assert saved["param_groups"] == theirs["param_groups"]
    own = {"xgrad_last_update", "xgrad_predicted", "xgrad_prediction_shift"}
    for index, values_ in theirs["state"].items():
        assert saved["state"][index].keys() == values_.keys() | own
        assert all(saved["state"][index][key] is values_[key] for key in values_)
    assert not own & optimizer.state[params[0]].keys()


def test_nothing_is_saved_of_a_prediction_that_there_is_not():
    optimizer, _ = trained("AdamW", prediction_steps=0)
    assert all("xgrad_predicted" not in state for state in optimizer.state_dict()["state"].values())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("mode", [True, False])
def test_a_copy_goes_on_alone(copied, mode):
    optimizer, params = trained("AdamW", prediction_steps=2.0)
    optimizer.train(mode)
    other, others = copied((optimizer, params))
    assert isinstance(other, XGrad) and other.predicted is mode and other.base is not optimizer.base
    before = clones(params)
    for index in range(2):
        step("AdamW", other, others, index + 20)
    assert same(params, before) and optimizer.predicted is mode
    for index in range(2):
        step("AdamW", optimizer, params, index + 20)
    assert same(params, others)
    for own in (optimizer, other):
        own.eval()
    assert same(params, others)


def test_hooks_of_saving_and_loading_run():
    optimizer, _ = trained("AdamW")
    calls = []
    optimizer.register_state_dict_pre_hook(lambda own: calls.append("save"))
    optimizer.register_state_dict_post_hook(lambda own, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda own, saved: calls.append("load") or {**saved})
    optimizer.register_load_state_dict_post_hook(lambda own: calls.append("loaded"))
    saved = optimizer.state_dict()
    assert saved.pop("more") == 1
    optimizer.load_state_dict(saved)
    assert calls == ["save", "load", "loaded"]


@pytest.mark.parametrize("what", ["groups", "params", "shape", "kind", "state"])
def test_what_does_not_fit_changes_nothing(what):
    optimizer, params = trained("AdamW")
    saved = copy.deepcopy(optimizer.state_dict())
    if what == "groups":
        saved["param_groups"].append(saved["param_groups"][0])
    elif what == "params":
        saved["param_groups"][0]["params"].append(9)
    elif what == "shape":
        saved["state"][0]["xgrad_last_update"] = torch.zeros(3)
    elif what == "kind":
        saved["state"][0]["xgrad_last_update"] = 3
    else:
        del saved["state"]
    before, theta_hat = copy.deepcopy(optimizer.state_dict()), clones(params)
    with pytest.raises(ValueError, match="loaded state dict"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert same(params, theta_hat) and optimizer.predicted
    assert after["state"].keys() == before["state"].keys()
    for index in before["state"]:
        assert all(same_bits(after["state"][index][key], value) for key, value in before["state"][index].items())


def test_the_base_s_own_error_changes_nothing():
    optimizer, params = trained("AdamW")
    theta_hat = clones(params)
    optimizer.base.load_state_dict = lambda state_dict: 1 / 0
    with pytest.raises(ZeroDivisionError):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.predicted and same(params, theta_hat)
    optimizer.eval()
    assert not same(params, theta_hat)


def test_weights_of_another_moment_draw_a_warning():
    optimizer, params = trained("AdamW")
    saved = copy.deepcopy(optimizer.state_dict())
    resumed, _ = wrapped(BASES["AdamW"], [param.detach() * 1.37 + 0.1 for param in params])
    resumed.load_state_dict(saved)
    with pytest.warns(UserWarning, match="do not hold the predicted weights"):
        resumed.eval()


def test_a_write_while_predicted_draws_a_warning_and_moves_theta():
    optimizer, params = trained("AdamW")
    with torch.no_grad():
        params[0].mul_(0.5)
    with pytest.warns(UserWarning, match="written to while they held predicted weights"):
        optimizer.eval()


def test_a_state_that_is_reset_does_not_take_theta_along():
    optimizer, params = trained("AdamW")
    with optimizer.true_weights():
        theta = clones(params)
    optimizer.state.clear()
    optimizer.eval()
    assert same(params, theta)
    optimizer.state = type(optimizer.state)(dict)
    assert optimizer.base.state is optimizer.state
    optimizer.train()
    step("AdamW", optimizer, params, 9)
    assert optimizer.predicted


def test_the_base_s_own_casts_stay_the_base_s():
    """XGrad's numbers stay what they are in bfloat16, where torch casts all that is loaded."""
    start = values(SHAPES, torch.bfloat16)
    optimizer, params = wrapped(BASES["AdamW"], start, prediction_steps=1.1)
    give(params, values(SHAPES, torch.bfloat16, 1))
    optimizer.step()
    optimizer.eval()
    theta = clones(params)
    optimizer.train()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer._own[params[0]]["prediction_shift"].item() == 1.1
    optimizer.eval()
    assert same(params, theta)
