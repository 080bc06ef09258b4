"""The CUDA kernels without a GPU: compiled for the host, or to PTX that ptxsim runs."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import ptxsim
import pytest
import torch
from random_launch import DTYPES, RandomLaunch, Variant
from simulation import simulate

from xgrad_optim.backends import build, build_cuda

EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
STRUCTS = build_cuda.rules()
"""The structs of csrc/rules.h by the rule's name."""
THREADS = 256
"""Of a block."""

_MANGLED = {torch.float64: "d", torch.float32: "f", torch.bfloat16: "NS0_8BFloat16E", torch.float16: "NS0_7Float16E"}


def _missing(find: Any) -> str | None:
    try:
        find()
    except RuntimeError as error:
        return str(error)
    return None


needs_nvcc = pytest.mark.skipif(_missing(build_cuda.find_nvcc) is not None, reason="there is no nvcc")
needs_compiler = pytest.mark.skipif(_missing(build.find_compiler) is not None, reason="there is no C++ compiler")


class KernelLaunch(ctypes.Structure):
    """`Launch` of csrc/launch.h, the one argument of a step's kernel."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("grads", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("n_columns", ctypes.c_int64),
        ("next_numbers", ctypes.c_void_p),
        ("n_numbers", ctypes.c_int64),
        ("chunks", ctypes.c_void_p),
        ("chunk_size", ctypes.c_int64),
    ]


class RowsLaunch(ctypes.Structure):
    """`RowsLaunch` of csrc/rows.h, the one argument of the kernel that makes rows."""

    _fields_ = [
        ("table", ctypes.c_void_p),
        ("group_of", ctypes.c_void_p),
        ("options", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("next_numbers", ctypes.c_void_p),
        ("n_tensors", ctypes.c_int64),
        ("is_step", ctypes.c_bool),
    ]


def symbol_of(variant: Variant) -> str:
    """The mangled name of a step's kernel."""
    struct, flags = STRUCTS[variant.rule], sum(flag << bit for bit, flag in enumerate(variant.buffers))
    param, state = _MANGLED[variant.dtype], _MANGLED[variant.state_dtype]
    state = "S4_" if variant.state_dtype == variant.dtype and len(state) > 1 else state
    name = f"NS0_7VariantINS0_{len(struct)}{struct}E{param}{state}Li{flags}EEE"
    return f"_ZN5xgrad4cuda19multi_tensor_kernelI{name}EEvNS_6LaunchE"


def rows_symbol_of(rule: str, is_double: bool) -> str:
    """That of the kernel that makes rows."""
    struct = STRUCTS[rule]
    return f"_ZN5xgrad4cuda16make_rows_kernelINS0_{len(struct)}{struct}E{'d' if is_double else 'f'}EEvNS0_10RowsLaunchE"


def compiled(rule: str, architecture: str) -> Path:
    """The rule's kernels as machine code; beside it, under `.ptx`, as what nvcc handed to ptxas."""
    _, source = build_cuda.sources()
    flags = [*build_cuda.DEVICE_FLAGS, f"-arch={architecture}", f"-DXGRAD_RULE={STRUCTS[rule]}"]
    name = f"{rule}-{architecture}-{build.digest_of([source], flags)}"
    cubin = build.cache_directory() / "tests" / f"{name}.cubin"
    ptx, nvcc = cubin.with_suffix(".ptx"), build_cuda.find_nvcc()
    to_ptx = [*nvcc, *flags, "-ptx", str(source), "-o", str(ptx)]
    to_cubin = [*nvcc, f"-arch={architecture}", "-Xptxas=--fmad=false", "-cubin", str(ptx), "-o", cubin.name]
    return build.make(cubin, {str(ptx): to_ptx}, to_cubin)


def ptx_of(rule: str, architecture: str) -> str:
    """The text without what names the architecture."""
    text = compiled(rule, architecture).with_suffix(".ptx").read_text()
    return "\n".join(line for line in text.splitlines() if not line.startswith((".target", "//")))


@functools.cache
def load_ptx(rule: str, architecture: str) -> dict[str, ptxsim.Kernel]:
    """The rule's kernels for the simulator, by their mangled names."""
    return ptxsim.load_ptx(ptx_of(rule, architecture))


def argument_of(launch: RandomLaunch, tables: dict[str, int]) -> KernelLaunch:
    """The struct, of these addresses."""
    rows, numbers = launch.rows.shape[1], launch.next_numbers.shape[1]
    grads = tables["grads"] if launch.variant.has_grad else None
    places = {"table": tables["table"], "grads": grads, "rows": tables["rows"], "chunks": tables["chunks"]}
    sizes = {"n_columns": rows, "n_numbers": numbers, "chunk_size": launch.chunk_size}
    return KernelLaunch(**places, next_numbers=tables["next_numbers"], **sizes)


def run_simulated(launch: RandomLaunch, architecture: str) -> Any:
    """nvcc's PTX, executed by ptxsim; returns its statistics."""
    kernel = load_ptx(launch.variant.rule, architecture)[symbol_of(launch.variant)]
    return simulate(kernel, THREADS, launch, lambda tables: [argument_of(launch, tables)])


@functools.cache
def load_emulation() -> Any:
    """The C functions of emulation.cpp, with the kernels compiled as C++ for the host."""
    files = [build_cuda.sources()[1], *sorted(EMULATION.iterdir())]
    flags = ["-O1", "-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DXGRAD_ISA=cuda"]
    flags += [f"-I{EMULATION}", f"-I{build.source_directory()}"]
    compiler = [*build.find_compiler(), *flags]
    objects = {"emulation.o": [*compiler, "-c", str(EMULATION / "emulation.cpp"), "-o", "emulation.o"]}
    for struct in STRUCTS.values():
        source = ["-x", "c++", "-c", str(files[0])]
        objects[f"{struct}.o"] = [*compiler, f"-DXGRAD_RULE={struct}", *source, "-o", f"{struct}.o"]
    target = build.cache_directory() / "tests" / f"cuda_emulation-{build.digest_of(files, flags)}.so"
    link = [*build.find_compiler(), "-shared", *objects, "-o", target.name]
    library = ctypes.CDLL(str(build.make(target, objects, link)))
    for function in (library.run_emulated, library.make_rows_emulated):
        function.restype = ctypes.c_char_p
    return library


def run_emulated(launch: RandomLaunch) -> None:
    """By the host's own instructions, thread by thread."""
    variant, tables = launch.variant, launch.tables
    by_name = {"table": tables.table, "grads": tables.grads, "chunks": tables.chunks}
    by_name |= {"rows": launch.rows, "next_numbers": launch.next_numbers}
    argument = argument_of(launch, {name: table.data_ptr() for name, table in by_name.items()})
    error = load_emulation().run_emulated(
        ctypes.byref(argument),
        ctypes.c_int64(len(tables.chunks)),
        variant.rule.encode(),
        DTYPES.index(variant.dtype),
        DTYPES.index(variant.state_dtype),
        (ctypes.c_bool * 3)(*variant.buffers),
    )
    assert error is None, error


def make_rows_emulated(rule: str, is_double: bool, argument: RowsLaunch) -> None:
    error = load_emulation().make_rows_emulated(ctypes.byref(argument), rule.encode(), is_double)
    assert error is None, error
