"""What the simulator's tests share: small programs, numbers of every kind, exact results."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy

from ptxsim import Kernel, Memory, load_ptx

F32, U16, U32 = numpy.float32, numpy.uint16, numpy.uint32

HEADER = """.version 8.0
.target sm_90
.address_size 64
"""

_REGISTERS = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}


def run_instructions(
    body: str, inputs: dict[str, numpy.ndarray], outputs: dict[str, Any], declarations: str = ""
) -> list[numpy.ndarray]:
    """Run instructions over as many threads as the inputs have elements.

    Each input and output is a register of its name; `outputs` gives the dtype of each result. q and q2 are predicates.
    """
    n_threads = next(iter(inputs.values())).size
    arrays = {name: numpy.ascontiguousarray(values) for name, values in inputs.items()}
    results = {name: numpy.zeros(n_threads, dtype) for name, dtype in outputs.items()}
    lines = [declarations]
    for name, array in {**arrays, **results}.items():
        width = array.dtype.itemsize
        lines.append(f".reg .{'b16' if width == 1 else _REGISTERS[width]} {name};")
    lines += ["mov.u32 thread, %tid.x; mov.u32 block, %ctaid.x; mad.lo.u32 thread, block, 256, thread;"]
    lines += [f"setp.ge.u32 q, thread, {n_threads};", "@q ret;"]
    lines += [_access("ld", name, array.dtype.itemsize) for name, array in arrays.items()]
    lines += [body, *(_access("st", name, array.dtype.itemsize) for name, array in results.items()), "ret;"]
    parameters = ", ".join(f".param .u64 p_{name}" for name in (*arrays, *results))
    registers = ".reg .b64 address; .reg .b32 thread, block; .reg .pred q, q2;"
    kernel = compiled(f".visible .entry k({parameters})\n{{ {registers}\n" + "\n".join(lines) + "\n}")
    memory = Memory()
    for name, array in arrays.items():
        memory.register(array, name, writable=False)
    for name, array in results.items():
        memory.register(array, name)
    kernel.launch(-(-n_threads // 256), 256, [*arrays.values(), *results.values()], memory)
    return list(results.values())


def _access(op: str, name: str, width: int) -> str:
    address = f"ld.param.u64 address, [p_{name}]; mad.wide.u32 address, thread, {width}, address;"
    operands = f"{name}, [address]" if op == "ld" else f"[address], {name}"
    return f"{address} {op}.global.{_REGISTERS[width]} {operands};"


def compiled(entry: str) -> Kernel:
    """The kernel `k` of a text without a header."""
    return load_ptx(HEADER + entry)["k"]


def run_block(body: str, n_threads: int = 64, **options: Any) -> numpy.ndarray:
    """Run a body of one block whose register v is the result.

    There are registers a (64 bits: the result's address), t (the thread), w, x, i (32 bits), p, q (predicates), and 64
    words of shared memory, s.
    """
    result = numpy.zeros(n_threads, U32)
    kernel = compiled(f""".visible .entry k(.param .u64 out)
{{
  .reg .b64 a; .reg .b32 t, v, w, x, i; .reg .pred p, q; .shared .align 4 .b32 s[64];
  mov.u32 t, %tid.x; ld.param.u64 a, [out]; mad.wide.u32 a, t, 4, a; mov.u32 v, 0;
  {body}
  st.global.u32 [a], v;
  ret;
}}""")
    memory = Memory()
    memory.register(result, "out")
    kernel.launch(1, n_threads, [result], memory, **options)
    return result


def apart(values: numpy.ndarray, offset: int = 0) -> numpy.ndarray:
    """A copy that begins this many elements after a multiple of 256 bytes, with a gap around it."""
    room = numpy.zeros(values.nbytes + 1024, numpy.uint8)
    start = -room.ctypes.data % 256 + 256 + offset * values.dtype.itemsize
    copy = room[start : start + values.nbytes].view(values.dtype)
    copy[:] = values
    return copy


def some_floats(size: int, seed: int) -> numpy.ndarray:
    """float32 of every kind: any bits, exponents that are close, special values."""
    random = numpy.random.default_rng(seed)
    any_bits = random.integers(0, 2**32, size, numpy.uint64).astype(U32).view(F32)
    close = random.standard_normal(size).astype(F32)
    infinity, tiny = numpy.inf, 1.17549435e-38
    special = [0.0, -0.0, 1.0, -1.0, infinity, -infinity, numpy.nan, 1e-45, -1e-45, tiny, 3.4028235e38, 0.5]
    chosen = numpy.array(special, F32)[random.integers(0, len(special), size)]
    kind = random.integers(0, 5, size)
    return numpy.where(kind < 2, any_bits, numpy.where(kind < 4, close, chosen)).astype(F32)


# Precision in bits, exponent of the smallest subnormal, largest finite number.
FORMATS = {
    "f32": (24, -149, Fraction(float(numpy.finfo(F32).max))),
    "bf16": (8, -133, Fraction(3.3895313892515355e38)),
    "f16": (11, -24, Fraction(65504)),
}


def round_exactly(x: Fraction, name: str) -> Fraction | None:
    """The nearest number of a format, ties to even; None where that is beyond the largest."""
    precision, lowest, largest = FORMATS[name]
    if x == 0:
        return Fraction(0)
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** max(exponent + 1 - precision, lowest)
    rounded = round(size / unit) * unit
    return None if rounded > largest else rounded * (1 if x > 0 else -1)


def exact_results(function: Callable[..., Fraction], *arrays: numpy.ndarray) -> list[Fraction | None]:
    """A function of each row of numbers as fractions, None where one is not finite."""
    rows = zip(*(array.astype(numpy.float64).tolist() for array in arrays), strict=True)
    return [function(*map(Fraction, row)) if numpy.isfinite(row).all() else None for row in rows]


def check_rounded_once(results: numpy.ndarray, exact: Sequence[Fraction | None], name: str) -> None:
    """Each result is the exact one rounded to a format."""
    n_checked = 0
    for result, x in zip(results.astype(numpy.float64).tolist(), exact, strict=True):
        if x is None:
            continue
        expected = round_exactly(x, name)
        if expected is None:
            assert numpy.isinf(result) and (result > 0) == (x > 0), (result, x)
        else:
            assert numpy.isfinite(result) and Fraction(result) == expected, (result, float(x), float(expected))
        n_checked += 1
    assert n_checked > len(exact) // 4


def decode(bits: numpy.ndarray, name: str) -> numpy.ndarray:
    """16-bit floats as float64."""
    if name == "f16":
        return bits.view(numpy.float16).astype(numpy.float64)
    return (bits.astype(U32) << 16).view(F32).astype(numpy.float64)
