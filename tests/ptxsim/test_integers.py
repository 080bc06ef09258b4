"""Integer instructions are exact and wrap around; the references are Python's integers."""

import random

import numpy

from ptxsim.programs import U16, U32, run_block, run_instructions, some_floats

ALL_32 = 0xFFFFFFFF


def signed(value: int) -> int:
    return value - 2**32 if value >> 31 else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extracted(x: int, position: int, length: int, is_signed: bool) -> int:
    top = 0 if length == 0 or not is_signed else x >> min(position + length - 1, 31) & 1
    bits = [x >> position + i & 1 if i < length and position + i <= 31 else top for i in range(32)]
    return sum(bit << i for i, bit in enumerate(bits))


def inserted(x: int, y: int, position: int, length: int) -> int:
    for i in range(min(length, 32)):
        if position + i <= 31:
            y = y & ~(1 << position + i) | (x >> i & 1) << position + i
    return y


def permuted(x: int, y: int, selector: int) -> int:
    source, result = x.to_bytes(4, "little") + y.to_bytes(4, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = source[nibble & 7]
        result |= ((255 if byte >> 7 else 0) if nibble & 8 else byte) << 8 * i
    return result


def reversed_bits(x: int) -> int:
    return int(f"{x:032b}"[::-1], 2)


def top_bit(x: int) -> int:
    return (x if signed(x) >= 0 else ~x & ALL_32).bit_length() - 1


CASES = {
    "div.s32 {}, x, y;": lambda x, y, z, p, n: quotient(signed(x), signed(y)) if y else None,
    "rem.s32 {}, x, y;": lambda x, y, z, p, n: signed(x) - quotient(signed(x), signed(y)) * signed(y) if y else None,
    "div.u32 {}, x, y;": lambda x, y, z, p, n: x // y if y else None,
    "mul.hi.s32 {}, x, y;": lambda x, y, z, p, n: signed(x) * signed(y) >> 32,
    "mad.lo.s32 {}, x, y, z;": lambda x, y, z, p, n: x * y + z,
    "shl.b32 {}, x, p;": lambda x, y, z, p, n: x << p if p < 32 else 0,
    "shr.u32 {}, x, p;": lambda x, y, z, p, n: x >> p,
    "shr.s32 {}, x, p;": lambda x, y, z, p, n: signed(x) >> min(p, 31),
    "bfe.u32 {}, x, p, n;": lambda x, y, z, p, n: extracted(x, p & 255, n & 255, False),
    "bfe.s32 {}, x, p, n;": lambda x, y, z, p, n: extracted(x, p & 255, n & 255, True),
    "bfi.b32 {}, x, y, p, n;": lambda x, y, z, p, n: inserted(x, y, p & 255, n & 255),
    "lop3.b32 {}, x, y, z, 0xCA;": lambda x, y, z, p, n: x & y | ~x & z,
    "prmt.b32 {}, x, y, z;": lambda x, y, z, p, n: permuted(x, y, z),
    "shf.l.wrap.b32 {}, x, y, p;": lambda x, y, z, p, n: (y << 32 | x) << (p & 31) >> 32,
    "shf.r.clamp.b32 {}, x, y, p;": lambda x, y, z, p, n: (y << 32 | x) >> min(p, 32),
    "min.s32 {}, x, y;": lambda x, y, z, p, n: min(signed(x), signed(y)),
    "max.u32 {}, x, y;": lambda x, y, z, p, n: max(x, y),
    "abs.s32 {}, x;": lambda x, y, z, p, n: abs(signed(x)),
    "sad.s32 {}, x, y, z;": lambda x, y, z, p, n: z + abs(signed(x) - signed(y)),
    "bfind.s32 {}, x;": lambda x, y, z, p, n: top_bit(x),
    "clz.b32 {}, x;": lambda x, y, z, p, n: 32 - x.bit_length(),
    "popc.b32 {}, x;": lambda x, y, z, p, n: bin(x).count("1"),
    "add.sat.s32 {}, x, y;": lambda x, y, z, p, n: min(max(signed(x) + signed(y), -(2**31)), 2**31 - 1),
    "mul24.lo.u32 {}, x, y;": lambda x, y, z, p, n: (x & 0xFFFFFF) * (y & 0xFFFFFF),
    "slct.u32.s32 {}, x, y, z;": lambda x, y, z, p, n: x if signed(z) >= 0 else y,
    "brev.b32 {}, x;": lambda x, y, z, p, n: reversed_bits(x),
    "xor.b32 {}, x, y;": lambda x, y, z, p, n: x ^ y,
    "not.b32 {}, x;": lambda x, y, z, p, n: ~x,
    "neg.s32 {}, x;": lambda x, y, z, p, n: -x,
}


def test_instructions_of_32_bits():
    choose, n = random.Random(14), 2000
    special = [0, 1, 0x7FFFFFFF, 0x80000000, ALL_32, 2]
    rows = [
        [choose.choice(special) if choose.random() < 0.3 else choose.getrandbits(choose.choice((5, 32))) for _ in "xyz"]
        + [choose.choice((0, 1, 5, 8, 31, 32, 33, 40, 255, 256 + 3)) for _ in "pn"]
        for _ in range(n)
    ]
    names = [f"o{i}" for i in range(len(CASES))]
    body = " ".join(text.format(name) for text, name in zip(CASES, names, strict=True))
    columns = dict(zip("xyzpn", numpy.array(rows, U32).T, strict=True))
    results = run_instructions(body, columns, dict.fromkeys(names, U32))
    for (text, function), result in zip(CASES.items(), results, strict=True):
        for row, value in zip(rows, result.tolist(), strict=True):
            expected = function(*row)
            assert expected is None or value == expected & ALL_32, (text, row)


def test_conversions_and_extension():
    x = numpy.random.default_rng(13).integers(0, 2**32, 2000).astype(U32)
    y = x.view(numpy.int32)
    cases = {
        "cvt.s32.s8 {}, x;": x.astype(numpy.int8).astype(numpy.int32),
        "cvt.u32.u8 {}, x;": x & 255,
        "cvt.sat.u8.s32 {}, x;": numpy.clip(y, 0, 255).astype(U32),
        "cvt.sat.s16.u32 {}, x;": numpy.minimum(x, 32767).astype(numpy.int32),
        "cvt.s64.s32 {}, x;": y.astype(numpy.int64),
        "cvt.u16.u32 {}, x;": x & 0xFFFF,
        "cvt.s16.s32 {}, x;": x.astype(numpy.int16).astype(numpy.int32),
        "cvt.s8.s32 {}, x;": x.astype(numpy.int8).astype(numpy.int64),
    }
    names = [f"o{i}" for i in range(len(cases))]
    body = " ".join(text.format(name) for text, name in zip(cases, names, strict=True))
    kinds = {name: values.dtype for name, values in zip(names, cases.values(), strict=True)}
    for text, result in zip(cases, run_instructions(body, {"x": x}, kinds), strict=True):
        numpy.testing.assert_array_equal(result, cases[text], err_msg=text)


def test_loads_extend_by_the_type_of_the_load():
    body = "st.global.u32 [a], 0xffffff80; ld.global.s8 v, [a]; ld.global.u8 w, [a]; mad.lo.u32 v, v, 1000, w;"
    assert (run_block(body) == (-128 * 1000 + 128) % 2**32).all()


def test_comparisons_and_predicates():
    x, y = some_floats(4000, 17).view(U32), some_floats(4000, 18).view(U32)
    y[::3] = x[::3]
    body = """setp.lt.s32 q, x, y; selp.u32 o, 1, 0, q; setp.lo.u32 q, x, y; selp.u32 p, 1, 0, q;
      setp.lt.and.s32 q|q2, x, y, !q; selp.u32 r, 1, 0, q; selp.u32 s, 1, 0, q2;"""
    results = run_instructions(body, {"x": x, "y": y}, dict.fromkeys("oprs", U32))
    is_less, is_lower = x.view(numpy.int32) < y.view(numpy.int32), x < y
    expected = (is_less, is_lower, is_less & ~is_lower, ~is_less & ~is_lower)
    for result, values in zip(results, expected, strict=True):
        numpy.testing.assert_array_equal(result.astype(bool), values)


def test_packing_and_unpacking():
    x = numpy.random.default_rng(19).integers(0, 2**64, 1000, numpy.uint64)
    body = """.reg .b32 h, l; mov.b64 {l, h}, x; mov.b64 o, {h, l}; mov.b64 {_, p}, x;
      { .reg .b16 s0, s1, s2, s3; .reg .b128 w; .reg .b64 e;
        mov.b64 {s0, s1, s2, s3}, x; mov.b32 r, {s3, s0}; mov.b128 w, {x, x}; mov.b128 {e, _}, w; mov.b64 u, e; }"""
    kinds = {"o": numpy.uint64, "p": U32, "r": U32, "u": numpy.uint64}
    swapped, high, ends, same = run_instructions(body, {"x": x}, kinds)
    half = numpy.uint64(32)
    numpy.testing.assert_array_equal(swapped, (x >> half) | (x << half))
    numpy.testing.assert_array_equal(high, (x >> half).astype(U32))
    numpy.testing.assert_array_equal(ends, (x >> numpy.uint64(48)).astype(U32) | (x.astype(U32) << 16))
    numpy.testing.assert_array_equal(same, x)


def test_a_narrow_input_keeps_its_low_bits():
    x = numpy.arange(256, dtype=U16)
    (doubled,) = run_instructions("add.u16 o, x, x;", {"x": x}, {"o": U16})
    numpy.testing.assert_array_equal(doubled, 2 * x)
