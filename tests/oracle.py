"""One parameter as the paper has it: two explicit copies, theta and theta_hat, moved by the literal algorithm."""

from typing import Any

import numpy as np
import torch
from cases import Case
from reference import Reference
from torch import Tensor


class Oracle:
    """What a parameter holds in either mode.

    Attributes:
        theta: in the compute type: the master copy where there is one.
        is_frozen: it holds theta from the next step, train() or eval() on, until it takes a step.
        is_reset: its state has been taken away; the next step or swap finds out.
    """

    def __init__(self, case: Case, param: Tensor) -> None:
        self._case, self._dtype = case, param.dtype
        self.theta = as_array(param)
        self._reference: Reference | None = None
        self._theta_hat = self.theta
        self._is_written = False
        self.is_frozen = self.is_reset = False

    @property
    def has_state(self) -> bool:
        return self._reference is not None

    @property
    def n_steps(self) -> int:
        """What the state counts."""
        return 0 if self._reference is None or self.is_reset else self._reference.steps[0]

    def held(self, is_predicted: bool) -> Tensor:
        values = self._theta_hat if is_predicted and self.has_state else self.theta
        return torch.from_numpy(values).to(self._dtype)

    def look(self, at_frozen: bool = True) -> None:
        """A step or a swap begins: what takes no more steps is brought to theta. A forward leaves frozen ones alone."""
        if self.is_reset:
            self.theta = self._write(self.theta)  # the master copy goes with the state
            self._reference, self.is_reset, self._is_written = None, False, False
        if at_frozen and self.is_frozen and self._reference is not None:
            self._reference.step_sizes[0] = 0.0
            self._theta_hat, self._is_written = self.theta, False

    def predict(self) -> None:
        """theta_hat is put in place. What was written to theta is rounded as a step rounds theta."""
        if self._is_written and self._reference is not None:
            if not self._reference.options["master_weights"]:
                self._reference._settle(0)
                self.theta = self._reference.thetas[0]
            (self._theta_hat,) = self._reference.predicted()
        self._is_written = False

    def write(self, param: Tensor) -> None:
        """Somebody has written to the parameter, which held theta."""
        values = as_array(param)
        if self._reference is None:
            self.theta = values
            return
        is_same = self._write(self.theta) == values  # there the master copy knows more digits
        has_master = self._reference.options["master_weights"]
        self.theta = self._reference.thetas[0] = np.where(is_same, self.theta, values) if has_master else values
        self._is_written = True

    def zero_momentum(self) -> None:
        """The first buffer is zeroed while the parameter holds theta: nothing is predicted from it."""
        assert self._reference is not None
        self._reference.states[0][self._case.optimizer.rule.state_keys[0]] = np.zeros_like(self.theta)
        self._reference.deltas[0] = np.zeros_like(self.theta)
        self._theta_hat = self._write(self.theta)

    def begin(self, options: dict[str, Any]) -> None:
        """A step comes, which may yet be skipped: there is state, with the buffers that the options ask for."""
        given = {name: value for name, value in options.items() if name != "params"}
        if self._reference is None:
            decoupled = given.get("decoupled_weight_decay", False)
            self._reference = Reference(self._case.rule, [self.theta], given, decoupled, write=self._write)
            self._reference.store = self._write  # state without a master copy is as narrow as its parameter
            self._theta_hat = self.theta
        self._follow(given)
        buffers = {name: given[name] for name in ("amsgrad", "master_weights") if name in given}
        self._reference.options = {**self._reference.options, **buffers}

    def step(self, grad: Tensor, options: dict[str, Any]) -> None:
        """One update at theta, with the param group's present options."""
        self.begin(options)
        assert self._reference is not None
        self._reference.options = {name: value for name, value in options.items() if name != "params"}
        self._reference.update([as_array(grad)])
        self.theta, self._is_written = self._reference.thetas[0], False
        (self._theta_hat,) = self._reference.predicted()

    def _follow(self, options: dict[str, Any]) -> None:
        """A switch of amsgrad or master_weights takes effect at the next step."""
        assert self._reference is not None
        state = self._reference.states[0]
        if not options.get("amsgrad"):
            state.pop("max_exp_avg_sq", None)
        elif "exp_avg_sq" in state:
            state.setdefault("max_exp_avg_sq", state["exp_avg_sq"])
        if options["master_weights"]:
            self._reference.store = _as_it_is
        else:
            self._reference.thetas[0] = self._write(self._reference.thetas[0])

    def _write(self, values: np.ndarray) -> np.ndarray:
        """Rounded to the parameter's dtype."""
        return as_array(torch.from_numpy(values).to(self._dtype))


def _as_it_is(values: np.ndarray) -> np.ndarray:
    return values


def as_array(tensor: Tensor) -> np.ndarray:
    """A copy in the compute type."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).numpy().copy()
