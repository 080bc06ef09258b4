"""Every variant of the Triton kernel compiles for every GPU we promise, into the machine code that we expect of it.

A compiler may spill registers to memory, split wide accesses where it lost sight of the alignment, move values between
threads through shared memory, or contract a product and a sum: each costs speed or bits, and none shows in a result.
"""

import re
from collections import Counter

import ptxsim
import pytest

pytest.importorskip("triton", reason="the Triton back end needs the package triton")
from family import RULES
from machine_code import ARCHITECTURES, REASON, kernels_of, usage_of
from random_launch import variants_for
from triton_kernels import compile_rows, compile_step, constants_of, multi_tensor

from xgrad_optim.numeric import COMPUTE_DTYPES

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NEVER = r"\bfma\.rn\.f(32|64)|\.ftz|\.approx|div\.full|ld\.local|st\.local|\.shared"
"""On sm_80 fma.rn.bf16 with a factor of 1 is its addition."""


def expected_widths(variant) -> tuple[Counter[int], Counter[int]]:
    """Bytes of each load and store of one thread: 16 of a buffer in the compute type, 8 of a narrow one."""
    elements = 16 // COMPUTE_DTYPES[variant.dtype].itemsize
    loads, stores = variant.operands()
    return Counter(elements * size for size in loads), Counter(elements * size for size in stores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("has_grad", [True, False], ids=["step", "swap"])
def test_every_variant(rule, architecture, has_grad, tmp_path, are_all_variants):
    for variant in variants_for(rule, architecture, are_all_variants):
        if variant.has_grad != has_grad:
            continue
        compiled = compile_step(variant, architecture)
        cubin = tmp_path / f"{compiled.hash}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        assert not re.search(NEVER, ptx), variant
        assert compiled.metadata.shared == 0
        assert ptxsim.load_ptx(ptx)[compiled.metadata.name].unsupported() == []
        ((registers, local),) = usage_of(cubin).values()
        assert local == 0, f"{variant} spills"
        options = multi_tensor.options_for("cuda", 32, constants_of(variant))
        assert registers <= options["maxnreg"], variant
        if architecture == "sm_90":
            check_instructions(cubin, variant)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_that_makes_rows(rule, architecture, tmp_path):
    for is_double in (False, True):
        for is_step in (False, True):
            compiled = compile_rows(rule, is_double, is_step, architecture)
            assert not re.search(NEVER.replace(r"|\.shared", ""), compiled.asm["ptx"])
            cubin = tmp_path / f"{compiled.hash}.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            ((_, local),) = usage_of(cubin).values()
            assert local == 0


def check_instructions(cubin, variant) -> None:
    """A loop reads and writes each buffer once, as wide as it can, in global memory; the compiler may unroll it."""
    (code,) = kernels_of(cubin).values()
    assert code.local_accesses == code.generic_accesses == 0
    expected = expected_widths(variant)
    found = [(code.widths("LD", loop), code.widths("ST", loop)) for loop in code.loops]
    assert any(multiply(expected, rounds) in found for rounds in (1, 2, 4, 8)), (variant, found)
    if variant.rule == "sgdm":  # divisions and roots are made of exact multiply-adds
        assert not any(instruction.opcode in ("FFMA", "DFMA") for instruction in code.instructions)


def multiply(counters: tuple[Counter[int], ...], rounds: int) -> tuple[Counter[int], ...]:
    return tuple(Counter({width: rounds * count for width, count in counter.items()}) for counter in counters)
