"""The state's own numbers: step counts, and the coefficients of each prediction.

Every parameter has a vector of float64 numbers, whose elements its state holds as 0-dim tensors. So they travel with
all that carries the state, while a step reads and writes the numbers of all parameters at once. They live on the host,
or on the parameter's device (capturable, fused), where the host neither reads nor writes one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy
import torch
from torch import Tensor

from xgrad_optim.launch import Launch, Member, RowSources
from xgrad_optim.rows import HOST, HostRows, Scaling, Target, as_floats, is_remote, make_row
from xgrad_optim.rule import Rule
from xgrad_optim.state import State

STEP, PREDICTED, SHIFT = 0, 1, 2
"""Indices of a vector of numbers; the direction's coefficients follow."""

UNKNOWN = -1
"""The mode of a parameter that only the device knows; the version counters of one that nobody follows."""


class Numbers(ABC):
    """The numbers of all parameters that have state and live on one device, in the order of the parameters.

    Attributes:
        params: these parameters.
        vectors: each one's numbers.
        views: and the 0-dim views of them that its state holds.
        versions: int64 `[n, 2]`: the version counters of each parameter and of its state buffers (a sum) after our last
            write. UNKNOWN where nobody has written yet.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.params: list[Tensor] = []
        self.vectors: list[Tensor] = []
        self.views: list[list[Tensor]] = []
        self.versions = numpy.empty((0, 2), numpy.int64)

    @abstractmethod
    def bind(self, params: list[Tensor], states: list[State]) -> None:
        """Take over what these states hold, and give the states our views of it."""

    @property
    @abstractmethod
    def is_untouched(self) -> bool:
        """Whether nobody else has written to the numbers."""

    def are_in(self, params: list[Tensor], states: list[State]) -> bool:
        """Whether these are the parameters, in this order, and the states still hold these numbers."""
        if len(params) != len(self.params) or not all(map(is_, params, self.params)) or not self.is_untouched:
            return False
        held = [state.get(key) for state in states for key in self._rule.number_keys]
        return all(map(is_, held, chain(*self.views)))

    def _held_by(self, state: State) -> list[Any]:
        # A state without a step count (torch.optim.SGD keeps none) has taken at least one step.
        defaults = (1.0,) + (0.0,) * (len(self._rule.number_keys) - 1)
        return [state.get(key, default) for key, default in zip(self._rule.number_keys, defaults, strict=True)]

    def _adopt(self, params: list[Tensor], vectors: list[Tensor], states: list[State]) -> None:
        self.params, self.vectors = params, vectors
        self.views = [list(vector.unbind()) for vector in vectors]
        self.versions = numpy.full((len(params), 2), UNKNOWN)
        for state, views in zip(states, self.views, strict=True):
            state.update(zip(self._rule.number_keys, views, strict=True))

    # -- what the parameters hold, as far as the host knows ------------------------------------------------------

    @abstractmethod
    def modes(self) -> numpy.ndarray:
        """Of each parameter: 1 where it holds theta_hat, 0 where it holds theta, UNKNOWN."""

    @abstractmethod
    def are_shifted(self) -> numpy.ndarray:
        """Which of the parameters have a theta_hat that may differ from theta."""

    @abstractmethod
    def to_move(self, target: bool | Tensor) -> list[int]:
        """The parameters that a swap to these weights has to write."""

    @abstractmethod
    def note_unmoved(self, target: bool | Tensor) -> None:
        """The swap has run: what it had not to write holds these weights, too."""

    @abstractmethod
    def settle(self, indices: list[int]) -> None:
        """Nothing is predicted for these parameters any more: what they hold is theta and theta_hat."""

    def note_versions(self, launch: Launch, versions: numpy.ndarray) -> None:
        """Who writes to a parameter while it holds theta_hat, or to its state, is found out by these counts."""
        self.versions[launch.indices] = versions

    # -- a launch ------------------------------------------------------------------------------------------------

    @abstractmethod
    def sources(self, members: Sequence[Member]) -> RowSources:
        """What the rows of these members are made of."""

    @abstractmethod
    def note(self, launch: Launch, target: Target, scaling: Scaling) -> None:
        """The launch has run, and written the numbers."""

    def forget(self, launch: Launch) -> None:
        """The launch was interrupted: nobody knows whether it has run."""
        self.versions[launch.indices] = UNKNOWN


class HostNumbers(Numbers):
    """Numbers that the host reads and writes, in one matrix."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(rule)
        self.matrix = torch.empty((0, len(rule.number_keys)), dtype=torch.float64, device=HOST)
        self._version = self.matrix._version

    @property
    def values(self) -> numpy.ndarray:
        """The matrix for numpy, which leaves its version counter alone.

        Made anew at each use: torch moves the memory to share it with another process.
        """
        return self.matrix.numpy()

    @property
    def is_untouched(self) -> bool:
        return self.matrix._version == self._version

    def bind(self, params: list[Tensor], states: list[State]) -> None:
        values = [[float(value) for value in self._held_by(state)] for state in states]
        matrix = torch.tensor(values, dtype=torch.float64, device=HOST)
        self.matrix = matrix.reshape(len(states), len(self._rule.number_keys))
        self._version = self.matrix._version
        self._adopt(params, list(self.matrix.unbind()), states)

    def modes(self) -> numpy.ndarray:
        return self.values[:, PREDICTED]

    def are_shifted(self) -> numpy.ndarray:
        return self.values[:, SHIFT] != 0

    def to_move(self, target: bool | Tensor) -> list[int]:
        # A shift of 0 leaves nothing to move, not even the version counter.
        return numpy.flatnonzero(self.are_shifted() & (self.modes() != float(target))).tolist()

    def note_unmoved(self, target: bool | Tensor) -> None:
        self.values[~self.are_shifted(), PREDICTED] = float(target)

    def shifts(self) -> list[float]:
        """How many times its direction each parameter's theta_hat is away from theta."""
        return self.values[:, SHIFT].tolist()

    def displace(self, indices: list[int], shifts: list[float]) -> None:
        """These parameters hold theta, and are to be predicted by these shifts."""
        self.values[indices, PREDICTED] = 0.0
        self.values[indices, SHIFT] = shifts

    def settle(self, indices: list[int]) -> None:
        self.values[indices, SHIFT] = 0.0

    def sources(self, members: Sequence[Member]) -> RowSources:
        # While their group and all their numbers are equal, they stay equal.
        values = self.values[[member.index for member in members]].tolist()
        keys = [(id(member.options), *numbers) for member, numbers in zip(members, values, strict=True)]
        first: dict[tuple[float, ...], int] = {}
        for index, key in enumerate(keys):
            first.setdefault(key, index)
        row_of = {key: row for row, key in enumerate(first)}
        options = [members[index].options for index in first.values()]
        return RowSources([row_of[key] for key in keys], options, list(first.values()), [])

    def rows(self, launch: Launch, target: Target, scaling: Scaling) -> HostRows:
        """The rows of a step or a swap, with the groups' present hyperparameters."""
        mode = target if target is None else bool(target)
        grad_scale, found_inf = map(float, scaling)
        numbers = self.values[launch.indices][launch.sources.members].tolist()
        made = [
            make_row(self._rule, as_floats(self._rule, options), before, mode, grad_scale, found_inf)
            for options, before in zip(launch.sources.options, numbers, strict=True)
        ]
        values = torch.tensor([row for row, _ in made], dtype=launch.compute_dtype, device=HOST)
        return HostRows(values, torch.tensor([after for _, after in made], dtype=torch.float64, device=HOST))

    def note(self, launch: Launch, target: Target, scaling: Scaling) -> None:
        """The host reads the numbers themselves."""


class DeviceNumbers(Numbers):
    """Numbers that only their device reads and writes: the host never waits for one, it takes notes.

    The vector of a parameter never moves, because a captured graph may read and write it at every replay.
    """

    def __init__(self, rule: Rule, device: torch.device) -> None:
        super().__init__(rule)
        self._device = device
        self._modes = numpy.empty(0, numpy.int64)
        self._known: dict[Tensor, tuple[Tensor, list[Tensor]]] = {}
        self._written: list[int] = []
        self._is_captured = False

    @property
    def is_untouched(self) -> bool:
        return self._written == [vector._version for vector in self.vectors]

    def bind(self, params: list[Tensor], states: list[State]) -> None:
        modes = dict(zip(self.params, self._modes.tolist(), strict=True)) if self.is_untouched else {}
        held = {param: self._held_by(state) for param, state in zip(params, states, strict=True)}
        newcomers = {param: values for param, values in held.items() if param not in self._known}
        self._allocate(newcomers)
        for param, values in held.items():
            foreign = [pair for pair in zip(self._known[param][1], values, strict=True) if pair[0] is not pair[1]]
            for view, value in foreign:
                if param not in newcomers or is_remote(value):
                    view.copy_(torch.as_tensor(value), non_blocking=True)
            if foreign or param not in modes:
                modes[param] = _mode_of(values)
        self.params, self._modes = params, numpy.array([modes[param] for param in params], numpy.int64)
        self.vectors = [self._known[param][0] for param in params]
        self.views = [self._known[param][1] for param in params]
        self.versions = numpy.full((len(params), 2), UNKNOWN)
        self._written = [vector._version for vector in self.vectors]
        for state, views in zip(states, self.views, strict=True):
            state.update(zip(self._rule.number_keys, views, strict=True))
        if self._is_captured:
            self._modes[:] = UNKNOWN

    def _allocate(self, newcomers: Mapping[Tensor, list[Any]]) -> None:
        """Memory for these parameters' numbers, with what the host knows of them in it."""
        if newcomers:
            values = [[0.0 if is_remote(value) else float(value) for value in held] for held in newcomers.values()]
            vectors = upload(torch.tensor(values, dtype=torch.float64, device=HOST), self._device).unbind()
            self._known |= {
                param: (vector, list(vector.unbind())) for param, vector in zip(newcomers, vectors, strict=True)
            }

    def modes(self) -> numpy.ndarray:
        return self._modes

    def are_shifted(self) -> numpy.ndarray:
        return numpy.ones(len(self.params), bool)

    def to_move(self, target: bool | Tensor) -> list[int]:
        if isinstance(target, Tensor):
            return list(range(len(self.params)))
        return numpy.flatnonzero(self._modes != target).tolist()

    def note_unmoved(self, target: bool | Tensor) -> None:
        """There is none: only the device knows the shifts."""

    def settle(self, indices: list[int]) -> None:
        torch._foreach_zero_([self.views[index][SHIFT] for index in indices])
        self._written = [vector._version for vector in self.vectors]

    def sources(self, members: Sequence[Member]) -> RowSources:
        groups = {id(member.options): member.options for member in members}
        index_of = {key: index for index, key in enumerate(groups)}
        group_of = [index_of[id(member.options)] for member in members]
        return RowSources(list(range(len(members))), list(groups.values()), [], group_of)

    def note(self, launch: Launch, target: Target, scaling: Scaling) -> None:
        self._is_captured = self._is_captured or is_capturing(self._device)
        if self._is_captured:
            self._modes[:] = UNKNOWN
            return
        if isinstance(target, Tensor):
            self._modes[launch.indices] = UNKNOWN
            return
        mode = int(target is not False)
        is_sure = (self._modes[launch.indices] == mode) | (not is_remote(scaling.found_inf))
        self._modes[launch.indices] = numpy.where(is_sure, mode, UNKNOWN)

    def forget(self, launch: Launch) -> None:
        super().forget(launch)
        self._modes[launch.indices] = UNKNOWN


def make_numbers(rule: Rule, device: torch.device) -> Numbers:
    """Numbers that live on this device."""
    return HostNumbers(rule) if device == HOST else DeviceNumbers(rule, device)


def _mode_of(held: list[Any]) -> int:
    """Of a parameter whose state holds these numbers. One that nothing is predicted for holds both weights."""
    predicted, shift = held[PREDICTED], held[SHIFT]
    if is_remote(predicted) or is_remote(shift):
        return UNKNOWN
    return int(bool(predicted) or not shift)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device, without waiting for it: torch frees the pinned memory when it is read."""
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether what the device is told now is recorded into a graph, and not run."""
    if device.type in ("cpu", "meta"):
        return False
    module = torch.get_device_module(device)
    return hasattr(module, "is_current_stream_capturing") and module.is_current_stream_capturing()
