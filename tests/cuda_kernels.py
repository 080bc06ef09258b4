"""The CUDA kernels without a GPU: compiled for the host or to PTX, standing in for `backend_cuda.run_kernel`."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from simulation import Simulator, ptxsim, slot_widths

from xgrad_optim import backend_cuda, build_cuda, build_native
from xgrad_optim.device_tables import Uploaded
from xgrad_optim.launch import Launch
from xgrad_optim.numeric import COMPUTE_DTYPES

EMULATION = Path(__file__).resolve().parent / "cuda_emulation"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""In the order of `Dtype` in csrc/launch.h."""
RULES = build_cuda.rules()
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
needs_compiler = pytest.mark.skipif(_missing(build_native.find_compiler) is not None, reason="there is no C++ compiler")


class KernelLaunch(ctypes.Structure):
    """`Launch` of csrc/launch.h, the kernels' one argument."""

    _fields_ = [
        ("addresses", ctypes.c_void_p),
        ("numels", ctypes.c_void_p),
        ("row_of", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("n_columns", ctypes.c_int64),
        ("chunks", ctypes.c_void_p),
        ("chunk_size", ctypes.c_int64),
        ("trusts_master", ctypes.c_bool),
    ]


@dataclass(frozen=True)
class Variant:
    """One instance of the kernel template."""

    rule: str
    dtype: torch.dtype
    state_dtype: torch.dtype
    has_grad: bool
    has_max_exp_avg_sq: bool = False
    has_master_weights: bool = False
    trusts_master: bool = False

    @classmethod
    def of(cls, launch: Launch) -> "Variant":
        buffers = ("max_exp_avg_sq" in launch.state, "master_weights" in launch.state, launch.trusts_master)
        return cls(launch.rule.name, launch.dtype, launch.state_dtype, launch.grads is not None, *buffers)

    @property
    def buffers(self) -> tuple[bool, bool, bool, bool]:
        return self.has_grad, self.has_max_exp_avg_sq, self.has_master_weights, self.trusts_master

    def operands(self) -> tuple[list[int], list[int]]:
        """Bytes of an element of each buffer that a run must load, and of each that it must store."""
        n_states = 1 if self.rule == "sgdm" else 2
        param, state, master = (dtype.itemsize for dtype in (self.dtype, self.state_dtype, COMPUTE_DTYPES[self.dtype]))
        params, masters = [param] * (not self.trusts_master), [master] * self.has_master_weights
        if not self.has_grad:  # the running maximum stands in for the second moment
            written = [] if self.trusts_master else masters
            return [*params, *[state] * n_states, *masters], [param, *written]
        states = [state] * (n_states + self.has_max_exp_avg_sq)
        return [*params, param, *states, *masters], [param, *states, *masters]

    @property
    def symbol(self) -> str:
        """The kernel's mangled name."""
        rule, flags = RULES[self.rule], sum(flag << bit for bit, flag in enumerate(self.buffers))
        param, state = _MANGLED[self.dtype], _MANGLED[self.state_dtype]
        state = "S4_" if self.state_dtype == self.dtype and len(state) > 1 else state
        variant = f"NS0_7VariantINS0_{len(rule)}{rule}E{param}{state}Li{flags}EEE"
        return f"_ZN5xgrad4cuda19multi_tensor_kernelI{variant}EEvNS_6LaunchE"


def every_variant(rule: str) -> list[Variant]:
    """All that multi_tensor_cuda.cu makes of a rule."""
    pairs = [(dtype, torch.float64 if dtype == torch.float64 else torch.float32) for dtype in DTYPES]
    pairs += [(dtype, dtype) for dtype in (torch.bfloat16, torch.float16)]
    masters = [(False, False), (True, False), (True, True)]
    return [
        Variant(rule, dtype, state_dtype, has_grad, has_max, *master)
        for dtype, state_dtype in pairs
        for has_grad in (False, True)
        for has_max in ((False,) if rule == "sgdm" else (False, True))
        for master in (masters if state_dtype.itemsize >= 4 else masters[:1])
    ]


def compiled(rule: str, architecture: str) -> Path:
    """The rule's kernels as machine code; beside it, under `.ptx`, as what nvcc handed to ptxas."""
    _, source = build_cuda.sources()
    flags = [*build_cuda.DEVICE_FLAGS, f"-arch={architecture}", f"-DXGRAD_RULE={RULES[rule]}"]
    name = f"{rule}-{architecture}-{build_native.digest_of([source], flags)}"
    cubin = build_native.cache_directory() / "tests" / f"{name}.cubin"
    ptx, nvcc = cubin.with_suffix(".ptx"), build_cuda.find_nvcc()
    to_ptx = [*nvcc, *flags, "-ptx", str(source), "-o", str(ptx)]
    to_cubin = [*nvcc, f"-arch={architecture}", "-Xptxas=--fmad=false", "-cubin", str(ptx), "-o", cubin.name]
    return build_native.make(cubin, {str(ptx): to_ptx}, to_cubin)


def ptx_of(rule: str, architecture: str) -> str:
    """The text without what names the architecture."""
    text = compiled(rule, architecture).with_suffix(".ptx").read_text()
    return "\n".join(line for line in text.splitlines() if not line.startswith((".target", "//")))


@functools.cache
def load_ptx(rule: str, architecture: str) -> dict[str, Any]:
    """The rule's kernels for the simulator, by their mangled names."""
    return ptxsim.load_ptx(ptx_of(rule, architecture))


@functools.cache
def load_emulation() -> Any:
    """The C function of emulation.cpp, with the kernels compiled as C++ for the host."""
    files = [build_cuda.sources()[1], *sorted(EMULATION.iterdir())]
    flags = ["-O1", "-std=c++17", "-fPIC", "-ffp-contract=off", "-Wno-unknown-pragmas", "-DXGRAD_ISA=cuda"]
    flags += [f"-I{EMULATION}", f"-I{build_native.source_directory()}"]
    compiler = [*build_native.find_compiler(), *flags]
    objects = {"emulation.o": [*compiler, "-c", str(EMULATION / "emulation.cpp"), "-o", "emulation.o"]}
    for rule in RULES.values():
        source = ["-x", "c++", "-c", str(files[0])]
        objects[f"{rule}.o"] = [*compiler, f"-DXGRAD_RULE={rule}", *source, "-o", f"{rule}.o"]
    target = build_native.cache_directory() / "tests" / f"cuda_emulation-{build_native.digest_of(files, flags)}.so"
    link = [*build_native.find_compiler(), "-shared", *objects, "-o", target.name]
    function = ctypes.CDLL(str(build_native.make(target, objects, link))).run_emulated
    function.restype = ctypes.c_char_p
    return function


class EmulatedKernel:
    """The host's own instructions, thread by thread."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, launch: Launch, uploaded: Uploaded) -> None:
        self.runs += 1
        variant = Variant.of(launch)
        addresses, numels, row_of, rows, chunks = (table.data_ptr() for table in uploaded)
        columns, chunk_size = uploaded.rows.shape[1], launch.tables.chunk_size
        argument = KernelLaunch(addresses, numels, row_of, rows, columns, chunks, chunk_size)
        error = load_emulation()(
            ctypes.byref(argument),
            ctypes.c_int64(len(uploaded.chunks)),
            variant.rule.encode(),
            DTYPES.index(variant.dtype),
            DTYPES.index(variant.state_dtype),
            (ctypes.c_bool * 4)(*variant.buffers),
        )
        assert error is None, error


class SimulatedKernel:
    """nvcc's PTX, executed by ptxsim."""

    def __init__(self, architecture: str = "sm_90") -> None:
        self.simulator = Simulator()
        self.architecture = architecture

    def __call__(self, launch: Launch, uploaded: Uploaded) -> None:
        variant = Variant.of(launch)
        kernel = load_ptx(variant.rule, self.architecture)[variant.symbol]

        def argument(place: Any) -> KernelLaunch:
            addresses, numels, row_of, rows, chunks = map(place, uploaded)
            columns, chunk_size = uploaded.rows.shape[1], launch.tables.chunk_size
            return KernelLaunch(addresses, numels, row_of, rows, columns, chunks, chunk_size)

        if len(uploaded.chunks):
            widths = slot_widths(variant.dtype, variant.state_dtype)
            tables = (uploaded.addresses, uploaded.numels)
            self.simulator.run(kernel, len(uploaded.chunks), THREADS, [argument], *tables, widths)


def stand_in(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let backend="cuda" run CPU tensors through this."""
    monkeypatch.setattr(backend_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(backend_cuda, "unavailable", lambda: None)
    monkeypatch.setattr(backend_cuda, "run_kernel", kernel)
    return kernel
