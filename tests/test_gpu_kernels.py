"""The GPU kernels' instructions, executed without a GPU, equal the CPU back end in every bit and move the least bytes.

They can break where a compiler contracts or reorders operations, where an instruction rounds to 16 bits in another way
than the portable text, at the ragged end of a chunk, at misaligned addresses, and by touching memory that is nobody's.
"""

import functools
import mmap

import cuda_kernels
import ptxsim
import pytest
import torch
from cuda_kernels import needs_compiler, needs_nvcc
from family import FAMILY, RULES
from random_launch import RandomLaunch, Variant, every_variant, random_launch, variants_for
from simulation import bytes_moved, check_traffic
from twins import needs_library, same_bits

from xgrad_optim.launch import NUMEL, columns_of

pytestmark = needs_library

SIZES = (64, 63, 65, 130, 200, 64, 31, 16, 9, 8, 7, 3, 2, 1, 0)
"""The first ones longer than a pack of any dtype: one of their buffers each is misaligned."""

triton_kernels = pytest.importorskip("triton_kernels", reason="the Triton kernels need the package triton")

TRITON = [
    pytest.param(functools.partial(triton_kernels.run_simulated, architecture=name), id=f"triton-{name}")
    for name in ("sm_80", "sm_90", "sm_100", "sm_120")
]
CUDA = [
    pytest.param(functools.partial(cuda_kernels.run_simulated, architecture=name), id=f"cuda-{name}", marks=needs_nvcc)
    for name in ("sm_80", "sm_90", "sm_100")
]
EMULATED = pytest.param(cuda_kernels.run_emulated, id="cuda-emulated", marks=needs_compiler)
NEWEST = [TRITON[1], CUDA[1]]

every_kernel = pytest.mark.parametrize("run", [*TRITON, *CUDA, EMULATED])
either_kernel = pytest.mark.parametrize("run", NEWEST)
every_rule = pytest.mark.parametrize("rule", RULES)


def check(run, launch: RandomLaunch):
    """Returns the statistics, where the kernel was simulated."""
    expected = launch.copied()
    expected.run_on_cpu()
    stats = run(launch)
    pairs = zip(launch.tensors().items(), expected.tensors().values(), strict=True)
    wrong = [name for (name, ours), theirs in pairs if not same_bits(ours, theirs)]
    assert not wrong, (launch.variant, wrong)
    if stats is not None and launch.variant.has_grad:  # a swap need not read what it leaves alone
        check_traffic(stats)
    return stats


@every_kernel
@every_rule
def test_every_variant_equals_the_cpu_back_end(rule, run, are_all_variants):
    """On tensors around packs, blocks and chunks, aligned and not, with rows that switch each phase on and off."""
    architecture = run.keywords["architecture"] if isinstance(run, functools.partial) else "emulated"
    for variant in variants_for(rule, architecture, are_all_variants):
        check(run, random_launch(variant, SIZES, chunk_size=64))


@either_kernel
@every_rule
def test_sizes_around_a_whole_block(rule, run):
    """Whole blocks and packs, and what is left over, in chunks of more than one block."""
    for dtype in (torch.float32, torch.bfloat16):
        variant = Variant(rule, dtype, torch.float32, has_grad=True)
        check(run, random_launch(variant, (5000, 2049, 2048, 2047, 1500, 1024, 513, 512, 511, 1), chunk_size=2048))


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
@pytest.mark.parametrize("run", [EMULATED])
@every_rule
def test_odd_chunks(rule, run, chunk_size):
    for variant in every_variant(rule):
        check(run, random_launch(variant, (0, 1, 3, chunk_size, chunk_size + 1, 130, 7, 8, 9, 16, 31), chunk_size))


@either_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", {len(rule.state_keys): name for name, rule in RULES.items()}.values())
def test_every_misalignment_of_every_buffer(rule, dtype, run):
    """Each buffer in turn lies at each odd address; an access of 16 bytes would fault there."""
    variant = Variant(rule, dtype, dtype, has_grad=True)
    for name in ("param", "grad", *RULES[rule].state_keys):
        for shift in range(1, 8):
            launch = random_launch(variant, (1100,), chunk_size=2048)
            slot = {"param": launch.params, "grad": launch.grads, **launch.state}[name]
            slot[0] = torch.empty(1108, dtype=dtype)[shift : shift + 1100].copy_(slot[0])
            launch.__post_init__()
            check(run, launch)


SPECIAL = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-40, 3e38, 1e-20, 1.0])


@either_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_rule
def test_special_numbers(rule, dtype, run):
    """NaN stays in its element, infinities and subnormals take the same way in both, in whole blocks and in tails."""
    numbers = torch.cartesian_prod(SPECIAL, SPECIAL).repeat(11, 1).to(dtype)
    for has_optional in {False, RULES[rule].optional is not None}:
        launch = random_launch(Variant(rule, dtype, dtype, True, has_optional), (len(numbers),) * 7, chunk_size=2048)
        for index in range(7):  # one for each row
            others = iter(range(1, 9))
            launch.params[index].copy_(numbers[:, 0])
            launch.grads[index].copy_(numbers[:, 1])
            for slot in launch.state.values():
                slot[index].copy_(numbers[:, 0].roll(next(others) * 13))
        check(run, launch)


@either_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_and_tie_is_converted_alike(dtype, run):
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    launch = random_launch(Variant("sgdm", dtype, dtype, has_grad=True), (len(halves),), chunk_size=4096)
    launch.params[0].copy_(halves)
    launch.grads[0].copy_(halves.flip(0))
    check(run, launch)
    between = halves.float() * torch.linspace(0.9, 1.1, halves.numel())
    edges = torch.tensor([65519.0, 65520.0, 65535.9, 2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 6.1e-5, 3.3e38, 3.4e38, 1e-41])
    floats = torch.cat((between, edges))
    variant = Variant("sgdm", dtype, torch.float32, has_grad=False, has_master_weights=True)
    launch = random_launch(variant, (len(floats),), chunk_size=4096)
    launch.state["master_weights"][0].copy_(floats)
    launch.params[0].copy_(floats.to(dtype))
    check(run, launch)


FLOAT32_BYTES = {member.rule.name: member.bytes_per_element for member in FAMILY}
BYTES = [
    *((Variant(rule, torch.float32, torch.float32, True), bytes_) for rule, bytes_ in FLOAT32_BYTES.items()),
    (Variant("adam", torch.float32, torch.float32, True, has_optional=True), 36),
    (Variant("adam", torch.float64, torch.float64, True), 56),
    (Variant("adam", torch.bfloat16, torch.bfloat16, True), 14),
    (Variant("adam", torch.bfloat16, torch.float32, True, has_master_weights=True), 30),
]


@either_kernel
@pytest.mark.parametrize(("variant", "expected"), BYTES, ids=str)
def test_bytes_per_element(variant, expected, run):
    """A step moves what its base optimizer moves, and the parameter itself where there are master weights."""
    sizes = (2048, 1500, 3)
    stats = run(random_launch(variant, sizes, chunk_size=2048))
    assert bytes_moved(stats) == expected * sum(sizes)


@either_kernel
def test_a_tensor_of_more_than_2_to_the_31_elements(run, monkeypatch):
    """Its first and its last chunk, compared with two tensors of another launch; nothing in between is ever touched."""
    numel, chunk_size = (1 << 31) + 4 * 1024 + 3, 1024
    last = numel // chunk_size
    launch = random_launch(Variant("adam", torch.float32, torch.float32, True), (chunk_size, 3), chunk_size)
    launch.row_of = [0, 0]
    launch.__post_init__()
    memory, table = ptxsim.Memory(), launch.tables.table[:1].clone()
    table[0, NUMEL], ends = numel, {}
    for name, slot in {"param": launch.params, **launch.state, "grad": launch.grads}.items():
        whole = _reserve(numel)
        ends[name] = whole[:chunk_size].copy_(slot[0]), whole[last * chunk_size :].copy_(slot[1])
        for index, end in enumerate(ends[name]):
            memory.register(end, f"{name} {index}", writable=name != "grad")
        if name == "grad":
            grads = torch.tensor([whole.data_ptr()])
        else:
            table[0, columns_of(launch.rule)[name]] = whole.data_ptr()
    chunks = torch.tensor([[0, 0], [0, last]], dtype=torch.int32)
    tables = {"table": table, "grads": grads, "chunks": chunks}
    tables |= {"rows": launch.rows, "next_numbers": launch.next_numbers}
    places = {name: memory.register(one, f"table {name}", writable=False) for name, one in tables.items()}
    table[0, -1] = 0

    def simulate(kernel, block, launch, arguments, shared=0):
        values = list(arguments(places))
        return kernel.launch(2, block, values + [0] * (len(kernel.params) - len(values)), memory, shared=shared)

    for module in (triton_kernels, cuda_kernels):
        monkeypatch.setattr(module, "simulate", simulate)
    expected = launch.copied()
    run(launch)
    expected.run_on_cpu()
    for name, slot in {"param": expected.params, **expected.state}.items():
        assert all(map(same_bits, ends[name], slot)), name


def _reserve(numel: int) -> torch.Tensor:
    """Address space for so many floats, of which memory backs only what is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, 4 * numel, flags=flags), dtype=torch.float32)
