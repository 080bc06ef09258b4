"""Which launches the next step or swap runs: the last ones, where they still fit, or new ones."""

from collections.abc import Callable, Collection, Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from xgrad_optim import backends
from xgrad_optim.backends import Runner
from xgrad_optim.inventory import Groups, Inventory, States, as_dict, params_of
from xgrad_optim.launch import Launch, Member
from xgrad_optim.layout import DTensor, is_flat, local, owns_memory, place_like
from xgrad_optim.notes import warn
from xgrad_optim.numbers import PREDICTED, STEP, UNKNOWN, HostNumbers, Numbers, is_capturing
from xgrad_optim.options import checked_options
from xgrad_optim.rows import HOST, UNSCALED, Scaling, Target
from xgrad_optim.rule import Options, Rule
from xgrad_optim.settle import find_leaving
from xgrad_optim.state import (
    State,
    check_gradient,
    follow_options,
    follows_options,
    has_state,
    new_state,
    warn_of_lost_options,
)

_NOT_FLAT = {"backend": "torch", "foreach": None, "fused": None}
"""Options for tensors that are not one flat range in memory each, which no kernel over addresses takes."""

_UNSTEADY = "Tensors moved while the step was being prepared, twice in a row. Does another thread replace them?"


class Active(NamedTuple):
    """The parameters that have a gradient, with it and their group's options."""

    params: list[Tensor]
    grads: list[Tensor]
    options: list[Options]


def active(groups: Groups) -> Active:
    """The parameters that take the next step; each gradient cut as its parameter is, which may need a collective."""
    found = Active([], [], [])
    for group in groups:
        for param in group["params"]:
            if param.grad is not None:
                found.params.append(param)
                found.grads.append(place_like(param.grad, param))
                found.options.append(group)
    return found


class Run(NamedTuple):
    """A launch, the numbers of its members, and what runs it."""

    launch: Launch
    numbers: Numbers
    runner: Runner


class Plan:
    """The launches of a step, or of a swap.

    Attributes:
        runs: the launches, with their numbers and what runs them.
        params: the parameters that take part.
        is_sharded: whether there are DTensors among them, whose gradients have to be given.
        is_sure: whether the host knows what its run leaves.
        incoming: the optimizer's states, a parameter, and what its state becomes when this first runs.
    """

    def __init__(self, runs: list[Run], params: list[Tensor]) -> None:
        self.runs, self.params = runs, params
        self.incoming: list[tuple[States, Tensor, State]] = []
        self.is_sharded = any(isinstance(param, DTensor) for param in params)
        self.is_sure = all(isinstance(run.numbers, HostNumbers) for run in runs)
        launches = [run.launch for run in runs]
        self._not_captured = {one.device for one in launches if not one.is_capturable and one.device.type != "cpu"}

    def read(self, grads: list[Tensor] | None) -> bool:
        """Look at the tensors as they now are. False where they do not fit the launches any more."""
        for launch, _, runner in self.runs:
            if not runner.read(grads and [grads[index] for index in launch.grad_indices]):
                return False
        return True

    def check_writes(self) -> bool:
        """Whether nobody has written to the state of a parameter that holds theta_hat since `read` looked.

        Says so where somebody has written to such a parameter, believing perhaps that it holds theta.
        """
        n_written, is_intact = 0, True
        for launch, numbers, _ in self.runs:
            found, known = launch.tables.counts, numbers.versions[launch.indices]
            if (found == known).all():
                continue
            # A counter that fell is that of other memory: a conversion has put it there.
            is_displaced = (numbers.modes() == 1) & numbers.are_shifted()
            rose = (found > known) & (known != UNKNOWN) & is_displaced[launch.indices, None]
            n_written += numpy.count_nonzero(rose[:, 0])
            is_intact = is_intact and not (rose[:, 1] & ~rose[:, 0]).any()
            numbers.versions[launch.indices] = numpy.where(rose[:, :1], UNKNOWN, known)  # said once
        if n_written:
            warn(
                f"{n_written} parameters were written to while they held predicted weights (by load_state_dict, copy_, "
                "clamp_ or the like). The change is kept as one of the predicted weights: the true weights move by it. "
                "To set the true weights, write inside `with optimizer.true_weights():`, or call optimizer.eval() "
                "before and optimizer.train() after"
            )
        return is_intact

    def run(self, target: Target, scaling: Scaling) -> None:
        """Run all launches. Whatever can fail, fails before the first one writes; an interrupt finds all done."""
        runs = self.runs
        for device in self._not_captured:
            if is_capturing(device):
                raise RuntimeError(
                    "A graph is being captured, but its replay would repeat this step's lr and step count: use "
                    "capturable=True"
                )
        for _, _, runner in runs:
            runner.load(target, scaling)
        try:
            self._take_in()
            for _, _, runner in runs:
                runner.run()
            self._note(target, scaling)
        except BaseException:
            self._take_in()
            for launch, numbers, _ in runs:
                numbers.forget(launch)
            for _, _, runner in runs:
                runner.resume()
                runner.finish()
            raise

    def _take_in(self) -> None:
        """May be interrupted, and called again."""
        for states, param, values in self.incoming:
            state = states[param]
            state.update(values)
            for key in state.keys() - values.keys():
                del state[key]
        self.incoming = []

    def _note(self, target: Target, scaling: Scaling) -> None:
        for launch, numbers, runner in self.runs:
            runner.finish()
            numbers.note(launch, target, scaling)
        for launch, numbers, runner in self.runs:  # when all have run: views may share a counter with another launch's
            numbers.note_versions(launch, runner.versions())


class Planner:
    """The plans of one optimizer.

    Args:
        rule, name: of the optimizer.
        begin: called right before parameters change, with whether that is a swap.

    Attributes:
        inventory: what there is to step and to swap.
        last_step: its plan, or None.
        builds: how often a step was planned; a steady step adds nothing.
    """

    def __init__(self, rule: Rule, name: str, begin: Callable[[bool], None] = lambda is_swap: None) -> None:
        self._rule, self._name, self._begin = rule, name, begin
        self.builds = 0
        self.clear()

    def clear(self) -> None:
        """Forget everything: the state was replaced as a whole."""
        self.inventory = Inventory(self._rule)
        self._left: list[Tensor] = []
        self._seen_shifts: list[float] = []
        self._frozen: set[Tensor] = set()
        self._drop_plans()

    def _drop_plans(self) -> None:
        self.last_step: Plan | None = None
        self._idle: list[Tensor] = []
        self._swaps: dict[bool, tuple[list[list[int]], Plan]] = {}

    # -- steps and swaps -----------------------------------------------------------------------------------------

    def step(self, groups: Groups, state: States, scaling: Scaling) -> bool:
        """Step every parameter that has a gradient, and leave theta_hat in all; or do nothing, if `scaling` says so.

        Returns:
            Whether all hold theta_hat, as far as the host knows.

        Raises:
            RuntimeError, ValueError: the step can't be made. Parameters and state are as before.
        """
        self._look(groups, state)
        plan = self.last_step
        given = active(groups) if plan is None or plan.is_sharded else None
        if plan is None or not self._fits(plan, given):
            plan = self._plan_step(groups, state, given or active(groups))
        if scaling.is_skipped(waits=HOST in self.inventory.numbers):
            return self.inventory.are_all_predicted
        if plan.params:
            self._begin(False)
        plan.run(None, scaling)
        self._end()
        if len(plan.params) == len(self.inventory.known):
            return (plan.is_sure and scaling is UNSCALED) or self.inventory.are_all_predicted
        self._swaps = {}  # parameters that share a row of theirs are no longer in step
        if not self.inventory.are_all_predicted:
            self.swap(groups, state, True, scaling, but=plan.params)
        return self.inventory.are_all_predicted

    def _fits(self, plan: Plan, given: Active | None) -> bool:
        """Whether the next step takes the parameters of the last one, and their tensors are as they were."""
        # Idle parameters still have no gradient, so an equal count means the same parameters.
        is_complete = given is None or len(given.params) == len(plan.params)
        is_idle = all(param.grad is None for param in self._idle)
        return is_complete and is_idle and plan.read(given and given.grads) and plan.check_writes()

    def swap(
        self,
        groups: Groups,
        state: States,
        target: bool | Tensor,
        scaling: Scaling = UNSCALED,
        but: Collection[Tensor] = (),
    ) -> None:
        """Put theta_hat or theta into all parameters but these."""
        self._look(groups, state)
        plan = None if isinstance(target, Tensor) else self._last_swap(target)
        if plan is None:
            plan = self._plan_swap(groups, state, target, set(but))
        if plan.params:
            self._begin(True)
        plan.run(target, scaling)
        for numbers in self.inventory.numbers.values():
            numbers.note_unmoved(target)
        self._end()

    def predict_by(self, shifts: Mapping[Tensor, float]) -> None:
        """Of these parameters, which hold theta: theta_hat is so many times their first buffer away from it.

        For who writes that buffer without a step of ours. Such parameters have their numbers on the host.
        """
        numbers = self.inventory.numbers.get(HOST)
        if not shifts or not isinstance(numbers, HostNumbers):
            return
        numbers.displace([self.inventory.indices[param][1] for param in shifts], [*shifts.values()])
        present = numbers.shifts()
        if any(shifts.values()) and present != self._seen_shifts:
            self._swaps, self._seen_shifts = {}, present  # who shared a row may not do so any more

    def _last_swap(self, target: bool) -> Plan | None:
        """The plan of the last swap to these weights, if it moved the parameters that are to be moved now."""
        if target not in self._swaps:
            return None
        moved, plan = self._swaps[target]
        if moved != self.inventory.to_move(target) or not plan.read(None) or not plan.check_writes():
            return None
        return plan

    def _end(self) -> None:
        if torch.__future__.get_swap_module_params_on_conversion():
            # torch.utils.swap_tensors refuses tensors that somebody holds.
            self._drop_plans()

    def note_frozen(self, groups: Groups) -> None:
        """What is frozen now holds theta from the coming step or swap on; what still has a gradient is stepped."""
        frozen = {
            param for group in groups for param in group["params"] if not param.requires_grad and param.grad is None
        }
        if frozen != self._frozen:
            self.inventory.forget_look()
            self._frozen = frozen

    def _look(self, groups: Groups, state: States) -> None:
        """Bring numbers and plans in line with the groups and the state as they now are."""
        if not self.inventory.is_current(groups, state):
            self.inventory.tracked(groups, state)
            self._settle(groups, state)
            self._drop_plans()
            self.inventory.follow(groups, state, self._drop_plans)
            if self._frozen:  # the state may just have been loaded
                self._settle(groups, state)

    def _plan_step(self, groups: Groups, state: States, given: Active) -> Plan:
        """Check everything, create the missing state and divide the step into launches."""
        checked = [checked_options(self._rule, group, check_ranges=False) for group in groups]
        for own, kept in zip(groups, checked, strict=True):
            own.update(kept)
        for param, grad, group in zip(*given, strict=True):
            check_gradient(self._name, param, grad, group)
        options = dict(zip(given.params, given.options, strict=True))
        if len(options) < len(given.params):
            raise ValueError("some parameters appear more than once in the parameter groups: list each one once")
        self._settle(groups, state)
        followed = self._followed(groups, state, options)
        created = {
            param: {**as_dict(state.get(param)), **new_state(self._rule, param, group)}
            for param, group in options.items()
            if not has_state(self._rule, state.get(param))
        }
        self._warn_of_replaced(created)
        warn_of_lost_options(self._rule, state, created, options)
        incoming = {**followed, **created}
        self.inventory.follow(groups, state, self._drop_plans, incoming)
        members = {param: (options[param], incoming.get(param) or state[param]) for param in given.params}
        plan = self._launch(members, has_grad=True)
        if not plan.read(given.grads):
            raise RuntimeError(_UNSTEADY)
        plan.check_writes()
        plan.incoming = [(state, param, values) for param, values in incoming.items()]
        self.inventory.see(groups, {**state, **incoming})
        self._idle = [param for param, _ in params_of(groups) if param not in options]
        self.last_step, self._swaps, self.builds = plan, {}, self.builds + 1
        return plan

    def _plan_swap(self, groups: Groups, state: States, target: bool | Tensor, but: set[Tensor]) -> Plan:
        self._settle(groups, state)
        self.inventory.follow(groups, state, self._drop_plans)
        moving = self.inventory.to_move(target)
        params = [
            numbers.params[index]
            for numbers, indices in zip(self.inventory.numbers.values(), moving, strict=True)
            for index in indices
        ]
        members = {param: (self.inventory.known[param].options, state[param]) for param in params if param not in but}
        plan = self._launch(members, has_grad=False)
        if not plan.read(None):
            raise RuntimeError(_UNSTEADY)
        plan.check_writes()
        if isinstance(target, bool) and not but:
            self._swaps[target] = moving, plan
        return plan

    def _launch(self, members: Mapping[Tensor, tuple[Options, State]], has_grad: bool) -> Plan:
        """As few launches as devices, dtypes, buffers and options allow."""
        rule = self._rule
        divided: dict[tuple[object, ...], list[int]] = {}
        params = list(members)
        for index, (param, (options, state)) in enumerate(members.items()):
            key = (
                param.device,
                param.dtype,
                state[rule.state_keys[0]].dtype,
                rule.has_optional(state),
                "master_weights" in state,
                is_flat(param, self.inventory.buffers(state)),
                id(self.inventory.indices[param][0]),
                *(options[name] for name in ("backend", "foreach", "fused", "capturable")),
            )
            divided.setdefault(key, []).append(index)
        runs = []
        for key, indices in divided.items():
            numbers = self.inventory.indices[params[indices[0]]][0]
            chosen = [Member(params[i], *members[params[i]], self.inventory.indices[params[i]][1]) for i in indices]
            vectors = [(numbers.vectors[member.index], numbers.views[member.index][STEP]) for member in chosen]
            launch = Launch(rule, chosen, indices, vectors, numbers.sources(chosen), has_grad)
            options = chosen[0].options if key[5] else {**chosen[0].options, **_NOT_FLAT}
            runs.append(Run(launch, numbers, backends.bind(launch, numbers, options)))
        return Plan(runs, params)

    def _followed(self, groups: Groups, state: States, options: Mapping[Tensor, Options]) -> dict[Tensor, State]:
        """States with the buffers that the groups' flags ask for now, where they have others."""
        switched = [
            param
            for param, group in options.items()
            if has_state(self._rule, state.get(param)) and not follows_options(self._rule, state[param], group)
        ]
        if switched:
            # theta_hat can only be undone with the buffers that made it.
            self.swap(groups, state, False)
        followed = {param: {**state[param]} for param in switched}
        for param, values in followed.items():
            follow_options(self._rule, param, values, options[param])
        return followed

    # -- what leaves, leaves at theta ----------------------------------------------------------------------------

    def _settle(self, groups: Groups, state: States) -> None:
        """Bring to theta what takes no more steps, so that the weights stay that somebody who froze a layer or reset an
        optimizer believes to be there."""
        present = {param for param, _ in params_of(groups)}
        leaving = find_leaving(self.inventory.numbers.values(), self.inventory.known, present, self._frozen, state)
        if leaving.undone:
            members = {
                param: (self.inventory.known[param].options, self.inventory.known[param].buffers)
                for param in leaving.undone
            }
            plan = self._launch(members, has_grad=False)
            if plan.read(None):
                self._begin(True)
                plan.run(False, UNSCALED)
                self._end()
        lost = [param for param in leaving.spoiled if not self._is_equal_still(param)]
        self._give_up(lost)
        for param in chain(leaving.undone, lost, leaving.settled):
            numbers, index = self.inventory.indices[param]
            numbers.settle([index])
            values = state.get(param)
            if isinstance(values, dict) and values.get("predicted") is not numbers.views[index][PREDICTED]:
                values.pop("predicted", None)  # a copy of the state says that the parameter holds theta_hat
        self._left = leaving.gone or self._left

    def _is_equal_still(self, param: Tensor) -> bool:
        """Whether the state that somebody wrote to undoes the prediction all the same: it was copied there, say."""
        (numbers, index), known = self.inventory.indices[param], self.inventory.known[param]
        state = {**known.buffers, **dict(zip(self._rule.number_keys, numbers.views[index], strict=True))}
        is_held, is_moved = round_trip(self._rule, [{**known.options, "params": [param]}], {param: state})
        numbers.versions[index] = UNKNOWN
        return is_held and is_moved

    def _give_up(self, lost: list[Tensor]) -> None:
        """What these parameters hold is theta from now on, unless there is a copy of it."""
        without_copy = 0
        for param in lost:
            master = self.inventory.known[param].buffers.get("master_weights")
            if master is not None:
                local(param).copy_(local(master))
            without_copy += master is None
        if without_copy:
            warn(
                f"the state of {without_copy} parameters was written to while they held predicted weights, so that the "
                "prediction can't be undone: what they hold is taken for the true weights. Write to the state inside "
                "`with optimizer.true_weights():`, or call optimizer.eval() before"
            )

    def _warn_of_replaced(self, created: Collection[Tensor]) -> None:
        """Say so where parameters without state seem to replace others, whose predicted weights they then hold."""
        shapes = {tuple(param.shape) for param in created}
        count = sum(tuple(param.shape) in shapes for param in self._left)
        self._left = []
        if count:
            warn(
                f"{count} parameters that hold predicted weights have left the param groups, and new ones of the same "
                "shapes have no state yet. If the new ones replace them (fully_shard, a conversion of the model), "
                "training goes on without momentum and takes predicted weights for true ones. Make the optimizer after "
                "the replacement; in mid-training save state_dict() of model and optimizer before it and load both "
                "afterwards"
            )


SAMPLE = 1 << 12
"""Elements of each parameter that `round_trip` looks at."""


def round_trip(rule: Rule, groups: Groups, state: Mapping[Tensor, Any]) -> tuple[bool, bool]:
    """Whether the parameters hold the theta_hat that their state predicts, and whether that differs from theta.

    Going to theta and back returns every bit of a theta_hat. Of any other numbers it changes the ones whose sums round
    differently on the way back, a few in a hundred or thousand: enough to tell, but for the tiniest of models. One pair
    passes unseen, theta itself one step ahead: it is what the theta before it predicted.
    """
    sampled_groups, sampled = _sample(rule, groups, state)
    planner = Planner(rule, rule.name)
    seen = [_weights(sampled)]
    for target in (False, True):
        planner.swap(sampled_groups, sampled, target)
        seen.append(_weights(sampled))
    before, at_theta, after = seen
    return all(map(_are_equal, before, after)), not all(map(_are_equal, before, at_theta))


def _sample(rule: Rule, groups: Groups, state: Mapping[Tensor, Any]) -> tuple[Groups, dict[Tensor, Any]]:
    """Copies of the first elements of each parameter that holds predicted weights, with their state."""
    sampled: dict[Tensor, Any] = {}
    sampled_groups: Groups = []
    for group in groups:
        sampled_groups.append({**group, "params": []})
        for param in group["params"]:
            values = as_dict(state.get(param))
            if bool(values.get("predicted", False)):
                piece = _first_elements(param).requires_grad_()
                sampled_groups[-1]["params"].append(piece)
                sampled[piece] = {key: _first_elements(values[key]) for key in rule.buffer_keys if key in values}
                sampled[piece] |= {key: values[key].clone() for key in rule.number_keys}
    return sampled_groups, sampled


def _are_equal(before: Tensor, after: Tensor) -> bool:
    """Whether the finite elements are; what has overflowed comes from nowhere and goes nowhere."""
    return bool(((before == after) | ~before.isfinite()).all())


def _first_elements(tensor: Tensor) -> Tensor:
    tensor = local(tensor.detach())
    return tensor.reshape(-1)[:SAMPLE].clone() if owns_memory(tensor) else tensor.clone()


def _weights(state: Mapping[Tensor, Any]) -> list[Tensor]:
    """In full: a master copy tells what a 16-bit parameter can't."""
    return [values.get("master_weights", param).clone() for param, values in state.items()] + [p.clone() for p in state]
