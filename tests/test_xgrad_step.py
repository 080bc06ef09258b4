"""A step of XGrad: what the base is given, what it is refused for, and what is left where it fails."""

import pytest
import torch
from twins import same_bits
from xgrad_bases import BASES, TwoCopies, give, values, wrapped

from xgrad_optim import XSGDM, XAdamW, XGrad

SHAPES = [(6, 4), (7,)]


def feed(params, seed):
    give(params, values(SHAPES, torch.float32, seed))


def trained(name="AdamW", steps=2, **options):
    optimizer, params = wrapped(BASES[name], values(SHAPES, torch.float32), **options)
    for step in range(steps):
        feed(params, step + 1)
        optimizer.step()
    return optimizer, params


def clones(params):
    return [param.detach().clone() for param in params]


def same(tensors, others):
    return all(map(same_bits, tensors, others))


def theta_of(optimizer, params):
    with optimizer.true_weights():
        return clones(params)


# -- closures ----------------------------------------------------------------------------------------------------------


def test_the_closure_runs_once_at_the_predicted_weights_with_gradients():
    optimizer, params = trained()
    theta_hat, seen = clones(params), []

    def closure():
        seen.append((clones(params), torch.is_grad_enabled()))
        optimizer.zero_grad()
        loss = sum(param.square().sum() for param in params)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    ((weights, with_gradients),) = seen
    assert same(weights, theta_hat) and with_gradients
    assert loss.item() == pytest.approx(sum(value.square().sum().item() for value in theta_hat))


def test_a_closure_that_raises_changes_nothing():
    optimizer, params = trained()
    theta_hat, state = clones(params), [value["exp_avg"].clone() for value in optimizer.state.values()]
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert optimizer.predicted and same(params, theta_hat)
    assert same([value["exp_avg"] for value in optimizer.state.values()], state)


class AsksTwice(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        super().step()
        return closure()


def test_a_base_that_asks_again_is_refused_with_theta_left():
    params = [torch.nn.Parameter(value) for value in values(SHAPES, torch.float32)]
    optimizer = XGrad(AsksTwice(params, lr=0.1))
    theta = clones(params)
    feed(params, 1)
    with pytest.raises(RuntimeError, match="closure more than once"):
        optimizer.step(lambda: torch.ones(()))
    assert same(params, theta) and not optimizer.predicted


# -- what fails --------------------------------------------------------------------------------------------------------


class FailsHalfWay(torch.optim.SGD):
    """Its step raises when the first parameter has been updated."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise MemoryError("half-way")
        return super().step(closure)


def test_a_base_that_fails_half_way_leaves_theta_from_before():
    params = [torch.nn.Parameter(value) for value in values(SHAPES, torch.float32)]
    base = FailsHalfWay(params, lr=0.1, momentum=0.9)
    optimizer = XGrad(base)
    feed(params, 1)
    optimizer.step()
    theta = theta_of(optimizer, params)
    base.fails = True
    feed(params, 2)
    with pytest.raises(MemoryError):
        optimizer.step()
    for mode in (True, False, True):
        optimizer.train(mode)
        assert same(params, theta)
    base.fails = False
    optimizer.step()
    assert optimizer.predicted and not same(params, theta_of(optimizer, params))


def test_a_base_that_refuses_its_gradients_leaves_theta():
    optimizer, params = trained()
    theta = theta_of(optimizer, params)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert same(theta_of(optimizer, params), theta)


def test_shared_memory_is_refused_before_anything_moves():
    memory = torch.arange(6.0)
    params = [torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[3:])]
    optimizer = XGrad(torch.optim.SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="share memory"):
            optimizer.step()
        assert torch.equal(memory, torch.arange(6.0))


def test_a_dtype_that_nothing_is_predicted_in_is_refused_unless_it_is_not_to_be():
    param = torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)
    optimizer = XGrad(torch.optim.SGD([param], lr=0.1))
    param.grad = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(RuntimeError, match=r"dtype torch\.float8_e4m3fn"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: torch.optim.AdamW, TypeError, "the class AdamW: make it first"),
        (lambda p: torch.nn.Linear(1, 1), TypeError, "expects an optimizer, got a Linear"),
        (lambda p: XGrad(torch.optim.SGD(p)), ValueError, "has eval\\(\\) and train\\(\\) of its own"),
        (lambda p: torch.optim.LBFGS(p), ValueError, "max_iter=1"),
        (lambda p: torch.optim.LBFGS(p, max_iter=1, line_search_fn="strong_wolfe"), ValueError, "line_search_fn=None"),
    ],
)
def test_what_it_can_t_wrap(make, error, match):
    params = [torch.nn.Parameter(torch.ones(2))]
    with pytest.raises(error, match=match):
        XGrad(make(params))


def test_an_attached_base_of_ours_is_refused():
    model = torch.nn.Linear(2, 2)
    base = XAdamW(model.parameters())
    handle = base.attach(model)
    with pytest.raises(ValueError, match=r"call remove\(\)"):
        XGrad(base)
    handle.remove()
    XGrad(base).attach(model)


@pytest.mark.parametrize("value", [-1.0, float("nan"), "two", None])
def test_prediction_steps_that_are_no_number_are_refused(value):
    with pytest.raises((TypeError, ValueError), match="prediction_steps"):
        wrapped(BASES["SGD"], values(SHAPES, torch.float32), prediction_steps=value)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_steps_ahead_are_an_option_of_each_group_and_may_change():
    start = values(SHAPES, torch.float32)
    params = [torch.nn.Parameter(value.clone()) for value in start]
    groups = [{"params": params[:1], "prediction_steps": 2.0}, {"params": params[1:]}]
    optimizer = XGrad(BASES["AdamW"](groups), 0.5)
    literals = [TwoCopies(BASES["AdamW"], [value], steps) for value, steps in zip(start, (2.0, 0.5), strict=True)]
    schedule = [(2.0, 0.5), (0.0, 3.0), (1.0, 0.0), (1.0, 1.0)]
    for step, chosen in enumerate(schedule):
        feed(params, step + 1)
        for index, (literal, steps) in enumerate(zip(literals, chosen, strict=True)):
            optimizer.param_groups[index]["prediction_steps"] = literal.steps = steps
            literal.step([params[index].grad.clone()])
        optimizer.step()
        for mode in (True, False, True):
            optimizer.train(mode)
            held = [literal.held(mode)[0] for literal in literals]
            assert same(params, held)
    assert set(optimizer._own) == set(params)


def test_a_change_of_steps_ahead_does_not_disturb_the_way_back():
    optimizer, params = trained()
    theta_hat, theta = clones(params), theta_of(optimizer, params)
    optimizer.param_groups[0]["prediction_steps"] = 7.0
    optimizer.param_groups[0]["lr"] = 9.0
    optimizer.eval()
    assert same(params, theta)
    optimizer.train()
    assert same(params, theta_hat)


def test_a_parameter_without_a_gradient_keeps_its_prediction_at_another_number_of_steps():
    optimizer, params = trained()
    hat, theta = clones(params), theta_of(optimizer, params)
    optimizer.param_groups[0]["prediction_steps"] = 3.0
    params[1].grad = None
    optimizer.step()
    assert same_bits(params[1], hat[1]) and not same_bits(params[0], hat[0])
    optimizer.eval()
    assert same_bits(params[1], theta[1])


def test_a_frozen_parameter_holds_theta():
    optimizer, params = trained()
    theta = theta_of(optimizer, params)
    params[1].requires_grad_(False).grad = None
    optimizer.step()
    assert optimizer.predicted and same_bits(params[1], theta[1])


def test_a_group_may_join_and_leave():
    optimizer, params = trained()
    late = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late], "lr": 0.3})
    assert optimizer.param_groups[1]["prediction_steps"] == 1.0 and optimizer.base.param_groups[1]["lr"] == 0.3
    theta = theta_of(optimizer, params)
    late.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(late, theta_of(optimizer, [late])[0])
    theta = theta_of(optimizer, params)
    del optimizer.param_groups[0]
    optimizer.eval()
    assert same(params, theta)  # what leaves, leaves at theta
    optimizer.step()
    assert set(optimizer._own) == {late}


def test_named_parameters_and_nested_modules():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.nn.Linear(4, 1))
    optimizer = XGrad(torch.optim.AdamW(model.named_parameters(), lr=0.1))
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert optimizer.predicted


def test_other_groups_in_place_of_these():
    """As frameworks do that replace parameters."""
    optimizer, params = trained()
    theta = theta_of(optimizer, params)
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [params[0]]}]
    optimizer.eval()
    assert same(params, theta)
    assert optimizer.base.param_groups is optimizer.param_groups


# -- what belongs to others --------------------------------------------------------------------------------------------


def test_the_base_sees_its_own_state_alone():
    optimizer, params = trained()
    assert optimizer.state is optimizer.base.state and optimizer.defaults is optimizer.base.defaults
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("of_the_base", [True, False])
def test_schedulers_may_be_of_either(of_the_base):
    optimizer, params = trained(steps=0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer.base if of_the_base else optimizer, 0.1, total_steps=9)
    literal = TwoCopies(BASES["AdamW"], clones(params))
    other = torch.optim.lr_scheduler.OneCycleLR(literal.base, 0.1, total_steps=9)
    for step in range(8):
        feed(params, step + 1)
        literal.step([param.grad.clone() for param in params])
        optimizer.step()
        other.step()
        scheduler.step()
        assert same(params, literal.held(True))
        assert optimizer.param_groups[0]["betas"] == literal.base.param_groups[0]["betas"]


def test_hooks_of_both_run():
    optimizer, params = trained(steps=0)
    calls = []
    optimizer.register_step_pre_hook(lambda own, *_: calls.append(("before", own)))
    optimizer.base.register_step_post_hook(lambda own, *_: calls.append(("base", own)))
    optimizer.register_step_post_hook(lambda own, *_: calls.append(("after", own)))
    feed(params, 1)
    optimizer.step()
    assert calls == [("before", optimizer), ("base", optimizer.base), ("after", optimizer)]


def test_a_hook_inside_the_base_s_step_finds_true_weights():
    optimizer, params = trained()
    seen = []
    optimizer.base.register_step_post_hook(lambda *_: seen.append((optimizer.predicted, clones(params))))
    optimizer.base.register_step_post_hook(lambda *_: optimizer.train())
    optimizer.base.register_step_post_hook(lambda *_: seen.append(optimizer.state_dict()["state"][0].keys()))
    literal = TwoCopies(BASES["AdamW"], values(SHAPES, torch.float32))
    for step in range(2):
        literal.step(values(SHAPES, torch.float32, step + 1))
    feed(params, 5)
    literal.step([param.grad.clone() for param in params])
    optimizer.step()
    (was_predicted, weights), keys = seen
    assert not was_predicted and keys == {"step", "exp_avg", "exp_avg_sq"}
    assert same(params, literal.held(True))
    assert not same(weights, params)


@pytest.mark.parametrize("name", ["AdamW", "Adam fused"])
def test_grad_scaler(name):
    """Both protocols: a step that the scaler skips changes nothing, any other is that of the unscaled gradients."""
    optimizer, params = trained(name)
    assert optimizer._step_supports_amp_scaling is (name == "Adam fused")
    plain, plain_params = trained(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        hat, state = clones(params), [value["exp_avg"].clone() for value in optimizer.state.values()]
        feed(plain_params, step + 9)
        for param, other in zip(params, plain_params, strict=True):
            param.grad = other.grad * scaler.scale(torch.ones(())) * factor
        scaler.step(optimizer)
        scaler.update()
        if factor == 1.0:
            plain.step()
            assert same(params, plain_params) and not same(params, hat)
            scaler.update(8.0)
        else:
            assert same(params, hat) and optimizer.predicted
            assert same([value["exp_avg"] for value in optimizer.state.values()], state)
        assert not hasattr(optimizer.base, "found_inf")


@pytest.mark.parametrize("cls", [XAdamW, XSGDM])
def test_a_base_of_ours_gets_its_marks_and_its_groups_back(cls):
    params = [torch.nn.Parameter(value) for value in values(SHAPES, torch.float32)]
    optimizer = XGrad(cls(params, prediction_steps=4.0), 2.0)
    assert optimizer.param_groups[0]["prediction_steps"] == 2.0
    feed(params, 1)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.param_groups[0]["prediction_steps"] == 2.0


def test_clipping_of_gradients_and_zero_grad_are_those_of_any_optimizer():
    optimizer, params = trained()
    torch.nn.utils.clip_grad_norm_([param for group in optimizer.param_groups for param in group["params"]], 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert all(not param.grad.any() for param in params)
    optimizer.zero_grad()
    assert all(param.grad is None for param in params)
