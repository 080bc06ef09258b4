"""Floating-point instructions round once, to the nearest or as they say; the references are fractions."""

import math
from fractions import Fraction

import numpy
import pytest
import torch

from ptxsim.programs import (
    F32,
    FORMATS,
    U16,
    U32,
    check_rounded_once,
    decode,
    exact_results,
    run_instructions,
    some_floats,
)


def any_halves(size, seed):
    random = numpy.random.default_rng(seed)
    return [random.integers(0, 2**16, size).astype(U16) for _ in range(3)]


def test_fma_f32_rounds_once():
    n = 6000
    a, b, c = (some_floats(n, seed) for seed in (1, 2, 3))
    # Hard cases: the product lies halfway between two float32 (25 bits, odd), a tiny addend decides.
    random = numpy.random.default_rng(4)
    a[:3000] = random.integers(2**10, 2**11, 3000) * 2 + 1
    b[:3000] = random.integers(2**11, 2**12, 3000) * 2 + 1
    c[:3000] = random.choice([-1, 1], 3000) * 2.0 ** random.integers(-60, -10, 3000)
    (o,) = run_instructions("fma.rn.f32 o, x, y, z;", {"x": a, "y": b, "z": c}, {"o": F32})
    check_rounded_once(o, exact_results(lambda x, y, z: x * y + z, a, b, c), "f32")
    twice = (a.astype(numpy.float64) * b + c).astype(F32)
    assert (twice[:3000] != o[:3000]).any()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_16_bit_arithmetic_rounds_once(kind):
    raw = any_halves(3000, 5)
    values = [decode(bits, kind) for bits in raw]
    body = f"add.{kind} p, x, y; sub.{kind} d, x, y; mul.{kind} r, x, y; fma.rn.{kind} s, x, y, z;"
    results = run_instructions(body, dict(zip("xyz", raw, strict=True)), dict.fromkeys("pdrs", U16))
    functions = (lambda x, y, z: x + y, lambda x, y, z: x - y, lambda x, y, z: x * y, lambda x, y, z: x * y + z)
    for result, function in zip(results, functions, strict=True):
        check_rounded_once(decode(result, kind), exact_results(function, *values), kind)
    packed = {
        name: bits.astype(U32) | (numpy.roll(bits, 1).astype(U32) << 16) for name, bits in zip("xyz", raw, strict=True)
    }
    (both,) = run_instructions(f"fma.rn.{kind}x2 s, x, y, z;", packed, {"s": U32})
    numpy.testing.assert_array_equal(both & 0xFFFF, results[3])
    numpy.testing.assert_array_equal(both >> 16, numpy.roll(results[3], 1))


def test_conversions_of_floats_are_those_of_torch():
    x = some_floats(20000, 6)
    x[:4000] = (x[:4000].view(U32) & 0xFFFF8000).view(F32)  # halfway between two bf16
    body = """cvt.rn.f16.f32 o, x; cvt.rn.bf16.f32 p, x; cvt.rn.f16x2.f32 r, x, x;
      cvt.rn.bf16x2.f32 s, x, 0f3F800000;"""
    half, bf16, halves, mixed = run_instructions(body, {"x": x}, {"o": U16, "p": U16, "r": U32, "s": U32})
    ours, is_number = torch.from_numpy(x), ~numpy.isnan(x)
    for result, dtype in ((half, torch.float16), (bf16, torch.bfloat16)):
        expected = ours.to(dtype).view(torch.int16).numpy().view(U16)
        numpy.testing.assert_array_equal(result[is_number], expected[is_number])
        assert (result[~is_number] == 0x7FFF).all()
    numpy.testing.assert_array_equal(halves, half.astype(U32) * 0x10001)
    numpy.testing.assert_array_equal(mixed, (bf16.astype(U32) << 16) | 0x3F80)
    every = numpy.arange(65536).astype(U16)
    body = "cvt.f32.f16 o, x; cvt.f32.bf16 p, x; mov.b32 r, {0, x};"
    a, b, c = run_instructions(body, {"x": every}, {"o": F32, "p": F32, "r": U32})
    numpy.testing.assert_array_equal(a, every.view(numpy.float16).astype(F32))
    is_number = ~numpy.isnan(b)
    numpy.testing.assert_array_equal(b.view(U32)[is_number], (every.astype(U32) << 16)[is_number])
    numpy.testing.assert_array_equal(c, every.astype(U32) << 16)


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(mode):
    a, b = some_floats(4000, 7), some_floats(4000, 8)
    body = f"add.{mode}.f32 s, x, y; mul.{mode}.f32 m, x, y; cvt.rz.bf16.f32 h, x;"
    total, product, truncated = run_instructions(body, {"x": a, "y": b}, {"s": F32, "m": F32, "h": U16})
    for results, function in ((total, lambda x, y: x + y), (product, lambda x, y: x * y)):
        for result, x in zip(results.tolist(), exact_results(function, a, b), strict=True):
            if x is not None:
                assert is_directed(result, x, mode), (result, float(x))
    is_number = ~numpy.isnan(a)
    numpy.testing.assert_array_equal(truncated[is_number], (a.view(U32) >> 16).astype(U16)[is_number])


def is_directed(result: float, x: Fraction, mode: str) -> bool:
    """Whether this float32 is x rounded in that direction."""
    largest = FORMATS["f32"][2]
    if math.isinf(result):
        return abs(x) > largest and (result > 0) == (x > 0) and mode != "rz"
    above, below = (numpy.nextafter(F32(result), F32(to)) for to in (numpy.inf, -numpy.inf))
    if mode == "rp" or (mode == "rz" and x < 0):
        return Fraction(result) >= x and (numpy.isinf(below) or Fraction(float(below)) < x)
    return Fraction(result) <= x and (numpy.isinf(above) or Fraction(float(above)) > x)


def test_floats_to_integers_are_clamped():
    x = some_floats(4000, 9)
    x[:1000] *= F32(1e-30)
    x[1000:3000] = numpy.random.default_rng(10).standard_normal(2000) * 2.0**31
    body = """cvt.rzi.s32.f32 o, x; cvt.rni.u32.f32 u, x; cvt.rmi.s64.f32 w, x; cvt.rpi.u8.f32 r, x;
      cvt.rni.f32.f32 f, x;"""
    kinds = {"o": numpy.int32, "u": U32, "w": numpy.int64, "r": U16, "f": F32}
    *integers, rounded = run_instructions(body, {"x": x}, kinds)
    cases = [(math.trunc, -(2**31), 2**31 - 1), (round, 0, 2**32 - 1), (math.floor, -(2**63), 2**63 - 1)]
    cases += [(math.ceil, 0, 255)]
    for results, (function, low, high) in zip(integers, cases, strict=True):
        for result, value in zip(results.tolist(), x.tolist(), strict=True):
            if math.isnan(value):
                expected = 0
            elif math.isinf(value):
                expected = high if value > 0 else low
            else:
                expected = min(max(function(value), low), high)
            assert result == expected, value
    numpy.testing.assert_array_equal(rounded, numpy.rint(x))


def test_integers_of_64_bits_to_floats_round_once():
    random = numpy.random.default_rng(11)
    x = random.integers(0, 2**63, 3000).astype(numpy.uint64) * numpy.uint64(2) + numpy.uint64(1)
    x >>= random.integers(0, 64, 3000).astype(numpy.uint64)
    body = """cvt.rn.f32.u64 a1, x; cvt.rz.f32.s64 b1, x; cvt.rn.f16.u64 c1, x; cvt.rn.f64.s64 d1, x;
      cvt.rn.bf16.s64 e1, x;"""
    kinds = {"a1": F32, "b1": F32, "c1": numpy.float16, "d1": numpy.float64, "e1": U16}
    single, towards_zero, half, double, bf16 = run_instructions(body, {"x": x}, kinds)
    unsigned, signed = x.tolist(), x.view(numpy.int64).tolist()
    check_rounded_once(single, list(map(Fraction, unsigned)), "f32")
    check_rounded_once(half, list(map(Fraction, unsigned)), "f16")
    check_rounded_once(decode(bf16, "bf16"), list(map(Fraction, signed)), "bf16")
    assert double.tolist() == list(map(float, signed))
    assert all(is_directed(result, Fraction(i), "rz") for result, i in zip(towards_zero.tolist(), signed, strict=True))


def test_instructions_of_float32():
    a, b = some_floats(8000, 15), some_floats(8000, 16)
    wide = a.astype(numpy.float64)

    def flush(x):
        return numpy.where(numpy.abs(x) < F32(1.17549435e-38), numpy.copysign(F32(0), x), x)

    total = a + b
    clamped = numpy.clip(numpy.nan_to_num(total, nan=0.0, posinf=1, neginf=0), F32(0), F32(1))
    cases = {
        "add.f32 {}, x, y;": total,
        "sub.rn.f32 {}, x, y;": a - b,
        "mul.f32 {}, x, y;": a * b,
        "div.rn.f32 {}, x, y;": a / b,
        "div.full.f32 {}, x, y;": a / b,
        "sqrt.rn.f32 {}, x;": numpy.sqrt(a),
        "min.f32 {}, x, y;": numpy.fmin(a, b),
        "max.NaN.f32 {}, x, y;": numpy.maximum(a, b),
        "min.f32 {}, x, y, 0f3F000000;": numpy.fmin(numpy.fmin(a, b), F32(0.5)),
        "abs.f32 {}, x;": numpy.abs(a),
        "neg.f32 {}, x;": -a,
        "copysign.f32 {}, x, y;": numpy.copysign(b, a),
        "rcp.approx.f32 {}, x;": F32(1) / a,
        "ex2.approx.f32 {}, x;": numpy.exp2(wide).astype(F32),
        "lg2.approx.f32 {}, x;": numpy.log2(wide).astype(F32),
        "rsqrt.approx.f32 {}, x;": (1 / numpy.sqrt(wide)).astype(F32),
        "add.ftz.f32 {}, x, y;": flush(flush(a) + flush(b)),
        "add.sat.f32 {}, x, y;": clamped,
    }
    names = [f"o{i}" for i in range(len(cases))]
    body = " ".join(text.format(name) for text, name in zip(cases, names, strict=True))
    results = run_instructions(body, {"x": a, "y": b}, dict.fromkeys(names, F32))
    for text, result in zip(cases, results, strict=True):
        numpy.testing.assert_array_equal(result, cases[text], err_msg=text)


def test_minimum_and_maximum_order_zeros():
    zeros = numpy.array([0.0, -0.0], F32)
    body = "min.f32 o, x, y; max.f32 p, x, y;"
    low, high = run_instructions(body, {"x": zeros, "y": -zeros}, {"o": F32, "p": F32})
    assert numpy.signbit(low).all() and not numpy.signbit(high).any()


def test_comparisons():
    a, b = some_floats(4000, 17), some_floats(4000, 18)
    b[::3] = a[::3]
    unordered = numpy.isnan(a) | numpy.isnan(b)
    ordered = {"eq": a == b, "ne": (a != b) & ~unordered, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    expected = {**ordered, **{f"{name}u": values | unordered for name, values in ordered.items()}}
    expected |= {"num": ~unordered, "nan": unordered}
    body = "".join(f"setp.{name}.f32 q, x, y; selp.u32 o_{name}, 1, 0, q;\n" for name in expected)
    results = run_instructions(body, {"x": a, "y": b}, {f"o_{name}": U32 for name in expected})
    for name, result in zip(expected, results, strict=True):
        numpy.testing.assert_array_equal(result.astype(bool), expected[name], err_msg=name)


def test_float64():
    n = 1000
    random = numpy.random.default_rng(19)
    a, b, c = (random.integers(0, 2**64, n, numpy.uint64).view(numpy.float64) for _ in range(3))
    a[:500], b[:500], c[:500] = (random.standard_normal(500) for _ in range(3))
    c[:250] = -a[:250] * b[:250]
    kinds = {"o": numpy.float64, "s": numpy.float64, "d": F32, "r": numpy.float64}
    body = "fma.rn.f64 o, x, y, z; add.f64 s, x, y; cvt.rn.f32.f64 d, x; rcp.approx.ftz.f64 r, x;"
    fused, total, narrow, reciprocal = run_instructions(body, {"x": a, "y": b, "z": c}, kinds)
    exact = exact_results(lambda x, y, z: x * y + z, a[:500], b[:500], c[:500])
    assert fused[:500].tolist() == list(map(float, exact))
    numpy.testing.assert_array_equal(total, a + b)
    numpy.testing.assert_array_equal(narrow, a.astype(F32))
    numpy.testing.assert_allclose(reciprocal[:500], 1 / a[:500], rtol=2.0**-19)
    assert not (reciprocal.view(numpy.uint64) & numpy.uint64(0xFFFFFFFF)).any()
