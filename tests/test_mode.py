"""Where the mode lives: in the state alone, which reaches every wrapper, copy and file.

A wrapper that shares our class has its own `__dict__`, ZeRO overwrites group keys, DCP drops extra top-level keys.
"""

import copy
import io
import pickle

import pytest
import torch
from cases import every_class
from training import (
    assert_all_same_bits,
    assert_same,
    cloned_params,
    clones,
    either_mode,
    either_precision,
    make_params,
    thetas,
    train,
    trained,
)
from wrappers import either_wrapper


@every_class
@either_precision
@either_wrapper
def test_a_wrapper_that_shares_our_class_swaps_the_optimizer_itself(cls, master_weights, wrap):
    optimizer, params = trained(cls, steps=0, master_weights=master_weights)
    twin, twin_params = trained(cls, steps=0, master_weights=master_weights)
    wrapper = wrap(optimizer)
    assert isinstance(wrapper, cls)
    for step in range(4):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        theta = thetas(twin, twin_params)
        before = dict(vars(wrapper))
        wrapper.eval()
        assert_all_same_bits(params, theta)
        assert optimizer.predicted is wrapper.predicted is False
        optimizer.train()
        assert optimizer.predicted is wrapper.predicted is True
        with wrapper.true_weights():
            assert_all_same_bits(params, theta)
        assert_same(optimizer, params, twin, twin_params)
        if step == 1:
            wrapper.eval()  # the step of the real one starts from theta
        assert vars(wrapper).keys() == before.keys()
        assert all(vars(wrapper)[key] is before[key] for key in before), "an attribute was written to the wrapper"


@every_class
@either_wrapper
@pytest.mark.parametrize("loads_through_wrapper", [False, True])
def test_a_wrapper_made_before_load_state_dict_stays_right(cls, wrap, loads_through_wrapper):
    """Lightning wraps in setup and restores the state later; a new `state` object would be missed by one of the two."""
    saved, saved_params = trained(cls)
    theta = thetas(saved, saved_params)
    params = cloned_params(saved_params)
    optimizer = cls(params)
    wrapper = wrap(optimizer)
    (wrapper if loads_through_wrapper else optimizer).load_state_dict(copy.deepcopy(saved.state_dict()))
    assert optimizer.predicted is wrapper.predicted is True
    wrapper.eval()
    assert_all_same_bits(params, theta)
    assert optimizer.predicted is wrapper.predicted is False
    wrapper.train()
    train(optimizer, params, [3])
    train(saved, saved_params, [3])
    assert_same(optimizer, params, saved, saved_params)


@every_class
def test_the_mode_is_in_the_state_and_nowhere_else(cls):
    optimizer, _ = trained(cls)
    kept = {key: value for key, value in vars(optimizer).items() if key != "state"}
    groups = copy.deepcopy([{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups])
    keys = optimizer.state_dict().keys()
    for mode in (optimizer.eval, optimizer.train):
        mode()
        assert {key: value for key, value in vars(optimizer).items() if key != "state"} == kept
        assert [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups] == groups
        assert optimizer.state_dict().keys() == keys == {"state", "param_groups"}


@every_class
@either_mode
def test_the_mode_travels_with_the_state_by_every_route(cls, predicted):
    optimizer, _ = trained(cls)
    optimizer.train(predicted)
    assert optimizer.predicted is predicted
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    routes = {
        "state_dict": optimizer.state_dict(),
        "file": torch.load(io.BytesIO(buffer.getvalue()), weights_only=True),
        "deepcopy": copy.deepcopy(optimizer).state_dict(),
        "pickle": pickle.loads(pickle.dumps(optimizer)).state_dict(),
    }
    for route, state_dict in routes.items():
        other = cls(make_params())
        other.load_state_dict(state_dict)
        assert other.predicted is predicted, route
    assert all(
        isinstance(value, (torch.Tensor, int, float, bool))
        for state in optimizer.state.values()
        for value in state.values()
    )


@every_class
@either_precision
def test_true_weights_restores_the_mode_it_found(cls, master_weights):
    optimizer, params = trained(cls, master_weights=master_weights)
    theta_hat = clones(params)
    theta = thetas(optimizer, params)
    with pytest.raises(KeyError), optimizer.true_weights():
        assert not optimizer.predicted
        raise KeyError
    assert_all_same_bits(params, theta_hat)
    with optimizer.true_weights():
        with optimizer.true_weights():
            assert_all_same_bits(params, theta)
        assert_all_same_bits(params, theta)
        assert not optimizer.predicted
    assert_all_same_bits(params, theta_hat)
    optimizer.eval()
    with optimizer.true_weights():
        pass
    assert not optimizer.predicted
    assert_all_same_bits(params, theta)
