"""Triton kernels for the simulator's tests."""

from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language.extra import libdevice

from ptxsim import Kernel, load_ptx


def compiled(
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    architecture: int,
    aligned: tuple[int, ...] = (),
    **options: Any,
) -> tuple[Kernel, int, int]:
    """The kernel, its threads, its shared memory; the arguments at these positions are multiples of 16."""
    attributes = {(position,): [["tt.divisibility", 16]] for position in aligned}
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "enable_fp_fusion": False, **options}
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    (kernel,) = load_ptx(result.asm["ptx"]).values()
    return kernel, 32 * result.metadata.num_warps, result.metadata.shared


def padded(kernel: Kernel, arguments: list[Any]) -> list[Any]:
    """With null for the scratch pointers that Triton appends."""
    return arguments + [0] * (len(kernel.params) - len(arguments))


@triton.jit
def adam_block(p_ptr, g_ptr, m_ptr, v_ptr, mask, coefficients_ptr):
    lr = tl.load(coefficients_ptr + 0)
    beta1 = tl.load(coefficients_ptr + 1)
    beta2 = tl.load(coefficients_ptr + 2)
    eps = tl.load(coefficients_ptr + 3)
    decay = tl.load(coefficients_ptr + 4)
    g = tl.load(g_ptr, mask=mask)
    m = tl.load(m_ptr, mask=mask)
    v = tl.load(v_ptr, mask=mask)
    p = tl.load(p_ptr, mask=mask)
    m = m + (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    p = p * decay - lr * tl.div_rn(m, tl.sqrt_rn(v) + eps)
    tl.store(m_ptr, m, mask=mask)
    tl.store(v_ptr, v, mask=mask)
    tl.store(p_ptr, p, mask=mask)


@triton.jit
def adam(lines_ptr, chunks_ptr, coefficients_ptr, BLOCK: tl.constexpr, IS_ALIGNED: tl.constexpr):
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.multiple_of(tl.load(chunks_ptr + 2 * tl.program_id(0) + 1), BLOCK)
    count = tl.load(lines_ptr + 5 * tensor + 4)
    p_ptr = tl.load(lines_ptr + 5 * tensor + 0).to(tl.pointer_type(tl.float32))
    g_ptr = tl.load(lines_ptr + 5 * tensor + 1).to(tl.pointer_type(tl.float32))
    m_ptr = tl.load(lines_ptr + 5 * tensor + 2).to(tl.pointer_type(tl.float32))
    v_ptr = tl.load(lines_ptr + 5 * tensor + 3).to(tl.pointer_type(tl.float32))
    if IS_ALIGNED:
        p_ptr = tl.multiple_of(p_ptr, 16)
        g_ptr = tl.multiple_of(g_ptr, 16)
        m_ptr = tl.multiple_of(m_ptr, 16)
        v_ptr = tl.multiple_of(v_ptr, 16)
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= count:
        adam_block(p_ptr + i, g_ptr + i, m_ptr + i, v_ptr + i, None, coefficients_ptr)
    else:
        adam_block(p_ptr + i, g_ptr + i, m_ptr + i, v_ptr + i, i < count, coefficients_ptr)


@triton.jit
def row_statistics(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * n + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + 2 * tl.program_id(0), tl.sum(x, axis=0))
    tl.store(out_ptr + 2 * tl.program_id(0) + 1, tl.max(x, axis=0))


@triton.jit
def round_stochastically(x_ptr, out_ptr, seed, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(x_ptr + i, mask=i < n).to(tl.int32, bitcast=True)
    random = tl.randint(seed, i).to(tl.int32, bitcast=True)
    bits = (bits + (random & 0xFFFF)) & -65536
    tl.store(out_ptr + i, bits.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=i < n)


@triton.jit
def float64_functions(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1.0)
    y = tl.load(y_ptr + i, mask=i < n, other=1.0)
    tl.store(out_ptr + i, libdevice.pow(x, y), mask=i < n)
    tl.store(out_ptr + n + i, tl.exp(y), mask=i < n)
    tl.store(out_ptr + 2 * n + i, tl.log(x), mask=i < n)
    tl.store(out_ptr + 3 * n + i, x / y, mask=i < n)
    tl.store(out_ptr + 4 * n + i, tl.sqrt(x), mask=i < n)
