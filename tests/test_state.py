"""The state: saved, loaded, copied, exchanged with torch.optim, edited and replaced from outside.

- An exact resume: what is saved in either mode continues with the bits of the uninterrupted run, by any route. Breaks
  where the numbers that made theta_hat are not in the state, where loading rounds 16-bit parameters' fp32 state (as
  torch's own load_state_dict does), or where something lives in an attribute that copies drop.
- State keys are torch.optim's, so checkpoints go both ways. A loaded state without prediction numbers means theta.
- A state_dict that does not fit raises ValueError before anything has changed.
- Whoever replaces or edits state, parameters' memory or gradients between steps is obeyed: cached launches and the
  table behind the 0-dim numbers must notice. The witness, a copy of the optimizer, has no cache: both go on alike.
"""

import copy
import io
import math
import pickle
from collections import defaultdict

import pytest
import torch

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW

FAMILY = (XSGDM, XAdam, XAdamW, XAdaBelief, XAdaM3)
ADAMS = FAMILY[1:]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64)
SHAPES = ((3, 4), (5,), (), (0, 2))
PARAM = torch.nn.Parameter


def _id(value):
    return value.__name__ if hasattr(value, "__name__") else str(value).removeprefix("torch.")


every_class = pytest.mark.parametrize("cls", FAMILY, ids=_id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=_id)
either_mode = pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
either_precision = pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])


def options(cls, dtype=torch.float32):
    """Options under which the first steps move every element visibly and stay finite in this dtype."""
    chosen = {"lr": 0.01, "weight_decay": 0.1, "prediction_steps": 2.0}
    if cls is XSGDM:
        return chosen | {"momentum": 0.8, "dampening": 0.1}
    return chosen | {"betas": (0.8, 0.9), "eps": 1e-4 if dtype is torch.float16 else 1e-8}


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [PARAM(torch.randn(shape, generator=generator, dtype=wide).to(dtype)) for shape in shapes]


def feed(params, step):
    """Put the recorded gradients of this step into the parameters."""
    grads = make_params(params[0].dtype, [param.shape for param in params], 100 + step)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.detach()


def train(optimizer, params, steps):
    for step in steps:
        feed(params, step)
        optimizer.step()


def trained(cls, dtype=torch.float32, steps=3, shapes=SHAPES, **kwargs):
    params = make_params(dtype, shapes)
    optimizer = cls(params, **options(cls, dtype) | kwargs)
    train(optimizer, params, range(steps))
    return optimizer, params


def clones(params):
    return [PARAM(param.detach().clone()) for param in params]


def bits(tensor):
    """A tensor's bytes and description, so that NaN equals itself and -0 is not 0."""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def assert_same_bits(first, second, what=""):
    (dtype, shape, content), (other_dtype, other_shape, other) = bits(first), bits(second)
    assert (dtype, shape) == (other_dtype, other_shape), what
    assert torch.equal(content, other), what


def assert_same(optimizer, params, other, other_params):
    """Parameters and all state agree in every bit, and so does the mode."""
    for param, other_param in zip(params, other_params, strict=True):
        assert_same_bits(param, other_param, "parameter")
        state, other_state = optimizer.state[param], other.state[other_param]
        assert state.keys() == other_state.keys()
        for key in state:
            assert_same_bits(torch.as_tensor(state[key]), torch.as_tensor(other_state[key]), key)
    assert optimizer.predicted is other.predicted


def assert_goes_on_alike(optimizer, params, other, other_params, steps=range(10, 13)):
    """The next steps agree in every bit, with a look at theta in between, which must change nothing."""
    for step in steps:
        feed(params, step)
        feed(other_params, step)
        optimizer.step()
        other.step()
        assert all(torch.isfinite(param).all() for param in params)
        assert_same(optimizer, params, other, other_params)
        with optimizer.true_weights(), other.true_weights():
            assert_same(optimizer, params, other, other_params)


def snapshot(optimizer, params):
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    states = [optimizer.state.get(param, {}) for param in params]
    state = [{key: torch.as_tensor(value).clone() for key, value in each.items()} for each in states]
    return copy.deepcopy(groups), clones(params), state, optimizer.predicted


def assert_unchanged(optimizer, params, before):
    groups, values, state, predicted = snapshot(optimizer, params)
    assert (groups, predicted) == (before[0], before[3])
    for value, old in zip(values, before[1], strict=True):
        assert_same_bits(value, old, "parameter")
    for now, then in zip(state, before[2], strict=True):
        assert now.keys() == then.keys()
        for key, old in then.items():
            assert_same_bits(now[key], old, key)


def through_a_file(state_dict):
    """torch.save and torch.load as everyone should: weights_only admits tensors and plain values, nothing else."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


# -- the keys --------------------------------------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_keys_are_those_of_torch_optim(cls, amsgrad):
    if cls is XSGDM:
        ours, theirs = XSGDM(make_params()), torch.optim.SGD(make_params(), momentum=0.9)
    else:
        ours, theirs = cls(make_params(), amsgrad=amsgrad), torch.optim.Adam(make_params(), amsgrad=amsgrad)
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
    optimizer, params = trained(cls, dtype, master_weights=master_weights)
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    for param in params:
        buffers = {key: value for key, value in optimizer.state[param].items() if "exp" in key or "buffer" in key}
        assert buffers
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
    optimizer, params = trained(cls, dtype, master_weights=master_weights)
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
    resumed_params = clones(twin_params)
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
    optimizer, params = trained(cls, torch.bfloat16, master_weights=master_weights)
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
    before = snapshot(optimizer, params)
    train(optimizer_copy, copied, range(3, 5))
    assert_unchanged(optimizer, params, before)
    train(optimizer, params, range(3, 5))
    assert_goes_on_alike(optimizer, params, optimizer_copy, copied)


@every_class
@every_dtype
@either_precision
def test_reloading_ones_own_state_in_mid_training_changes_no_bit(cls, dtype, master_weights):
    """accelerate.prepare() does this at the start of every run; torch's load_state_dict would round 16-bit models."""
    optimizer, params = trained(cls, dtype, master_weights=master_weights)
    twin, twin_params = trained(cls, dtype, master_weights=master_weights)
    for state in (optimizer.state_dict(), copy.deepcopy(optimizer.state_dict())):
        optimizer.load_state_dict(state)
        assert_same(optimizer, params, twin, twin_params)
    assert_goes_on_alike(optimizer, params, twin, twin_params)


@pytest.mark.parametrize("cls", ADAMS, ids=_id)
@either_mode
def test_amsgrad_resumes(cls, predicted):
    optimizer, params = trained(cls, amsgrad=True)
    optimizer.train(predicted)
    resumed_params = clones(params)
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
    resumed_params = clones(params)
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
    resumed_params = clones(params)
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
    optimizer, _ = trained(cls)
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


# -- exchange with torch.optim ---------------------------------------------------------------------------------------

SGD_CASES = [
    {"momentum": 0.9},
    {"momentum": 0.0},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.9, "maximize": True},
    {"momentum": 0.9, "foreach": True},
    {"momentum": 0.9, "fused": True},
    {"momentum": 0.0, "weight_decay": 0.1},
]
ADAM_CASES = [
    {},
    {"amsgrad": True, "weight_decay": 0.05},
    {"betas": (0.7, 0.9), "eps": 1e-3, "maximize": True},
    {"foreach": True},
    {"fused": True, "amsgrad": True},
]
EXCHANGES = [
    *((torch.optim.SGD, XSGDM, case) for case in SGD_CASES),
    *((torch.optim.Adam, XAdam, case) for case in ADAM_CASES),
    *((torch.optim.AdamW, XAdamW, case) for case in ADAM_CASES),
]
exchange = pytest.mark.parametrize("base, cls, case", EXCHANGES, ids=_id)


def assert_close(params, expected):
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-14)


@exchange
def test_a_torch_checkpoint_goes_on_in_its_x_class(base, cls, case):
    """With prediction_steps=0, which no torch group holds and loading therefore keeps, as torch would have gone on."""
    params = make_params(torch.float64)
    theirs = base(params, lr=0.02, **case)
    train(theirs, params, range(4))
    our_params = clones(params)
    ours = cls(our_params, prediction_steps=0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert not ours.predicted
    for step in range(4, 24):
        train(theirs, params, [step])
        train(ours, our_params, [step])
        assert_close(our_params, params)


@exchange
def test_a_torch_checkpoint_goes_on_with_prediction(base, cls, case):
    """The loaded parameters are theta: after one step, theta is where torch's step with that gradient goes."""
    params = make_params(torch.float64)
    theirs = base(params, lr=0.02, **case)
    train(theirs, params, range(4))
    our_params = clones(params)
    ours = cls(our_params, prediction_steps=1.5)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["prediction_steps"] == 1.5
    for step in range(4, 8):
        train(theirs, params, [step])
        train(ours, our_params, [step])
        assert ours.predicted
        assert not torch.equal(our_params[0], params[0])
        with ours.true_weights():
            assert_close(our_params, params)


@exchange
def test_the_way_back_to_torch(base, cls, case):
    """At eval() the parameters are theta and the state is torch's."""
    case = {key: value for key, value in case.items() if key not in ("foreach", "fused")}
    params = make_params(torch.float64)
    ours = cls(params, lr=0.02, **case)
    train(ours, params, range(4))
    ours.eval()
    their_params = clones(params)
    theirs = base(their_params, lr=0.5)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for step in range(4, 14):
        train(theirs, their_params, [step])
        train(ours, params, [step])
        with ours.true_weights():
            assert_close(params, their_params)


def test_a_checkpoint_of_an_old_torch_counts_steps_in_python_numbers():
    params = make_params(torch.float64)
    theirs = torch.optim.Adam(params, lr=0.02)
    train(theirs, params, range(4))
    saved = copy.deepcopy(theirs.state_dict())
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    our_params = clones(params)
    ours = XAdam(our_params, prediction_steps=0)
    ours.load_state_dict(saved)
    train(theirs, params, range(4, 8))
    train(ours, our_params, range(4, 8))
    assert_close(our_params, params)


@pytest.mark.parametrize("base, cls", [(torch.optim.AdamW, XAdamW), (torch.optim.Adam, XAdam)], ids=_id)
def test_a_torch_checkpoint_of_a_16_bit_model_goes_on_with_master_weights(base, cls):
    """The master starts as exactly the loaded weights; from there it is a float32 run on the same gradients."""
    params = make_params(torch.bfloat16)
    theirs = base(params, lr=0.02, weight_decay=0.1)
    train(theirs, params, range(3))
    saved = through_a_file(theirs.state_dict())

    our_params = clones(params)
    ours = cls(our_params, master_weights=True, prediction_steps=0)
    ours.load_state_dict(saved)
    wide_params = [PARAM(param.detach().float()) for param in params]
    wide = cls(wide_params, prediction_steps=0)
    wide.load_state_dict(saved)
    for step in range(3, 8):
        feed(our_params, step)
        for param, wide_param in zip(our_params, wide_params, strict=True):
            wide_param.grad = param.grad.float()
        ours.step()
        wide.step()
        for param, wide_param in zip(our_params, wide_params, strict=True):
            assert_same_bits(ours.state[param]["master_weights"], wide_param)
            assert_same_bits(param, wide_param.to(torch.bfloat16))


@pytest.mark.parametrize("source, target", [(XAdam, XAdamW), (XAdamW, XAdam)], ids=_id)
@pytest.mark.filterwarnings("ignore:the loaded state dict has decoupled_weight_decay=False")
def test_xadam_and_xadamw_exchange_checkpoints_as_their_bases_do(source, target):
    """Their state is the same. XAdam decays as the file says, XAdamW always decoupled."""
    saved, params = trained(source, torch.float64)
    saved.eval()
    their_params, our_params = clones(params), clones(params)
    base = torch.optim.AdamW if target is XAdamW else torch.optim.Adam
    theirs, ours = base(their_params), target(our_params)
    for each in (theirs, ours):
        each.load_state_dict(copy.deepcopy(saved.state_dict()))
        each.param_groups[0]["prediction_steps"] = 0
    assert ours.param_groups[0]["decoupled_weight_decay"] is True
    train(theirs, their_params, range(5, 9))
    train(ours, our_params, range(5, 9))
    assert_close(our_params, their_params)


# -- what does not fit -----------------------------------------------------------------------------------------------


def _on_state(change):
    """A corruption of the second parameter's state."""
    return lambda saved: change(saved["state"][1])


def _set(key, value):
    return _on_state(lambda state: state.__setitem__(key, value))


def _first_group(change):
    return lambda saved: change(saved["param_groups"][0])


def _state_of_no_dict(saved):
    saved["state"][1] = [1.0]


MISFITS = {  # name: (change of a good state_dict, classes)
    "no state": (lambda saved: saved.pop("state"), FAMILY),
    "no param_groups": (lambda saved: saved.pop("param_groups"), FAMILY),
    "one group more": (lambda saved: saved["param_groups"].append({"params": []}), FAMILY),
    "one group less": (lambda saved: saved["param_groups"].pop(), FAMILY),
    "one parameter more": (_first_group(lambda group: group["params"].append(7)), FAMILY),
    "one parameter less": (_first_group(lambda group: group["params"].pop()), FAMILY),
    "a group without params": (_first_group(lambda group: group.pop("params")), FAMILY),
    "a group without lr": (_first_group(lambda group: group.pop("lr")), FAMILY),
    "a group whose lr is nan": (_first_group(lambda group: group.__setitem__("lr", math.nan)), FAMILY),
    "a group whose lr is text": (_first_group(lambda group: group.__setitem__("lr", "0.1")), FAMILY),
    "a group without betas": (_first_group(lambda group: group.pop("betas")), ADAMS),
    "a group without momentum": (_first_group(lambda group: group.pop("momentum")), (XSGDM,)),
    "a group with nesterov": (_first_group(lambda group: group.__setitem__("nesterov", True)), (XSGDM,)),
    "state that is no dict": (_state_of_no_dict, FAMILY),
    "no buffer": (_on_state(lambda state: state.pop("exp_avg", None) or state.pop("momentum_buffer")), (XSGDM,)),
    "no exp_avg": (_on_state(lambda state: state.pop("exp_avg")), ADAMS),
    "no exp_avg_sq": (_on_state(lambda state: state.pop("exp_avg_sq")), ADAMS),
    "exp_avg is None": (_set("exp_avg", None), ADAMS),
    "exp_avg is a number": (_set("exp_avg", 0.5), ADAMS),
    "exp_avg is a list": (_set("exp_avg", [0.0] * 5), ADAMS),
    "no step": (_on_state(lambda state: state.pop("step")), ADAMS),
    "step of three elements": (_set("step", torch.ones(3)), FAMILY),
    "step is text": (_set("step", "3"), FAMILY),
    "exp_avg of another shape": (_set("exp_avg", torch.zeros(5, 1)), ADAMS),
    "exp_avg_sq of another size": (_set("exp_avg_sq", torch.zeros(6)), ADAMS),
    "max_exp_avg_sq of another size": (_set("max_exp_avg_sq", torch.zeros(())), ADAMS),
    "momentum_buffer of another shape": (_set("momentum_buffer", torch.zeros(1, 5)), (XSGDM,)),
    "master_weights of another shape": (_set("master_weights", torch.zeros(4)), FAMILY),
    "prediction_shift of two elements": (_set("prediction_shift", torch.zeros(2)), FAMILY),
}


@pytest.mark.parametrize(
    "cls, name", [(cls, name) for name, (_, classes) in MISFITS.items() for cls in classes], ids=_id
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
    before = snapshot(optimizer, params)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, params, before)
    assert_goes_on_alike(optimizer, params, undisturbed, expected, range(10, 11))


@every_class
@pytest.mark.parametrize("not_a_state_dict", [None, [], {}, {"state": {}}], ids=repr)
def test_what_is_no_state_dict_raises(cls, not_a_state_dict):
    optimizer, params = trained(cls)
    before = snapshot(optimizer, params)
    with pytest.raises((ValueError, TypeError)):
        optimizer.load_state_dict(not_a_state_dict)
    assert_unchanged(optimizer, params, before)


def _x(cls):
    return lambda params: cls(params, lr=0.1)


OTHERS = [  # (name, what builds it, into which classes it must not load)
    ("SGD", lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), ADAMS),
    ("SGD without momentum", lambda params: torch.optim.SGD(params, lr=0.1), ADAMS),
    ("Adam", torch.optim.Adam, (XSGDM, XAdaBelief, XAdaM3)),
    ("AdamW", torch.optim.AdamW, (XSGDM, XAdaBelief, XAdaM3)),
    ("Adagrad", torch.optim.Adagrad, FAMILY),
    ("Adadelta", torch.optim.Adadelta, FAMILY),
    ("Adamax", torch.optim.Adamax, FAMILY),
    ("NAdam", torch.optim.NAdam, FAMILY),
    ("RAdam", torch.optim.RAdam, FAMILY),
    ("RMSprop", lambda params: torch.optim.RMSprop(params, momentum=0.9), FAMILY),
    ("Rprop", torch.optim.Rprop, FAMILY),
    ("ASGD", torch.optim.ASGD, FAMILY),
    ("XSGDM", _x(XSGDM), ADAMS),
    ("XAdam", _x(XAdam), (XSGDM, XAdaBelief, XAdaM3)),
    ("XAdamW", _x(XAdamW), (XSGDM, XAdaBelief, XAdaM3)),
    ("XAdaBelief", _x(XAdaBelief), (XSGDM, XAdam, XAdamW, XAdaM3)),
    ("XAdaM3", _x(XAdaM3), (XSGDM, XAdam, XAdamW, XAdaBelief)),
]


@pytest.mark.parametrize(
    "name, make, cls", [(name, make, cls) for name, make, classes in OTHERS for cls in classes], ids=_id
)
def test_the_state_dict_of_another_optimizer_raises_and_changes_nothing(name, make, cls):
    """AdaBelief's second moment is not Adam's: the keys alone would fit."""
    params = make_params()
    other = make(params)
    train(other, params, range(2))
    optimizer, our_params = trained(cls)
    before = snapshot(optimizer, our_params)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(other.state_dict())
    assert_unchanged(optimizer, our_params, before)


# -- state, memory and gradients that others replace -----------------------------------------------------------------


def _move_as_lightning(optimizer, params):
    """lightning.fabric's _optimizer_to_device: every value but "step" moved, the dict itself replaced."""
    for param, state in optimizer.state.items():
        optimizer.state[param] = {key: value if key == "step" else value.clone() for key, value in state.items()}


def _clone_one_buffer(optimizer, params):
    state = optimizer.state[params[0]]
    key = "momentum_buffer" if "momentum_buffer" in state else "exp_avg"
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
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if (value.shape == param.shape and "exp_avg" in key) or "buffer" in key:
                value.mul_(2)


def _other_buffer(optimizer, params):
    state = optimizer.state[params[1]]
    key = "momentum_buffer" if "momentum_buffer" in state else "exp_avg_sq"
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
    if not (cls is XSGDM and "step" in edit.__name__) and edit is not _torchs_keys_only:
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
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=_id)
def test_parameters_that_change_their_dtype_between_steps(cls, master_weights, dtype):
    """model.double() keeps the Parameter objects. The step computes in the new dtype, or refuses."""
    optimizer, params = trained(cls, master_weights=master_weights)
    optimizer.eval()
    for param in params:
        param.data, param.grad = param.data.to(dtype), None
    witness, witness_params = copy.deepcopy((optimizer, params))
    feed(params, 3)
    before = snapshot(optimizer, params)
    try:
        optimizer.step()
    except (RuntimeError, ValueError) as error:
        assert "dtype" in str(error)
        assert_unchanged(optimizer, params, before)
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
    state["momentum_buffer" if cls is XSGDM else "exp_avg"] = torch.zeros(shape)
    before = snapshot(optimizer, params)
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert_unchanged(optimizer, params, before)


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
