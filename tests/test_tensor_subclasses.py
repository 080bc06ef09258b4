"""Parameters of tensor subclasses, with state of the same subclass.

A wrapper holds its numbers in tensors inside; torch.optim steps it by dispatch, element by element, and so does the
torch back end. It can break where working memory is a plain tensor, which has room for one of the inner tensors only,
and where a wrapper is cut or joined, which it need not know.
"""

import copy

import pytest
import torch
from cases import every_case, every_optimizer
from torch.utils._pytree import tree_map_only
from twins import same_bits

from xgrad_optim import XAdamW

CUTS = ("cat", "split", "slice", "select", "as_strided", "view", "_unsafe_view", "narrow", "index")


class Pair(torch.Tensor):
    """Two tensors in one; each operation runs on both."""

    @staticmethod
    def __new__(cls, first, second):
        return torch.Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)

    def __init__(self, first, second):
        self.first, self.second = first, second

    def __repr__(self):
        return f"Pair({self.first}, {self.second})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function._schema.name.removeprefix("aten::") in CUTS:
            raise NotImplementedError(f"a Pair can't be cut or joined: {function}")
        results = [
            function(*tree_map_only(Pair, part, args), **tree_map_only(Pair, part, kwargs or {}))
            for part in (lambda pair: pair.first, lambda pair: pair.second)
        ]
        written = {id(value): value for value in (*args, *(kwargs or {}).values()) if isinstance(value, Pair)}
        for value in written.values():  # in place, or out=
            if value.first is results[0] and value.second is results[1]:
                return value
        if isinstance(results[0], torch.Tensor):
            return Pair(*results)
        return results[0] and results[1]


class Plain(torch.Tensor):
    """Its memory is its own."""

    @classmethod
    def param(cls, values):
        return torch.nn.Parameter(values.as_subclass(cls))


def random(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair_of(shape, seed, dtype=torch.float32):
    return Pair(random(shape, seed, dtype), random(shape, seed + 1000, dtype))


def param_and_parts(shape, seed=0, dtype=torch.float32):
    """A wrapper, and a plain parameter for each of the inner tensors."""
    pair = pair_of(shape, seed, dtype)
    return torch.nn.Parameter(pair), [torch.nn.Parameter(part.clone()) for part in (pair.first, pair.second)]


def step(optimizer, alone, param, parts, seed):
    param.grad = pair_of(param.shape, 100 + seed, param.dtype)
    for part, grad in zip(parts, (param.grad.first, param.grad.second), strict=True):
        part.grad = grad.clone()
    optimizer.step()
    alone.step()


def assert_close(param, parts):
    for inner, part in zip((param.data.first, param.data.second), parts, strict=True):
        # On a CPU the root of a wrapper is torch's, which is not always the nearest number.
        torch.testing.assert_close(inner, part.detach(), rtol=1e-5, atol=1e-6)


def bits(*values):
    return [part.clone() for value in values for part in (value.data.first, value.data.second)]


@every_case
@pytest.mark.parametrize("master_weights", [False, True], ids=["", "master"])
@pytest.mark.parametrize("shape", [(3, 5), (200, 100), (), (0,)], ids=str)
def test_a_wrapper_steps_as_the_tensors_inside_do(case, master_weights, shape):
    param, parts = param_and_parts(shape)
    optimizer = case.make([param], master_weights=master_weights)
    alone = case.make(parts, master_weights=master_weights, backend="torch")
    for seed in range(3):
        step(optimizer, alone, param, parts, seed)
        assert_close(param, parts)
        for each in (optimizer, alone):
            each.train(seed == 1)
        assert_close(param, parts)
    buffers = [value for value in optimizer.state[param].values() if value.dim() == param.dim() and value.dim()]
    assert all(isinstance(value, Pair) for value in buffers)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_swaps_and_a_reload_change_no_bit(case, dtype):
    param, parts = param_and_parts((40, 3), dtype=dtype)
    optimizer, alone = case.make([param], lr=0.1), case.make(parts, lr=0.1)
    for seed in range(2):
        step(optimizer, alone, param, parts, seed)
    theta_hat = bits(param)
    optimizer.eval()
    theta = bits(param)
    for _ in range(20):
        optimizer.train()
        assert all(map(same_bits, bits(param), theta_hat))
        optimizer.eval()
        assert all(map(same_bits, bits(param), theta))
    optimizer.train()
    before = bits(*(value for value in optimizer.state[param].values() if isinstance(value, Pair)))
    optimizer.load_state_dict(optimizer.state_dict())
    loaded = [value for value in optimizer.state[param].values() if isinstance(value, Pair)]
    assert all(map(same_bits, bits(*loaded), before))
    optimizer.eval()
    assert all(map(same_bits, bits(param), theta))


@every_optimizer
def test_wrappers_and_plain_parameters_of_one_shape_mix(case):
    wrapped = [param_and_parts((6,), seed) for seed in range(2)]
    plain, twin = (torch.nn.Parameter(random((6,), 7)) for _ in range(2))
    optimizer = case.make([wrapped[0][0], plain, wrapped[1][0]], backend="torch")
    alone = case.make([*wrapped[0][1], *wrapped[1][1], twin], backend="torch")
    for seed in range(3):
        for (param, parts), offset in zip(wrapped, (0, 50), strict=True):
            param.grad = pair_of(param.shape, 100 + seed + offset)
            parts[0].grad, parts[1].grad = param.grad.first.clone(), param.grad.second.clone()
        plain.grad = random((6,), 300 + seed)
        twin.grad = plain.grad.clone()
        optimizer.step()
        alone.step()
        for param, parts in wrapped:
            assert_close(param, parts)
        assert torch.equal(plain, twin)


@every_optimizer
@pytest.mark.parametrize("make", [Plain.param, torch.nn.Buffer], ids=["Plain", "Buffer"])
def test_a_subclass_that_is_its_memory_runs_everywhere(case, make):
    values = random((5, 3), 0)
    for backend in ("cpu", "torch"):
        param, expected = make(values.clone()), torch.nn.Parameter(values.clone())
        optimizers = [case.make([each], backend=backend) for each in (param.requires_grad_(), expected)]
        for seed in range(3):
            param.grad = random((5, 3), 9 + seed).as_subclass(type(param.data))
            expected.grad = random((5, 3), 9 + seed)
            for each in optimizers:
                each.step()
        assert same_bits(param.as_subclass(torch.Tensor), expected)


def test_a_wrapper_s_back_end_says_why_not():
    param, _ = param_and_parts((3,))
    param.grad = pair_of((3,), 1)
    with pytest.raises(RuntimeError, match="a Pair has no memory of its own"):
        XAdamW([param], backend="cpu").step()


def test_a_copy_goes_on():
    param, parts = param_and_parts((4, 2))
    optimizer, alone = XAdamW([param]), XAdamW(parts, backend="torch")
    step(optimizer, alone, param, parts, 0)
    twin = torch.nn.Parameter(Pair(param.data.first.clone(), param.data.second.clone()))
    other = XAdamW([twin])
    other.load_state_dict(copy.copy(optimizer.state_dict()))
    param.grad = twin.grad = pair_of((4, 2), 5)
    optimizer.step()
    other.step()
    assert all(map(same_bits, bits(param), bits(twin)))
