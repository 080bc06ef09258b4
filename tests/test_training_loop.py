"""What a training loop does around a step: closures, torch.compile, GradScaler, averages, evaluation.

A skipped step changes nothing, a closure runs once at theta_hat, a compiled step sees every new lr. Averaging and
evaluating under inference_mode are done as docs/attach.md tells users to do it.
"""

import copy
import math

import pytest
import torch
from cases import every_class
from torch.optim import swa_utils
from training import (
    assert_all_same_bits,
    assert_same,
    assert_unchanged,
    cloned_params,
    clones,
    either_mode,
    either_precision,
    feed,
    name_of,
    our_warnings,
    snapshot,
    thetas,
    torch_may_warn,
    train,
    trained,
    trained_linear,
)

from xgrad_optim import XAdamW


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
        assert_all_same_bits(seen.pop(), theta_hat)
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
    optimizer.step(lambda: assert_all_same_bits(params, theta))
    assert optimizer.predicted


@every_class
@either_mode
def test_a_closure_that_raises_changes_nothing(cls, predicted):
    optimizer, _ = trained(cls)
    optimizer.train(predicted)
    before = snapshot(optimizer)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert_unchanged(optimizer, before)


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
        assert_all_same_bits(thetas(optimizer, params), thetas(twin, twin_params))


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


def scaler_step(scaler, optimizer, params, step, spoil=None):
    scaler.scale(torch.zeros(()))  # creates its scale
    feed(params, step, scale=scaler.get_scale())
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
    assert_all_same_bits(params, twin_params)
    assert not optimizer.predicted
    for state in optimizer.state.values():
        assert not any(value.any() for key, value in state.items() if key != "master_weights")
    for step in range(4):
        scaler_step(scaler, optimizer, params, step)
        train(twin, twin_params, [step])
        for each in (optimizer, twin):
            each.train(predicted)
        before = snapshot(optimizer)
        scaler_step(scaler, optimizer, params, 50 + step, spoil)
        assert_unchanged(optimizer, before, but_gradients=True)
        assert_same(optimizer, params, twin, twin_params)


@every_class
@either_precision
@pytest.mark.parametrize("averaging", ["mean", "ema"])
def test_an_averaged_model_inside_true_weights_averages_theta(cls, master_weights, averaging):
    model, optimizer, params = trained_linear(cls, master_weights=master_weights)
    _, twin, twin_params = trained_linear(cls, master_weights=master_weights)
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
        assert_all_same_bits(averaged.parameters(), expected.parameters())
        assert_same(optimizer, params, twin, twin_params)

    # And back in: the averages become theta.
    optimizer.eval()
    model.load_state_dict(averaged.module.state_dict())
    assert not our_warnings(optimizer.train)
    for theta, average in zip(thetas(optimizer, params), averaged.parameters(), strict=True):
        torch.testing.assert_close(theta, average.detach(), rtol=3e-7, atol=1e-7)


@every_class
@either_precision
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=name_of)
def test_evaluating_under_no_grad_and_inference_mode(cls, master_weights, context):
    """A validation loop runs under inference_mode, whose new tensors nobody may update afterwards."""
    saved, saved_params = trained(cls, master_weights=master_weights)
    theta = thetas(saved, saved_params)
    params = cloned_params(saved_params)
    optimizer = cls(params)
    optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    for step in range(3, 6):
        with context():
            optimizer.eval()
            assert_all_same_bits(params, theta)
            optimizer.train()
            with optimizer.true_weights():
                assert_all_same_bits(params, theta)
            copy.deepcopy(optimizer.state_dict())
        for state in optimizer.state.values():
            state["step"].add_(0)
        train(optimizer, params, [step])
        train(saved, saved_params, [step])
        assert_same(optimizer, params, saved, saved_params)
        theta = thetas(saved, saved_params)
