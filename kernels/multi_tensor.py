"""The Triton back end: one launch over the addresses of all tensors of a Launch, one program for each chunk."""

from typing import Any

import torch
import triton
import triton.language as tl

from xgrad_optim import backend_device
from xgrad_optim.device_tables import Uploaded
from xgrad_optim.kernels.element import run_element
from xgrad_optim.kernels.rules import RULES
from xgrad_optim.launch import Launch
from xgrad_optim.numeric import COMPUTE_DTYPES
from xgrad_optim.rule import STEP_COLUMNS, Rule
from xgrad_optim.tensor_reader import SLOTS

DEVICES = ("cuda", "xpu")
"""Types of devices that Triton compiles for; ROCm's GPUs are "cuda" to torch."""

BLOCK_BYTES = 2048
"""A block of a tensor, in the compute type: what a program works on at a time. Each of its 128 threads has 16 bytes,
the widest access there is, and so few registers that many programs share a multiprocessor."""

OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
"""4 warps of 32 threads. No stages: other programs run while one waits for memory. No fusion: each operation rounds."""

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

PARAM_SLOT = tl.constexpr(SLOTS["param"])
GRAD_SLOT = tl.constexpr(SLOTS["grad"])
STATE_SLOT = tl.constexpr(SLOTS["exp_avg"])  # and exp_avg_sq and max_exp_avg_sq after it
MASTER_WEIGHTS_SLOT = tl.constexpr(SLOTS["master_weights"])
N_SLOTS = tl.constexpr(max(SLOTS.values()) + 1)
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
def buffer_of(address, offset, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    """A pointer to the element at this offset. An address from a table has no alignment, the compiler must be told."""
    buffer_ptr = (address + offset * (DTYPE.primitive_bitwidth // 8)).to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        buffer_ptr = tl.multiple_of(buffer_ptr, ALIGNMENT)
    return buffer_ptr


@triton.jit
def run_block(
    buffers, elements, mask, numbers, ACCUMULATE: tl.constexpr, DIRECTION: tl.constexpr, TRUSTS_MASTER: tl.constexpr
):
    """Load, run, store."""
    param_ptr, grad_ptr, state_ptrs, master_weights_ptr = buffers
    PARAM: tl.constexpr = param_ptr.dtype.element_ty
    STATE: tl.constexpr = state_ptrs[0].dtype.element_ty
    COMPUTE: tl.constexpr = numbers[0][0].dtype
    param, grad, state, master_weights = None, None, (), None
    if not TRUSTS_MASTER:
        param = tl.load(param_ptr + elements, mask).to(COMPUTE)
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + elements, mask).to(COMPUTE)
    for i in tl.static_range(len(state_ptrs)):
        state += (tl.load(state_ptrs[i] + elements, mask).to(COMPUTE),)
    if master_weights_ptr is not None:
        master_weights = tl.load(master_weights_ptr + elements, mask)

    param, state, theta = run_element(
        param, grad, state, master_weights, numbers, ACCUMULATE, DIRECTION, PARAM, STATE
    )

    tl.store(param_ptr + elements, param.to(PARAM), mask)
    if grad_ptr is not None:  # a swap changes no state
        for i in tl.static_range(len(state_ptrs)):
            tl.store(state_ptrs[i] + elements, state[i].to(STATE), mask)
    if master_weights_ptr is not None and (grad_ptr is not None or not TRUSTS_MASTER):
        tl.store(master_weights_ptr + elements, theta, mask)


@triton.jit
def run_blocks(
    addresses,
    offset,
    start,
    end,
    count,
    numbers,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    N_STATES: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_MASTER_WEIGHTS: tl.constexpr,
    TRUSTS_MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Blocks from `start` to `end` of the chunk at this offset: whole and aligned ones, or any."""
    COMPUTE: tl.constexpr = numbers[0][0].dtype
    param_ptr = buffer_of(addresses[PARAM_SLOT], offset, PARAM, IS_WHOLE)
    grad_ptr, state_ptrs, master_weights_ptr = None, (), None
    if HAS_GRAD:
        grad_ptr = buffer_of(addresses[GRAD_SLOT], offset, PARAM, IS_WHOLE)
    for i in tl.static_range(N_STATES):
        state_ptrs += (buffer_of(addresses[STATE_SLOT + i], offset, STATE, IS_WHOLE),)
    if HAS_MASTER_WEIGHTS:
        master_weights_ptr = buffer_of(addresses[MASTER_WEIGHTS_SLOT], offset, COMPUTE, IS_WHOLE)
    buffers = param_ptr, grad_ptr, state_ptrs, master_weights_ptr
    for first in range(start, end, BLOCK):
        elements = first + tl.arange(0, BLOCK)
        mask = None if IS_WHOLE else elements < count
        run_block(buffers, elements, mask, numbers, ACCUMULATE, DIRECTION, TRUSTS_MASTER)


@triton.jit(do_not_specialize=["chunk_size"])
def multi_tensor_kernel(
    addresses_ptr,
    numels_ptr,
    row_of_ptr,
    rows_ptr,
    chunks_ptr,
    chunk_size,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    N_STATES: tl.constexpr,
    N_ACCUMULATE: tl.constexpr,
    N_DIRECTION: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_MASTER_WEIGHTS: tl.constexpr,
    TRUSTS_MASTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk_ptr = chunks_ptr + 2 * tl.program_id(0)
    tensor = tl.load(chunk_ptr).to(tl.int64)
    offset = tl.load(chunk_ptr + 1).to(tl.int64) * chunk_size
    count = tl.minimum(tl.load(numels_ptr + tensor) - offset, chunk_size).to(tl.int32)
    addresses = load_numbers(addresses_ptr + tensor * N_SLOTS, N_SLOTS)
    n_columns = N_STEP_COLUMNS + N_ACCUMULATE + 2 * N_DIRECTION
    numbers = load_row(rows_ptr + tl.load(row_of_ptr + tensor) * n_columns, N_ACCUMULATE, N_DIRECTION)
    is_skipped = numbers[0][0] != 0
    if (addresses[PARAM_SLOT] == 0) | is_skipped:
        return
    # Offsets are multiples of 16 bytes unless somebody chose an odd chunk size; 2 bytes is the smallest element.
    bits = offset * 2
    for slot in tl.static_range(N_SLOTS):
        bits = bits | addresses[slot]
    end_of_whole = tl.where(bits % ALIGNMENT == 0, count // BLOCK * BLOCK, 0)
    run_blocks(addresses, offset, 0, end_of_whole, count, numbers, ACCUMULATE, DIRECTION, N_STATES, PARAM, STATE,
               HAS_GRAD, HAS_MASTER_WEIGHTS, TRUSTS_MASTER, BLOCK, True)  # fmt: skip
    run_blocks(addresses, offset, end_of_whole, count, count, numbers, ACCUMULATE, DIRECTION, N_STATES, PARAM, STATE,
               HAS_GRAD, HAS_MASTER_WEIGHTS, TRUSTS_MASTER, BLOCK // 2, False)  # fmt: skip


def unavailable() -> str | None:
    """Why this machine can't run it: the kernel needs a GPU, unless it is interpreted (TRITON_INTERPRET=1)."""
    if _runs_on_cpu():
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return "this machine has no GPU that torch can use"
    return None if accelerator.type in DEVICES else f"it does not serve {accelerator.type}"


def why_not(launch: Launch) -> str | None:
    return launch.why_no_kernel(("cpu",) if _runs_on_cpu() else DEVICES)


prepare = backend_device.prepare


def run(launch: Launch) -> bool:
    """Restore, update where there are gradients, and predict every tensor of the launch."""
    return backend_device.run(launch, run_kernel)


def run_kernel(launch: Launch, uploaded: Uploaded) -> None:
    """One launch on the current stream, with a program for each chunk."""
    tables, constants = launch.tables, variant_of(launch)
    options = nvidia_options(constants) if torch.version.cuda else OPTIONS
    multi_tensor_kernel[(len(tables.chunks),)](*uploaded, tables.chunk_size, **constants, **options)


def nvidia_options(constants: dict[str, Any]) -> dict[str, Any]:
    """The options, with room for the largest variants: there NVIDIA's assembler spills an address to save registers."""
    is_large = constants["PARAM"] == tl.float64 or (constants["N_STATES"] == 3 and constants["HAS_MASTER_WEIGHTS"])
    return {**OPTIONS, "maxnreg": 128} if is_large else OPTIONS


def variant(
    rule: Rule,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    has_grad: bool,
    has_max_exp_avg_sq: bool,
    has_master_weights: bool,
    trusts_master: bool,
) -> dict[str, Any]:
    """What the kernel is compiled for. No number of the rows is among it, nor how many tensors there are."""
    accumulate, direction = RULES[rule.name]
    return {
        "ACCUMULATE": accumulate,
        "DIRECTION": direction,
        "N_STATES": len(rule.state_keys) + has_max_exp_avg_sq,
        "N_ACCUMULATE": len(rule.accumulate_columns),
        "N_DIRECTION": len(rule.direction_columns),
        "PARAM": DTYPES[dtype],
        "STATE": DTYPES[state_dtype],
        "HAS_GRAD": has_grad,
        "HAS_MASTER_WEIGHTS": has_master_weights,
        "TRUSTS_MASTER": trusts_master,
        "BLOCK": BLOCK_BYTES // COMPUTE_DTYPES[dtype].itemsize,
    }


def variant_of(launch: Launch) -> dict[str, Any]:
    has_max, has_master = "max_exp_avg_sq" in launch.state, "master_weights" in launch.state
    has_grad, trusts = launch.has_grad, launch.trusts_master and has_master
    return variant(launch.rule, launch.dtype, launch.state_dtype, has_grad, has_max, has_master, trusts)


def _runs_on_cpu() -> bool:
    """Whether the kernel is not one that a GPU executes, but what stands in for it in tests."""
    return not isinstance(multi_tensor_kernel, triton.JITFunction)
