"""Parameters of any shape, strides, offset, dtype and class; and which are refused.

Blocks and bundles of tensors end at sizes that the shapes here straddle.
"""

import pytest
import torch
from cases import every_class
from family import CLASSES, taking
from training import (
    COMPLEX_DTYPES,
    PARAM,
    REAL_DTYPES,
    assert_all_same_bits,
    assert_same,
    assert_same_bits,
    clones,
    either_precision,
    feed,
    gradient,
    make_params,
    name_of,
    options,
    random,
    thetas,
    train,
    trained,
)


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
@pytest.mark.parametrize("dtype", REAL_DTYPES, ids=name_of)
def test_every_real_dtype_trains(cls, master_weights, dtype):
    """One step away from a float64 run, in the precision of the dtype."""
    shapes = ((6, 7), (30,))
    optimizer, params = trained(cls, 1, shapes, dtype, master_weights=master_weights)
    wide_params = [PARAM(param.detach().double()) for param in make_params(shapes, dtype=dtype)]
    wide = cls(wide_params, **options(cls, dtype))
    for place, param in enumerate(wide_params):
        param.grad = gradient(params[place], place, 0).double()
    wide.step()
    slack = 8 * torch.finfo(dtype).eps
    for params_now, expected in ((clones(params), wide_params), (thetas(optimizer, params), thetas(wide, wide_params))):
        for param, other in zip(params_now, expected, strict=True):
            assert param.dtype == dtype
            torch.testing.assert_close(param.double(), other.detach(), rtol=slack, atol=slack)


@pytest.mark.parametrize(
    "cls, extra", [(cls, {}) for cls in CLASSES] + [(cls, {"amsgrad": True}) for cls in taking("amsgrad")]
)
@either_precision
@pytest.mark.parametrize("dtype", COMPLEX_DTYPES, ids=name_of)
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
