"""The Triton kernels' variants, compiled without a GPU, run in ptxsim, or interpreted."""

import functools
import importlib
import sys
from typing import Any

import ptxsim
import torch
import triton
import triton.language as tl
from family import RULES
from random_launch import RandomLaunch, Variant
from simulation import simulate
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xgrad_optim import backends

multi_tensor: Any = backends._module("triton")
rows: Any = multi_tensor.rows

STEP_TYPES = {
    "table_ptr": "*i64",
    "grads_ptr": "*i64",
    "next_numbers_ptr": "*fp64",
    "chunks_ptr": "*i32",
    "chunk_size": "i32",
}
ROWS_TYPES = {
    "table_ptr": "*i64",
    "group_of_ptr": "*i64",
    "options_ptr": "*i64",
    "next_numbers_ptr": "*fp64",
    "n_tensors": "i32",
}


def constants_of(variant: Variant) -> dict[str, Any]:
    rule, dtypes = RULES[variant.rule], (variant.dtype, variant.state_dtype)
    return multi_tensor.variant(rule, *dtypes, variant.has_optional, variant.has_master_weights)


@functools.cache
def compile_step(variant: Variant, architecture: str) -> Any:
    """One variant for one compute capability, with the just-in-time compiler's own signature and options."""
    constants = constants_of(variant)
    types = {**STEP_TYPES, "rows_ptr": "*fp64" if constants["PARAM"] == tl.float64 else "*fp32"}
    if not variant.has_grad:
        del types["grads_ptr"]
        constants["grads_ptr"] = None
    target = _target(architecture)
    options = multi_tensor.options_for(target.backend, target.warp_size, constants)
    return _compile(multi_tensor.multi_tensor_kernel, types, constants, options, architecture)


@functools.cache
def compile_rows(rule: str, is_double: bool, is_step: bool, architecture: str) -> Any:
    types = {**ROWS_TYPES, "rows_ptr": "*fp64" if is_double else "*fp32"}
    constants = multi_tensor.rows_variant(RULES[rule], is_step)
    return _compile(rows.make_rows_kernel, types, constants, rows.OPTIONS, architecture)


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], options: dict, architecture: str) -> Any:
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=_target(architecture), options=options)


def _target(architecture: str) -> GPUTarget:
    """sm_90 is NVIDIA's, gfx942 is AMD's, whose data-centre GPUs have warps of 64."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@functools.cache
def load(compiled: Any) -> ptxsim.Kernel:
    return ptxsim.load_ptx(compiled.asm["ptx"])[compiled.metadata.name]


def run_simulated(launch: RandomLaunch, architecture: str) -> Any:
    """Returns ptxsim's statistics."""
    compiled = compile_step(launch.variant, architecture)

    def arguments(tables: dict[str, int]) -> list[int]:
        grads = [tables["grads"]] * launch.variant.has_grad
        others = [tables[name] for name in ("rows", "next_numbers", "chunks")]
        return [tables["table"], *grads, *others, launch.chunk_size]

    return simulate(load(compiled), 32 * compiled.metadata.num_warps, launch, arguments, compiled.metadata.shared)


@functools.cache
def interpreted_kernels() -> Any:
    """A second copy of the kernels, whose functions run in Triton's interpreter, on CPU tensors."""
    names = [f"xgrad_optim.kernels.{name}" for name in ("rules", "element", "rows", "multi_tensor")]
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
