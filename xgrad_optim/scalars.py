"""The state's 0-dim numbers (step counts, the prediction's coefficients), kept as views of one table per device."""

import warnings
from abc import ABC, abstractmethod
from operator import is_

import numpy
import torch
from torch import Tensor

from xgrad_optim.numeric import Number
from xgrad_optim.rule import Options, Rule
from xgrad_optim.state import State

STEP, PREDICTED, SHIFT = 0, 1, 2
"""Rows of the table; the direction's coefficients follow."""

Columns = numpy.ndarray | slice
"""Which parameters of the table."""

HOST = torch.device("cpu")


def home(param: Tensor, options: Options) -> torch.device:
    """Where a parameter's numbers live: on the host, or beside it, as torch.optim has it for capturable and fused."""
    return param.device if options["capturable"] or options["fused"] else HOST


def make_scalars(rule: Rule, states: list[State], device: torch.device) -> "Scalars":
    """The numbers of these states, which live on `device`."""
    return HostScalars(rule, states) if device == HOST else DeviceScalars(rule, states, device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on the device, without waiting for it: torch frees the pinned memory when it is read."""
    return tensor.to(device) if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Scalars(ABC):
    """Every parameter's numbers as one column of a float64 table whose elements `state[p]` holds as 0-dim tensors.

    So they travel with everything that carries the state, while a step reads and writes them all at once.

    Attributes:
        device: where the table is.
        tensor: float64 `[n_keys, n_parameters]`, which the tensors in the state are views of.
        versions: the version counter of each parameter after our last write of theta_hat, -1 where unknown.
    """

    def __init__(self, rule: Rule, states: list[State], device: torch.device) -> None:
        self._keys = rule.number_keys
        self.device = device
        self.tensor = self._gather(states)
        self._version = self.tensor._version
        self._views = [view for column in self.tensor.T.unbind() for view in column.unbind()]
        self.versions = numpy.full(len(states), -1)
        views = iter(self._views)
        for state in states:
            for key in self._keys:
                state[key] = next(views)

    def _gather(self, states: list[State]) -> Tensor:
        # A state without a step count (torch.optim.SGD keeps none) has taken at least one step.
        defaults = (1.0,) + (0.0,) * (len(self._keys) - 1)
        held = [state.get(key, default) for key, default in zip(self._keys, defaults, strict=True) for state in states]
        remote = {i: value for i, value in enumerate(held) if isinstance(value, Tensor) and not value.is_cpu}
        values = [0.0 if i in remote else float(value) for i, value in enumerate(held)]
        table = upload(torch.tensor(values, dtype=torch.float64, device="cpu"), self.device)
        for i, value in remote.items():
            table[i] = value.to(self.device, torch.float64, non_blocking=True)
        return table.reshape(len(self._keys), len(states))

    @property
    def is_untouched(self) -> bool:
        """Whether nobody else has written to the numbers."""
        return self.tensor._version == self._version

    def are_in(self, states: list[State]) -> bool:
        """Whether these states, in this order, still hold these numbers."""
        if len(states) != len(self.versions) or not self.is_untouched:
            return False
        held = [state.get(key) for state in states for key in self._keys]
        return all(map(is_, held, self._views))

    @property
    @abstractmethod
    def are_all_predicted(self) -> bool:
        """Whether every parameter holds theta_hat, as far as the host knows."""

    @abstractmethod
    def to_move(self, to_predicted: bool) -> list[int]:
        """The parameters that a swap to these weights has to write; of the others it is noted that they hold them."""

    @abstractmethod
    def are_predicted(self, members: Columns) -> numpy.ndarray:
        """Which of the parameters hold theta_hat, as far as the host knows."""

    @abstractmethod
    def are_shifted(self, members: Columns) -> numpy.ndarray:
        """Which of the parameters hold a theta_hat that may differ from theta, as far as the host knows."""

    def note_writes(self, members: Columns, versions: numpy.ndarray) -> None:
        """Remember these version counters of parameters that hold theta_hat: who writes to them now means theta_hat."""
        self.versions[members] = numpy.where(self.are_predicted(members), versions, -1)

    def are_unwritten(self, members: Columns, versions: numpy.ndarray) -> bool:
        """Whether these parameters hold theta_hat as we wrote it, as far as version counters tell.

        Says so where somebody else has written to a theta_hat that differs from theta, believing perhaps that it is
        theta.
        """
        known = self.versions[members]
        is_same = known == versions
        if is_same.all():
            return bool((known >= 0).all())
        # A counter that fell is that of other memory: a conversion has put it there.
        n_written = numpy.count_nonzero((versions > known) & (known >= 0) & self.are_shifted(members))
        if n_written:
            warnings.warn(
                f"{n_written} parameters were written to while they held predicted weights (by load_state_dict, copy_, "
                "clamp_ or the like). The change is kept as one of the predicted weights: the true weights move by it. "
                "To set the true weights, write inside `with optimizer.true_weights():`, or call optimizer.eval() "
                "before and optimizer.train() after",
                stacklevel=2,
            )
        return False


class HostScalars(Scalars):
    """Numbers that the host reads and writes through numpy, which leaves the tensor's version counter alone.

    Attributes:
        table: the same memory as `tensor`.
    """

    def __init__(self, rule: Rule, states: list[State]) -> None:
        super().__init__(rule, states, HOST)
        self.table: numpy.ndarray = self.tensor.numpy()

    @property
    def are_all_predicted(self) -> bool:
        return bool(self.table[PREDICTED].all())

    def to_move(self, to_predicted: bool) -> list[int]:
        # A shift of 0 leaves nothing to move, not even the version counter.
        self.table[PREDICTED, self.table[SHIFT] == 0] = to_predicted
        return numpy.flatnonzero(self.table[PREDICTED] != to_predicted).tolist()

    def are_predicted(self, members: Columns) -> numpy.ndarray:
        return self.table[PREDICTED, members] != 0

    def are_shifted(self, members: Columns) -> numpy.ndarray:
        return self.are_predicted(members) & (self.table[SHIFT, members] != 0)


class DeviceScalars(Scalars):
    """Numbers that only their device reads and writes: the host never waits for one.

    Attributes:
        modes: what the host knows of each parameter without asking: 1 where it holds theta_hat, 0 where it holds
            theta, -1 where that depends on a number. A parameter without a step yet holds both.
    """

    def __init__(self, rule: Rule, states: list[State], device: torch.device) -> None:
        self.modes = numpy.array([-1 if "predicted" in state else 1 for state in states])
        super().__init__(rule, states, device)

    @property
    def are_all_predicted(self) -> bool:
        return bool((self.modes == 1).all())

    def to_move(self, to_predicted: bool) -> list[int]:
        return numpy.flatnonzero(self.modes != to_predicted).tolist()

    def write(self, members: Tensor | slice, before: Tensor, after: Tensor, found_inf: Number) -> None:
        """Replace the numbers of the members, unless the step is skipped."""
        if isinstance(found_inf, Tensor):
            after = torch.where(found_inf != 0, before, after)
        self.tensor[:, members] = after
        self._version = self.tensor._version

    def note_mode(self, members: Columns, is_predicted: bool, found_inf: Number) -> None:
        is_sure = (self.modes[members] == is_predicted) | (not isinstance(found_inf, Tensor))
        self.modes[members] = numpy.where(is_sure, is_predicted, -1)

    def are_predicted(self, members: Columns) -> numpy.ndarray:
        return self.modes[members] == 1

    are_shifted = are_predicted
