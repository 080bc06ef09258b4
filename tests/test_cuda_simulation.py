"""The CUDA kernels' instructions, as nvcc makes them, executed without a GPU, equal the other back ends in every bit.

They can break where the compiler contracts or reorders operations, where an instruction rounds to 16 bits in another
way than the portable text, at the ragged end of a chunk, and by touching memory that is nobody's.
"""

import mmap

import pytest
import torch
from cases import every_optimizer
from cuda_kernels import (
    RULES,
    THREADS,
    KernelLaunch,
    SimulatedKernel,
    Variant,
    every_variant,
    load_ptx,
    needs_nvcc,
    ptx_of,
    stand_in,
)
from random_launch import random_launch
from simulation import bytes_moved, check_traffic, needs_simulator, ptxsim
from twins import Twins, needs_library, same_bits, train

from xgrad_optim import XSGDM, XAdam, XAdaM3, XAdamW, backend_cuda, backend_native, backend_torch

pytestmark = [needs_nvcc, needs_simulator, needs_library]
NAMES = ("cpu", "cuda")
SIZES = (64, 63, 65, 130, 200, 64, 31, 16, 9, 8, 7, 3, 2, 1, 0)
"""The first ones longer than a pack of any dtype: one of their buffers each is misaligned."""


@pytest.fixture
def simulated(monkeypatch) -> SimulatedKernel:
    return stand_in(SimulatedKernel(), monkeypatch)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("rule", RULES)
def test_every_variant_equals_the_cpu_back_end(rule, architecture, monkeypatch):
    """On tensors around packs and chunks, aligned and not, with rows that switch each phase on and off."""
    if architecture == "sm_80" and ptx_of(rule, "sm_80") == ptx_of(rule, "sm_90"):
        return  # which is executed
    kernel = stand_in(SimulatedKernel(architecture), monkeypatch)
    for variant in every_variant(rule):
        launch = random_launch(rule, variant.dtype, variant.state_dtype, *variant.buffers, SIZES, chunk_size=64)
        expected = launch.copied()
        assert backend_native.prepare(expected) and backend_native.run(expected)
        assert backend_cuda.prepare(launch)
        backend_cuda.run(launch)
        pairs = zip(launch.tensors().items(), expected.tensors().values(), strict=True)
        assert not [name for (name, ours), theirs in pairs if not same_bits(ours, theirs)], variant
        if variant.has_grad:  # a swap need not read the state of an element that it leaves alone
            check_traffic(kernel.simulator.runs[-1])


@every_optimizer
def test_training(case, simulated):
    tensors = [torch.randn(n) for n in (0, 1, 3, 1023, 1024, 1025, 5000)]
    train(Twins(case.make, tensors, NAMES), tensors)
    for stats in simulated.simulator.runs:
        check_traffic(stats)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("master_weights", [False, True], ids=["", "master"])
def test_training_in_other_dtypes(dtype, master_weights, simulated):
    """Two groups, a skipped gradient, misaligned tensors."""
    storage = torch.randn(900, dtype=dtype)
    tensors = [storage[1:400], torch.randn(300, dtype=dtype), storage[403:450], torch.randn((), dtype=dtype)]

    def make(params, **options):
        groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "prediction_steps": 3, "weight_decay": 0.2}]
        return XAdam(groups, amsgrad=True, master_weights=master_weights, **options)

    twins = Twins(make, tensors, NAMES)
    misaligned = twins.params["cuda"][0]
    misaligned.data = torch.cat((storage, storage))[3:402].copy_(misaligned.data)
    train(twins, tensors, steps=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_and_tie_is_converted_as_torch_does(dtype, simulated):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    Twins(XSGDM, [halves], NAMES, lr=1.0, momentum=0.5, dampening=0.25).step([halves.flip(0)])
    between = halves.float() * torch.linspace(0.9, 1.1, halves.numel())
    edges = torch.tensor([65519.0, 65520.0, 65535.9, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 6.1e-5, 3.3e38, 3.4e38, 1e-41])
    tensors = [torch.zeros(halves.numel() + len(edges), dtype=dtype)]
    twins = Twins(XSGDM, tensors, NAMES, lr=1.0, momentum=0.0, master_weights=True)
    twins.step([torch.zeros_like(tensors[0])])
    for name, (param,) in twins.params.items():
        twins.optimizers[name].state[param]["momentum_buffer"].copy_(torch.cat((between, edges)))
    twins.do(lambda optimizer: optimizer.eval())
    twins.do(lambda optimizer: optimizer.train())


@pytest.mark.parametrize("optimizer", [XSGDM, XAdam, XAdaM3])
def test_special_numbers(optimizer, simulated):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 1.0])
    pairs = torch.cartesian_prod(special, special)
    twins = Twins(optimizer, [pairs[:, 0].contiguous()], NAMES, lr=0.1)
    for grad in (pairs[:, 1], pairs[:, 0].flip(0), torch.zeros(100)):
        twins.step([grad.contiguous()])


@pytest.mark.parametrize(
    ("rule", "options", "expected"),
    [
        ("sgdm", {}, 20),
        ("adam", {}, 28),
        ("adabelief", {}, 28),
        ("adam3", {}, 28),
        ("adam", {"has_max_exp_avg_sq": True}, 36),
        ("adam", {"dtype": torch.bfloat16, "has_master_weights": True, "trusts_master": True}, 28),
        ("adam", {"dtype": torch.bfloat16, "state_dtype": torch.bfloat16}, 14),
    ],
)
def test_bytes_per_element(rule, options, expected, simulated):
    """Every buffer once in and once out, which is what the base optimizer moves; a step both restores and predicts."""
    flags = ("has_max_exp_avg_sq", "has_master_weights", "trusts_master")
    dtypes = (options.get("dtype", torch.float32), options.get("state_dtype", torch.float32))
    launch = random_launch(rule, *dtypes, True, *(options.get(flag, False) for flag in flags), (4096,) * 2, 2048)
    backend_cuda.prepare(launch)
    backend_cuda.run(launch)
    assert bytes_moved(simulated.simulator.runs[-1]) / (2 * 4096) == expected


def test_one_launch_for_all_tensors_and_groups(simulated):
    params = [torch.nn.Parameter(torch.randn(n)) for n in (3, 40, 500)]
    optimizer = XAdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:]}], backend="cuda")
    for count, action in enumerate((optimizer.step, optimizer.eval, optimizer.train, optimizer.step), start=1):
        for param in params:
            param.grad = torch.ones_like(param)
        action()
        assert len(simulated.simulator.runs) == count


def test_a_tensor_of_more_than_2_to_the_31_elements():
    """Its first and its last chunk, as two tensors of another launch; nothing in between is ever touched."""
    numel, chunk_size = (1 << 31) + 4 * 1024 + 3, 1024
    last = numel // chunk_size
    variant = Variant("adam", torch.float32, torch.float32, has_grad=True)
    expected = random_launch("adam", torch.float32, torch.float32, *variant.buffers, (chunk_size, 3), chunk_size)
    expected.row_of = [0, 0]
    memory, ends, addresses = ptxsim.Memory(), [], []
    for slot in (expected.params, expected.grads, *expected.state.values()):
        whole = _reserve(numel)
        addresses.append(whole.data_ptr())
        ends.append((whole[:chunk_size], whole[last * chunk_size :]))
        for index, (end, values) in enumerate(zip(ends[-1], slot, strict=True)):
            memory.register(end.copy_(values), f"slot {len(ends)}, {index}", writable=slot is not expected.grads)
    tables = {
        "addresses": torch.tensor([*addresses, 0, 0]),
        "numels": torch.tensor([numel]),
        "row_of": torch.tensor([0], dtype=torch.int32),
        "rows": expected.rows,
        "chunks": torch.tensor([[0, 0], [0, last]], dtype=torch.int32),
    }
    places = {name: memory.register(table, name, writable=False) for name, table in tables.items()}
    argument = KernelLaunch(**places, n_columns=expected.rows.shape[1], chunk_size=chunk_size)
    load_ptx("adam", "sm_90")[variant.symbol].launch(2, THREADS, [argument], memory, shared=0)
    backend_torch.run(expected)
    for both, slot in zip(ends, (expected.params, expected.grads, *expected.state.values()), strict=True):
        assert all(map(same_bits, both, slot))


def _reserve(numel: int) -> torch.Tensor:
    """Address space for so many floats, of which memory backs only what is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 4 * numel, flags=flags), dtype=torch.float32)
