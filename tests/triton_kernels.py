"""The Triton kernel's variants, compiled without a GPU, and what stands in for the kernel where there is none."""

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from simulation import Simulator, ptxsim
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xgrad_optim import XSGDM, XAdaBelief, XAdam, XAdaM3, backends
from xgrad_optim.numeric import COMPUTE_DTYPES
from xgrad_optim.rule import Rule

multi_tensor: Any = backends._module("triton")
KERNEL = multi_tensor.multi_tensor_kernel

_POINTERS = {"addresses_ptr": "*i64", "numels_ptr": "*i64", "row_of_ptr": "*i32", "chunks_ptr": "*i32"}


def compile_kernel(architecture: int, constants: dict[str, Any]) -> Any:
    """One variant for one compute capability, with the just-in-time compiler's own signature and options."""
    rows = "*fp64" if constants["PARAM"] == tl.float64 else "*fp32"
    types = {**_POINTERS, "rows_ptr": rows, "chunk_size": "i32"}
    signature = {name: types.get(name, "constexpr") for name in KERNEL.arg_names}
    source = ASTSource(fn=KERNEL, signature=signature, constexprs=constants)
    options = multi_tensor.nvidia_options(constants)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@functools.cache
def load_kernel(architecture: int, constants: tuple[tuple[str, Any], ...]) -> tuple[Any, int, int]:
    """The variant for the simulator, its threads, its shared memory."""
    compiled = compile_kernel(architecture, dict(constants))
    kernel = ptxsim.load_ptx(compiled.asm["ptx"])[compiled.metadata.name]
    return kernel, 32 * compiled.metadata.num_warps, compiled.metadata.shared


class SimulatedKernel:
    """Takes the place of `multi_tensor_kernel`: `kernel[grid](...)` runs in the simulator.

    Attributes:
        simulator: with the statistics of every launch.
        variants: what each launch was compiled for.
    """

    def __init__(self, architecture: int = 90) -> None:
        self.simulator = Simulator()
        self.variants: list[tuple[tuple[str, Any], ...]] = []
        self.architecture = architecture

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(addresses: Any, numels: Any, *others: Any, **constants: Any) -> None:
            constants = {name: value for name, value in constants.items() if name not in multi_tensor.OPTIONS}
            self.variants.append(tuple(constants.items()))
            kernel, block, shared = load_kernel(self.architecture, self.variants[-1])
            param, state = (constants[name].primitive_bitwidth // 8 for name in ("PARAM", "STATE"))
            widths = (param, param, state, state, state, max(param, 4))
            arguments = (addresses, numels, *others)
            self.simulator.run(kernel, grid[0], block, arguments, addresses, numels, widths, shared)

        return launch


@functools.cache
def interpreted_kernels() -> Any:
    """A second copy of the kernels, whose functions run in Triton's interpreter, on CPU tensors."""
    names = [f"xgrad_optim.kernels.{name}" for name in ("rules", "element", "multi_tensor")]
    compiled = {name: sys.modules.pop(name) for name in names}
    was_interpreting, triton.knobs.runtime.interpret = triton.knobs.runtime.interpret, True
    try:
        return importlib.import_module(names[-1])
    finally:
        triton.knobs.runtime.interpret = was_interpreting
        for name, module in compiled.items():
            sys.modules[name] = module
            setattr(sys.modules["xgrad_optim.kernels"], name.rpartition(".")[2], module)


def convert_float(values: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The conversion between float32 and bfloat16 as a GPU does it: the interpreter truncates."""
    if target == tl.bfloat16:
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    return torch.from_numpy(values.view("i2")).view(torch.bfloat16).float().numpy()


RULES = {optimizer.rule.name: optimizer.rule for optimizer in (XSGDM, XAdam, XAdaBelief, XAdaM3)}


def all_variants(rule: Rule, has_grad: bool) -> list[dict[str, Any]]:
    """All that a step or a swap of this rule can be compiled for."""
    narrow = [dtype for dtype, compute in COMPUTE_DTYPES.items() if dtype != compute]
    storage = [(dtype, dtype, False) for dtype in COMPUTE_DTYPES]
    storage += [(dtype, compute, True) for dtype, compute in COMPUTE_DTYPES.items()]
    storage += [(dtype, COMPUTE_DTYPES[dtype], False) for dtype in narrow]
    return [
        multi_tensor.variant(rule, dtype, state_dtype, has_grad, has_max, has_master, trusts_master)
        for dtype, state_dtype, has_master in storage
        for has_max in ((False, True) if "exp_avg_sq" in rule.state_keys else (False,))
        for trusts_master in ((False, True) if has_master else (False,))
    ]
