"""XGrad equals two explicit copies around each optimizer of torch.optim, bit for bit in every dtype."""

import copy

import pytest
import torch
from twins import needs_library, same_bits
from xgrad_bases import BASES, TwoCopies, as_given, every_base, every_dtype, give, shapes_for, stepper, values, wrapped

from xgrad_optim import XAdamW, XGrad


def check(optimizer, params, literal):
    """In both modes, there and back."""
    for is_predicted in (True, False, True):
        optimizer.train(is_predicted)
        assert optimizer.predicted is is_predicted
        held = literal.held(is_predicted)
        assert all(map(same_bits, params, held)), [torch.equal(*pair) for pair in zip(params, held, strict=True)]


@every_base
@every_dtype
@pytest.mark.parametrize("steps", [1.0, 2.5])
def test_it_equals_two_copies(name, dtype, steps):
    start = values(shapes_for(name), dtype)
    literal = TwoCopies(BASES[name], start, steps)
    optimizer, params = wrapped(BASES[name], start, prediction_steps=steps)
    act, was_displaced = stepper(name), False
    for step in range(6):
        grads = [as_given(name, grad) for grad in values(shapes_for(name), dtype, seed=step + 1)]
        if step == 3 and name != "LBFGS":
            grads[0] = None  # keeps its prediction
        for base in (literal.base, optimizer):
            base.param_groups[0]["lr"] *= 0.9
        give(params, grads)
        literal.step(copy.copy(grads), act)
        act(optimizer)
        check(optimizer, params, literal)
        was_displaced = was_displaced or any(d.abs().sum() > 0 for d in literal.shifted)
        if step == 4:
            optimizer.eval()  # a step from there is right, too
    assert was_displaced


@every_base
def test_no_steps_ahead_is_the_base_itself(name):
    start = values(shapes_for(name), torch.float32)
    base_params = [torch.nn.Parameter(value.clone()) for value in start]
    base = BASES[name](base_params)
    optimizer, params = wrapped(BASES[name], start, prediction_steps=0)
    for step in range(3):
        grads = [as_given(name, grad) for grad in values(shapes_for(name), torch.float32, seed=step + 1)]
        for some in (base_params, params):
            give(some, grads)
        stepper(name)(base)
        stepper(name)(optimizer)
        assert all(map(same_bits, params, base_params))
        assert not optimizer._own  # no memory


@needs_library
@every_dtype
def test_back_ends_agree(dtype):
    start = values([(6, 4), (5000,)], dtype)
    runs = [wrapped(BASES["AdamW"], start, prediction_steps=1.7, backend=backend) for backend in ("torch", "cpu")]
    for step in range(3):
        for optimizer, params in runs:
            give(params, values([(6, 4), (5000,)], dtype, seed=step + 1))
            optimizer.step()
        for mode in (True, False):
            for optimizer, _ in runs:
                optimizer.train(mode)
            assert all(map(same_bits, runs[0][1], runs[1][1]))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_parameters(dtype):
    start = [torch.complex(*values([(4, 3), (4, 3)], torch.float64)).to(dtype)]
    optimizer, params = wrapped(BASES["Adam"], start)
    reals = [torch.view_as_real(value) for value in start]
    theta = None
    for step in range(3):
        before = start[0] if theta is None else theta
        params[0].grad = torch.complex(*values([(4, 3), (4, 3)], torch.float64, seed=step)).to(dtype)
        optimizer.step()
        theta_hat = params[0].detach().clone()
        optimizer.eval()
        theta = params[0].detach().clone()
        torch.testing.assert_close(theta_hat, theta + (theta - before))
        optimizer.train()
        assert torch.equal(params[0], theta_hat)
    assert reals[0].shape == (4, 3, 2)


def test_strided_parameters():
    """Transposed ones, and ones with gaps, which no kernel over addresses takes."""
    whole = values([(6, 8), (6, 8)], torch.float32)
    start = [whole[0].t(), whole[1][:, ::2]]
    literal = TwoCopies(BASES["AdamW"], [value.contiguous() for value in start])
    params = [torch.nn.Parameter(start[0]), torch.nn.Parameter(start[1])]
    optimizer = XGrad(BASES["AdamW"](params))
    for step in range(3):
        grads = values([(8, 6), (6, 4)], torch.float32, seed=step)
        give(params, grads)
        literal.step(grads)
        optimizer.step()
        check(optimizer, params, literal)


def test_around_adamw_it_agrees_with_xadamw():
    """Without weight decay both predict by the same number; theirs is rounded in another order."""
    start = values([(6, 4), (300, 70)], torch.float64)
    optimizer, params = wrapped(lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0), start, prediction_steps=1.5)
    native_params = [torch.nn.Parameter(value.clone()) for value in start]
    native = XAdamW(native_params, lr=0.05, weight_decay=0, prediction_steps=1.5)
    for step in range(10):
        grads = values([(6, 4), (300, 70)], torch.float64, seed=step + 1)
        for own, some in ((optimizer, params), (native, native_params)):
            give(some, grads)
            own.step()
        for mode in (True, False):
            optimizer.train(mode)
            native.train(mode)
            for param, other in zip(params, native_params, strict=True):
                torch.testing.assert_close(param, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("steps", [1.0, 2.5])
def test_ours_is_a_base_like_any_other(steps):
    """A native class, which then predicts nothing itself: the whole last update, weight decay included."""
    make = lambda p, **more: XAdamW(p, lr=0.05, weight_decay=0.3, **more)  # noqa: E731
    start = values([(6, 4), (7,)], torch.float32)
    literal = TwoCopies(lambda p: make(p, prediction_steps=0), start, steps)
    optimizer, params = wrapped(make, start, prediction_steps=steps)
    for step in range(4):
        grads = values([(6, 4), (7,)], torch.float32, seed=step + 1)
        give(params, grads)
        literal.step(grads)
        optimizer.step()
        check(optimizer, params, literal)
        assert optimizer.param_groups[0]["prediction_steps"] == steps
