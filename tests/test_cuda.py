"""The CUDA kernels' source, compiled for the host with a loop for the grid, equals the CPU back end in every bit.

It can break in the indexing of chunks and packs, in the ragged end of a tensor, where a misaligned address takes the
path of aligned ones, in the choice of the kernel, and in what a swap must leave alone.
"""

import itertools

import pytest
import torch
from cases import every_optimizer
from cuda_kernels import RULES, EmulatedKernel, every_variant, needs_compiler, stand_in
from random_launch import random_launch
from twins import Twins, needs_library, same_bits, train

from xgrad_optim import XAdamW, backend_cuda, backend_native
from xgrad_optim import launch as launch_module

pytestmark = [needs_compiler, needs_library]
NAMES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def emulated(monkeypatch) -> EmulatedKernel:
    return stand_in(EmulatedKernel(), monkeypatch)


@every_optimizer
@every_dtype
def test_equals_the_cpu_back_end(case, dtype, emulated):
    """Every option, on sizes around a pack and a block, several row groups at once."""
    tensors = [torch.randn(shape, dtype=dtype) for shape in ((), (0,), (3,), (17, 5), (64,), (1030,))]
    defaults = case.make([torch.zeros(1)]).defaults
    is_adam = "betas" in defaults
    for s, master, amsgrad, ascend in itertools.product((0, 2.5), (False, True), (False, is_adam), (False, True)):
        options = {"prediction_steps": s, "master_weights": master, "maximize": ascend, "lr": 0.02}
        options |= {"amsgrad": True} if amsgrad else {}
        options |= {"weight_decay": 0.1} if ascend != master else {"weight_decay": 0}
        if "decoupled_weight_decay" in defaults and case.rule != "adam":
            options["decoupled_weight_decay"] = not ascend
        if case.rule == "sgdm":
            options |= {"dampening": 0.3} if ascend else {"momentum": 0.0 if master else 0.9}
        emulated.runs = 0
        train(Twins(case.make, tensors, NAMES, **options), tensors, steps=3)
        assert emulated.runs >= 3


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("rule", RULES)
def test_every_variant_equals_the_cpu_back_end(rule, chunk_size):
    """On aligned and misaligned tensors, with rows that switch each phase on and off."""
    variants = every_variant(rule)
    for variant in variants:
        sizes = (0, 1, 3, chunk_size, chunk_size + 1, 130, 7, 8, 9, 16, 31)
        launch = random_launch(rule, variant.dtype, variant.state_dtype, *variant.buffers, sizes, chunk_size)
        expected = launch.copied()
        assert backend_native.prepare(expected) and backend_native.run(expected)
        assert backend_cuda.prepare(launch)
        backend_cuda.run(launch)
        pairs = zip(launch.tensors().items(), expected.tensors().values(), strict=True)
        assert not [name for (name, ours), theirs in pairs if not same_bits(ours, theirs)], variant


@every_optimizer
def test_groups_and_skipped_gradients_have_rows_of_their_own(case):
    tensors = [torch.randn(70) for _ in range(4)]

    def make(params, **options):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "prediction_steps": 3, "weight_decay": 0.2}]
        return case.make(groups, **options)

    twins = Twins(make, tensors, NAMES)
    for step in range(5):
        twins.step([None if step == index else torch.randn(70) for index in range(4)])


@pytest.mark.parametrize("chunk", [1, 7, 1000, 1 << 14])
def test_chunks_change_no_bit(chunk, monkeypatch):
    monkeypatch.setattr(launch_module, "CHUNK", chunk)
    tensors = [torch.randn(size) for size in (0, 1, chunk - 1, chunk, chunk + 1, 3 * chunk + 5, *(2,) * 50)]
    train(Twins(XAdamW, tensors, NAMES), tensors, steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_layouts(dtype):
    """Views at odd offsets and permuted but dense tensors take the kernel, the others the torch back end."""
    storage = torch.randn(5000, dtype=dtype)
    flat = [storage[1:68], storage[70:171], torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=torch.channels_last)]
    flat += [torch.randn(6, 7, dtype=dtype).t()]
    gaps = [torch.randn(8, 10, dtype=dtype)[:, ::2], torch.randn(3, 4, dtype=dtype)]
    twins = Twins(XAdamW, flat + gaps, NAMES)
    twins.params["cuda"][0].data = torch.cat((storage, storage))[3:70].copy_(flat[0])  # misaligned
    for _ in range(3):
        grads = [torch.randn_like(t) for t in flat + gaps]
        grads[-1] = grads[-1].t().contiguous().t()  # the last one's gradient lies otherwise than its parameter
        twins.step(grads)
        twins.do(lambda optimizer: optimizer.eval())
        twins.do(lambda optimizer: optimizer.train())
    assert twins.optimizers["cuda"]._cache.launches[0].tables.n_refused == len(gaps)


def test_autograd_sees_what_was_written():
    param = torch.nn.Parameter(torch.ones(5))
    (param**2).sum().backward()
    loss = (param**2).sum()
    XAdamW([param], backend="cuda").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refuses_tensors_of_another_device(monkeypatch):
    monkeypatch.setattr(backend_cuda, "DEVICE", "cuda")
    param = torch.nn.Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    with pytest.raises(RuntimeError, match="parameters are on cpu, it runs on cuda"):
        XAdamW([param], backend="cuda").step()
    assert torch.equal(param, torch.ones(5))
