"""What Triton makes of its kernels runs, and computes what numpy does."""

import numpy
import pytest
import torch

from ptxsim import Memory, MemoryFault
from ptxsim.adam import COEFFICIENTS, SIZES, adam_reference, address_table
from ptxsim.programs import U32

pytest.importorskip("triton", reason="these are Triton's kernels")
from ptxsim import triton_programs as programs

architectures = pytest.mark.parametrize("architecture", [80, 90, 100])


def adam_kernel(architecture=90, is_aligned=True, **options):
    signature = {"lines_ptr": "*i64", "chunks_ptr": "*i64", "coefficients_ptr": "*fp32"}
    constants = {"BLOCK": 1024, "IS_ALIGNED": is_aligned}
    kernel, threads, _ = programs.compiled(programs.adam, signature, constants, architecture, (0, 1, 2), **options)
    return kernel, threads


def run_adam(kernel, threads, sizes, offset=0):
    memory = Memory()
    tensors, lines, chunks = address_table(sizes, memory, 1024, offset)
    memory.register(COEFFICIENTS, "coefficients", writable=False)
    expected = [adam_reference(*map(numpy.copy, buffers)) for buffers in tensors]
    stats = kernel.launch(len(chunks), threads, programs.padded(kernel, [lines, chunks, COEFFICIENTS]), memory)
    return tensors, expected, stats


@architectures
@pytest.mark.parametrize(("is_aligned", "offset"), [(True, 0), (False, 0), (False, 1)])
def test_a_table_of_tensors(architecture, is_aligned, offset):
    tensors, expected, stats = run_adam(*adam_kernel(architecture, is_aligned), SIZES, offset)
    for (p, _, m, v), values in zip(tensors, expected, strict=True):
        for ours, theirs in zip((p, m, v), values, strict=True):
            numpy.testing.assert_array_equal(ours, theirs)
    for index, size in enumerate(SIZES):
        for name, stored in (("p", 4), ("g", 0), ("m", 4), ("v", 4)):
            traffic = stats.by_buffer[f"{name}{index}"]
            assert (traffic.loaded, traffic.distinct_loaded) == (4 * size, 4 * size)
            assert (traffic.stored, traffic.distinct_stored) == (stored * size, stored * size)
    assert (stats.load_requests_by_width[16] > 0) == is_aligned
    if is_aligned:  # four whole chunks of the last tensor: 16 bytes a lane are 16 sectors a request
        assert stats.by_buffer["p4"].store_sectors >= 4 * 128


def test_misaligned_tensors_fault_in_a_kernel_for_aligned_ones():
    with pytest.raises(MemoryFault, match="misaligned load") as caught:
        run_adam(*adam_kernel(), (5000,), offset=1)
    assert caught.value.width == 16 and caught.value.block == (0, 0, 0) and "'g0'" in caught.value.nearest


def test_many_blocks():
    tensors, expected, stats = run_adam(*adam_kernel(), (100_000,))
    numpy.testing.assert_array_equal(tensors[0][0], expected[0][0])
    assert stats.by_buffer["g0"].loaded == 400_000 and stats.by_buffer["p0"].stored == 400_000


def test_contraction_shows():
    """Where the compiler may fuse, the result is near the other one, but not always it."""
    kernel, threads = adam_kernel(enable_fp_fusion=True)
    assert any(instruction.op == "fma.rn.f32" for instruction in kernel.code)
    tensors, expected, _ = run_adam(kernel, threads, (1025,))
    numpy.testing.assert_allclose(tensors[0][0], expected[0][0], rtol=2e-6, atol=1e-7)
    assert (tensors[0][2] != expected[0][1]).any()


@architectures
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_reduction(architecture, dtype):
    pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    signature = {"x_ptr": pointer, "out_ptr": "*fp32", "n": "i32"}
    kernel, threads, shared = programs.compiled(
        programs.row_statistics, signature, {"BLOCK": 1024}, architecture, (0, 1)
    )
    x, out = torch.randn(3, 1000).to(dtype), torch.empty(3, 2)
    memory = Memory()
    memory.register(x, "x", writable=False)
    memory.register(out, "out")
    kernel.launch(3, threads, programs.padded(kernel, [x, out, 1000]), memory, shared=shared)
    torch.testing.assert_close(out[:, 0], x.double().sum(1).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(out[:, 1], x.float().max(1).values)


def philox(counter, key):
    """The first word of Philox-4x32-10."""
    words, keys = [counter, 0, 0, 0], [key, 0]
    for _ in range(10):
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [
            second >> 32 ^ words[1] ^ keys[0],
            second & 0xFFFFFFFF,
            first >> 32 ^ words[3] ^ keys[1],
            first & 0xFFFFFFFF,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return words[0]


@architectures
def test_random_bits_and_stochastic_rounding(architecture):
    signature = {"x_ptr": "*fp32", "out_ptr": "*bf16", "seed": "i32", "n": "i32"}
    kernel, threads, shared = programs.compiled(
        programs.round_stochastically, signature, {"BLOCK": 256}, architecture, (0, 1)
    )
    x, out = torch.randn(700), torch.zeros(700, dtype=torch.bfloat16)
    memory = Memory()
    memory.register(x, "x", writable=False)
    memory.register(out, "out")
    kernel.launch(3, threads, programs.padded(kernel, [x, out, 1234, 700]), memory, shared=shared)
    bits = x.numpy().view(U32).tolist()
    expected = [(value + (philox(i, 1234) & 0xFFFF)) >> 16 & 0xFFFF for i, value in enumerate(bits)]
    assert [value & 0xFFFF for value in out.view(torch.int16).tolist()] == expected


@architectures
def test_float64_functions_of_libdevice(architecture):
    """A few numbers for each tensor, as bias corrections are computed: exact where hardware is, else within 2 ulp."""
    n = 100
    signature = {"x_ptr": "*fp64", "y_ptr": "*fp64", "out_ptr": "*fp64", "n": "i32"}
    kernel, threads, shared = programs.compiled(programs.float64_functions, signature, {"BLOCK": 128}, architecture)
    x = numpy.concatenate((numpy.random.default_rng(1).random(60), 1 - 10.0 ** -numpy.arange(1, 41)[:40] / 4))
    y = numpy.arange(1.0, n + 1)
    out = numpy.zeros((5, n))
    memory = Memory()
    for name, array in (("x", x), ("y", y), ("out", out)):
        memory.register(array, name, writable=name == "out")
    kernel.launch(1, threads, programs.padded(kernel, [x, y, out, n]), memory, shared=shared)
    for result, expected in zip(out, (x**y, numpy.exp(y), numpy.log(x)), strict=False):
        numpy.testing.assert_array_max_ulp(result, expected, maxulp=2)
    numpy.testing.assert_array_equal(out[3], x / y)
    numpy.testing.assert_array_equal(out[4], numpy.sqrt(x))
