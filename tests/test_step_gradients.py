"""Gradients: read only, NaN stays in its element, and a wrong one raises before anything has changed."""

import math

import pytest
import torch
from cases import every_class
from training import (
    PARAM,
    assert_all_same_bits,
    assert_same,
    assert_same_bits,
    assert_unchanged,
    clones,
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


@every_class
@either_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=name_of)
@pytest.mark.parametrize("maximize", [False, True], ids=["", "maximize"])
def test_gradients_are_read_only(cls, master_weights, dtype, maximize):
    """Users log, clip and accumulate them."""
    kwargs = {"master_weights": master_weights, "maximize": maximize}
    optimizer, params = trained(cls, 2, ((3, 4), (), (20_000,)), dtype, **kwargs)
    feed(params, 2)
    grads = [param.grad for param in params]
    before, versions = clones(grads), [grad._version for grad in grads]
    optimizer.step()
    optimizer.eval()
    optimizer.train()
    assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
    assert_all_same_bits(grads, before)
    assert [grad._version for grad in grads] == versions


@every_class
@either_precision
def test_maximize_is_a_step_on_the_negated_gradient(cls, master_weights):
    params, twin_params = make_params(), make_params()
    optimizer = cls(params, **options(cls, master_weights=master_weights, maximize=True))
    twin = cls(twin_params, **options(cls, master_weights=master_weights))
    for step in range(4):
        feed(params, step)
        for param, twin_param in zip(params, twin_params, strict=True):
            twin_param.grad = -param.grad
        optimizer.step()
        twin.step()
        assert_same(optimizer, params, twin, twin_params)


@every_class
@either_precision
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(3, 4), (20_000,)], ids=["small", "large"])
def test_nan_and_inf_stay_in_their_element(cls, master_weights, bad, shape):
    """The rest of the tensor, and its neighbours, have the bits of a run without it."""
    shapes = (shape, (5,))
    optimizer, params = trained(cls, shapes=shapes, master_weights=master_weights)
    twin, twin_params = trained(cls, shapes=shapes, master_weights=master_weights)
    for step in range(3, 6):
        feed(params, step)
        params[0].grad.view(-1)[7] = bad
        optimizer.step()
        train(twin, twin_params, [step])
        optimizer.eval()
        optimizer.train()
        tensors = {"parameter": params[0], **optimizer.state[params[0]]}
        twin_tensors = {"parameter": twin_params[0], **twin.state[twin_params[0]]}
        for key in tensors:
            tensor, twin_tensor = (each[key].detach().clone().view(-1) for each in (tensors, twin_tensors))
            if tensor.numel() > 1:
                tensor[7] = twin_tensor[7] = 0.0
            assert_same_bits(tensor, twin_tensor, key)
        assert_same(optimizer, params[1:], twin, twin_params[1:])
    assert not torch.isfinite(params[0].view(-1)[7])


def _sparse(params):
    params[1].grad = None
    params[1].grad = torch.sparse_coo_tensor([[0, 2]], [1.0, 2.0], (5,), check_invariants=True)


def _wrong_dtype(params):
    params[1].grad = None
    params[1].data = params[1].data.double()
    params[1].grad = torch.ones(5, dtype=torch.float64)
    params[1].data = params[1].data.float()


def _wrong_shape(params):
    params[1].grad = None
    value = params[1].data
    params[1].data = torch.ones(4)
    params[1].grad = torch.ones(4)
    params[1].data = value


class _GradAnywhere(torch.Tensor):
    """Its .grad is a plain attribute: torch itself lets no gradient on another device in, offloading wrappers do."""

    grad = None


def _wrong_device(params):
    params[1].grad = torch.ones(5, device="meta")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch < 2.12, once in a process
@every_class
@either_mode
@pytest.mark.parametrize(
    "spoil, text",
    [
        (_sparse, "does not support sparse gradients"),
        (_wrong_dtype, "float64"),
        (_wrong_shape, "(4,)"),
        (_wrong_device, "meta"),
    ],
    ids=["sparse", "dtype", "shape", "device"],
)
def test_a_gradient_that_does_not_match_raises_and_changes_nothing(cls, predicted, spoil, text):
    params, twin_params = make_params(), make_params()
    if spoil is _wrong_device:
        params[1] = PARAM(params[1].detach().as_subclass(_GradAnywhere))
    optimizer, twin = cls(params, **options(cls)), cls(twin_params, **options(cls))
    train(optimizer, params, range(3))
    train(twin, twin_params, range(3))
    optimizer.train(predicted)
    feed(params, 3)
    spoil(params)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert text in str(caught.value)
    assert_unchanged(optimizer, before, but_gradients=True)
    train(optimizer, params, [3])
    train(twin, twin_params, [3])
    for param, twin_param in zip(params, twin_params, strict=True):
        assert_same_bits(param.detach().as_subclass(torch.Tensor), twin_param)


@every_class
def test_a_sparse_gradient_at_the_first_step_leaves_no_state(cls):
    params = make_params()
    optimizer = cls(params)
    feed(params, 0)
    _sparse(params)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert not any(optimizer.state.values())


@every_class
def test_dtypes_that_no_kernel_computes_in_are_refused(cls):
    param = PARAM(torch.zeros(4, dtype=torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises((RuntimeError, TypeError, ValueError), match="float8_e4m3fn"):
        optimizer = cls([param])
        param.grad = torch.zeros(4, dtype=torch.float8_e4m3fn)
        optimizer.step()
