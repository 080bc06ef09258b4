"""The state's 0-dim numbers (step counts, the prediction's coefficients), kept as views of one table."""

import warnings
from operator import is_

import numpy
import torch
from torch import Tensor

from xgrad_optim.rule import Rule
from xgrad_optim.state import State

STEP, PREDICTED, SHIFT = 0, 1, 2
"""Rows of the table; the direction's coefficients follow."""


class Scalars:
    """Every parameter's numbers as one column of a float64 table whose elements `state[p]` holds as 0-dim tensors.

    So they travel with everything that carries the state, while the host reads and writes them all at once.

    Attributes:
        table: float64 `[n_keys, n_parameters]`, over the same memory as the tensors in the state.
        versions: the version counter of each parameter after our last write of theta_hat, -1 where unknown.
    """

    def __init__(self, rule: Rule, states: list[State]) -> None:
        self._keys = rule.number_keys
        # A state without a step count (torch.optim.SGD keeps none) has taken at least one step.
        defaults = (1.0,) + (0.0,) * (len(self._keys) - 1)
        values = [
            [float(state.get(key, default)) for key, default in zip(self._keys, defaults, strict=True)]
            for state in states
        ]
        tensor = torch.tensor(values, dtype=torch.float64, device="cpu").reshape(len(states), len(self._keys))
        self._tensor = tensor.T.contiguous()
        self._version = self._tensor._version
        self._views = [view for column in self._tensor.T.unbind() for view in column.unbind()]
        self.table: numpy.ndarray = self._tensor.numpy()
        self.versions = numpy.full(len(states), -1)
        views = iter(self._views)
        for state in states:
            for key in self._keys:
                state[key] = next(views)

    @property
    def is_untouched(self) -> bool:
        """Whether nobody else has written to the numbers: numpy's writes, ours, leave the version counter alone."""
        return self._tensor._version == self._version

    def are_in(self, states: list[State]) -> bool:
        """Whether these states, in this order, still hold these numbers."""
        if len(states) != len(self.versions) or not self.is_untouched:
            return False
        held = [state.get(key) for state in states for key in self._keys]
        return all(map(is_, held, self._views))

    def note_writes(self, members: numpy.ndarray, params: list[Tensor], has_version: numpy.ndarray) -> None:
        """Remember these parameters' version counters where they hold a theta_hat that differs from theta."""
        is_shifted = (self.table[PREDICTED, members] != 0) & (self.table[SHIFT, members] != 0)
        versions = numpy.array([param._version for param in params])
        self.versions[members] = numpy.where(is_shifted & has_version, versions, -1)

    def warn_of_foreign_writes(self, members: numpy.ndarray, params: list[Tensor]) -> None:
        """Say so where somebody else has written to theta_hat, believing perhaps that it is theta."""
        known = self.versions[members]
        written = numpy.count_nonzero((known >= 0) & (known != numpy.array([param._version for param in params])))
        if written:
            warnings.warn(
                f"{written} parameters were written to while they held predicted weights (by load_state_dict, copy_, "
                "clamp_ or the like). The change is kept as one of the predicted weights: the true weights move by it. "
                "To set the true weights, write inside `with optimizer.true_weights():`, or call optimizer.eval() "
                "before and optimizer.train() after",
                stacklevel=2,
            )
