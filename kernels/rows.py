"""The rows of a launch whose numbers live on its device, in float64: the Triton text of csrc/rows.h."""

import triton
import triton.language as tl

from xgrad_optim.launch import LINE_LENGTH as _LINE_LENGTH
from xgrad_optim.launch import NUMBERS as _NUMBERS
from xgrad_optim.rule import COMMON_OPTIONS

LINE_LENGTH = tl.constexpr(_LINE_LENGTH)
NUMBERS_COLUMN = tl.constexpr(_NUMBERS)
N_COMMON = tl.constexpr(len(COMMON_OPTIONS))

BLOCK = 32
"""Tensors of one program, which is one warp."""

OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": False}


@triton.jit
def value_at(address, DTYPE: tl.constexpr, mask):
    return tl.load(address.to(tl.pointer_type(DTYPE)), mask, other=0).to(tl.float64)


@triton.jit
def load_option(option_ptr, mask):
    """A number's own bits, or what is at an address of this kind (`KINDS` of xgrad_optim/numbers.py)."""
    kind = tl.load(option_ptr, mask, other=0)
    bits = tl.load(option_ptr + 1, mask, other=0)
    value = bits.to(tl.float64, bitcast=True)
    value = tl.where(kind == 1, value_at(bits, tl.float64, mask & (kind == 1)), value)
    value = tl.where(kind == 2, value_at(bits, tl.float32, mask & (kind == 2)), value)
    value = tl.where(kind == 3, value_at(bits, tl.bfloat16, mask & (kind == 3)), value)
    return tl.where(kind == 4, value_at(bits, tl.float16, mask & (kind == 4)), value)


@triton.jit
def load_options(options_ptr, mask, COUNT: tl.constexpr):
    options = ()
    for i in tl.static_range(COUNT):
        options += (load_option(options_ptr + 2 * i, mask),)
    return options


@triton.jit
def load_numbers(numbers_ptr, mask, COUNT: tl.constexpr):
    numbers = ()
    for i in tl.static_range(COUNT):
        numbers += (tl.load(numbers_ptr + i, mask, other=0),)
    return numbers


@triton.jit
def store_numbers(numbers_ptr, numbers, mask):
    """Each of them rounded to what the pointer points to, once."""
    for i in tl.static_range(len(numbers)):
        tl.store(numbers_ptr + i, numbers[i].to(numbers_ptr.dtype.element_ty), mask)


@triton.jit
def step_row(options, common, step, was_predicted, shift, COEFFICIENTS: tl.constexpr):
    """Update and predict with today's hyperparameters: the columns of every rule but is_skipped, the rule's own, and
    direction's."""
    weight_decay, is_decoupled, maximize, prediction_steps, grad_scale, _, _ = common
    step_size, accumulate, direction = COEFFICIENTS(options, step)
    grad_factor = tl.where(maximize != 0, -1.0, 1.0) / grad_scale
    penalty = tl.where(is_decoupled != 0, 0.0, weight_decay)
    decay_factor = tl.where(is_decoupled != 0, 1.0 - options[0] * weight_decay, 1.0)
    columns = grad_factor, penalty, decay_factor, step_size
    columns += prediction_steps * step_size, tl.where(was_predicted, shift, 0.0)
    return columns, accumulate, direction


@triton.jit(do_not_specialize=["n_tensors"])
def make_rows_kernel(
    table_ptr,
    group_of_ptr,
    options_ptr,
    rows_ptr,
    next_numbers_ptr,
    n_tensors,
    COEFFICIENTS: tl.constexpr,
    N_OPTIONS: tl.constexpr,
    N_ACCUMULATE: tl.constexpr,
    N_DIRECTION: tl.constexpr,
    IS_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane per tensor. Only reads the numbers: nothing has happened yet where the launch after it can't run."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = tensor < n_tensors
    group_ptr = options_ptr + tl.load(group_of_ptr + tensor, mask, other=0) * (2 * (N_OPTIONS + N_COMMON))
    options = load_options(group_ptr, mask, N_OPTIONS)
    common = load_options(group_ptr + 2 * N_OPTIONS, mask, N_COMMON)
    numbers_ptr = tl.load(table_ptr + tensor * LINE_LENGTH + NUMBERS_COLUMN, mask, other=0)
    numbers_ptr = numbers_ptr.to(tl.pointer_type(tl.float64))
    step, predicted, shift = load_numbers(numbers_ptr, mask, 3)
    direction_prev = load_numbers(numbers_ptr + 3, mask, N_DIRECTION)
    is_skipped, to_predicted = common[5], common[6] != 0
    was_predicted = predicted != 0
    if IS_STEP:
        step += 1.0
        columns, accumulate, direction = step_row(options, common, step, was_predicted, shift, COEFFICIENTS)
        after = (step, tl.full(step.shape, 1.0, tl.float64), columns[4])
    else:
        # What is in place stays untouched: with a shift of 0 the master would take theta_hat for a foreign write.
        is_skipped = tl.where(to_predicted == was_predicted, 1.0, is_skipped)
        zero = tl.zeros(step.shape, tl.float64)
        there = tl.where(to_predicted & (predicted == 0), shift, 0.0)
        back = tl.where(was_predicted & (common[6] == 0), shift, 0.0)
        columns, direction = (zero, zero, zero, zero, there, back), direction_prev
        accumulate = ()
        for _ in tl.static_range(N_ACCUMULATE):
            accumulate += (zero,)
        after = (step, tl.where(to_predicted, 1.0, 0.0).to(tl.float64), shift)
    n_columns = 1 + len(columns) + N_ACCUMULATE + 2 * N_DIRECTION
    row = (is_skipped,)
    row += columns + accumulate + direction + direction_prev
    store_numbers(rows_ptr + tensor * n_columns, row, mask)
    store_numbers(next_numbers_ptr + tensor * (3 + N_DIRECTION), after + direction, mask)
