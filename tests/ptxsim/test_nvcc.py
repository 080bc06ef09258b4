"""What nvcc makes of CUDA C++ runs, and computes what the source says."""

import random
import shutil
import subprocess

import numpy
import pytest
import torch

from ptxsim import Memory, MemoryFault, load_ptx
from ptxsim.adam import COEFFICIENTS, SIZES, adam_reference, address_table
from ptxsim.programs import F32, U32

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
    pytest.mark.parametrize("architecture", [80, 90]),
]
ALL_64 = 2**64 - 1


@pytest.fixture(scope="module")
def kernels(tmp_path_factory, request):
    """The kernels of kernels.cu by architecture."""
    source, folder = request.path.parent / "kernels.cu", tmp_path_factory.mktemp("nvcc")
    loaded = {}
    for architecture in (80, 90):
        target = folder / f"{architecture}.ptx"
        command = ["nvcc", f"-arch=sm_{architecture}", "-ptx", "-std=c++17", "-o", str(target), str(source)]
        subprocess.run(command, check=True)
        loaded[architecture] = load_ptx(target.read_text())
    return loaded


@pytest.mark.parametrize("offset", [0, 1])
def test_a_table_of_float32_tensors(kernels, architecture, offset):
    memory = Memory()
    tensors, lines, chunks = address_table(SIZES, memory, 2048, offset)
    expected = [adam_reference(*map(numpy.copy, buffers)) for buffers in tensors]
    arguments = [lines, chunks, COEFFICIENTS.tobytes(), 2048]
    stats = kernels[architecture]["adam_f32"].launch(len(chunks), 256, arguments, memory)
    for (p, _, m, v), values in zip(tensors, expected, strict=True):
        for ours, theirs in zip((p, m, v), values, strict=True):
            numpy.testing.assert_array_equal(ours, theirs)
    traffic = stats.by_buffer["p4"]
    assert (traffic.loaded, traffic.stored) == (20000, 20000)
    assert (stats.store_requests_by_width[16] > 0) == (offset == 0)


@pytest.mark.parametrize("offset", [0, 1])
def test_bf16_parameters_are_rounded_once(kernels, architecture, offset):
    torch.manual_seed(0)
    n, memory = 5000, Memory()
    p, g = (torch.randn(n + 8).bfloat16()[offset : offset + n] for _ in range(2))
    m, v = torch.randn(n + 8)[offset : offset + n], torch.rand(n + 8)[offset : offset + n]
    expected = adam_reference(*(tensor.float().numpy().copy() for tensor in (p, g, m, v)))
    for name, tensor in zip("pgmv", (p, g, m, v), strict=True):
        memory.register(tensor, name, writable=name != "g")
    lines = numpy.array([[tensor.data_ptr() for tensor in (p, g, m, v)] + [n]], numpy.int64)
    chunks = numpy.array([[0, start] for start in range(0, n, 2048)], numpy.int64)
    memory.register(lines, "lines", writable=False)
    memory.register(chunks, "chunks", writable=False)
    arguments = [lines, chunks, COEFFICIENTS.tobytes(), 2048]
    stats = kernels[architecture]["adam_bf16"].launch(len(chunks), 256, arguments, memory)
    assert torch.equal(p, torch.from_numpy(expected[0]).bfloat16())
    numpy.testing.assert_array_equal(m.numpy(), expected[1])
    numpy.testing.assert_array_equal(v.numpy(), expected[2])
    assert stats.by_buffer["g"].loaded == 2 * n and stats.by_buffer["m"].stored == 4 * n


def test_a_reduction_in_shared_memory(kernels, architecture):
    x, out = numpy.random.default_rng(1).standard_normal(3000).astype(F32), numpy.zeros(4, F32)
    memory = Memory()
    memory.register(x, "x", writable=False)
    memory.register(out, "out")
    kernels[architecture]["block_sum"].launch(4, 256, [x, out, x.size], memory)
    sums = numpy.zeros((4, 256), F32)  # the same additions in the same order
    for i, value in enumerate(x):
        sums[i // 256 % 4, i % 256] += value
    half = 128
    while half:
        sums[:, :half] += sums[:, half : 2 * half]
        half //= 2
    numpy.testing.assert_array_equal(out, sums[:, 0])


@pytest.mark.parametrize("threads", [128, 96])
def test_shuffles_votes_and_atomics(kernels, architecture, threads):
    x = numpy.random.default_rng(2).integers(-8, 9, 1000).astype(F32)
    out, n_positive, grid = numpy.zeros(1, F32), numpy.zeros(1, U32), -(-1000 // threads)
    memory = Memory()
    memory.register(x, "x", writable=False)
    memory.register(out, "out")
    memory.register(n_positive, "n_positive")
    kernel, arguments = kernels[architecture]["warp_sum"], [x, out, n_positive, 1000]
    stats = kernel.launch(grid, threads, arguments, memory, shared=4 * (threads // 32))
    assert out[0] == x.sum() and n_positive[0] == (x > 0).sum()
    assert stats.by_buffer["out"].atomic == 4 * grid and stats.by_buffer["out"].distinct_stored == 4
    with pytest.raises(MemoryFault, match="shared"):  # too little dynamic shared memory
        kernel.launch(1, threads, arguments, memory, shared=4)


def test_loops_of_different_lengths(kernels, architecture):
    x, steps = numpy.arange(1, 301, dtype=numpy.int32), numpy.zeros(300, numpy.int32)
    memory = Memory()
    memory.register(x, "x", writable=False)
    memory.register(steps, "steps")
    stats = kernels[architecture]["collatz"].launch(3, 128, [x, steps, 300], memory)

    def count(value):
        return 0 if value == 1 else 1 + count(3 * value + 1 if value & 1 else value // 2)

    assert steps.tolist() == [count(value) for value in range(1, 301)]
    assert stats.max_instructions > 2 * stats.instructions_per_thread


def test_local_constant_and_global_variables(kernels, architecture):
    out, n = numpy.zeros(64, numpy.int32), 37
    memory = Memory()
    memory.register(out, "out")
    kernels[architecture]["private_arrays"].launch(1, 64, [out, n], memory)
    weights = [3, 1, 4, 1, 5, 2, 6, 7]
    for thread in range(64):
        cells, total = [i * thread for i in range(16)], 0
        for i in range(n):
            cells[(i * 5 + thread) & 15] += weights[(i + thread) & 7]
            total += cells[(i * 3) & 15]
        assert out[thread] == total + 100


def test_wide_integers(kernels, architecture):
    choose = random.Random(3)
    special = [0, 1, 2, 2**63, ALL_64, 2**32, 2**32 - 1, 2**63 - 1]
    rows = [[pick(choose, special) for _ in "ab"] for _ in range(500)]
    a, b = numpy.array(rows, numpy.uint64).T.copy()
    out = numpy.zeros((500, 8), numpy.uint64)
    memory = Memory()
    for name, array in (("a", a), ("b", b), ("out", out)):
        memory.register(array, name, writable=name == "out")
    kernels[architecture]["integers"].launch(4, 128, [a, b, out, 500], memory)
    for (x, y), line in zip(rows, out.tolist(), strict=True):
        product, low_x, low_y = x * y + x, x & 0xFFFFFFFF, y & 0xFFFFFFFF
        octets = low_x.to_bytes(4, "little") + low_y.to_bytes(4, "little")
        permuted = sum(octets[index] << 8 * i for i, index in enumerate((3, 6, 5, 2)))
        first_set = (x & -x).bit_length()
        assert line == [
            product >> 64,
            product & ALL_64,
            x // y if y else 0,
            x % y if y else 0,
            (signed(x) * signed(y) >> 64) & ALL_64,
            64 - x.bit_length() | bin(y).count("1") << 8 | first_set << 16,
            ((low_y << 32 | low_x) << 13 >> 32 & 0xFFFFFFFF) | permuted << 32,
            int(f"{x:064b}"[::-1], 2),
        ]


def pick(choose, special):
    return choose.choice(special) if choose.random() < 0.3 else choose.getrandbits(choose.choice((8, 32, 64)))


def signed(value):
    return value - 2**64 if value >> 63 else value
