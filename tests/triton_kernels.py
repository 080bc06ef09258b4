"""The Triton kernel's variants, compiled without a GPU, and what stands in for the kernel where there is none."""

import functools
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from simulation import Simulator, ptxsim
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xgrad_optim import backends

multi_tensor: Any = backends._module("triton")
KERNEL = multi_tensor.multi_tensor_kernel

_POINTERS = {"addresses_ptr": "*i64", "numels_ptr": "*i64", "row_of_ptr": "*i32", "chunks_ptr": "*i32"}


def compile_kernel(arch: int, constants: dict[str, Any]) -> Any:
    """One variant for one compute capability, with the just-in-time compiler's own signature and options."""
    rows = "*fp64" if constants["PARAM"] == tl.float64 else "*fp32"
    types = {**_POINTERS, "rows_ptr": rows, "chunk_size": "i32"}
    signature = {name: types.get(name, "constexpr") for name in KERNEL.arg_names}
    source = ASTSource(fn=KERNEL, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=multi_tensor.OPTIONS)


@functools.cache
def _load(arch: int, constants: tuple[tuple[str, Any], ...]) -> tuple[Any, int, int]:
    """The variant for the simulator, its threads, its shared memory."""
    compiled = compile_kernel(arch, dict(constants))
    kernel = ptxsim.load_ptx(compiled.asm["ptx"])[compiled.metadata.name]
    return kernel, 32 * compiled.metadata.num_warps, compiled.metadata.shared


class SimulatedKernel:
    """Takes the place of `multi_tensor_kernel`: `kernel[grid](...)` runs in the simulator."""

    def __init__(self, arch: int = 90) -> None:
        self.simulator = Simulator()
        self._arch = arch

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(addresses: Any, numels: Any, *others: Any, **constants: Any) -> None:
            constants = {name: value for name, value in constants.items() if name not in multi_tensor.OPTIONS}
            kernel, block, shared = _load(self._arch, tuple(constants.items()))
            param, state = (constants[name].primitive_bitwidth // 8 for name in ("PARAM", "STATE"))
            widths = (param, param, state, state, state, max(param, 4))
            arguments = (addresses, numels, *others)
            self.simulator.run(kernel, grid[0], block, arguments, addresses, numels, widths, shared)

        return launch
