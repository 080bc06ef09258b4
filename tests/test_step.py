"""One step, for whatever parameters and gradients there are.

The oracle is independence: parameters do not see each other, so a parameter must end with the same bits whatever shares
its optimizer, group or launch, whatever its memory layout, and whether its neighbours have gradients. Breaks where
tensors are bundled, split into blocks, share rows of coefficients or step counts.

- Calls in unusual order: in evaluation mode, twice, before any gradient, with none at all.
- Shapes, strides, offsets, dtypes; blocks and bundles of tensors end at sizes that the shapes here straddle.
- Gradients: read only, any strides, conjugate, expanded; a wrong one raises before anything has changed.
- Parameters that are changed from outside keep the change.
- NaN stays where it is, scratch memory stays bounded, options may be switched in mid-training.
"""

import copy
import math
import warnings
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, XAdamW

FAMILY = (XSGDM, XAdam, XAdamW, XAdaBelief, XAdaM3)
ADAMS = FAMILY[1:]
REAL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
PARAM = torch.nn.Parameter


def _id(value):
    return value.__name__ if hasattr(value, "__name__") else str(value).removeprefix("torch.")


every_class = pytest.mark.parametrize("cls", FAMILY, ids=_id)
every_adam = pytest.mark.parametrize("cls", ADAMS, ids=_id)
either_mode = pytest.mark.parametrize("predicted", [True, False], ids=["predicted", "true"])
either_precision = pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are small, and test workers that share two cores only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(cls, **kwargs):
    own = {"momentum": 0.8, "dampening": 0.1} if cls is XSGDM else {"betas": (0.8, 0.9), "eps": 1e-6}
    return {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0} | own | kwargs


def random(shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return torch.randn(shape, generator=generator, dtype=wide).to(dtype)


def make_params(shapes=((3, 4), (5,), ()), seed=0, dtype=torch.float32):
    return [PARAM(random(shape, seed + place, dtype)) for place, shape in enumerate(shapes)]


def gradient(param, place, step):
    """The recorded gradient of the parameter in this place at this step."""
    return random(param.shape, 1000 + 50 * step + place, param.dtype)


def feed(params, step, skip=()):
    for place, param in enumerate(params):
        param.grad = None if place in skip else gradient(param, place, step)


def train(optimizer, params, steps):
    for step in steps:
        feed(params, step)
        optimizer.step()


def trained(cls, steps=3, shapes=((3, 4), (5,), ()), dtype=torch.float32, **kwargs):
    params = make_params(shapes, dtype=dtype)
    optimizer = cls(params, **options(cls, **kwargs))
    train(optimizer, params, range(steps))
    return optimizer, params


def clones(params):
    return [param.detach().clone() for param in params]


def thetas(optimizer, params):
    with optimizer.true_weights():
        return clones(params)


def assert_same_bits(first, second, what=""):
    assert (first.dtype, first.shape) == (second.dtype, second.shape), what
    if first.numel():
        first, second = (tensor.detach().resolve_conj().contiguous().reshape(-1) for tensor in (first, second))
        assert torch.equal(first.view(torch.uint8), second.view(torch.uint8)), what


def assert_all_same_bits(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        assert_same_bits(tensor, other)


def assert_same(optimizer, params, other, other_params):
    for param, other_param in zip(params, other_params, strict=True):
        assert_same_bits(param, other_param, "parameter")
        state, other_state = optimizer.state[param], other.state[other_param]
        assert state.keys() == other_state.keys()
        for key in state:
            assert_same_bits(state[key], other_state[key], key)


def content(optimizer, params):
    state = [{key: value.clone() for key, value in optimizer.state.get(param, {}).items()} for param in params]
    return clones(params), state, optimizer.predicted


def assert_content(optimizer, params, before):
    values, state, predicted = content(optimizer, params)
    assert_all_same_bits(values, before[0])
    for now, then in zip(state, before[1], strict=True):
        assert now.keys() == then.keys()
        for key in now:
            assert_same_bits(now[key], then[key], key)
    assert predicted is before[2]


def our_warnings(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught if "predicted weights" in str(warning.message)]


# -- calls in unusual order ------------------------------------------------------------------------------------------


@every_class
@either_precision
def test_a_step_in_evaluation_mode_updates_theta_and_leaves_theta_hat(cls, master_weights):
    optimizer, params = trained(cls, master_weights=master_weights)
    twin, twin_params = trained(cls, master_weights=master_weights)
    for step in range(3, 6):
        optimizer.eval()
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert optimizer.predicted
        assert_same(optimizer, params, twin, twin_params)
        assert not torch.equal(thetas(optimizer, params)[0], params[0])


@every_class
@either_mode
def test_a_step_twice_in_a_row_takes_the_same_gradient_twice(cls, predicted):
    optimizer, params = trained(cls)
    twin, twin_params = trained(cls)
    feed(params, 3)
    for _ in range(2):
        optimizer.train(predicted)
        optimizer.step()
        feed(twin_params, 3)
        twin.step()
    assert_same(optimizer, params, twin, twin_params)
    assert all(state["step"] == 5 for state in optimizer.state.values())


@every_class
@either_precision
def test_before_any_gradient_nothing_happens(cls, master_weights):
    params = make_params()
    before = clones(params)
    optimizer = cls(params, **options(cls, master_weights=master_weights))
    for call in (optimizer.eval, optimizer.train, optimizer.step, optimizer.step, optimizer.eval, optimizer.step):
        call()
        assert_all_same_bits(params, before)
        assert not optimizer.predicted and not any(optimizer.state.values())
    with optimizer.true_weights():
        assert_all_same_bits(params, before)
    twin, twin_params = trained(cls, master_weights=master_weights)
    train(optimizer, params, range(3))
    assert_same(optimizer, params, twin, twin_params)


@every_class
@either_precision
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=_id)
@pytest.mark.parametrize("reloaded", [False, True], ids=["same", "reloaded"])
def test_with_all_gradients_none_a_step_only_goes_to_theta_hat(cls, master_weights, dtype, reloaded):
    """At an lr whose predictions are as large as the weights, so that a swap which only nearly undoes itself shows."""
    shapes = ((3, 4), (2000,), ())
    optimizer, params = trained(cls, shapes=shapes, dtype=dtype, lr=0.5, master_weights=master_weights)
    predicted = content(optimizer, params)
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()
    assert_content(optimizer, params, predicted)
    optimizer.eval()
    if reloaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert_content(optimizer, params, predicted)


@every_class
def test_theta_hat_is_theta_minus_the_step_ahead(cls):
    """The direction comes from the state: here by hand, in float64, from the buffers that the step left."""
    optimizer, params = trained(cls, dtype=torch.float64)
    theta_hat, theta = clones(params), thetas(optimizer, params)
    for place, param in enumerate(params):
        state = optimizer.state[param]
        if cls is XSGDM:
            ahead = 0.02 * state["momentum_buffer"]
        else:
            denom = (state["exp_avg_sq"] / (1 - 0.9**3)).sqrt() + (0.0 if cls is XAdaM3 else 1e-6)
            ahead = 0.02 / (1 - 0.8**3) * state["exp_avg"] / denom
        torch.testing.assert_close(theta_hat[place], theta[place] - 2.0 * ahead, rtol=1e-12, atol=1e-14)


@every_class
def test_zero_gradients_are_gradients(cls):
    """None skips a parameter, zero decays its moments and counts."""
    optimizer, params = trained(cls, weight_decay=0)
    before = thetas(optimizer, params)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(state["step"] == 4 for state in optimizer.state.values())
    assert all(not torch.equal(theta, old) for theta, old in zip(thetas(optimizer, params), before, strict=True))


# -- independence of each other --------------------------------------------------------------------------------------


def assert_steps_like_loners(cls, params, schedule, groups=None, steps=6, **kwargs):
    """Train together, and each in an optimizer of its own; `schedule[place]`: the steps in which it has a gradient."""
    loners = [PARAM(value) for value in clones(params)]
    groups = groups or [{"params": params}]
    optimizer = cls([{**group, "params": list(group["params"])} for group in groups], **options(cls, **kwargs))
    places = {id(param): place for place, param in enumerate(params)}
    alone = list(loners)
    for group in groups:
        own = {key: value for key, value in group.items() if key != "params"}
        for place in (places[id(param)] for param in group["params"]):
            alone[place] = cls([loners[place]], **options(cls, **kwargs) | own)
    for step in range(steps):
        feed(params, step, skip=[place for place in range(len(params)) if step not in schedule[place]])
        optimizer.step()
        for place, loner in enumerate(loners):
            loner.grad = gradient(loner, place, step) if step in schedule[place] else None
            alone[place].step()
            assert_same(optimizer, [params[place]], alone[place], [loner])
        if step % 2:
            optimizer.eval()
            for place, loner in enumerate(loners):
                assert_same_bits(thetas(alone[place], [loner])[0], params[place])


@every_class
@either_precision
def test_parameters_without_gradient_at_some_steps_and_one_that_joins_later(cls, master_weights):
    params = make_params([(3, 4), (5,), (), (2, 2, 2), (6,)])
    schedule = [range(6), (0, 1, 4, 5), (0, 2, 4), range(3, 6), ()]
    assert_steps_like_loners(cls, params[:4], schedule, master_weights=master_weights)
    optimizer = cls(params, **options(cls))
    feed(params, 0, skip=[4])
    optimizer.step()
    assert params[4] not in optimizer.state or not optimizer.state[params[4]]


GROUP_OPTIONS = {
    XSGDM: [{}, {"lr": 0.3}, {"momentum": 0.0}, {"dampening": 0.0}, {"maximize": True}, {"weight_decay": 0.0}],
    XAdam: [{}, {"lr": 0.3}, {"betas": (0.5, 0.6)}, {"eps": 0.1}, {"maximize": True}, {"weight_decay": 0.0}],
}
COMMON_GROUP_OPTIONS = [
    {"prediction_steps": 0},
    {"prediction_steps": 7.5},
    {"master_weights": True},
    {"lr": torch.tensor(0.25)},
    {"lr": 0.0},
]
ADAM_GROUP_OPTIONS = [{"amsgrad": True}, {"amsgrad": True, "master_weights": True, "maximize": True}]


@every_class
def test_groups_with_different_options(cls):
    own = GROUP_OPTIONS.get(cls, GROUP_OPTIONS[XAdam]) + COMMON_GROUP_OPTIONS
    if cls is not XSGDM:
        own = own + ADAM_GROUP_OPTIONS
    if cls in (XAdaBelief, XAdaM3):
        own = [*own, {"decoupled_weight_decay": False}]
    params = make_params([(4,)] * len(own) + [(2, 3)] * len(own))
    groups = [{"params": params[place :: len(own)], **group} for place, group in enumerate(own)]
    schedule = [range(6) if place % 3 else (0, 1, 3, 5) for place in range(len(params))]
    assert_steps_like_loners(cls, params, schedule, groups)


@every_class
def test_parameters_of_every_dtype_in_one_group(cls):
    params = [PARAM(random((4, 3), place, dtype)) for place, dtype in enumerate((*REAL_DTYPES, *COMPLEX_DTYPES) * 2)]
    kwargs = {} if cls is XSGDM else {"eps": 1e-3}
    assert_steps_like_loners(cls, params, [range(4)] * len(params), steps=4, **kwargs)


@every_class
def test_many_tiny_parameters(cls):
    """More than one bundle of small tensors, with sizes around nothing."""
    params = make_params([((place % 5),) if place % 7 else () for place in range(300)])
    loners = [PARAM(torch.cat([value.reshape(-1) for value in clones(params)]))]
    optimizer, alone = cls(params, **options(cls)), cls(loners, **options(cls))
    for step in range(3):
        feed(params, step)
        loners[0].grad = torch.cat([param.grad.reshape(-1) for param in params])
        optimizer.step()
        alone.step()
        assert_same_bits(torch.cat([value.reshape(-1) for value in clones(params)]), loners[0])


@every_class
@pytest.mark.parametrize("numel", [1 << 14, (1 << 14) + 1, 1 << 19, (1 << 19) + 1, (1 << 20) + 3])
def test_sizes_around_the_ends_of_blocks(cls, numel):
    """The same numbers as parameters of 1000 elements each, which fit into one block."""
    whole = make_params([(numel,)])
    parts = [PARAM(part.clone()) for part in whole[0].detach().split(100_000)]
    optimizer, alone = cls(whole, **options(cls)), cls(parts, **options(cls))
    for step in range(2):
        feed(whole, step)
        for part, grad in zip(parts, whole[0].grad.split(100_000), strict=True):
            part.grad = grad.clone()
        optimizer.step()
        alone.step()
    assert_same_bits(whole[0], torch.cat(clones(parts)))
    assert_same_bits(thetas(optimizer, whole)[0], torch.cat(thetas(alone, parts)))


@every_class
@either_mode
def test_add_param_group_in_mid_training(cls, predicted):
    optimizer, params = trained(cls)
    twin, twin_params = trained(cls)
    added, alone_params = make_params([(4, 2), ()], seed=40), make_params([(4, 2), ()], seed=40)
    optimizer.train(predicted)
    optimizer.add_param_group({"params": added, "lr": 0.3, "prediction_steps": 1.0})
    alone = cls(alone_params, **options(cls, lr=0.3, prediction_steps=1.0))
    assert optimizer.predicted is predicted
    for step in range(3, 6):
        for each, its_params in ((twin, twin_params), (alone, alone_params)):
            train(each, its_params, [step])
        feed(params, step)
        feed(added, step)
        optimizer.step()
        assert_same(optimizer, params, twin, twin_params)
        assert_same(optimizer, added, alone, alone_params)


# -- shapes, strides, dtypes -----------------------------------------------------------------------------------------


@every_class
@either_precision
@pytest.mark.parametrize("shapes", [[(0,)], [(0, 3)], [(2, 0), (0,)], [()], [(0,), (), (4,)]], ids=str)
def test_empty_and_0_dim_parameters(cls, master_weights, shapes):
    params = make_params(shapes)
    assert_steps_like_loners(cls, params, [range(4)] * len(params), steps=4, master_weights=master_weights)


def _channels_last(values):
    return values.to(memory_format=torch.channels_last)


def _permuted(values):
    return values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)


def _strided(values):
    return torch.stack([values, values], dim=-1)[..., 0]


def _odd_offset(values):
    padded = torch.empty(values.numel() + 1, dtype=values.dtype)
    return padded[1:].view(values.shape).copy_(values)


def _row_padded(values):
    rows = torch.zeros(*values.shape[:-1], values.shape[-1] + 3, dtype=values.dtype)
    return rows[..., : values.shape[-1]].copy_(values)


LAYOUTS = (torch.Tensor.contiguous, _channels_last, _permuted, _strided, _odd_offset, _row_padded)
SMALL_4D, LARGE_4D = (3, 4, 2, 5), (17, 9, 8, 31)  # the second is more than one bundle takes


@every_class
@either_precision
@pytest.mark.parametrize("shape", [SMALL_4D, LARGE_4D], ids=["small", "large"])
@pytest.mark.parametrize("of_grad", [0, 1, 3], ids=lambda place: f"grad_{LAYOUTS[place].__name__.strip('_')}")
def test_memory_layout_changes_no_bit(cls, master_weights, shape, of_grad):
    reference = [PARAM(random(shape, 5))]
    layouts = [PARAM(layout(random(shape, 5))) for layout in LAYOUTS]
    assert len({(param.stride(), param.storage_offset()) for param in layouts}) == len(LAYOUTS)
    optimizer = cls(layouts, **options(cls, master_weights=master_weights))
    expected = cls(reference, **options(cls, master_weights=master_weights))
    for step in range(3):
        reference[0].grad = gradient(reference[0], 0, step)
        for param in layouts:
            param.grad = LAYOUTS[of_grad](reference[0].grad)
        optimizer.step()
        expected.step()
        for param in layouts:
            assert_same(optimizer, [param], expected, reference)
    for theta in thetas(optimizer, layouts):
        assert_same_bits(theta, thetas(expected, reference)[0])


@every_class
def test_views_leave_the_memory_beside_them_alone(cls):
    memory = torch.full((40,), 7.0)
    params = [PARAM(memory[3:8]), PARAM(memory[10:30:4]), PARAM(memory[31])]
    optimizer = cls(params, **options(cls))
    train(optimizer, params, range(3))
    optimizer.eval()
    mine = {*range(3, 8), *range(10, 30, 4), 31}
    assert all((memory[place] == 7.0) == (place not in mine) for place in range(40))


@every_class
def test_gradients_that_are_views_expanded_or_need_grad(cls):
    runs = []
    for make in (torch.Tensor.contiguous, lambda grad: grad, lambda grad: grad.clone().requires_grad_() * 1.0):
        params = make_params([(4, 3), (200, 100)])
        optimizer = cls(params, **options(cls))
        for step in range(3):
            for place, param in enumerate(params):
                grad = random((param.shape[1],), 1000 + 50 * step + place).expand(param.shape)  # stride 0
                param.grad = make(grad)
            optimizer.step()
        assert not any(param.requires_grad is False for param in params)
        runs.append((optimizer, params))
    for optimizer, params in runs[1:]:
        assert_same(*runs[0], optimizer, params)


@every_class
@either_precision
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=_id)
def test_every_real_dtype_trains(cls, master_weights, dtype):
    """One step away from a float64 run, in the precision of the dtype."""
    shapes = ((6, 7), (30,))
    optimizer, params = trained(cls, 1, shapes, dtype, master_weights=master_weights)
    wide_params = [PARAM(param.detach().double()) for param in make_params(shapes, dtype=dtype)]
    wide = cls(wide_params, **options(cls))
    for place, param in enumerate(wide_params):
        param.grad = gradient(params[place], place, 0).double()
    wide.step()
    slack = 8 * torch.finfo(dtype).eps
    for params_now, expected in ((clones(params), wide_params), (thetas(optimizer, params), thetas(wide, wide_params))):
        for param, other in zip(params_now, expected, strict=True):
            assert param.dtype == dtype
            torch.testing.assert_close(param.double(), other.detach(), rtol=slack, atol=slack)


@pytest.mark.parametrize("cls, extra", [(cls, {}) for cls in FAMILY] + [(cls, {"amsgrad": True}) for cls in ADAMS])
@either_precision
@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=_id)
def test_complex_parameters_step_as_real_pairs(cls, extra, master_weights, dtype):
    kwargs = options(cls, master_weights=master_weights) | extra
    params = make_params([(3, 4), (), (130, 131)], dtype=dtype)
    pairs = [PARAM(torch.view_as_real(value).clone()) for value in clones(params)]
    optimizer, expected = cls(params, **kwargs), cls(pairs, **kwargs)
    for step in range(3):
        feed(params, step)
        for param, pair in zip(params, pairs, strict=True):
            pair.grad = torch.view_as_real(param.grad).clone()
        optimizer.step()
        expected.step()
        assert_all_same_bits([torch.view_as_real(value) for value in clones(params)], pairs)
    assert_all_same_bits([torch.view_as_real(value) for value in thetas(optimizer, params)], thetas(expected, pairs))


@every_class
@pytest.mark.parametrize("size", [5, 20_000])
def test_conjugate_gradients(cls, size):
    """A lazily conjugated gradient is another number than its memory says."""
    lazy, resolved = make_params([(size,)], dtype=torch.complex64), make_params([(size,)], dtype=torch.complex64)
    optimizer, expected = cls(lazy, **options(cls)), cls(resolved, **options(cls))
    for step in range(3):
        grad = gradient(lazy[0], 0, step)
        lazy[0].grad = grad.conj()
        assert lazy[0].grad.is_conj()
        resolved[0].grad = grad.conj().resolve_conj()
        optimizer.step()
        expected.step()
        assert lazy[0].grad.is_conj()
        assert_same(optimizer, lazy, expected, resolved)


@every_class
def test_gradients_with_the_negative_bit(cls):
    lazy, resolved = make_params([(5,), (20_000,)]), make_params([(5,), (20_000,)])
    optimizer, expected = cls(lazy, **options(cls)), cls(resolved, **options(cls))
    for step in range(3):
        for place, (param, other) in enumerate(zip(lazy, resolved, strict=True)):
            param.grad = random(param.shape, 60 + place + 10 * step, torch.complex64).conj().imag
            assert param.grad.is_neg()
            other.grad = param.grad.resolve_neg()
        optimizer.step()
        expected.step()
        assert_same(optimizer, lazy, expected, resolved)


@every_class
@pytest.mark.parametrize("size", [5, 20_000])
@pytest.mark.parametrize("kind", ["conjugate", "negative"])
def test_parameters_that_are_lazy_views_train_or_are_refused(cls, size, kind):
    """Resolving the view makes a copy: a step that updates the copy trains nothing, and says nothing."""
    values = random((size,), 3, torch.complex64).conj()
    param = PARAM(values if kind == "conjugate" else values.imag)
    expected_params = [PARAM(param.detach().resolve_conj().resolve_neg().clone())]
    assert param.is_conj() or param.is_neg()
    try:
        optimizer = cls([param], **options(cls))
        train(optimizer, [param], range(2))
    except (RuntimeError, ValueError) as error:
        assert "conj" in str(error) or "neg" in str(error)
        assert torch.equal(param.detach(), expected_params[0].detach())
        return
    expected = cls(expected_params, **options(cls))
    train(expected, expected_params, range(2))
    assert torch.equal(param.detach(), expected_params[0].detach())


class _Tagged(torch.Tensor):
    """A subclass that does nothing; users' own parameters look like this."""


@every_class
@either_precision
def test_tensor_subclasses(cls, master_weights):
    shapes = [(4, 3), (20_000,)]
    params = [PARAM(value.as_subclass(_Tagged)) for value in clones(make_params(shapes))]
    assert all(isinstance(param, _Tagged) for param in params)
    optimizer = cls(params, **options(cls, master_weights=master_weights))
    expected_params = make_params(shapes)
    expected = cls(expected_params, **options(cls, master_weights=master_weights))
    for step in range(3):
        for each, its_params in ((optimizer, params), (expected, expected_params)):
            train(each, its_params, [step])
        for param, other in zip(params, expected_params, strict=True):
            assert_same_bits(param.as_subclass(torch.Tensor), other)
    assert all(isinstance(param, _Tagged) for param in params)


@every_class
def test_plain_tensors_are_parameters_too(cls):
    """torch.optim takes any leaf; a Parameter is not required."""
    plain = [value.requires_grad_() for value in clones(make_params())]
    optimizer, expected_params = cls(plain, **options(cls)), make_params()
    expected = cls(expected_params, **options(cls))
    for each, its_params in ((optimizer, plain), (expected, expected_params)):
        train(each, its_params, range(3))
    assert_same(optimizer, plain, expected, expected_params)


@every_class
def test_the_default_dtype_of_the_process_does_not_matter(cls):
    optimizer, params = trained(cls)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        other, other_params = trained(cls)
    finally:
        torch.set_default_dtype(default)
    assert_same(optimizer, params, other, other_params)


@every_class
def test_a_default_device_does_not_matter(cls):
    """Under `with torch.device("meta")`, as large models are built, the tables of numbers must stay on the CPU."""
    optimizer, params = trained(cls)
    other, other_params = trained(cls)
    feed(params, 3)
    feed(other_params, 3)
    with torch.device("meta"):
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    other.step()
    assert_same(optimizer, params, other, other_params)


# -- gradients -------------------------------------------------------------------------------------------------------


@every_class
@either_precision
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=_id)
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
    before = content(optimizer, params)
    with pytest.raises(RuntimeError) as caught:
        optimizer.step()
    assert text in str(caught.value)
    assert_content(optimizer, params, before)
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


# -- parameters that are changed from outside ------------------------------------------------------------------------

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
    twin_params = [PARAM(value) for value in clones(params)]
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_id)
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


# -- options that are switched in mid-training -----------------------------------------------------------------------


@every_adam
@either_precision
@either_mode
def test_amsgrad_switched_on_starts_its_maximum_from_the_present_second_moment(cls, master_weights, predicted):
    optimizer, params = trained(cls, master_weights=master_weights)
    theta = thetas(optimizer, params)
    twin_params = [PARAM(value) for value in theta]
    twin = cls(twin_params)
    optimizer.eval()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["amsgrad"] = True
    for state in state_dict["state"].values():
        state["max_exp_avg_sq"] = state["exp_avg_sq"].clone()
    twin.load_state_dict(state_dict)
    optimizer.train(predicted)
    optimizer.param_groups[0]["amsgrad"] = True
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)


@every_adam
@either_precision
@either_mode
def test_amsgrad_switched_off_goes_on_with_the_second_moment(cls, master_weights, predicted):
    optimizer, params = trained(cls, master_weights=master_weights, amsgrad=True)
    theta = thetas(optimizer, params)
    twin_params = [PARAM(value) for value in theta]
    twin = cls(twin_params)
    optimizer.eval()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["amsgrad"] = False
    for state in state_dict["state"].values():
        del state["max_exp_avg_sq"]
    twin.load_state_dict(state_dict)
    optimizer.train(predicted)
    optimizer.param_groups[0]["amsgrad"] = False
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)


@every_class
@either_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_id)
def test_master_weights_switched_on_start_from_theta(cls, predicted, dtype):
    optimizer, params = trained(cls, dtype=dtype)
    theta = thetas(optimizer, params)
    twin_params = [PARAM(value) for value in theta]
    twin = cls(twin_params)
    optimizer.eval()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][0]["master_weights"] = True
    for place, state in state_dict["state"].items():
        state["master_weights"] = theta[place].float()
    twin.load_state_dict(state_dict)
    optimizer.train(predicted)
    optimizer.param_groups[0]["master_weights"] = True
    for step in range(3, 6):
        train(optimizer, params, [step])
        train(twin, twin_params, [step])
        assert_same(optimizer, params, twin, twin_params)


@every_class
@either_mode
def test_master_weights_switched_off_leave_theta_in_the_parameters(cls, predicted):
    optimizer, params = trained(cls, dtype=torch.bfloat16, master_weights=True)
    theta = thetas(optimizer, params)
    assert_all_same_bits(theta, [optimizer.state[param]["master_weights"].to(torch.bfloat16) for param in params])
    optimizer.train(predicted)
    optimizer.param_groups[0].update(master_weights=False, lr=0.0)
    train(optimizer, params, [3])
    assert all("master_weights" not in state for state in optimizer.state.values())
    assert_all_same_bits(thetas(optimizer, params), theta)
    optimizer.param_groups[0]["lr"] = 0.02
    train(optimizer, params, [4])
    assert optimizer.predicted
    assert all(not torch.equal(now, then) for now, then in zip(thetas(optimizer, params), theta, strict=True))


@every_class
@either_precision
def test_a_parameter_without_gradient_follows_a_switch_when_it_next_steps(cls, master_weights):
    """The switch is seen while only its neighbour has a gradient; both modes must stay exact meanwhile."""
    optimizer, params = trained(cls, master_weights=master_weights)
    theta, theta_hat = thetas(optimizer, params), clones(params)
    group = optimizer.param_groups[0]
    group["master_weights"] = not master_weights
    if cls is not XSGDM:
        group["amsgrad"] = True
    feed(params, 3, skip=[1])
    optimizer.step()
    assert_same_bits(params[1], theta_hat[1])
    assert_same_bits(thetas(optimizer, params)[1], theta[1])
    train(optimizer, params, [4])
    assert all(("master_weights" in state) is not master_weights for state in optimizer.state.values())


@every_class
def test_prediction_steps_may_be_scheduled(cls):
    """At 0 the parameters hold theta after the step; theta itself does not depend on the schedule of a fed run."""
    optimizer, params = trained(cls, steps=0, dtype=torch.float64)
    base, base_params = trained(cls, steps=0, dtype=torch.float64, prediction_steps=0)
    for step, ahead in enumerate((0, 1.0, 3.5, 0, 2, 0)):
        optimizer.param_groups[0]["prediction_steps"] = ahead
        train(optimizer, params, [step])
        train(base, base_params, [step])
        for theta, expected in zip(thetas(optimizer, params), base_params, strict=True):
            torch.testing.assert_close(theta, expected.detach(), rtol=1e-13, atol=1e-14)
        if ahead == 0:
            assert_all_same_bits(params, thetas(optimizer, params))
        else:
            assert not torch.equal(params[0], thetas(optimizer, params)[0])


# -- memory ----------------------------------------------------------------------------------------------------------


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors created under it held at one time."""

    def __init__(self):
        super().__init__()
        self.peak = self.live = 0
        self._storages = {}

    def _forget(self, key):
        self.live -= self._storages.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        known = {value.untyped_storage()._cdata for value in arguments}
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._storages:
                    self._storages[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._forget, key)
        return result


def test_the_meter_of_memory_measures():
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1.0
        del first
        third = second.double()
        del second, third
    assert memory.peak == 4000 + 8000
    assert memory.live == 0


MIB = 1 << 20
MEMORY_CASES = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 with master": (torch.bfloat16, {"master_weights": True}),
    "float32 with master": (torch.float32, {"master_weights": True}),
    "float64 with everything": (torch.float64, {"master_weights": True, "maximize": True}),
    "complex64": (torch.complex64, {}),
}


def peak_memory(optimizer):
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    assert memory.live < MIB, "scratch memory is kept"
    return memory.peak


def assert_bounded(peak_of):
    """Below 64 MiB, whatever the model: a model of twice the size takes no more."""
    small, large = peak_of(1_600_000), peak_of(3_200_000)
    assert 0 < large < 64 * MIB
    assert large <= 1.2 * small


@pytest.mark.parametrize("cls", [XSGDM, XAdam, XAdaBelief], ids=_id)
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_scratch_memory_is_bounded(cls, case):
    dtype, kwargs = MEMORY_CASES[case]
    if cls is not XSGDM:
        kwargs = kwargs | {"amsgrad": True}

    def peak_of(numel):
        param = PARAM(torch.full((numel,), 0.5, dtype=dtype))
        param.grad = torch.full((numel,), 0.25, dtype=dtype)
        return peak_memory(cls([param], **options(cls, **kwargs), backend="torch"))

    assert_bounded(peak_of)


@pytest.mark.parametrize("layout", ["strided", "grad of other strides", "conjugate grad", "many small"])
def test_scratch_memory_is_bounded_in_any_layout(layout):
    def peak_of(numel):
        rows = numel // 400
        if layout == "many small":
            params = [PARAM(torch.full((10_000,), 0.5)) for _ in range(numel // 10_000)]
            grads = [torch.full((10_000,), 0.25) for _ in params]
        elif layout == "strided":
            params = [PARAM(torch.full((rows, 400, 2), 0.5)[..., 0])]
            grads = [torch.full((rows, 400), 0.25)]
        elif layout == "grad of other strides":
            params = [PARAM(torch.full((rows, 400), 0.5))]
            grads = [torch.full((400, rows), 0.25).t()]
        else:
            params = [PARAM(torch.full((numel,), 0.5 + 0.5j, dtype=torch.complex64))]
            grads = [torch.full((numel,), 0.25j, dtype=torch.complex64).conj()]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return peak_memory(XAdamW(params, backend="torch"))

    assert_bounded(peak_of)


@every_class
def test_a_parameter_that_was_listed_twice_is_refused(cls):
    """In groups that were edited in place; no other parameter gets its gradient."""
    params = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = cls(params)
    optimizer.param_groups[0]["params"][:] = [params[0], params[0], params[1]]
    for value, param in enumerate(params):
        param.grad = torch.full((3,), 1.0 + value)
    with pytest.raises(ValueError, match="more than once"):
        optimizer.step()
    assert not any(param.any() for param in params) and not optimizer.state


@every_class
def test_a_parameter_of_inference_mode_is_refused(cls):
    with torch.inference_mode():
        param = torch.nn.Parameter(torch.zeros(3))
    optimizer = cls([param])
    param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="inference_mode"):
        optimizer.step()
    assert not optimizer.state
