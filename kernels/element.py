"""What a launch does to a block of elements, whatever the rule: restore, update, predict. No loads, no stores.

The Triton text of csrc/element.h, in the same order of operations. What the launch does not have is None, at compile
time. Row values are tested at run time, so a new value never recompiles.
"""

import triton
import triton.language as tl


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """The nearest number that the storage can hold, ties to even."""
    return x.to(DTYPE).to(x.dtype)


@triton.jit
def predicted_direction(delta, momentum):
    """delta for a displacement: rows that join with zeros for their state must not be moved by 0 / 0."""
    return tl.where(momentum == 0, momentum, delta)


@triton.jit
def restore(param, master_weights, state, hyper, shift_prev, DIRECTION: tl.constexpr, PARAM: tl.constexpr):
    """theta = R(theta_hat + d): exact, because theta_hat was made from a theta for which it is."""
    expected, theta = master_weights, param
    if shift_prev != 0:  # 0 * delta may be NaN, which must not reach the weights
        displacement = shift_prev * predicted_direction(DIRECTION(state, hyper), state[0])
        if master_weights is None:
            theta = round_to(param + round_to(displacement, PARAM), PARAM)
        else:
            expected = master_weights - displacement
            theta = param + displacement
    if master_weights is None:
        return theta
    else:
        # The master stands where the parameter still holds what it made of it; a foreign write there counts.
        return tl.where(round_to(expected, PARAM) == param, master_weights, theta)


@triton.jit
def penalize(grad, theta, step):
    """The gradient, unscaled and with the penalty of weight decay."""
    _, grad_factor, weight_decay, _, _, _, _ = step
    grad = grad_factor * grad
    return tl.where(weight_decay != 0, grad + weight_decay * theta, grad)


@triton.jit
def advance(grad, state, hyper, ACCUMULATE: tl.constexpr, STATE: tl.constexpr):
    """The state after this gradient, rounded to what will be stored, so that delta can be computed of it again."""
    advanced = ACCUMULATE(grad, state, hyper)
    rounded = ()
    for i in tl.static_range(len(advanced)):
        rounded += (round_to(advanced[i], STATE),)
    return rounded


@triton.jit
def predict(theta, delta, shift, has_master_weights: tl.constexpr, PARAM: tl.constexpr):
    """theta_hat = R(theta - d), from the theta next to it that survives the round trip; the store rounds."""
    displacement = shift * delta
    if has_master_weights:
        theta_hat = theta - displacement
    else:
        d = round_to(displacement, PARAM)
        there = round_to(theta - d, PARAM)
        and_back = round_to(there + d, PARAM)
        theta_hat = and_back - d
    return tl.where(shift != 0, theta_hat, theta)


@triton.jit
def run_element(
    param,
    grad,
    state,
    master_weights,
    numbers,
    ACCUMULATE: tl.constexpr,
    DIRECTION: tl.constexpr,
    UPDATE: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
):
    """The new parameter, state and theta, which is the new master.

    Args:
        grad: None for a swap.
        state: the rule's buffers, the optional one last where there is one.
        master_weights: None where there are none.
        numbers: one row, as tuples: the columns of every rule, the rule's own, its direction's, and the numbers that
            these had in the last prediction.
    """
    step, hyper, direction_hyper, direction_hyper_prev = numbers
    _, _, _, decay_factor, step_size, shift, shift_prev = step
    theta = restore(param, master_weights, state, direction_hyper_prev, shift_prev, DIRECTION, PARAM)
    if grad is not None:
        grad = penalize(grad, theta, step)
        state = advance(grad, state, hyper, ACCUMULATE, STATE)
    delta = DIRECTION(state, direction_hyper)
    if grad is not None:
        moved = delta
        if UPDATE is not None:
            moved = UPDATE(grad, state, hyper)
        theta = theta * decay_factor - step_size * moved
        if master_weights is None:
            theta = round_to(theta, PARAM)
    else:
        delta = predicted_direction(delta, state[0])
    return predict(theta, delta, shift, master_weights is not None, PARAM), state, theta
