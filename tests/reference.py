"""Algorithm 1 of the XGrad paper, literally, one parameter at a time; it imports nothing of xgrad_optim.

Numpy rounds each operation once, to the arrays' dtype, so in float32 the order of operations below is the numeric
contract's. `Reference` keeps theta beside the model, as the paper does: copy the weights, predict, run forward and
backward, copy back, update.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

Array = np.ndarray


class Reference:
    """One optimizer of the family over a list of arrays.

    `name` is that of a rule, which has a method below; `options` are the constructor's; the dtype of the arrays is the
    compute type. What it computes beyond the paper is the numeric contract's rounding to narrower types: `store`
    rounds to the state's dtype, `write` to the parameter's, and without `master_weights` theta is rounded so that it
    survives the way to theta_hat and back.
    """

    def __init__(
        self,
        name: str,
        thetas: list[Array],
        options: dict,
        decoupled: bool,
        store: Callable[[Array], Array] = lambda values: values,
        write: Callable[[Array], Array] = lambda values: values,
    ) -> None:
        self.store, self.write = store, write
        self.name, self.options, self.decoupled = name, options, decoupled
        self.thetas = [np.array(theta) for theta in thetas]
        self.states: list[dict[str, Array]] = [{} for _ in thetas]
        self.steps = [0 for _ in thetas]
        self.deltas: list[Array] = [np.zeros_like(theta) for theta in self.thetas]
        self.step_sizes = [0.0 for _ in thetas]

    def _displacement(self, index: int) -> Array | None:
        """d = s * step_size * delta, of the last update."""
        theta, shift = self.thetas[index], self.options["prediction_steps"] * self.step_sizes[index]
        return theta.dtype.type(shift) * self.deltas[index] if shift else None

    def predicted(self) -> list[Array]:
        """theta_hat = theta - s * step_size * delta, with the last update's step_size and delta."""
        predicted = []
        for index, theta in enumerate(self.thetas):
            displacement = self._displacement(index)
            if displacement is not None and not self.options["master_weights"]:
                displacement = self.write(displacement)
            predicted.append(self.write(theta if displacement is None else theta - displacement))
        return predicted

    def update(self, grads: list[Array | None]) -> None:
        """The base optimizer's update of theta with gradients that were taken at theta_hat."""
        for index, grad in enumerate(grads):
            if grad is not None:
                self._update_one(index, grad)

    def _update_one(self, index: int, grad: Array) -> None:
        options, theta = self.options, self.thetas[index]
        real = theta.dtype.type
        self.steps[index] += 1
        if options.get("maximize"):
            grad = -grad
        if options["weight_decay"] and not self.decoupled:
            grad = grad + real(options["weight_decay"]) * theta
        if self.decoupled:
            theta = theta * real(1 - options["lr"] * options["weight_decay"])
        rule: Callable = getattr(self, f"_{self.name}")
        delta, step_size, *update = rule(self.states[index], grad, self.steps[index], real)
        self.deltas[index], self.step_sizes[index] = delta, step_size
        self.thetas[index] = theta - real(step_size) * (update[0] if update else delta)
        if not self.options["master_weights"]:
            self._settle(index)

    def _settle(self, index: int) -> None:
        """Round theta to the parameter's dtype and to where theta - d + d is theta (docs/numerics.md)."""
        theta = self.write(self.thetas[index])
        displacement = self._displacement(index)
        if displacement is not None:
            displacement = self.write(displacement)
            theta = self.write(self.write(theta - displacement) + displacement)
        self.thetas[index] = theta

    def _sgdm(self, state: dict[str, Array], grad: Array, step: int, real: type) -> tuple[Array, float]:
        options = self.options
        if step == 1 or options["momentum"] == 0:
            state["momentum_buffer"] = self.store(grad)
        else:
            old = state["momentum_buffer"]
            new = real(options["momentum"]) * old + real(1 - options["dampening"]) * grad
            state["momentum_buffer"] = self.store(new)
        return state["momentum_buffer"], options["lr"]

    def _moments(self, state: dict[str, Array], grad: Array, real: type) -> tuple[Array, Array]:
        m = state.get("exp_avg", np.zeros_like(grad))
        v = state.get("exp_avg_sq", np.zeros_like(grad))
        beta1 = self.options["betas"][0]
        return m + real(1 - beta1) * (grad - m), v

    def _second(self, state: dict[str, Array], v: Array) -> Array:
        """What stands under the root: v, or amsgrad's running maximum of it."""
        if not self.options["amsgrad"]:
            return v
        state["max_exp_avg_sq"] = np.maximum(state.get("max_exp_avg_sq", np.zeros_like(v)), v)
        return state["max_exp_avg_sq"]

    def _finish(self, step: int, real: type) -> tuple[Array, float]:
        beta1, beta2 = self.options["betas"]
        return real(1 / math.sqrt(1 - _power(beta2, step))), self.options["lr"] / (1 - _power(beta1, step))

    def _adam(self, state: dict[str, Array], grad: Array, step: int, real: type) -> tuple[Array, float]:
        beta2, eps = self.options["betas"][1], self.options["eps"]
        m, v = self._moments(state, grad, real)
        v = real(beta2) * v + real(1 - beta2) * (grad * grad)
        m, v = state["exp_avg"], state["exp_avg_sq"] = self.store(m), self.store(v)
        r, step_size = self._finish(step, real)
        return m / (np.sqrt(self._second(state, v)) * r + real(eps)), step_size

    def _adabelief(self, state: dict[str, Array], grad: Array, step: int, real: type) -> tuple[Array, float]:
        beta2, eps = self.options["betas"][1], self.options["eps"]
        m, v = self._moments(state, grad, real)
        surprise = grad - m
        v = real(beta2) * v + real(1 - beta2) * (surprise * surprise) + real(eps)
        m, v = state["exp_avg"], state["exp_avg_sq"] = self.store(m), self.store(v)
        r, step_size = self._finish(step, real)
        return m / (np.sqrt(self._second(state, v)) * r + real(eps)), step_size

    def _adaplus(self, state: dict[str, Array], grad: Array, step: int, real: type) -> tuple[Array, float, Array]:
        """The update's numerator is beta1 * m + (1 - beta1) * g; what follows it is predicted from m alone."""
        delta, step_size = self._adabelief(state, grad, step, real)
        m, v, beta1 = state["exp_avg"], state["exp_avg_sq"], self.options["betas"][0]
        denom = np.sqrt(state.get("max_exp_avg_sq", v)) * self._finish(step, real)[0] + real(self.options["eps"])
        return delta, step_size, (m + real(1 - beta1) * (grad - m)) / denom

    def _rmsprop(self, state: dict[str, Array], grad: Array, step: int, real: type) -> tuple[Array, float]:
        options, zero = self.options, np.zeros_like(grad)
        alpha, one_minus_alpha = real(options["alpha"]), real(1 - options["alpha"])
        v = alpha * state.get("square_avg", zero) + one_minus_alpha * (grad * grad)
        variance = v
        if options["centered"]:
            mean = state.get("grad_avg", zero)
            mean = mean + one_minus_alpha * (grad - mean)
            variance = np.maximum(v - mean * mean, 0)
            state["grad_avg"] = self.store(mean)
        buffer = grad / (np.sqrt(variance) + real(options["eps"]))
        if options["momentum"] != 0:
            buffer = real(options["momentum"]) * state.get("momentum_buffer", zero) + buffer
        state["square_avg"], state["momentum_buffer"] = self.store(v), self.store(buffer)
        return state["momentum_buffer"], options["lr"]

    def _adam3(self, state: dict[str, Array], grad: Array, step: int, real: type) -> tuple[Array, float]:
        beta2, eps = self.options["betas"][1], self.options["eps"]
        m, v = self._moments(state, grad, real)
        v = real(beta2) * v + real(1 - beta2) * (m * m) + real(eps)
        m, v = state["exp_avg"], state["exp_avg_sq"] = self.store(m), self.store(v)
        r, step_size = self._finish(step, real)
        return np.where(m == 0, m, m / (np.sqrt(self._second(state, v)) * r)), step_size


def algorithm_1(
    reference: Reference, model: torch.nn.Module, loss: Callable[[torch.nn.Module, int], torch.Tensor], step: int
) -> None:
    """One step of Algorithm 1: the model visits theta_hat for forward and backward and comes back with theta."""
    params = list(model.parameters())
    with torch.no_grad():
        for param, theta_hat in zip(params, reference.predicted(), strict=True):
            param.copy_(torch.from_numpy(theta_hat))
    model.zero_grad()
    loss(model, step).backward()
    reference.update([None if p.grad is None else p.grad.numpy().copy() for p in params])
    with torch.no_grad():
        for param, theta in zip(params, reference.thetas, strict=True):
            param.copy_(torch.from_numpy(theta))


def _power(base: float, exponent: int) -> float:
    """By squaring, from the lowest bit of the exponent on: no library promises the last bit of its pow."""
    result = 1.0
    for bit in reversed(f"{exponent:b}"):
        if bit == "1":
            result = result * base
        base = base * base
    return result
