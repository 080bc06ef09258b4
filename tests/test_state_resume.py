"""The state: its keys, saved, loaded, copied.

- An exact resume: what is saved in either mode continues with the bits of the uninterrupted run, by any route. Breaks
  where the numbers that made theta_hat are not in the state, where loading rounds 16-bit parameters' fp32 state (as
  torch's own load_state_dict does), or where something lives in an attribute that copies drop.
- State keys are torch.optim's.
"""

import copy
import pickle

import pytest
import torch
from cases import every_class
from family import CLASSES, MEMBERS, taking
from training import (
    PARAM,
    assert_goes_on_alike,
    assert_same,
    assert_same_bits,
    assert_unchanged,
    cloned_params,
    either_mode,
    either_precision,
    every_class_with_amsgrad,
    every_dtype,
    feed,
    make_params,
    name_of,
    options,
    snapshot,
    through_a_file,
    train,
    trained,
)

from xgrad_optim import XAdam


@pytest.mark.parametrize(
    "amsgrad, cls", [(False, cls) for cls in CLASSES] + [(True, cls) for cls in taking("amsgrad")], ids=name_of
)
def test_state_keys_are_those_of_torch_optim(cls, amsgrad):
    more = {**MEMBERS[cls].training, **({"amsgrad": True} if amsgrad else {})}
    ours, theirs = cls(make_params(), **more), MEMBERS[cls].like(make_params(), **more)
    for optimizer in (ours, theirs):
        train(optimizer, optimizer.param_groups[0]["params"], range(1))
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for place, their_state in theirs["state"].items():
        our_state = ours["state"][place]
        assert their_state.keys() <= our_state.keys()
        assert all(our_state[key].shape == their_state[key].shape for key in their_state)
        extra = our_state.keys() - their_state.keys() - {"step"}
        assert all(key.startswith("predict") and our_state[key].dim() == 0 for key in extra)


@every_class
@every_dtype
@either_precision
def test_state_is_as_precise_as_promised(cls, dtype, master_weights):
    """Like the parameter; with master weights float32 for 16-bit parameters, the buffers too."""
    optimizer, params = trained(cls, dtype=dtype, master_weights=master_weights)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    for param in params:
        buffers = {key: optimizer.state[param][key] for key in cls.rule.state_keys}
        assert all(value.dtype == (wide if master_weights else dtype) for value in buffers.values())
        assert ("master_weights" in optimizer.state[param]) is master_weights
        if master_weights:
            assert optimizer.state[param]["master_weights"].dtype == wide


# -- resuming --------------------------------------------------------------------------------------------------------


@every_class
@every_dtype
@either_precision
@either_mode
def test_a_resume_from_a_file_continues_bit_for_bit(cls, dtype, master_weights, predicted):
    optimizer, params = trained(cls, dtype=dtype, master_weights=master_weights)
    optimizer.train(predicted)
    saved = through_a_file({"model": [param.detach() for param in params], "optimizer": optimizer.state_dict()})

    resumed_params = [PARAM(value) for value in saved["model"]]
    resumed = cls(resumed_params)
    resumed.load_state_dict(state_dict=saved["optimizer"])
    assert resumed.predicted is predicted
    assert_same(optimizer, params, resumed, resumed_params)
    assert_goes_on_alike(optimizer, params, resumed, resumed_params)


@every_class
@either_mode
def test_saving_in_the_other_mode_does_not_change_training(cls, predicted):
    """The uninterrupted run never leaves theta_hat; the file was written at theta, or the other way round."""
    optimizer, params = trained(cls)
    twin, twin_params = trained(cls)
    twin.train(not predicted)
    resumed_params = cloned_params(twin_params)
    resumed = cls(resumed_params)
    resumed.load_state_dict(through_a_file(twin.state_dict()))
    resumed.train(predicted)
    for each, its_params in ((optimizer, params), (resumed, resumed_params)):
        train(each, its_params, range(10, 13))
    assert_same(optimizer, params, resumed, resumed_params)


@every_class
@either_precision
@either_mode
def test_pickle_of_optimizer_and_parameters_continues_bit_for_bit(cls, master_weights, predicted):
    optimizer, params = trained(cls, dtype=torch.bfloat16, master_weights=master_weights)
    optimizer.train(predicted)
    unpickled, unpickled_params = pickle.loads(pickle.dumps((optimizer, params)))
    assert type(unpickled) is cls
    assert all(param in unpickled.state for param in unpickled_params)
    assert_goes_on_alike(optimizer, params, unpickled, unpickled_params)


@every_class
@either_precision
@either_mode
def test_deepcopy_of_model_and_optimizer_together_continues_bit_for_bit(cls, master_weights, predicted):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = cls(model.parameters(), **options(cls), master_weights=master_weights)
    params = list(model.parameters())
    train(optimizer, params, range(3))
    optimizer.train(predicted)
    model_copy, optimizer_copy = copy.deepcopy((model, optimizer))
    copied = list(model_copy.parameters())
    before = snapshot(optimizer)
    train(optimizer_copy, copied, range(3, 5))
    assert_unchanged(optimizer, before)
    train(optimizer, params, range(3, 5))
    assert_goes_on_alike(optimizer, params, optimizer_copy, copied)


@every_class
@every_dtype
@either_precision
def test_reloading_ones_own_state_in_mid_training_changes_no_bit(cls, dtype, master_weights):
    """accelerate.prepare() does this at the start of every run; torch's load_state_dict would round 16-bit models."""
    optimizer, params = trained(cls, dtype=dtype, master_weights=master_weights)
    twin, twin_params = trained(cls, dtype=dtype, master_weights=master_weights)
    for state in (optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())):
        optimizer.load_state_dict(state)
        assert_same(optimizer, params, twin, twin_params)
    assert_goes_on_alike(optimizer, params, twin, twin_params)


@every_class_with_amsgrad
@either_mode
def test_amsgrad_resumes(cls, predicted):
    optimizer, params = trained(cls, amsgrad=True)
    optimizer.train(predicted)
    resumed_params = cloned_params(params)
    resumed = cls(resumed_params)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert all("max_exp_avg_sq" in state for state in resumed.state.values())
    assert_goes_on_alike(optimizer, params, resumed, resumed_params)


@every_class
def test_parameters_with_older_predictions_resume(cls):
    """Parameters that had no gradient keep an older prediction than their neighbours, made with another lr."""
    optimizer, params = trained(cls)
    for step, lr in ((3, 0.05), (4, 0.001)):
        optimizer.param_groups[0]["lr"] = lr
        feed(params, step)
        params[step - 3].grad = None
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.3
    resumed_params = cloned_params(params)
    resumed = cls(resumed_params)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    for each in (optimizer, resumed):
        each.eval()
    assert_same(optimizer, params, resumed, resumed_params)
    assert_goes_on_alike(optimizer, params, resumed, resumed_params)


@every_class
def test_options_travel_with_the_groups(cls):
    params = make_params()
    groups = [{"params": params[:2], "lr": 0.5, "name": "trunk"}, {"params": params[2:], "prediction_steps": 3.5}]
    optimizer = cls(groups, maximize=True)
    resumed = cls([{"params": params[:2]}, {"params": params[2:]}])
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    first, second = resumed.param_groups
    assert (first["lr"], first["name"], second["prediction_steps"]) == (0.5, "trunk", 3.5)
    assert first["maximize"] is second["maximize"] is True


@every_class
def test_which_code_runs_stays_as_this_machine_has_it(cls):
    saved = cls(make_params()).state_dict()
    saved["param_groups"][0].update(backend="cuda", fused=True, capturable=True)
    optimizer = cls(make_params(), foreach=True)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["backend"], group["foreach"], group["fused"], group["capturable"]) == (None, True, None, False)
    train(optimizer, group["params"], range(1))


@every_class
@either_precision
def test_loading_shares_no_tensor(cls, master_weights):
    optimizer, params = trained(cls, lr=torch.tensor(0.01), master_weights=master_weights)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    resumed_params = cloned_params(params)
    resumed = cls(resumed_params)
    resumed.load_state_dict(saved)
    ours = {value.untyped_storage().data_ptr() for state in resumed.state.values() for value in state.values()}
    ours.add(resumed.param_groups[0]["lr"].untyped_storage().data_ptr())
    theirs = {value.untyped_storage().data_ptr() for state in saved["state"].values() for value in state.values()}
    theirs.add(saved["param_groups"][0]["lr"].untyped_storage().data_ptr())
    assert not (ours & theirs) - {0}  # 0: an empty tensor's

    resumed.param_groups[0]["lr"].fill_(0.5)
    train(resumed, resumed_params, range(3, 5))
    assert saved["param_groups"][0]["lr"] == kept["param_groups"][0]["lr"]
    for place, state in kept["state"].items():
        for key, value in state.items():
            assert_same_bits(saved["state"][place][key], value, key)


def test_loading_many_small_parameters_takes_memory_in_proportion():
    """The 0-dim numbers are views of one table: copying each with its whole storage takes the square of the model."""
    optimizer, _ = trained(XAdam, shapes=((1,),) * 400, steps=1)
    optimizer.load_state_dict(optimizer.state_dict())
    values = [value for state in optimizer.state.values() for value in state.values()]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in values}
    assert sum(storages.values()) <= 16 * len(values)


@every_class
def test_load_state_dict_before_the_first_step_of_either_side(cls):
    optimizer, params = cls(make_params()), make_params()
    fresh = cls(params)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert not fresh.predicted and not any(fresh.state.values())
    train(fresh, params, range(2))
    fresh.load_state_dict(optimizer.state_dict())  # and back to nothing: what is there is theta
    assert not fresh.predicted and not any(fresh.state.values())


# -- hooks -----------------------------------------------------------------------------------------------------------


@every_class
def test_hooks_of_step_and_of_state_dict_fire(cls):
    optimizer, params = trained(cls)
    calls = []
    steps = optimizer.state[params[0]]["step"]
    optimizer.register_step_pre_hook(lambda self, args, kwargs: calls.append((self is optimizer, "pre", steps.item())))
    optimizer.register_step_post_hook(
        lambda self, args, kwargs: calls.append((self is optimizer, "post", steps.item()))
    )
    optimizer.step()
    assert calls == [(True, "pre", 3), (True, "post", 4)]

    calls.clear()
    optimizer.register_state_dict_pre_hook(lambda self: calls.append("state_dict pre"))
    optimizer.register_state_dict_post_hook(lambda self, state_dict: state_dict | {"note": "ours"})
    assert optimizer.state_dict()["note"] == "ours" and calls == ["state_dict pre"]


@every_class
def test_hooks_of_load_state_dict_fire_and_the_first_may_replace_the_dict(cls):
    optimizer, _ = trained(cls, lr=0.01)
    saved, calls = copy.deepcopy(optimizer.state_dict()), []

    def halve_lr(self, state_dict):
        assert self is optimizer
        calls.append("pre")
        state_dict["param_groups"] = [group | {"lr": group["lr"] / 2} for group in state_dict["param_groups"]]
        return state_dict

    optimizer.register_load_state_dict_pre_hook(halve_lr)
    optimizer.register_load_state_dict_post_hook(lambda self: calls.append(("post", self.param_groups[0]["lr"])))
    optimizer.load_state_dict(saved)
    assert calls == ["pre", ("post", 0.005)]
    assert saved["param_groups"][0]["lr"] == 0.01, "the caller's dict is not ours to change"


@every_class
def test_groups_without_our_keys_get_the_defaults(cls):
    optimizer, params = trained(cls)
    pickled = optimizer.__getstate__()
    for group in pickled["param_groups"]:
        for key in ("prediction_steps", "master_weights", "backend", "capturable", "rule"):
            group.pop(key, None)
    restored = cls.__new__(cls)
    restored.__setstate__(pickled)
    assert restored.param_groups[0]["prediction_steps"] == 2.0
    assert restored.param_groups[0]["master_weights"] is False
    train(restored, params, [3])
    assert restored.predicted
