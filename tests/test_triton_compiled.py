"""Every variant of the Triton kernel compiles for every GPU we promise, into the machine code that we expect of it.

A compiler may spill registers to memory, split wide accesses where it lost sight of the alignment, move values between
threads through shared memory, or contract a product and a sum: each costs speed or bits, and none shows in a result.
"""

import re
from collections import Counter

import pytest

pytest.importorskip("triton", reason="the Triton back end needs the package triton")
import triton.language as tl
from machine_code import ARCHITECTURES, REASON, kernels_of, usage_of
from triton_kernels import RULES, all_variants, compile_kernel, multi_tensor

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

NEVER = r"\bfma\.rn\.f(32|64)|\.ftz|\.approx|div\.full|ld\.local|st\.local|\.shared"
"""On sm_80 fma.rn.bf16 with a factor of 1 is its addition."""

MAX_REGISTERS = 72
"""Then 7 programs of 128 threads share a multiprocessor's 65536 registers. Only the largest variants have more."""


def expected_widths(variant) -> tuple[Counter[int], Counter[int]]:
    """Bytes of each load and store of one thread: 16 of a buffer in the compute type, 8 of a narrow one."""
    n_bytes = {tl.float64: (16,), tl.float32: (16,), tl.bfloat16: (8,), tl.float16: (8,)}
    param, state, master = n_bytes[variant["PARAM"]], n_bytes[variant["STATE"]], (16,)
    has_grad, has_master, trusts = variant["HAS_GRAD"], variant["HAS_MASTER_WEIGHTS"], variant["TRUSTS_MASTER"]
    n_states = variant["N_STATES"]
    # With a running maximum a swap has no use for the second moment itself.
    n_loaded = n_states - (n_states == 3 and not has_grad)
    loads = (not trusts) * param + has_grad * param + n_loaded * state + has_master * master
    stores = param + has_grad * n_states * state + (has_master and (has_grad or not trusts)) * master
    return Counter(loads), Counter(stores)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("has_grad", [True, False], ids=["step", "swap"])
def test_every_variant(rule, architecture, has_grad, tmp_path):
    for variant in all_variants(RULES[rule], has_grad):
        compiled = compile_kernel(int(architecture.removeprefix("sm_")), variant)
        cubin = tmp_path / f"{compiled.hash}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        assert not re.search(NEVER, ptx), variant
        assert compiled.metadata.shared == 0
        ((registers, local),) = usage_of(cubin).values()
        assert local == 0, f"{variant} spills"
        assert registers <= multi_tensor.nvidia_options(variant).get("maxnreg", MAX_REGISTERS), variant
        if architecture == "sm_90":
            check_instructions(cubin, variant)


def check_instructions(cubin, variant) -> None:
    """A loop reads and writes each buffer once, as wide as it can, in global memory; the compiler may unroll it."""
    (code,) = kernels_of(cubin).values()
    assert code.local_accesses == code.generic_accesses == 0
    expected = expected_widths(variant)
    found = [(code.widths("LD", loop), code.widths("ST", loop)) for loop in code.loops]
    assert any(multiply(expected, rounds) in found for rounds in (1, 2, 4, 8)), (variant, found)
    if variant["N_DIRECTION"] == 0:  # divisions and roots are made of exact multiply-adds
        assert not any(instruction.opcode in ("FFMA", "DFMA") for instruction in code.instructions)


def multiply(counters: tuple[Counter[int], ...], rounds: int) -> tuple[Counter[int], ...]:
    return tuple(Counter({width: rounds * count for width, count in counter.items()}) for counter in counters)
