"""The parameters that have state, their numbers, and all that plans are built from, as they were last looked at."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any

import numpy
import torch
from torch import Tensor

from xgrad_optim.layout import is_flat
from xgrad_optim.numbers import UNKNOWN, Numbers, make_numbers
from xgrad_optim.options import LAUNCH_OPTIONS
from xgrad_optim.rows import HOST
from xgrad_optim.rule import Options, Rule
from xgrad_optim.settle import Known
from xgrad_optim.state import State, check_memory, check_state, fit_dtype, has_state

Groups = list[dict[str, Any]]

States = MutableMapping[Tensor, Any]


class Inventory:
    """What there is to step and to swap, and whether groups and state still are what was last looked at.

    Args:
        rule: of the optimizer.

    Attributes:
        numbers: those of all parameters that have state, by the device where they live.
        indices: of each of these parameters its numbers, and its index in them.
        known: each as it was when it was last looked at.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self.numbers: dict[torch.device, Numbers] = {}
        self.indices: dict[Tensor, tuple[Numbers, int]] = {}
        self.known: dict[Tensor, Known] = {}
        self._seen_groups: list[object] = []
        self._seen_options: list[object] = []
        self._seen_state: list[object] = [None]
        self._get_contents: Callable[[Any], tuple[object, ...]] = itemgetter(*rule.state_keys, "step")

    # -- what the parameters hold --------------------------------------------------------------------------------

    @property
    def are_all_predicted(self) -> bool:
        """Whether every parameter holds theta_hat, as far as the host knows."""
        return all(not (numbers.modes() != 1).any() for numbers in self.numbers.values())

    @property
    def is_known(self) -> bool:
        """Whether the host knows what every parameter holds."""
        return not any(bool((numbers.modes() == UNKNOWN).any()) for numbers in self.numbers.values())

    def predicted(self, state: States) -> bool | Tensor:
        """Whether any parameter holds theta_hat; as a flag on the device where only that knows."""
        if self._holds_state(state):
            modes = numpy.concatenate([[0], *(numbers.modes() for numbers in self.numbers.values())])
            if (modes == 1).any() or not (modes == UNKNOWN).any():
                return bool((modes == 1).any())
        flags = [values["predicted"] for values in map(as_dict, state.values()) if "predicted" in values]
        remote = [flag for flag in flags if isinstance(flag, Tensor) and not flag.is_cpu]
        if any(bool(flag) for flag in flags if not isinstance(flag, Tensor) or flag.is_cpu):
            return True
        by_device = {flag.device: [other for other in remote if other.device == flag.device] for flag in remote}
        reduced = [torch.stack(flags).any() for flags in by_device.values()]
        return reduced[0] if len(reduced) == 1 else any(map(bool, reduced))

    def to_move(self, target: bool | Tensor) -> list[list[int]]:
        """For each of the numbers, the parameters that a swap to these weights has to move."""
        return [numbers.to_move(target) for numbers in self.numbers.values()]

    # -- whether groups and state are as before ------------------------------------------------------------------

    def _holds_state(self, state: States) -> bool:
        """Whether the state is made of the very objects that were last looked at, and its numbers are ours."""
        is_untouched = all(numbers.is_untouched for numbers in self.numbers.values())
        return is_untouched and are_same(self._seen_state, self._contents(state))

    def is_current(self, groups: Groups, state: States) -> bool:
        """Whether groups and state are those that were last looked at."""
        return self._holds_groups(groups) and self._holds_state(state)

    def _holds_groups(self, groups: Groups) -> bool:
        """Whether these are the groups that were last looked at, with the same parameters, and options but numbers."""
        return are_same(self._seen_groups, _members(groups)) and self._seen_options == _launch_options(groups)

    def _contents(self, state: States) -> list[object]:
        """The parameters that have state, and what is in it."""
        try:
            if all(map(isinstance, state.values(), repeat(dict))):
                return [*state, *chain.from_iterable(map(self._get_contents, state.values()))]
        except KeyError:  # not all have the same buffers, or somebody keeps other things in there
            pass
        own = {param: values for param, values in state.items() if has_state(self._rule, values)}
        keys = (*self._rule.number_keys, *self._rule.buffer_keys)
        return [*own, *(values.get(key) for values in own.values() for key in keys)]

    def forget_look(self) -> None:
        """Makes the next step or swap look at groups and state anew."""
        self._seen_state = [None]

    # -- what was looked at --------------------------------------------------------------------------------------

    def follow(
        self,
        groups: Groups,
        state: States,
        drop_plans: Callable[[], None],
        created: Mapping[Tensor, State] | None = None,
    ) -> None:
        """Follow all parameters that have state, or get it from `created`, and bind their numbers.

        `drop_plans` is called right before numbers are bound anew: the plans that there are hold the old ones.
        """
        self.forget_look()
        tracked = self.tracked(groups, {**state, **(created or {})})
        check_memory(groups, [param for param, _, _ in tracked])
        for param, _, values in tracked:
            fit_dtype(self._rule, param, values)
        by_device: dict[torch.device, dict[Tensor, State]] = {}
        for param, group, values in tracked:
            by_device.setdefault(self._device_of(param, group, values), {})[param] = values
        if by_device.keys() != self.numbers.keys() or not all(
            self.numbers[device].are_in(list(states), list(states.values())) for device, states in by_device.items()
        ):
            drop_plans()
            self._bind(by_device)
        for param, group, values in tracked:
            buffers = {key: values[key] for key in self._rule.buffer_keys if key in values}
            if param in self.known and not are_same([*buffers.values()], [*self.known[param].buffers.values()]):
                numbers, index = self.indices[param]
                numbers.versions[index] = UNKNOWN  # other tensors have other counters
            self.known[param] = Known(group, buffers)
        if not created:
            self.see(groups, state)

    def tracked(self, groups: Groups, state: Mapping[Tensor, Any]) -> list[tuple[Tensor, Options, State]]:
        """The parameters that have state, with their options and the state, which is checked."""
        members = [(param, group, as_dict(state.get(param))) for param, group in params_of(groups)]
        tracked = [(param, group, values) for param, group, values in members if has_state(self._rule, values)]
        for param, _, values in tracked:
            check_state(self._rule, param, values)
        return tracked

    def _bind(self, by_device: Mapping[torch.device, Mapping[Tensor, State]]) -> None:
        # Until all is bound there are no numbers, so that after an interrupt they are bound again.
        before, self.numbers = self.numbers, {}
        bound = {}
        for device, states in by_device.items():
            numbers = before.get(device) or make_numbers(self._rule, device)
            numbers.bind(list(states), list(states.values()))
            bound[device] = numbers
        self.indices = {
            param: (numbers, index) for numbers in bound.values() for index, param in enumerate(numbers.params)
        }
        self.known = {param: known for param, known in self.known.items() if param in self.indices}
        self.numbers = bound

    def see(self, groups: Groups, state: States) -> None:
        """All that plans are built from, to compare it with what is there when they are used."""
        self._seen_groups, self._seen_options = _members(groups), _launch_options(groups)
        buffers = [key for key in self._rule.buffer_keys if any(key in known.buffers for known in self.known.values())]
        self._get_contents = itemgetter(*self._rule.number_keys, *buffers)
        self._seen_state = self._contents(state)

    def _device_of(self, param: Tensor, options: Options, state: State) -> torch.device:
        """Where a parameter's numbers live: on the host; or beside it, as torch.optim's for capturable and fused."""
        if param.device.type == "cpu" or not (options["capturable"] or options["fused"]):
            return HOST
        if is_flat(param, self.buffers(state)):
            return param.device
        if options["capturable"]:
            raise RuntimeError(
                "capturable=True needs a parameter and its state to lie in memory alike and without gaps, those of "
                f"shape {tuple(param.shape)} do not: make them contiguous, or use capturable=False"
            )
        return HOST  # the torch back end runs it

    def buffers(self, state: State) -> list[Tensor]:
        return [state[key] for key in self._rule.buffer_keys if key in state]


def are_same(seen: Sequence[object], present: Sequence[object]) -> bool:
    """Whether both hold the same objects. `==` would ask tensors that are not, and takes an equal one for the same."""
    return len(seen) == len(present) and all(map(is_, seen, present))


def params_of(groups: Groups) -> Iterator[tuple[Tensor, Options]]:
    """All parameters, each with its group's options."""
    return ((param, group) for group in groups for param in group["params"])


def _members(groups: Groups) -> list[object]:
    """Each group, and behind it its parameters: a parameter that changes groups changes this."""
    return [*chain.from_iterable((group, *group["params"]) for group in groups)]


def _launch_options(groups: Groups) -> list[object]:
    return [group.get(name) for group in groups for name in LAUNCH_OPTIONS]


def as_dict(values: Any) -> State:
    """A parameter's state; anything else that somebody keeps in the optimizer's state counts as none."""
    return values if isinstance(values, dict) else {}
