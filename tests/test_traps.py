"""The traps of clients.md that do not need `attach`, each through the client that sets it where that is in torch.

- 2, schedulers: they step after the optimizer and move lr, momentum and betas, tensors in place; undoing a prediction
  with the group's numbers of now gives silently wrong weights.
- 3, where the mode lives: a wrapper that shares our class has its own `__dict__`, ZeRO overwrites group keys, DCP drops
  extra top-level keys; only the state reaches all of them.
- 4 and 18, writes to theta_hat by somebody who takes it for theta: the right weights, or a warning; no false alarm.
- 10, 16, 19, 20, state through DCP, ZeRO and __setstate__ (the rest of these is in test_state.py).
- 11, closures; 12, torch.compile; 13, a swap between forward and backward must not hide from autograd; 14, GradScaler.
- Averaging, evaluating under inference_mode and clipping, as docs/attach.md tells users to do it.
"""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler, swa_utils
from wrappers import either_wrapper

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW

FAMILY = (XSGDM, XAdam, XAdamW, XAdaBelief, XAdaM3)
ADAMS = FAMILY[1:]
SHAPES = ((3, 4), (5,), ())
PARAM = torch.nn.Parameter


def _id(value):
    return value.__name__ if hasattr(value, "__name__") else str(value)


every_class = pytest.mark.parametrize("cls", FAMILY, ids=_id)
either_mode = pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
either_precision = pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])
torch_may_warn = pytest.mark.filterwarnings("default")  # of its own deprecations; ours are asserted where they matter


def make_params(shapes=SHAPES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [PARAM(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def feed(params, step, scale=1.0):
    """Put the recorded gradients of this step into the parameters."""
    grads = make_params([param.shape for param in params], 100 + step, params[0].dtype)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.detach() * scale


def train(optimizer, params, steps):
    for step in steps:
        feed(params, step)
        optimizer.step()


def trained(cls, steps=3, shapes=SHAPES, **kwargs):
    params = make_params(shapes)
    optimizer = cls(params, **{"lr": 0.01, "weight_decay": 0.1, "prediction_steps": 2.0} | kwargs)
    train(optimizer, params, range(steps))
    return optimizer, params


def clones(params):
    return [param.detach().clone() for param in params]


def thetas(optimizer, params):
    """The true weights, seen without leaving a trace."""
    with optimizer.true_weights():
        return clones(params)


def assert_equal(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        assert tensor.dtype == other.dtype
        assert torch.equal(tensor, other)


def assert_same(optimizer, params, other, other_params):
    """Parameters and all state agree in every bit."""
    assert_equal(params, other_params)
    for param, other_param in zip(params, other_params, strict=True):
        state, other_state = optimizer.state[param], other.state[other_param]
        assert state.keys() == other_state.keys()
        assert all(torch.equal(state[key], other_state[key]) for key in state)


def content(optimizer, params):
    """All that a step could change."""
    state = [{key: value.clone() for key, value in optimizer.state.get(param, {}).items()} for param in params]
    return clones(params), state, optimizer.predicted


def assert_content(optimizer, params, before):
    values, state, predicted = content(optimizer, params)
    assert_equal(values, before[0])
    assert [one.keys() for one in state] == [one.keys() for one in before[1]]
    assert all(torch.equal(now[key], then[key]) for now, then in zip(state, before[1], strict=True) for key in now)
    assert predicted is before[2]


# -- trap 2: options change between step() and eval() ----------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda epoch: 0.7**epoch),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda epoch: 0.6),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 1, 0.3),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [1, 3], 0.1),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.2, 2),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.1, 1.0, 4),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.5),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 5, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 4),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 2),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.1, patience=0),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.05, step_size_up=2),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.05, total_steps=8),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.ConstantLR(opt, 0.1, 2), lr_scheduler.ExponentialLR(opt, 0.5)], [2]
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(opt, 0.2, 1.0, 3), lr_scheduler.ExponentialLR(opt, 0.8)]
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, 0.05, anneal_epochs=3),
}


def _advance(scheduler):
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def test_no_scheduler_of_torch_is_forgotten():
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= SCHEDULERS.keys()


@every_class
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02, dtype=torch.float64)], ids=["float", "tensor"])
@torch_may_warn
def test_schedulers_do_not_disturb_the_swap(cls, name, lr):
    """Evaluating after scheduler.step() shows the theta of before it, and leaves the run's bits alone."""
    optimizer, params = trained(cls, steps=0, lr=copy.deepcopy(lr))
    twin, twin_params = trained(cls, steps=0, lr=copy.deepcopy(lr))
    scheduler, twin_scheduler = SCHEDULERS[name](optimizer), SCHEDULERS[name](twin)
    rates = set()
    for step in range(6):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        theta, theta_hat = thetas(optimizer, params), clones(params)
        _advance(scheduler)
        _advance(twin_scheduler)
        rates.add(float(optimizer.param_groups[0]["lr"]))
        optimizer.eval()
        assert_equal(params, theta)
        optimizer.train()
        assert_equal(params, theta_hat)
        if step % 2:
            optimizer.eval()  # and the next step starts from here
        else:
            assert_same(optimizer, params, twin, twin_params)
    assert len(rates) > 1
    optimizer.train()
    assert_same(optimizer, params, twin, twin_params)


@every_class
@pytest.mark.parametrize("make", [SCHEDULERS["CyclicLR"], SCHEDULERS["OneCycleLR"]], ids=["CyclicLR", "OneCycleLR"])
@torch_may_warn
def test_momentum_is_cycled(cls, make):
    """Both look into `defaults` for "momentum" or "betas", and then move it in the groups."""
    optimizer, params = trained(cls, steps=0)
    scheduler = make(optimizer)
    seen = set()
    for step in range(4):
        train(optimizer, params, [step])
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.add(float(group["momentum"] if cls is XSGDM else group["betas"][0]))
    assert len(seen) > 2


CHANGES = {
    "lr": lambda group: group.update(lr=group["lr"] * 7),
    "lr to zero": lambda group: group.update(lr=0.0),
    "weight_decay": lambda group: group.update(weight_decay=0.7),
    "prediction_steps": lambda group: group.update(prediction_steps=9.0),
    "prediction_steps to zero": lambda group: group.update(prediction_steps=0.0),
    "maximize": lambda group: group.update(maximize=True),
    "betas or momentum": lambda group: group.update(betas=(0.1, 0.2), momentum=0.1, dampening=0.5),
    "eps": lambda group: group.update(eps=0.1),
}


@every_class
@either_precision
@pytest.mark.parametrize("name", CHANGES)
def test_no_option_of_now_undoes_a_prediction_of_then(cls, master_weights, name):
    optimizer, params = trained(cls, master_weights=master_weights)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    assert not torch.equal(theta[0], theta_hat[0])
    CHANGES[name](optimizer.param_groups[0])
    optimizer.eval()
    assert_equal(params, theta)
    optimizer.train()
    assert_equal(params, theta_hat)


@every_class
def test_tensor_options_that_are_filled_in_place_do_not_undo_a_prediction_wrongly(cls):
    number = torch.tensor
    kwargs = {"lr": number(0.01), "prediction_steps": number(2.0)}
    if cls is not XSGDM:
        kwargs["betas"] = (number(0.9), number(0.99))
    optimizer, params = trained(cls, **kwargs)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    group = optimizer.param_groups[0]
    for value in (group["lr"], group["prediction_steps"], *group.get("betas", ())):
        value.fill_(0.5)
    optimizer.eval()
    assert_equal(params, theta)
    optimizer.train()
    assert_equal(params, theta_hat)


@every_class
def test_a_parameter_without_gradient_keeps_its_own_prediction(cls):
    """Its neighbours were predicted later, with another lr: each is undone with its own numbers."""
    optimizer, params = trained(cls)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    optimizer.param_groups[0].update(lr=0.5, prediction_steps=4.0)
    for step in range(3, 6):
        feed(params, step)
        params[1].grad = None
        optimizer.step()
        assert torch.equal(params[1], theta_hat[1])
    optimizer.eval()
    assert torch.equal(params[1], theta[1])
    optimizer.train()
    assert torch.equal(params[1], theta_hat[1])


# -- trap 3: where the mode lives ------------------------------------------------------------------------------------


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
        assert_equal(params, theta)
        assert optimizer.predicted is wrapper.predicted is False
        optimizer.train()
        assert optimizer.predicted is wrapper.predicted is True
        with wrapper.true_weights():
            assert_equal(params, theta)
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
    params = [PARAM(value) for value in clones(saved_params)]
    optimizer = cls(params)
    wrapper = wrap(optimizer)
    (wrapper if loads_through_wrapper else optimizer).load_state_dict(copy.deepcopy(saved.state_dict()))
    assert optimizer.predicted is wrapper.predicted is True
    wrapper.eval()
    assert_equal(params, theta)
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


# -- one process's distributed clients -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    rendezvous = tmp_path_factory.mktemp("gloo") / "rendezvous"
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    except RuntimeError as error:
        pytest.skip(f"gloo finds no network interface here: {error}")
    yield
    dist.destroy_process_group()


@every_class
@either_precision
@torch_may_warn
def test_zero_redundancy_optimizer(cls, master_weights, process_group):
    """It copies its own group entries into ours at every step and load, and swaps state[param] for its own."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    options = {"weight_decay": 0.1, "prediction_steps": 2.0, "master_weights": master_weights}
    twin, twin_params = trained(cls, **options)

    def build(values):
        params = [PARAM(value.detach().clone()) for value in values]
        return ZeroRedundancyOptimizer(params, cls, lr=0.01, **options), params

    zero, params = build(make_params())
    train(zero, params, range(3))
    assert_same(zero.optim, params, twin, twin_params)

    zero.optim.eval()
    zero._sync_params()
    assert_equal(params, thetas(twin, twin_params))
    assert not zero.optim.predicted
    zero.consolidate_state_dict()
    saved_at_theta = copy.deepcopy(zero.state_dict())
    assert not zero.optim.predicted, "its stale group entries must not bring the old mode back"
    resumed, resumed_params = build(params)
    resumed.load_state_dict(saved_at_theta)
    assert not resumed.optim.predicted

    zero.optim.train()
    for each, its_params in ((zero, params), (resumed, resumed_params), (twin, twin_params)):
        each.param_groups[0]["lr"] = 0.03
        train(each, its_params, range(3, 5))
    assert_same(zero.optim, params, twin, twin_params)
    assert_same(resumed.optim, resumed_params, twin, twin_params)


@every_class
def test_wrapping_in_ddp_after_loading_raises_no_false_alarm(cls, process_group):
    """Its constructor broadcasts, which writes to every parameter what is there already."""
    saved, saved_params = trained(cls, shapes=((2, 4), (2,)))
    model = torch.nn.Linear(4, 2)
    model.load_state_dict({"weight": saved_params[0].detach(), "bias": saved_params[1].detach()})
    optimizer = cls(model.parameters())
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*predicted weights.*")
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        params = list(ddp.parameters())
        train(optimizer, params, [3])
        train(saved, saved_params, [3])
    assert_same(optimizer, params, saved, saved_params)


def small_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))


either_layout = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flat"])


@every_class
@either_precision
@pytest.mark.parametrize("lr", [0.02, torch.tensor(0.02)], ids=["float", "tensor"])
@torch_may_warn
def test_the_fake_step_of_dcp_moves_nothing_in_either_mode(cls, master_weights, lr):
    """torch fills an empty state by stepping with zero gradients at lr=0, and then puts the old lr back."""
    model = small_model()
    optimizer = cls(model.parameters(), lr=lr, weight_decay=0.1, prediction_steps=3.0, master_weights=master_weights)
    params = list(model.parameters())
    before = clones(params)
    assert get_optimizer_state_dict(model, optimizer)["state"]
    assert optimizer.param_groups[0]["lr"] is lr
    for mode in (optimizer.eval, optimizer.train, optimizer.eval):
        assert_equal(params, before)
        mode()
    assert_equal(params, before)
    assert all(torch.isfinite(value).all() for state in optimizer.state.values() for value in state.values())


@every_class
@either_precision
@either_layout
@either_mode
@torch_may_warn
def test_a_resume_through_dcp_continues_bit_for_bit(cls, master_weights, flatten, predicted, tmp_path):
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0, "master_weights": master_weights}
    layout = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = small_model()
    optimizer = cls(model.parameters(), **kwargs)
    train(optimizer, list(model.parameters()), range(3))
    optimizer.train(predicted)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=layout)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)

    resumed_model = small_model()
    resumed = cls(resumed_model.parameters(), **kwargs)
    # dcp.load writes into the tensors of this dict, which are the optimizer's own.
    loaded = {
        "model": resumed_model.state_dict(),
        "optimizer": get_optimizer_state_dict(resumed_model, resumed, options=layout),
    }
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    resumed_model.load_state_dict(loaded["model"])
    set_optimizer_state_dict(resumed_model, resumed, loaded["optimizer"], options=layout)

    params, resumed_params = list(model.parameters()), list(resumed_model.parameters())
    assert resumed.predicted is predicted
    assert_same(optimizer, params, resumed, resumed_params)
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(resumed, resumed_params, [step])
        assert_same(optimizer, params, resumed, resumed_params)
    assert_equal(thetas(optimizer, params), thetas(resumed, resumed_params))


# -- traps 4 and 18: writes to the parameters from outside -----------------------------------------------------------


def foreign_write_warnings(action):
    """How many warnings of ours `action` raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    ours = [str(warning.message) for warning in caught if "predicted weights" in str(warning.message)]
    assert all("true_weights()" in message and "eval()" in message for message in ours), "it must say what to do"
    return len(ours)


def _linear(cls, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = cls(model.parameters(), **{"lr": 0.05, "prediction_steps": 2.0} | kwargs)
    params = list(model.parameters())
    train(optimizer, params, range(3))
    return model, optimizer, params


@every_class
@either_precision
def test_loading_a_model_while_predicted_warns_once(cls, master_weights):
    """Without attach there is no telling whether theta or theta_hat was loaded; silence would be a wrong model."""
    model, optimizer, params = _linear(cls, master_weights=master_weights)
    best = copy.deepcopy(model.state_dict())
    train(optimizer, params, [3])
    model.load_state_dict(best)
    assert foreign_write_warnings(optimizer.eval) == 1
    assert foreign_write_warnings(optimizer.train) == 0
    assert foreign_write_warnings(lambda: train(optimizer, params, [4])) == 0


@every_class
@either_precision
@pytest.mark.parametrize("how", ["true_weights", "eval"])
def test_the_recipe_for_loading_a_model_is_exact_and_silent(cls, master_weights, how):
    """load_best_model_at_end, warm restarts: what is loaded at theta is theta."""
    model, optimizer, params = _linear(cls, master_weights=master_weights)
    with optimizer.true_weights():
        best = copy.deepcopy(model.state_dict())

    def reload():
        if how == "true_weights":
            with optimizer.true_weights():
                model.load_state_dict(best)
                assert_equal(params, best.values())
        else:
            optimizer.eval()
            model.load_state_dict(best)
            optimizer.train()

    # The state that predicts is a later one, so another rounding of theta is possible: one, and none afterwards.
    for step in range(3, 6):
        train(optimizer, params, [step])
        assert foreign_write_warnings(reload) == 0
        assert optimizer.predicted
        assert foreign_write_warnings(optimizer.eval) == 0
        if master_weights:
            assert_equal(params, best.values())
        for param, value in zip(params, best.values(), strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=3e-7, atol=1e-7)


@every_class
def test_loading_model_and_optimizer_in_either_order_raises_no_false_alarm(cls):
    model, optimizer, params = _linear(cls)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, params, [3])
    expected = clones(params)

    def resume():
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(optimizer, params, [3])

    assert foreign_write_warnings(resume) == 0
    assert_equal(params, expected)


@every_class
@either_precision
def test_our_own_steps_and_swaps_raise_no_false_alarm(cls, master_weights):
    def everything():
        optimizer, params = trained(cls, master_weights=master_weights)
        for step in range(3, 7):
            train(optimizer, params, [step])
            optimizer.eval()
            optimizer.train()
            with optimizer.true_weights():
                optimizer.state_dict()
            params[step % 3].grad = None
            optimizer.step()
            optimizer.zero_grad()
            optimizer.step()
            copy.deepcopy(optimizer).step()

    assert foreign_write_warnings(everything) == 0


@every_class
@either_precision
def test_clipping_inside_true_weights_clips_theta(cls, master_weights):
    """WGAN: the bound holds for theta, up to the one rounding by which a prediction may move it."""
    bound = 0.25
    optimizer, params = trained(cls, steps=0, master_weights=master_weights)

    def clip():
        with optimizer.true_weights(), torch.no_grad():
            for param in params:
                param.clamp_(-bound, bound)

    for step in range(4):
        train(optimizer, params, [step])
        assert foreign_write_warnings(clip) == 0
        slack = 0.0 if master_weights else 2.0**-24
        for theta in thetas(optimizer, params):
            assert theta.abs().max() <= bound + slack


# -- trap 11: closures -----------------------------------------------------------------------------------------------


@every_class
@either_precision
def test_a_closure_runs_once_at_theta_hat_with_grad(cls, master_weights):
    optimizer, params = trained(cls, master_weights=master_weights)
    twin, twin_params = trained(cls, master_weights=master_weights)
    seen = []

    def closure_of(optimizer, params):
        def closure():
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            loss = sum((param**3).sum() for param in params)
            loss.backward()
            seen.append(clones(params))
            return loss

        return closure

    for _ in range(3):
        theta_hat = clones(params)
        with torch.no_grad():
            loss = optimizer.step(closure_of(optimizer, params))
        assert len(seen) == 1
        assert_equal(seen.pop(), theta_hat)
        expected_loss = closure_of(twin, twin_params)()
        assert torch.equal(loss, expected_loss)
        twin.step()
        assert_same(optimizer, params, twin, twin_params)
        seen.clear()
    assert optimizer.step(closure=lambda: 7) == 7


@every_class
def test_a_closure_in_evaluation_mode_runs_at_theta_and_the_step_leaves_theta_hat(cls):
    optimizer, params = trained(cls)
    theta = thetas(optimizer, params)
    optimizer.eval()
    optimizer.step(lambda: assert_equal(params, theta))
    assert optimizer.predicted


@every_class
@either_mode
def test_a_closure_that_raises_changes_nothing(cls, predicted):
    optimizer, params = trained(cls)
    optimizer.train(predicted)
    before = content(optimizer, params)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_content(optimizer, params, before)


# -- trap 12: torch.compile ------------------------------------------------------------------------------------------


@every_class
@torch_may_warn
def test_a_compiled_step_sees_every_new_lr(cls):
    """Dynamo may keep the python number of an earlier step for good; no error would tell."""
    optimizer, params = trained(cls, steps=0)
    twin, twin_params = trained(cls, steps=0)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step, lr in enumerate((0.1, 0.01, 0.05, 0.002, 0.3)):
        for group in (optimizer.param_groups[0], twin.param_groups[0]):
            group.update(lr=lr, prediction_steps=float(step))
        feed(params, step)
        compiled()
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)
        assert_equal(thetas(optimizer, params), thetas(twin, twin_params))


@torch_may_warn
def test_a_compiled_training_step_is_the_eager_one():
    optimizer, params = trained(XAdamW, steps=0)
    twin, twin_params = trained(XAdamW, steps=0)

    def training_step(optimizer, params, weight):
        loss = sum((weight * param**2).sum() for param in params)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.eval()
        value = sum(param.detach().sum() for param in params)
        optimizer.train()
        return value

    compiled = torch.compile(training_step, backend="eager")
    for step in range(4):
        for group in (optimizer.param_groups[0], twin.param_groups[0]):
            group["lr"] = 0.1 / (step + 1)
        weight = torch.tensor(float(step + 1))
        assert torch.equal(compiled(optimizer, params, weight), training_step(twin, twin_params, weight))
        assert_same(optimizer, params, twin, twin_params)


# -- trap 13: autograd sees the swap ---------------------------------------------------------------------------------

SWAPS = {
    "eval": lambda optimizer: optimizer.eval(),
    "true_weights": lambda optimizer: optimizer.true_weights().__enter__(),
    "there and back": lambda optimizer: (optimizer.eval(), optimizer.train()),
    "step": lambda optimizer: optimizer.step(),
}


@every_class
@either_precision
@pytest.mark.parametrize("name", SWAPS)
@pytest.mark.parametrize("shape", [(), (7,), (130, 130), (3, 2, 4, 4)], ids=str)
def test_a_swap_between_forward_and_backward_raises_in_autograd(cls, master_weights, name, shape):
    """A swap through .data or raw memory would give a silently wrong gradient instead."""
    params = [PARAM(torch.randn(shape))]
    if len(shape) == 4:
        params = [PARAM(torch.randn(shape).to(memory_format=torch.channels_last))]
    optimizer = cls(params, lr=0.1, master_weights=master_weights)
    train(optimizer, params, range(1))
    loss = (params[0] ** 2).sum()
    SWAPS[name](optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_a_swap_of_complex_parameters_raises_in_autograd_too(cls):
    param = PARAM(torch.randn(5, dtype=torch.complex64))
    optimizer = cls([param], lr=0.1)
    param.grad = torch.randn(5, dtype=torch.complex64)
    optimizer.step()
    loss = (param**2).abs().sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_class
def test_a_swap_that_changes_nothing_leaves_autograd_in_peace(cls):
    """train() before each micro-batch is what trainers do; so is any mode without a prediction."""
    for kwargs, mode in (({}, "train"), ({"prediction_steps": 0}, "eval"), ({"prediction_steps": 0}, "train")):
        optimizer, params = trained(cls, **kwargs)
        loss = sum((param**2).sum() for param in params)
        getattr(optimizer, mode)()
        loss.backward()


# -- trap 14: GradScaler ---------------------------------------------------------------------------------------------


def scaler_step(scaler, optimizer, params, step, spoil=None):
    scaler.scale(torch.zeros(()))  # creates its scale
    feed(params, step, scaler.get_scale())
    if spoil is not None:
        params[1].grad[2] = spoil
    scaler.step(optimizer)
    scaler.update()


@every_class
@either_precision
@either_mode
@pytest.mark.parametrize("spoil", [math.inf, math.nan])
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_that_the_grad_scaler_skips_changes_nothing(cls, master_weights, predicted, spoil, fused, request):
    """The very first step, too: no step count, no mode. A fused step unscales and skips by itself."""
    if fused and request.config.getoption("--only-backend") == "torch":
        pytest.skip("fused=True demands a native back end")
    optimizer, params = trained(cls, steps=0, master_weights=master_weights, fused=fused)
    twin, twin_params = trained(cls, steps=0, master_weights=master_weights, fused=fused)
    assert optimizer._step_supports_amp_scaling is bool(fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler_step(scaler, optimizer, params, 0, spoil)
    assert_equal(params, twin_params)
    assert not optimizer.predicted
    for state in optimizer.state.values():
        assert not any(value.any() for key, value in state.items() if key != "master_weights")
    for step in range(4):
        scaler_step(scaler, optimizer, params, step)
        train(twin, twin_params, [step])
        for each in (optimizer, twin):
            each.train(predicted)
        before = content(optimizer, params)
        scaler_step(scaler, optimizer, params, 50 + step, spoil)
        assert_content(optimizer, params, before)
        assert_same(optimizer, params, twin, twin_params)


# -- trap 20 and old pickles: groups without our keys ----------------------------------------------------------------


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


# -- trap 16: lists of parameters that others replace ----------------------------------------------------------------


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


# -- evaluation and averages, by the recipes -------------------------------------------------------------------------


@every_class
@either_precision
@pytest.mark.parametrize("averaging", ["mean", "ema"])
def test_an_averaged_model_inside_true_weights_averages_theta(cls, master_weights, averaging):
    model, optimizer, params = _linear(cls, master_weights=master_weights)
    _, twin, twin_params = _linear(cls, master_weights=master_weights)
    multi_avg_fn = swa_utils.get_ema_multi_avg_fn(0.75) if averaging == "ema" else None
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=multi_avg_fn)
    plain = torch.nn.Linear(4, 3)
    expected = swa_utils.AveragedModel(plain, multi_avg_fn=multi_avg_fn)
    for step in range(3, 8):
        train(optimizer, params, [step])
        with optimizer.true_weights():
            averaged.update_parameters(model)
        train(twin, twin_params, [step])
        plain.load_state_dict(dict(zip(("weight", "bias"), thetas(twin, twin_params), strict=True)))
        expected.update_parameters(plain)
        assert_equal(averaged.parameters(), expected.parameters())
        assert_same(optimizer, params, twin, twin_params)

    # And back in: the averages become theta.
    optimizer.eval()
    model.load_state_dict(averaged.module.state_dict())
    assert foreign_write_warnings(optimizer.train) == 0
    for theta, average in zip(thetas(optimizer, params), averaged.parameters(), strict=True):
        torch.testing.assert_close(theta, average.detach(), rtol=3e-7, atol=1e-7)


@every_class
@either_precision
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=_id)
def test_evaluating_under_no_grad_and_inference_mode(cls, master_weights, context):
    """A validation loop runs under inference_mode, whose new tensors nobody may update afterwards."""
    saved, saved_params = trained(cls, master_weights=master_weights)
    theta = thetas(saved, saved_params)
    params = [PARAM(value) for value in clones(saved_params)]
    optimizer = cls(params)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for step in range(3, 6):
        with context():
            optimizer.eval()
            assert_equal(params, theta)
            optimizer.train()
            with optimizer.true_weights():
                assert_equal(params, theta)
            copy.deepcopy(optimizer.state_dict())
        for state in optimizer.state.values():
            state["step"].add_(0)
        train(optimizer, params, [step])
        train(saved, saved_params, [step])
        assert_same(optimizer, params, saved, saved_params)
        theta = thetas(saved, saved_params)


@every_class
@either_precision
def test_true_weights_restores_the_mode_it_found(cls, master_weights):
    optimizer, params = trained(cls, master_weights=master_weights)
    theta_hat = clones(params)
    theta = thetas(optimizer, params)
    with pytest.raises(KeyError), optimizer.true_weights():
        assert not optimizer.predicted
        raise KeyError
    assert_equal(params, theta_hat)
    with optimizer.true_weights():
        with optimizer.true_weights():
            assert_equal(params, theta)
        assert_equal(params, theta)
        assert not optimizer.predicted
    assert_equal(params, theta_hat)
    optimizer.eval()
    with optimizer.true_weights():
        pass
    assert not optimizer.predicted
    assert_equal(params, theta)
