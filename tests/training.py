"""Optimizers in mid-training for the tests of behaviour, and the comparison of every bit of them."""

import copy
import io
import warnings

import pytest
import torch
from family import MEMBERS, taking

REAL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
SHAPES = ((3, 4), (5,), (), (0, 2))  # the last one is empty
PARAM = torch.nn.Parameter


def name_of(value):
    """The id of a class, a dtype or anything else in a test's name."""
    return value.__name__ if hasattr(value, "__name__") else str(value).removeprefix("torch.")


every_class_with_amsgrad = pytest.mark.parametrize("cls", taking("amsgrad"), ids=name_of)
every_dtype = pytest.mark.parametrize("dtype", (*REAL_DTYPES, torch.complex64), ids=name_of)
either_mode = pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
either_precision = pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])
torch_may_warn = pytest.mark.filterwarnings("default")  # of its own deprecations; ours are asserted where they matter


# -- training --------------------------------------------------------------------------------------------------------


def options(cls, dtype=torch.float32, **kwargs):
    """Options under which the first steps move every element visibly and stay finite in this dtype."""
    own = MEMBERS[cls].training
    if dtype is torch.float16 and "eps" in own:
        own = {**own, "eps": 1e-4}
    return {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0} | own | kwargs


def random(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def make_params(shapes=SHAPES, seed=0, dtype=torch.float32):
    return [PARAM(random(shape, seed + place, dtype)) for place, shape in enumerate(shapes)]


def filled(*shape, seed=0):
    """A parameter with a gradient, both from this seed."""
    generator = torch.Generator().manual_seed(seed)
    param = PARAM(torch.randn(*shape, generator=generator))
    param.grad = torch.randn(*shape, generator=generator)
    return param


def gradient(param, place, step):
    """The recorded gradient of the parameter in this place at this step."""
    return random(param.shape, 1000 + 50 * step + place, param.dtype)


def feed(params, step, skip=(), scale=1.0):
    """Put the recorded gradients of this step into the parameters."""
    for place, param in enumerate(params):
        param.grad = None if place in skip else gradient(param, place, step) * scale


def train(optimizer, params, steps):
    for step in steps:
        feed(params, step)
        optimizer.step()


def trained(cls, steps=3, shapes=SHAPES, dtype=torch.float32, **kwargs):
    """An optimizer in mid-training, and its parameters."""
    params = make_params(shapes, dtype=dtype)
    optimizer = cls(params, **options(cls, dtype, **kwargs))
    train(optimizer, params, range(steps))
    return optimizer, params


def trained_in_two_groups(cls, **kwargs):
    """The same with two groups, and a gradient for the next step."""
    params = [filled(3, 2, seed=1), filled(4, seed=2)]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], **kwargs)
    optimizer.step()
    return optimizer, params


def trained_linear(cls, **kwargs):
    """A model in mid-training, its optimizer and its parameters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    params = list(model.parameters())
    optimizer = cls(params, **options(cls, **kwargs))
    train(optimizer, params, range(3))
    return model, optimizer, params


def clones(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def cloned_params(params):
    return [PARAM(value) for value in clones(params)]


def thetas(optimizer, params):
    """The true weights, seen without leaving a trace."""
    with optimizer.true_weights():
        return clones(params)


def through_a_file(state_dict):
    """torch.save and torch.load as everyone should: weights_only admits tensors and plain values, nothing else."""
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


# -- comparison ------------------------------------------------------------------------------------------------------


def bits(tensor):
    """A tensor's bytes and description, so that NaN equals itself and -0 is not 0."""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8) if flat.numel() else flat.to(torch.uint8)


def assert_same_bits(first, second, what=""):
    (dtype, shape, content), (other_dtype, other_shape, other) = bits(first), bits(second)
    assert (dtype, shape) == (other_dtype, other_shape), what
    assert torch.equal(content, other), what


def assert_all_same_bits(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        assert_same_bits(tensor, other)


def assert_same(optimizer, params, other, other_params):
    """Parameters and all state agree in every bit, the mode of each parameter among it."""
    for param, other_param in zip(params, other_params, strict=True):
        assert_same_bits(param, other_param, "parameter")
        state, other_state = optimizer.state[param], other.state[other_param]
        assert state.keys() == other_state.keys()
        for key in state:
            assert_same_bits(torch.as_tensor(state[key]), torch.as_tensor(other_state[key]), key)


def assert_goes_on_alike(optimizer, params, other, other_params, steps=range(10, 13)):
    """The next steps agree in every bit, with a look at theta in between, which must change nothing."""
    for step in steps:
        feed(params, step)
        feed(other_params, step)
        optimizer.step()
        other.step()
        assert all(torch.isfinite(param).all() for param in params)
        assert optimizer.predicted is other.predicted
        assert_same(optimizer, params, other, other_params)
        with optimizer.true_weights(), other.true_weights():
            assert_same(optimizer, params, other, other_params)


def snapshot(optimizer):
    """Every bit of an optimizer: options, parameters, gradients, state and mode."""
    groups = [
        {
            key: [id(param) for param in value] if key == "params" else copy.deepcopy(value)
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad if param.grad is None else param.grad.clone() for param in params]
    states = [optimizer.state.get(param, {}) for param in params]
    state = [{key: torch.as_tensor(value).clone() for key, value in each.items()} for each in states]
    return groups, clones(params), state, optimizer.predicted, grads


def assert_unchanged(optimizer, before, but_gradients=False):
    groups, values, state, predicted, grads = snapshot(optimizer)
    assert (groups, predicted) == (before[0], before[3])
    assert_all_same_bits(values, before[1])
    for now, then in zip(state, before[2], strict=True):
        assert now.keys() == then.keys()
        for key, old in then.items():
            assert_same_bits(now[key], old, key)
    for grad, old in zip(grads, before[4], strict=True):
        if not but_gradients:
            assert (grad is None) == (old is None)
            assert grad is None or torch.equal(grad, old)


def our_warnings(action):
    """The warnings of foreign writes that `action` raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    ours = [str(warning.message) for warning in caught if "predicted weights" in str(warning.message)]
    assert all("true_weights()" in message and "eval()" in message for message in ours), "it must say what to do"
    return ours


def message_of(call, error):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)
