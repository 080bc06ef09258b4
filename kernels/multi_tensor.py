"""The Triton back end: one launch over the addresses of all tensors of a Launch, one program for each chunk."""

from typing import Any

import torch
import triton
import triton.language as tl

from xgrad_optim.backends.gpu import GpuRunner, Uploaded
from xgrad_optim.kernels import rows
from xgrad_optim.kernels.element import run_element
from xgrad_optim.kernels.rules import RULES
from xgrad_optim.launch import LINE_LENGTH, MASTER_WEIGHTS, NUMBERS, NUMEL, ROW, Launch
from xgrad_optim.launch import PARAM as _PARAM
from xgrad_optim.launch import STATE as _STATE
from xgrad_optim.numbers import DeviceNumbers, Numbers
from xgrad_optim.numeric import COMPUTE_DTYPES
from xgrad_optim.rule import STEP_COLUMNS, Rule

BLOCK_BYTES = 2048
"""A block of a tensor, in the compute type: what a program works on at a time. Each of its 128 threads has 16 bytes,
the widest access there is, and so few registers that many programs share a multiprocessor."""

THREADS = 128
"""Of a program: 4 warps on NVIDIA's GPUs, 2 on AMD's with warps of 64."""

OPTIONS = {"num_stages": 1, "enable_fp_fusion": False}
"""No stages: other programs run while one waits for memory. No fusion: each operation rounds."""

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

PARAM_COLUMN = tl.constexpr(_PARAM)
STATE_COLUMN = tl.constexpr(_STATE)  # and the others after it, the optional one last
MASTER_WEIGHTS_COLUMN = tl.constexpr(MASTER_WEIGHTS)
NUMEL_COLUMN = tl.constexpr(NUMEL)
ROW_COLUMN = tl.constexpr(ROW)
NUMBERS_COLUMN = tl.constexpr(NUMBERS)
N_COLUMNS = tl.constexpr(LINE_LENGTH)
N_STEP_COLUMNS = tl.constexpr(len(STEP_COLUMNS))

ALIGNMENT = tl.constexpr(16)
"""Bytes. Where all buffers of a chunk begin at a multiple of it, its blocks are read and written without masks."""


@triton.jit
def load_numbers(numbers_ptr, COUNT: tl.constexpr):
    """The numbers from there on, as a tuple."""
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers += (tl.load(numbers_ptr + i),)
    return numbers


@triton.jit
def load_row(row_ptr, N_ACCUMULATE: tl.constexpr, N_DIRECTION: tl.constexpr):
    """One row, as tuples: the columns of every rule, the rule's own, direction's alone, and direction's last time."""
    step = load_numbers(row_ptr, N_STEP_COLUMNS)
    hyper = load_numbers(row_ptr + N_STEP_COLUMNS, N_ACCUMULATE + N_DIRECTION)
    direction_ptr = row_ptr + N_STEP_COLUMNS + N_ACCUMULATE
    direction_hyper = load_numbers(direction_ptr, N_DIRECTION)
    direction_hyper_prev = load_numbers(direction_ptr + N_DIRECTION, N_DIRECTION)
    return step, hyper, direction_hyper, direction_hyper_prev


@triton.jit
def write_numbers(address, next_numbers_ptr, row, COUNT: tl.constexpr):
    """The step count and the prediction, as they are once the launch has run."""
    numbers_ptr = address.to(tl.pointer_type(tl.float64))
    for i in tl.static_range(COUNT):
        tl.store(numbers_ptr + i, tl.load(next_numbers_ptr + row * COUNT + i))


@triton.jit
def buffer_of(address, offset, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """A pointer to the element at this offset. An address from a table has no alignment, the compiler must be told."""
    buffer_ptr = (address + offset * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        buffer_ptr = tl.multiple_of(buffer_ptr, ALIGNMENT)
    return buffer_ptr


@triton.jit
def run_block(
    buffers, elements, mask, numbers, ACCUMULATE: tl.constexpr, DIRECTION: tl.constexpr, UPDATE: tl.constexpr
):
    """Load, run, store."""
    param_ptr, grad_ptr, state_ptrs, master_weights_ptr = buffers
    PARAM: tl.constexpr = param_ptr.dtype.element_ty
    STATE: tl.constexpr = state_ptrs[0].dtype.element_ty
    COMPUTE: tl.constexpr = numbers[0][0].dtype
    grad, state, master_weights = None, (), None
    param = tl.load(param_ptr + elements, mask).to(COMPUTE)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + elements, mask).to(COMPUTE)
    for i in tl.static_range(len(state_ptrs)):
        state += (tl.load(state_ptrs[i] + elements, mask).to(COMPUTE),)
    if master_weights_ptr is not None:
        master_weights = tl.load(master_weights_ptr + elements, mask)

    param, state, theta = run_element(
        param, grad, state, master_weights, numbers, ACCUMULATE, DIRECTION, UPDATE, PARAM, STATE
    )

    tl.store(param_ptr + elements, param.to(PARAM), mask)
    if grad_ptr is not None:  # a swap changes no state
        for i in tl.static_range(len(state_ptrs)):
            tl.store(state_ptrs[i] + elements, state[i].to(STATE), mask)
    if master_weights_ptr is not None:
        tl.store(master_weights_ptr + elements, theta, mask)


@triton.jit
def run_blocks(
    line,
    grad_address,
    offset,
    start,
    end,
    count,
    numbers,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    UPDATE: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    HAS_MASTER_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Blocks from `start` to `end` of the chunk at this offset: whole and aligned ones, or any."""
    COMPUTE: tl.constexpr = numbers[0][0].dtype
    param_ptr = buffer_of(line[PARAM_COLUMN], offset, PARAM, IS_WHOLE)
    grad_ptr, state_ptrs, master_weights_ptr = None, (), None
    if grad_address is not None:
        grad_ptr = buffer_of(grad_address, offset, PARAM, IS_WHOLE)
    for i in tl.static_range(N_STATES):
        state_ptrs += (buffer_of(line[STATE_COLUMN + i], offset, STATE, IS_WHOLE),)
    if HAS_MASTER_WEIGHTS:
        master_weights_ptr = buffer_of(line[MASTER_WEIGHTS_COLUMN], offset, COMPUTE, IS_WHOLE)
    buffers = param_ptr, grad_ptr, state_ptrs, master_weights_ptr
    for first in range(start, end, BLOCK):
        elements = first + tl.arange(0, BLOCK)
        mask = None if IS_WHOLE else elements < count
        run_block(buffers, elements, mask, numbers, ACCUMULATE, DIRECTION, UPDATE)


@triton.jit(do_not_specialize=["chunk_size"])
def multi_tensor_kernel(
    table_ptr,
    grads_ptr,
    rows_ptr,
    next_numbers_ptr,
    chunks_ptr,
    chunk_size,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    UPDATE: tl.constexpr,
    N_STATES: tl.constexpr,
    N_ACCUMULATE: tl.constexpr,
    N_DIRECTION: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    HAS_MASTER_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One load of 8 bytes for the tensor and the index of the chunk in it, in this order in memory.
    chunk = tl.load(chunks_ptr.to(tl.pointer_type(tl.int64)) + tl.program_id(0))
    tensor, index = chunk & 0xFFFFFFFF, chunk >> 32
    offset = index * chunk_size
    line = load_numbers(table_ptr + tensor * N_COLUMNS, N_COLUMNS)
    grad_address = None
    if grads_ptr is not None:
        grad_address = tl.load(grads_ptr + tensor)
    count = tl.minimum(line[NUMEL_COLUMN] - offset, chunk_size).to(tl.int32)
    row = line[ROW_COLUMN]
    n_columns = N_STEP_COLUMNS + N_ACCUMULATE + 2 * N_DIRECTION
    numbers = load_row(rows_ptr + row * n_columns, N_ACCUMULATE, N_DIRECTION)
    if numbers[0][0] != 0:  # is_skipped
        return
    if (index == 0) & (line[NUMBERS_COLUMN] != 0):
        write_numbers(line[NUMBERS_COLUMN], next_numbers_ptr, row, 3 + N_DIRECTION)
    # Offsets are multiples of 16 bytes unless somebody chose an odd chunk size; 2 bytes is the smallest element.
    bits = offset * 2
    for column in tl.static_range(MASTER_WEIGHTS_COLUMN + 1):
        bits = bits | line[column]
    if grad_address is not None:
        bits = bits | grad_address
    end_of_whole = tl.where(bits % ALIGNMENT == 0, count // BLOCK * BLOCK, 0)
    run_blocks(line, grad_address, offset, 0, end_of_whole, count, numbers, ACCUMULATE, DIRECTION, UPDATE, N_STATES,
               PARAM, STATE, HAS_MASTER_WEIGHTS, BLOCK, True)  # fmt: skip
    run_blocks(line, grad_address, offset, end_of_whole, count, count, numbers, ACCUMULATE, DIRECTION, UPDATE, N_STATES,
               PARAM, STATE, HAS_MASTER_WEIGHTS, BLOCK // 2, False)  # fmt: skip


def unavailable() -> str | None:
    """Why this machine can't run it: it needs a GPU that Triton's driver serves, unless it is interpreted."""
    if _is_interpreted():
        return None
    try:
        triton.runtime.driver.active.get_active_torch_device()
    except Exception as error:  # whatever stands between Triton and a GPU: none is there, no compiler, no libcuda
        return f"Triton has no driver here: {_first_line(error)}"
    return None


def why_not(launch: Launch) -> str | None:
    if _is_interpreted():
        return launch.why_no_kernel(("cpu",))
    if launch.device.type == "cpu":
        return "parameters are on cpu, it runs on GPUs"
    if unavailable():
        return None  # which says more than that it does not serve the device
    return launch.why_no_kernel((triton.runtime.driver.active.get_active_torch_device().type,))


def bind(launch: Launch, numbers: Numbers) -> GpuRunner:
    """A runner whose kernels are compiled.

    Raises:
        RuntimeError: they can't be; the text says why. Triton's launcher needs a C compiler, for one.
    """
    kernels = Kernels(launch)
    try:
        kernels.compile(makes_rows=isinstance(numbers, DeviceNumbers))
    except Exception as error:
        raise RuntimeError(f"Triton can't compile its kernels: {_first_line(error)}") from error
    return GpuRunner(launch, numbers, kernels)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Kernels:
    """The two kernels as this launch needs them, on the current stream."""

    def __init__(self, launch: Launch) -> None:
        has_optional, has_master = launch.rule.has_optional(launch.state), "master_weights" in launch.state
        self._constants = variant(launch.rule, launch.dtype, launch.state_dtype, has_optional, has_master)
        self._options = options_of(self._constants)
        self._rows_constants = rows_variant(launch.rule, launch.has_grad)
        self._launch = launch

    def compile(self, makes_rows: bool) -> None:
        """Compile now what a step would compile else, when half of it may have been written."""
        if _is_interpreted():
            return
        grads = torch.int64 if self._launch.has_grad else None
        dtypes = (torch.int64, grads, self._launch.compute_dtype, torch.float64, torch.int32, 1)
        compiled = [multi_tensor_kernel.warmup(*dtypes, grid=(1,), **self._constants, **self._options)]
        if makes_rows:
            dtypes = (torch.int64, torch.int64, torch.int64, self._launch.compute_dtype, torch.float64, 1)
            compiled.append(rows.make_rows_kernel.warmup(*dtypes, grid=(1,), **self._rows_constants, **rows.OPTIONS))
        for kernel in compiled:
            kernel._init_handles()  # the launcher, too

    def make_rows(self, launch: Launch, uploaded: Uploaded) -> None:
        n_tensors = len(launch.params)
        rows.make_rows_kernel[(-(-n_tensors // rows.BLOCK),)](
            uploaded.table,
            uploaded.group_of,
            uploaded.options,
            uploaded.rows,
            uploaded.next_numbers,
            n_tensors,
            **self._rows_constants,
            **rows.OPTIONS,
        )

    def run(self, launch: Launch, uploaded: Uploaded) -> object:
        return multi_tensor_kernel[(len(uploaded.chunks),)](
            uploaded.table,
            uploaded.grads,
            uploaded.rows,
            uploaded.next_numbers,
            uploaded.chunks,
            launch.tables.chunk_size,
            **self._constants,
            **self._options,
        )


def options_of(constants: dict[str, Any]) -> dict[str, Any]:
    """The compiler's options on this machine."""
    if _is_interpreted():
        return {}
    target = triton.runtime.driver.active.get_current_target()
    return options_for(target.backend, target.warp_size, constants)


def options_for(backend: str, warp_size: int, constants: dict[str, Any]) -> dict[str, Any]:
    options = {**OPTIONS, "num_warps": THREADS // warp_size}
    is_large = constants["PARAM"] == tl.float64 or (constants["N_STATES"] == 3 and constants["HAS_MASTER_WEIGHTS"])
    if backend == "cuda":
        # Without a number NVIDIA's assembler spills an address here and there, to save registers that it has. With 72,
        # 7 programs share a multiprocessor.
        options["maxnreg"] = 128 if is_large else 72
    return options


def variant(
    rule: Rule, dtype: torch.dtype, state_dtype: torch.dtype, has_optional: bool, has_master_weights: bool
) -> dict[str, Any]:
    """What the kernel is compiled for. No number of the rows is among it, nor how many tensors there are."""
    _, accumulate, direction, update = RULES[rule.name]
    return {
        "ACCUMULATE": accumulate,
        "DIRECTION": direction,
        "UPDATE": update,
        "N_STATES": len(rule.state_keys) + has_optional,
        "N_ACCUMULATE": len(rule.accumulate_columns),
        "N_DIRECTION": len(rule.direction_columns),
        "PARAM": DTYPES[dtype],
        "STATE": DTYPES[state_dtype],
        "HAS_MASTER_WEIGHTS": has_master_weights,
        "BLOCK": BLOCK_BYTES // COMPUTE_DTYPES[dtype].itemsize,
    }


def rows_variant(rule: Rule, is_step: bool) -> dict[str, Any]:
    """As `variant`, for the kernel that makes the rows."""
    return {
        "COEFFICIENTS": RULES[rule.name][0],
        "N_OPTIONS": len(rule.options),
        "N_ACCUMULATE": len(rule.accumulate_columns),
        "N_DIRECTION": len(rule.direction_columns),
        "IS_STEP": is_step,
        "BLOCK": rows.BLOCK,
    }


def _is_interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 lets the kernel run on CPU tensors."""
    return not isinstance(multi_tensor_kernel, triton.JITFunction)
