"""Instructions of sm_100 with 16-bit operands and a float32 result (PTX ISA, mixed precision) round once.

add.f32.bf16 d, a, c is convert(a) + c: a is widened, which is exact, and the sum is rounded to float32.
"""

import numpy
import pytest

from ptxsim.programs import F32, U16, check_rounded_once, compiled, decode, exact_results, run_instructions, some_floats

KINDS = ["f16", "bf16"]


@pytest.fixture
def numbers():
    """Every 16-bit pattern in turn, and float32 of every kind, many of them halfway cases of the sum."""
    random = numpy.random.default_rng(21)
    a, b = (random.integers(0, 2**16, 6000).astype(U16) for _ in range(2))
    return a, b, some_floats(6000, 22)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["", ".rn"])
def test_results_are_rounded_once(kind, rounding, numbers):
    a, b, c = numbers
    x, y = decode(a, kind), decode(b, kind)
    # Addends near the product, where fused and twice rounded results part.
    c[:2000] = (x * y)[:2000] * 2.0 ** numpy.random.default_rng(23).integers(-30, 30, 2000)
    body = f"add{rounding}.f32.{kind} s, x, z; sub{rounding}.f32.{kind} d, x, z; fma.rn.f32.{kind} f, x, y, z;"
    total, difference, fused = run_instructions(body, {"x": a, "y": b, "z": c}, dict.fromkeys("sdf", F32))
    check_rounded_once(total, exact_results(lambda p, r: p + r, x, c), "f32")
    check_rounded_once(difference, exact_results(lambda p, r: p - r, x, c), "f32")
    check_rounded_once(fused, exact_results(lambda p, q, r: p * q + r, x, y, c), "f32")


@pytest.mark.parametrize("kind", KINDS)
def test_special_numbers_are_those_of_float32(kind, numbers):
    a, _, c = numbers
    a[:4], c[:4] = decode_special(kind), [numpy.inf, -numpy.inf, 0.0, numpy.nan]
    body = f"add.f32.{kind} s, x, z; add.sat.f32.{kind} t, x, z;"
    total, clamped = run_instructions(body, {"x": a, "z": c}, {"s": F32, "t": F32})
    expected = decode(a, kind).astype(F32) + c
    numpy.testing.assert_array_equal(total, expected)
    numpy.testing.assert_array_equal(clamped, numpy.clip(numpy.nan_to_num(expected, nan=0.0), F32(0), F32(1)))


def decode_special(kind):
    """Infinities, -0 and 1 as bits."""
    return [0x7C00, 0x7C00, 0x8000, 0x3C00] if kind == "f16" else [0x7F80, 0x7F80, 0x8000, 0x3F80]


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode, numbers):
    a, _, c = numbers
    body = f"add.{mode}.f32.bf16 s, x, z; cvt.f32.bf16 w, x; add.{mode}.f32 t, w, z;"
    mixed, _, plain = run_instructions(body, {"x": a, "z": c}, {"s": F32, "w": F32, "t": F32})
    numpy.testing.assert_array_equal(mixed, plain)


def test_only_these_forms_exist():
    text = "mul.f32.bf16 f, h, f; add.ftz.f32.bf16 f, h, f; add.f32.bf16 f, h, f; add.rn.f32.f16 f, h, f; ret;"
    kernel = compiled(f".visible .entry k() {{ .reg .f32 f; .reg .b16 h; {text} }}")
    assert [("mul" in message, "ftz" in message) for message in kernel.unsupported()] == [(True, False), (False, True)]
    assert [text.split()[0] for _, text in kernel.contractible()] == [
        "mul.f32.bf16",
        "add.ftz.f32.bf16",
        "add.f32.bf16",
    ]
