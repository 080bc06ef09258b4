"""Each rule's math as Triton functions of one block, in the order of operations of csrc/rules.h.

    coefficients(options, step) -> step_size, accumulate's numbers, direction's
    accumulate(grad, state, hyper) -> state    advance the state with this gradient
    direction(state, hyper) -> delta           of predictions, and of updates but where there is
    update(grad, state, hyper) -> delta        of updates alone

`options` is a tuple in the order of the rule's `options`, of float64 numbers, as are the coefficients.

`state` is a tuple of blocks in the order of the rule's `state_keys` (xgrad_optim/rule.py), the momentum first; where a
launch has the rule's optional buffer, that is the last. `hyper` is one of numbers: for direction its
`direction_columns`, for accumulate and update its `accumulate_columns` and then these. Each
operation rounds once: compile with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl


@triton.jit
def sqrt(x):
    """The correctly rounded square root; `tl.sqrt` is that in float64 only, `tl.sqrt_rn` exists in float32 only."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(a, b):
    """The correctly rounded quotient; `/` is that in float64 only, `tl.div_rn` exists in float32 only."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def maximum(a, b):
    """NaN where either is, as torch.maximum."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def power(base, exponent):
    """base**exponent by repeated squaring, each product rounded once: the bits of csrc/numeric.h."""
    result = tl.full(base.shape, 1.0, base.dtype)
    while tl.max(exponent) > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base = base * base
        exponent = exponent // 2
    return result


@triton.jit
def sgdm_coefficients(options, step):
    lr, momentum, dampening = options
    # The first step has no buffer yet.
    return lr, (tl.where(step > 1, momentum, 0.0), 1.0 - dampening), ()


@triton.jit
def adam_coefficients(options, step):
    """The numbers of the whole Adam family."""
    lr, beta1, beta2, eps = options
    t = step.to(tl.int64)
    step_size = lr / (1.0 - power(beta1, t))
    rsqrt_bias_correction2 = 1.0 / sqrt(1.0 - power(beta2, t))
    return step_size, (1.0 - beta1, beta2, 1.0 - beta2), (rsqrt_bias_correction2, eps)


@triton.jit
def adam3_coefficients(options, step):
    step_size, accumulate, direction = adam_coefficients(options, step)
    return step_size, (accumulate[0], accumulate[1], accumulate[2], options[3]), (direction[0],)


@triton.jit
def sgdm_accumulate(grad, state, hyper):
    (momentum_buffer,) = state
    momentum, one_minus_dampening = hyper
    # A momentum of 0 starts the buffer afresh: 0 * NaN must not spread.
    return (tl.where(momentum == 0, grad, momentum * momentum_buffer + one_minus_dampening * grad),)


@triton.jit
def sgdm_direction(state, hyper):
    return state[0]


@triton.jit
def moments(state, exp_avg, exp_avg_sq):
    """The new state: with amsgrad it has the running maximum of the second moment, too."""
    if len(state) == 3:
        return exp_avg, exp_avg_sq, maximum(state[2], exp_avg_sq)
    else:
        return exp_avg, exp_avg_sq


@triton.jit
def second_moment(state):
    """exp_avg_sq; with amsgrad its running maximum stands in for it."""
    if len(state) == 3:
        return state[2]
    else:
        return state[1]


@triton.jit
def adam_accumulate(grad, state, hyper):
    exp_avg, exp_avg_sq = state[0], state[1]
    one_minus_beta1, beta2, one_minus_beta2, _, _ = hyper
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    return moments(state, exp_avg, beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad))


@triton.jit
def denominator(state, rsqrt_bias_correction2, eps):
    return sqrt(second_moment(state)) * rsqrt_bias_correction2 + eps


@triton.jit
def adam_direction(state, hyper):
    rsqrt_bias_correction2, eps = hyper
    return divide(state[0], denominator(state, rsqrt_bias_correction2, eps))


@triton.jit
def adabelief_accumulate(grad, state, hyper):
    """The second moment is of the surprise, grad - exp_avg (Zhuang et al. 2020, Algorithm 2)."""
    exp_avg, exp_avg_sq = state[0], state[1]
    one_minus_beta1, beta2, one_minus_beta2, _, eps = hyper
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    surprise = grad - exp_avg
    return moments(state, exp_avg, beta2 * exp_avg_sq + one_minus_beta2 * (surprise * surprise) + eps)


@triton.jit
def adam3_accumulate(grad, state, hyper):
    """The second moment is of the momentum (arXiv 2106.11514)."""
    exp_avg, exp_avg_sq = state[0], state[1]
    one_minus_beta1, beta2, one_minus_beta2, eps, _ = hyper
    exp_avg = exp_avg + one_minus_beta1 * (grad - exp_avg)
    return moments(state, exp_avg, beta2 * exp_avg_sq + one_minus_beta2 * (exp_avg * exp_avg) + eps)


@triton.jit
def adam3_direction(state, hyper):
    exp_avg = state[0]
    (rsqrt_bias_correction2,) = hyper
    # Zero momentum stays zero, over a second moment of zero too.
    return divide(exp_avg, tl.where(exp_avg == 0, 1.0, sqrt(second_moment(state)) * rsqrt_bias_correction2))


@triton.jit
def adaplus_update(grad, state, hyper):
    """AdaPlus (arXiv 2309.01966): Nesterov's numerator over AdaBelief's root."""
    one_minus_beta1, _, _, rsqrt_bias_correction2, eps = hyper
    ahead = one_minus_beta1 * (grad - state[0]) + state[0]
    return divide(ahead, denominator(state, rsqrt_bias_correction2, eps))


@triton.jit
def rmsprop_coefficients(options, step):
    lr, alpha, eps, momentum = options
    return lr, (tl.where(momentum > 0, momentum, 0.0), alpha, 1.0 - alpha, eps), ()


@triton.jit
def rmsprop_accumulate(grad, state, hyper):
    """The quotient goes into the buffer, with a momentum of 0, too. Centered, the third state is the mean gradient."""
    momentum, alpha, one_minus_alpha, eps = hyper
    square_avg = alpha * state[1] + one_minus_alpha * (grad * grad)
    variance, means = square_avg, ()
    if len(state) == 3:
        grad_avg = state[2] + one_minus_alpha * (grad - state[2])
        variance = maximum(square_avg - grad_avg * grad_avg, 0.0)
        means = (grad_avg,)
    quotient = divide(grad, sqrt(variance) + eps)
    momentum_buffer = tl.where(momentum == 0, quotient, momentum * state[0] + quotient)
    # Triton unpacks no tuples.
    return (momentum_buffer, square_avg) + means  # noqa: RUF005


@triton.jit
def rmsprop_direction(state, hyper):
    return state[0]


RULES = {
    "sgdm": (sgdm_coefficients, sgdm_accumulate, sgdm_direction, None),
    "adam": (adam_coefficients, adam_accumulate, adam_direction, None),
    "adabelief": (adam_coefficients, adabelief_accumulate, adam_direction, None),
    "adam3": (adam3_coefficients, adam3_accumulate, adam3_direction, None),
    "adaplus": (adam_coefficients, adabelief_accumulate, adam_direction, adaplus_update),
    "rmsprop": (rmsprop_coefficients, rmsprop_accumulate, rmsprop_direction, None),
}
"""The functions by the rule's name; None for an update along the direction."""
