"""What the GPU will execute of the CUDA kernels: nothing spilled, 16 bytes at a time, no multiply-add.

The compiler may break it at any change of the sources: an address whose memory it no longer knows, a byte-wise copy, a
register too many.
"""

import re

import pytest
import torch
from cuda_kernels import compiled, needs_nvcc, ptx_of, rows_symbol_of, symbol_of
from family import RULES
from machine_code import ARCHITECTURES, REASON, kernels_of
from random_launch import every_variant

pytestmark = [needs_nvcc, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

every_rule = pytest.mark.parametrize("rule", RULES)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

MAX_REGISTERS = 128
"""With these, two blocks of 256 threads fit a multiprocessor, each thread with 64 bytes and more on their way."""


@every_rule
@every_architecture
def test_nothing_is_spilled_and_the_main_loop_moves_packs(rule, architecture):
    kernels = kernels_of(compiled(rule, architecture))
    variants = every_variant(rule)
    rows = {rows_symbol_of(rule, is_double) for is_double in (False, True)}
    assert set(kernels) == rows | set(map(symbol_of, variants))
    assert all(kernels[name].stack == 0 for name in rows)
    for variant in variants:
        code = kernels[symbol_of(variant)]
        assert code.stack == code.local_accesses == code.generic_accesses == 0, variant
        assert code.registers <= MAX_REGISTERS, variant
        width = 16 // max(variant.dtype.itemsize, variant.state_dtype.itemsize)
        loads, stores = variant.operands()
        moved = {kind: sorted(code.widths(kind, code.main_loop).elements()) for kind in ("LD", "ST")}
        assert moved["ST"] == sorted(width * size for size in stores), variant
        if variant.has_grad:
            assert moved["LD"] == sorted(width * size for size in loads), variant
        else:  # loads of a swap may wait for whether they are needed, and come in halves then
            assert sum(moved["LD"]) == width * sum(loads), variant


@every_rule
@every_architecture
def test_every_operation_rounds_once(rule, architecture):
    """No multiply-add in the PTX, and a rounding on each operation, which tells ptxas to make none."""
    text = ptx_of(rule, architecture)
    assert not re.search(r"\b(fma|mad)(\.\w+)*\.(f|bf)\d+", text)
    assert not re.search(r"\b(add|sub|mul)\.(ftz\.)?f(16|32|64)\b", text)
    assert not re.search(r"\.(ftz|approx|full)\b", text)
    assert re.search(r"\bmul\.rn\.f32\b", text)


def test_a_bfloat16_is_converted_by_one_instruction():
    text = ptx_of("adam", "sm_90")
    assert "cvt.rn.bf16.f32" in text and "cvt.rn.f16.f32" in text
    assert torch.bfloat16 in {variant.dtype for variant in every_variant("adam")}
