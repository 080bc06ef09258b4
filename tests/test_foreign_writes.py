"""Weights that somebody else writes: kept where they are theta, warned about where they are not, and no false alarm.

At theta what is written is theta. At theta_hat it may be meant as either: the change is kept and a warning says what to
do. Breaks where a swap restores what it remembers, or where our own writes are taken for foreign ones.
"""

import copy

import pytest
import torch
from cases import every_class
from training import (
    SHAPES,
    assert_all_same_bits,
    assert_same,
    assert_same_bits,
    cloned_params,
    clones,
    either_precision,
    feed,
    name_of,
    options,
    our_warnings,
    random,
    thetas,
    train,
    trained,
    trained_linear,
)

FOREIGN_WRITES = {
    "clamp_": lambda param: param.clamp_(-0.3, 0.3),
    "copy_": lambda param: param.copy_(random(param.shape, 77, param.dtype)),
    "through .data": lambda param: param.data.mul_(0.5),
    "one element": lambda param: param.view(-1)[:1].fill_(0.25),
    "new .data": lambda param: setattr(param, "data", random(param.shape, 78, param.dtype)),
    "zero_": lambda param: param.zero_(),
}
foreign_write = pytest.mark.parametrize("name", FOREIGN_WRITES)


def assert_within_one_rounding(theta, written, theta_hat):
    """A prediction without a master may move theta by the rounding of theta - d and of its way back, once."""
    largest = torch.maximum(theta_hat.detach().abs(), written.abs()).double()
    slack = (torch.finfo(written.dtype).eps * largest).clamp(min=torch.finfo(written.dtype).tiny)
    assert ((theta.double() - written.double()).abs() <= slack).all()


def write(params, name):
    with torch.no_grad():
        for param in params:
            FOREIGN_WRITES[name](param)


@every_class
@either_precision
@foreign_write
@pytest.mark.parametrize("how", ["eval", "true_weights"])
@pytest.mark.parametrize("prediction_steps", [0, 2.0])
def test_what_is_written_at_theta_is_theta(cls, master_weights, name, how, prediction_steps):
    optimizer, params = trained(cls, master_weights=master_weights, prediction_steps=prediction_steps)
    written = []

    def edit():
        if how == "true_weights":
            with optimizer.true_weights():
                write(params, name)
                written.extend(clones(params))
        else:
            optimizer.eval()
            write(params, name)
            written.extend(clones(params))
            optimizer.train()

    assert not our_warnings(edit)
    assert optimizer.predicted
    theta_hat, theta = clones(params), thetas(optimizer, params)
    for place, value in enumerate(written):
        if master_weights or prediction_steps == 0:
            assert_same_bits(theta[place], value)
        else:
            assert_within_one_rounding(theta[place], value, theta_hat[place])
    for _ in range(2):
        assert_all_same_bits(params, theta_hat)
        assert_all_same_bits(thetas(optimizer, params), theta)


@every_class
@either_precision
@foreign_write
def test_a_step_from_evaluation_mode_starts_from_what_is_written(cls, master_weights, name):
    """As an optimizer of the same state over the written weights does; no train() in between."""
    optimizer, params = trained(cls, master_weights=master_weights)
    optimizer.eval()
    write(params, name)
    twin_params = cloned_params(params)
    twin = cls(twin_params)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for place, value in enumerate(clones(twin_params)):
        if master_weights:
            state_dict["state"][place]["master_weights"] = value
    twin.load_state_dict(state_dict)
    for step in range(3, 5):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)


@every_class
@either_precision
@pytest.mark.parametrize("name", ["clamp_", "copy_", "one element", "zero_"])
@pytest.mark.parametrize("then", ["step", "eval", "true_weights"])
def test_what_is_written_at_theta_hat_is_kept_and_warned_about_once(cls, master_weights, name, then):
    """The true weights move by the edit: theta + (edited - theta_hat), in the precision of the dtype."""
    optimizer, params = trained(cls, master_weights=master_weights)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    write(params, name)
    edited = clones(params)
    if then == "step":
        twin, twin_params = copy.deepcopy((optimizer, params))
        feed(params, 3)
        assert len(our_warnings(optimizer.step)) == 1
        twin.eval()
        now = clones(twin_params)
    else:
        call = optimizer.eval if then == "eval" else optimizer.true_weights().__enter__
        assert len(our_warnings(call)) == 1
        now = clones(params)
    assert not our_warnings(lambda: (optimizer.train(), optimizer.eval(), train(optimizer, params, [4])))
    assert any(not torch.equal(one, other) for one, other in zip(edited, theta_hat, strict=True))
    for place in range(len(params)):
        moved = theta[place].double() + (edited[place].double() - theta_hat[place].double())
        torch.testing.assert_close(now[place].double(), moved, rtol=1e-6, atol=1e-6)
        untouched = edited[place] == theta_hat[place]
        assert torch.equal(now[place][untouched], theta[place][untouched])


@every_class
@either_precision
def test_loading_weights_in_evaluation_mode_is_kept(cls, master_weights):
    """Lightning's EMAWeightAveraging and "best model" reloads: foreign weights in, evaluated, and out again."""
    torch.manual_seed(0)
    model, foreign = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    params = list(model.parameters())
    optimizer = cls(params, **options(cls, master_weights=master_weights))
    train(optimizer, params, range(3))
    twin, twin_params = copy.deepcopy((optimizer, params))
    for step in range(3, 6):
        optimizer.eval()
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(foreign.state_dict())
        optimizer.eval()
        assert_all_same_bits(params, foreign.parameters())
        model.load_state_dict(kept)
        optimizer.train()
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_a_16_bit_parameter_that_nobody_touched_keeps_its_whole_master(cls, dtype):
    """In evaluation mode the parameters are the authority, but rounding theta to 16 bits is no edit."""
    optimizer, params = trained(cls, dtype=dtype, master_weights=True)
    masters = clones(optimizer.state[param]["master_weights"] for param in params)
    assert any(not torch.equal(master, master.to(dtype).float()) for master in masters)
    for value in (0.5, 0.25):
        optimizer.eval()
        assert_all_same_bits(params, [master.to(dtype) for master in masters])
        with torch.no_grad():
            params[0].view(-1)[:1].fill_(value)
        masters[0].view(-1)[0] = value
        optimizer.train()
        assert_all_same_bits((optimizer.state[param]["master_weights"] for param in params), masters)


@every_class
@either_precision
def test_loading_a_model_while_predicted_warns_once(cls, master_weights):
    """Without attach there is no telling whether theta or theta_hat was loaded; silence would be a wrong model."""
    model, optimizer, params = trained_linear(cls, master_weights=master_weights)
    best = copy.deepcopy(model.state_dict())
    train(optimizer, params, [3])
    model.load_state_dict(best)
    assert len(our_warnings(optimizer.eval)) == 1
    assert not our_warnings(optimizer.train)
    assert not our_warnings(lambda: train(optimizer, params, [4]))


@every_class
@either_precision
@pytest.mark.parametrize("how", ["true_weights", "eval"])
def test_the_recipe_for_loading_a_model_is_exact_and_silent(cls, master_weights, how):
    """load_best_model_at_end, warm restarts: what is loaded at theta is theta."""
    model, optimizer, params = trained_linear(cls, master_weights=master_weights)
    with optimizer.true_weights():
        best = copy.deepcopy(model.state_dict())

    def reload():
        if how == "true_weights":
            with optimizer.true_weights():
                model.load_state_dict(best)
                assert_all_same_bits(params, best.values())
        else:
            optimizer.eval()
            model.load_state_dict(best)
            optimizer.train()

    # The state that predicts is a later one, so another rounding of theta is possible: one, and none afterwards.
    for step in range(3, 6):
        train(optimizer, params, [step])
        assert not our_warnings(reload)
        assert optimizer.predicted
        assert not our_warnings(optimizer.eval)
        if master_weights:
            assert_all_same_bits(params, best.values())
        for param, value in zip(params, best.values(), strict=True):
            torch.testing.assert_close(param.detach(), value, rtol=3e-7, atol=1e-7)


@every_class
def test_loading_model_and_optimizer_in_either_order_raises_no_false_alarm(cls):
    model, optimizer, params = trained_linear(cls)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(optimizer, params, [3])
    expected = clones(params)

    def resume():
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(optimizer, params, [3])

    assert not our_warnings(resume)
    assert_all_same_bits(params, expected)


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

    assert not our_warnings(everything)


@every_class
@either_precision
def test_clipping_inside_true_weights_clips_theta(cls, master_weights):
    """WGAN: the bound holds for theta, up to the one rounding by which a prediction may move it."""
    bound = 0.25
    optimizer, params = trained(cls, steps=0, shapes=SHAPES[:-1], master_weights=master_weights)

    def clip():
        with optimizer.true_weights(), torch.no_grad():
            for param in params:
                param.clamp_(-bound, bound)

    for step in range(4):
        train(optimizer, params, [step])
        assert not our_warnings(clip)
        slack = 0.0 if master_weights else 2.0**-24
        for theta in thetas(optimizer, params):
            assert theta.abs().max() <= bound + slack
