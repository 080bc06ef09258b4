"""How many loads, each waiting for the one before, precede a kernel's first load of data: three.

A chunk names its tensor, the tensor's line has its addresses and its row, and the row says whether the step is skipped.
Every one more is half a microsecond at the start of each block, with nothing to do meanwhile.
"""

import re
from collections import defaultdict

import pytest
import torch
from cuda_kernels import needs_nvcc, ptx_of, symbol_of
from family import RULES
from random_launch import Variant

triton_kernels = pytest.importorskip("triton_kernels", reason="the Triton kernels need the package triton")

MOST_LOOKUPS = 3

REGISTER = re.compile(r"%\w+")
GUARD = re.compile(r"^@!?(%\w+)\s+")


def lookups_before_data(ptx: str) -> int:
    """The longest chain of loads that the first load of 16 bytes waits for, by its address or by a branch before it."""
    depth: defaultdict[str, int] = defaultdict(int)
    control = 0
    for line in ptx.splitlines():
        line = line.strip().removesuffix(";")
        guard = GUARD.match(line)
        text = line[guard.end() :] if guard else line
        opcode, _, operands = text.partition(" ")
        if not re.match(r"[a-z][a-z0-9_.]*$", opcode):
            continue
        condition = depth[guard[1]] if guard else 0
        if opcode.startswith(("bra", "ret", "exit")):
            control = max(control, condition)
            continue
        written, _, read = operands.strip().partition(",")
        if written.startswith("{"):
            written, _, read = operands.strip().partition("}")
        latest = max([condition, *(depth[register] for register in REGISTER.findall(read))])
        if opcode.startswith("ld.global"):
            if re.search(r"\.v4\.[bfu]32|\.v2\.[bfu]64", opcode):
                return max(latest, control)
            latest = max(latest, control) + 1
        for register in REGISTER.findall(written):
            # A guarded write may leave what was there.
            depth[register] = max(latest, depth[register]) if guard else latest
    raise AssertionError("there is no load of 16 bytes")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("has_grad", [True, False], ids=["step", "swap"])
def test_triton(rule, has_grad):
    compiled = triton_kernels.compile_step(Variant(rule, torch.float32, torch.float32, has_grad), "sm_90")
    assert lookups_before_data(compiled.asm["ptx"]) <= MOST_LOOKUPS


@needs_nvcc
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("has_grad", [True, False], ids=["step", "swap"])
def test_cuda(rule, has_grad):
    symbol = symbol_of(Variant(rule, torch.float32, torch.float32, has_grad))
    text = ptx_of(rule, "sm_90")
    (body,) = re.findall(rf"\.entry {symbol}\(.*?\n}}", text, re.DOTALL)
    assert lookups_before_data(body) <= MOST_LOOKUPS


def test_a_longer_chain_is_counted():
    chain = """
    ld.global.b64 %rd1, [%rd0];
    add.s64 %rd2, %rd1, 8;
    ld.global.b64 {%rd3}, [%rd2];
    ld.global.b32 %r1, [%rd3];
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra $L__BB0_1;
    ld.global.b32 %r2, [%rd0];
    setp.ne.s32 %p2, %r2, 0;
    @%p2 ret;
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd0];
    """
    assert lookups_before_data(chain) == 4
