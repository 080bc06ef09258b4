"""What steps and swaps reuse of earlier ones: their launches, while all that they were built from is the same."""

from collections.abc import Mapping
from copy import copy
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xgrad_optim.launch import Launch
from xgrad_optim.layout import DTensor, place_like
from xgrad_optim.options import EXECUTION_OPTIONS
from xgrad_optim.rule import Options
from xgrad_optim.scalars import Scalars
from xgrad_optim.state import State

_SWITCHES = ("amsgrad", "master_weights", *EXECUTION_OPTIONS)
"""Options that divide a step into launches; all others are read anew at every step."""


class Active(NamedTuple):
    """The parameters that have a gradient, with it and their group's options."""

    params: list[Tensor]
    grads: list[Tensor]
    options: list[Options]

    def placed(self) -> "Active":
        """With every gradient cut as its parameter is: tensor parallelism leaves sums over the ranks to do."""
        return self._replace(grads=list(map(place_like, self.grads, self.params)))


class _NoTensorEqualsAnother(TorchFunctionMode):
    """Makes == of containers an identity comparison: they ask two tensors only where these are not one object."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> bool:
        return False


class StepCache:
    """The launches of the last step, and of the swaps since.

    Attributes:
        scalars: the numbers of every parameter that has state, by the device that they live on.
        launches: those of the last step.
        params: the parameters that took it.
        is_sharded: whether there are DTensors among their parameters.
        builds: how often launches were built; a steady step adds nothing.
    """

    def __init__(self) -> None:
        self.builds = 0
        self.clear()

    def clear(self) -> None:
        self.scalars: dict[torch.device, Scalars] = {}
        self.launches: list[Launch] = []
        self.is_sharded = False
        self._groups: list[Options] = []
        self.params: list[Tensor] = []
        self._group_params: list[list[Tensor]] = []
        self._idle: list[Tensor] = []
        self._state: tuple[list[Any], list[Any]] = ([], [])
        self._divided_by: list[object] = []
        self._swaps: dict[bool, tuple[list[list[int]], list[Launch]]] = {}

    def keep(
        self, launches: list[Launch], groups: list[dict[str, Any]], active: Active, state: Mapping[Tensor, State]
    ) -> None:
        """Launches of a step that were built from these."""
        self.launches, self.builds = launches, self.builds + 1
        self.is_sharded = any(isinstance(param, DTensor) for param in active.params)
        self._groups, self._divided_by = list(groups), _switches(groups)
        self.params = active.params
        self._group_params = [copy(group["params"]) for group in groups]
        is_active = set(active.params)
        self._idle = [param for param in chain(*self._group_params) if param not in is_active]
        self._state = (list(state), [dict(values) for values in state.values()])
        self._swaps = {}

    def keep_swap(self, to_predicted: bool, launches: list[Launch]) -> None:
        """Launches of a swap that is about to run, built from what this cache holds."""
        self._swaps[to_predicted] = (self._moving(to_predicted), launches)

    def swap(self, to_predicted: bool) -> list[Launch] | None:
        """The launches of the last swap to these weights, if it moved the parameters that are to be moved now."""
        moved, launches = self._swaps.get(to_predicted, ([], None))
        return launches if moved == self._moving(to_predicted) else None

    def _moving(self, to_predicted: bool) -> list[list[int]]:
        return [scalars.to_move(to_predicted) for scalars in self.scalars.values()]

    def holds(self, groups: list[dict[str, Any]], state: Mapping[Tensor, State]) -> bool:
        """Whether the launches were built from these very objects and options, and no further gradient has come."""
        if self._divided_by != _switches(groups):
            return False
        if len(self._groups) != len(groups) or not all(map(is_, self._groups, groups)):
            return False
        if not _are_same(self._group_params, [group["params"] for group in groups]):
            return False
        return self.holds_state(state) and all(param.grad is None for param in self._idle)

    def holds_state(self, state: Mapping[Tensor, State]) -> bool:
        """Whether the state is made of the very objects of the last step, and its numbers are ours."""
        is_untouched = all(scalars.is_untouched for scalars in self.scalars.values())
        return is_untouched and _are_same(self._state, (list(state), list(state.values())))

    @property
    def are_all_predicted(self) -> bool:
        """Whether every parameter holds theta_hat, as far as the host knows."""
        return all(scalars.are_all_predicted for scalars in self.scalars.values())

    def prepare(self, grads: list[Tensor] | None = None) -> bool:
        """Ready the launches for a step with these gradients, or the parameters' own.

        False where a gradient is missing, or a tensor is no longer what its launch was built for.
        """
        # As those without one still have none, as many gradients are those of the same parameters.
        is_complete = grads is None or len(grads) == len(self.params)
        return is_complete and all(launch.prepare(grads) for launch in self.launches)


def _are_same(kept: object, present: object) -> bool:
    """Whether two nests of containers hold the same objects."""
    try:
        with _NoTensorEqualsAnother():
            return kept == present
    except (TypeError, ValueError, RuntimeError):  # a foreign object that was replaced
        return False


def _switches(groups: list[dict[str, Any]]) -> list[object]:
    return [group.get(name) for group in groups for name in _SWITCHES]
