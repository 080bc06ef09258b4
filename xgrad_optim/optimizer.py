"""The base class of the five optimizers: the step, the two modes and the state. It knows no formula."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from xgrad_optim import backends, checkpoint, hooks, pairing
from xgrad_optim.cache import Active, StepCache
from xgrad_optim.launch import Entry, Launch, build_launches
from xgrad_optim.options import check_options
from xgrad_optim.rows import UNSCALED, Scaling
from xgrad_optim.rule import Options, Rule
from xgrad_optim.scalars import Scalars, home, make_scalars
from xgrad_optim.state import (
    State,
    check_gradient,
    check_state,
    fit_dtype,
    follow_options,
    follows_options,
    new_state,
    warn_of_replaced,
)

_UNSTEADY = (
    "parameters, gradients or state have other memory at every look, so that no step can be prepared: nothing was "
    "changed. Is another thread replacing them, or a tensor subclass making them anew?"
)

Tracked = tuple[Tensor, State, Options]
"""A parameter with its state and its group's options."""


class XGradOptimizer(Optimizer):
    """Base of the XGrad family (arXiv 2305.18240): a subclass adds a `rule` and a constructor."""

    rule: ClassVar[Rule]
    fixed_options: ClassVar[dict[str, object]] = {}
    """Param-group entries that the class decides: no argument and no checkpoint changes them."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        defaults |= self._fixed()
        check_options(self.rule, defaults)
        backends.check_available(defaults)
        self._cache = StepCache()
        self._switch = hooks.Switch()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            group.update(self._fixed())
        # What exists is emptied, not replaced: wrappers hold it through a copy of our __dict__.
        self.__dict__.setdefault("_cache", StepCache()).clear()
        self.__dict__.setdefault("_switch", hooks.Switch()).turn(None)

    def _fixed(self) -> dict[str, object]:
        return {**self.fixed_options, "rule": self.rule.name}

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group with options of its own or the defaults; checked before anything is added."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            check_options(self.rule, options)
            backends.check_available(options)
            param_group.update(self._fixed())
            if not isinstance(param_group["params"], (Tensor, set)):
                params = param_group["params"] = list(param_group["params"])
                distinct = {id(param[1] if isinstance(param, tuple) else param) for param in params}
                if len(distinct) != len(params):
                    raise ValueError("a parameter appears more than once in one parameter group")
        super().add_param_group(param_group)
        self._switch.extend()

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's. An attached optimizer first puts theta in place, as its model's state_dict does."""
        if self._switch.attachments:
            self.eval()
        return super().state_dict()

    @torch.inference_mode(False)  # nobody may update what is made there
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt a state_dict of this class or of its torch.optim base, saved in either mode.

        The parameters must hold what they held when it was saved, theta or theta_hat: `predicted` tells which.
        Nothing is rounded, no tensor is shared with `state_dict`, and what chooses the code (backend, foreach,
        fused, capturable) stays as this optimizer has it.

        Raises:
            ValueError: it belongs to another optimizer, or does not fit the parameters. Nothing has changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"loaded state dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        groups, state = checkpoint.load(self.rule, self.param_groups, state_dict)
        if self._switch.attachments:
            # The numbers that undo the present prediction are about to go.
            self.eval()
        # In place: wrappers and schedulers hold the same dicts.
        self.state.clear()
        self.state.update(state)
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.clear()
            group.update(loaded, **self._fixed())
        self._cache.clear()
        self._switch.turn(None)
        self._switch.is_loaded = True
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # -- the two modes -------------------------------------------------------------------------------------------

    @property
    def predicted(self) -> bool:
        """Whether the parameters hold theta_hat. False before the first step, when theta_hat is theta."""
        return any(bool(state.get("predicted", False)) for state in self.state.values())

    @torch._disable_dynamo
    def eval(self) -> None:
        """Put the true weights theta into the parameters. Idempotent and exact: :meth:`train` undoes every bit."""
        self._put(predicted=False)

    @torch._disable_dynamo
    def train(self, mode: bool = True) -> None:
        """Put the predicted weights theta_hat into the parameters; ``train(False)`` is :meth:`eval`. Idempotent."""
        self._put(predicted=bool(mode))

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        """The parameters hold theta inside the block, and afterwards what they held before.

        The place to evaluate, save, average or clip: what is written to the parameters inside is written to theta.
        Forwards of an attached model in training mode see theta too (`torch.optim.swa_utils.update_bn`).
        """
        was_predicted = self.predicted
        self.eval()
        self._switch.pins += 1
        try:
            yield
        finally:
            self._switch.pins -= 1
            if was_predicted:
                self.train()

    def attach(self, model: torch.nn.Module) -> hooks.Attachment:
        """Let a model's own mode decide: in training mode a forward sees theta_hat, in evaluation mode theta.

        The mode is that of the outermost module that runs, whether or not gradients are recorded. ``state_dict()`` of
        the model, of its submodules and of this optimizer hold theta, ``load_state_dict()`` of the model sets theta;
        each leaves theta in place until the next forward in training mode. Nothing but the mode needs to change
        hands: a forward that finds its weights in place costs one comparison.

        Attach after what replaces parameters or moves their all-gather into hooks (``fully_shard``), before or after
        what wraps the model (``DistributedDataParallel``, ``torch.compile``). Several optimizers may attach to
        one model, and one optimizer to several; all its parameters then change together. A module that joins the
        model later is covered when it runs inside one that is attached; for calls of its own, attach again.

        An optimizer that has not stepped yet takes the model over from one that was attached to the same parameters:
        that one leaves theta in them and is detached.

        Args:
            model: contains parameters of this optimizer. Trainable parameters that no attached optimizer owns make
                the first forward raise RuntimeError.

        Returns:
            A handle: ``remove()`` takes the hooks off.

        Raises:
            TypeError: it is no module.
            ValueError: it has none of this optimizer's parameters.
            RuntimeError: another attached optimizer owns some of the same parameters, and both have state.
        """
        return hooks.attach(self, model)

    def _put(self, predicted: bool) -> None:
        # Trainers call train() before every batch.
        if self._switch.position is predicted and self._cache.holds_state(self.state):
            return
        if not predicted:
            self._check_loaded()
        self._swap(to_predicted=predicted)

    def _check_loaded(self) -> None:
        """Look once at what the parameters hold, when a state that calls it theta_hat is first used with them."""
        if self._switch.is_loaded and self.predicted:
            pairing.warn_of_mismatch(self)
        self._switch.is_loaded = False

    def _tracked(self) -> list[Tracked]:
        """The parameters that have taken a step, with their state and options."""
        first = self.rule.state_keys[0]
        tracked: list[Tracked] = [
            (param, state, group)
            for group in self.param_groups
            for param in group["params"]
            if first in (state := self.state.get(param, {}))
        ]
        for param, state, _ in tracked:
            check_state(self.rule, param, state)
        for param, state, _ in tracked:
            fit_dtype(self.rule, param, state)
        return tracked

    def _bind(self, tracked: list[Tracked]) -> list[tuple[Scalars, int]]:
        """Each parameter's table of numbers and its column there.

        The tables are the cached ones, unless the state was loaded, moved or edited.
        """
        homes = [home(param, options) for param, _, options in tracked]
        states: dict[torch.device, list[State]] = {}
        places = []
        for device, (_, state, _) in zip(homes, tracked, strict=True):
            neighbours = states.setdefault(device, [])
            places.append((device, len(neighbours)))
            neighbours.append(state)
        tables = self._cache.scalars
        if tables.keys() != states.keys() or not all(tables[device].are_in(states[device]) for device in states):
            tables = {device: make_scalars(self.rule, states[device], device) for device in states}
            self._cache.scalars = tables
        return [(tables[device], column) for device, column in places]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _swap(self, to_predicted: bool, but: Iterable[Tensor] = (), scaling: Scaling = UNSCALED) -> None:
        """Put the other weights into all parameters but these, unless `scaling` has them skip it."""
        cache, but = self._cache, set(but)
        is_held = not but and cache.holds(self.param_groups, self.state)
        launches = cache.swap(to_predicted) if is_held else None
        if launches is None or not all(launch.prepare() for launch in launches):
            launches = self._build_swap(to_predicted, but)
            if not all(launch.prepare() for launch in launches):
                raise RuntimeError(_UNSTEADY)
            if is_held:
                cache.keep_swap(to_predicted, launches)
        _run(launches, scaling)
        self._switch.turn(to_predicted)
        if launches:
            self._switch.drop_copies()

    def _build_swap(self, to_predicted: bool, but: set[Tensor]) -> list[Launch]:
        tracked = self._tracked()
        places = self._bind(tracked)
        moving = {scalars: set(scalars.to_move(to_predicted)) for scalars in self._cache.scalars.values()}
        entries = [
            Entry(param, options, state, scalars, column)
            for (param, state, options), (scalars, column) in zip(tracked, places, strict=True)
            if column in moving[scalars] and param not in but
        ]
        return build_launches(self.rule, entries, to_predicted)

    # -- the step ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restore theta, update it with the gradients, and leave theta_hat in the parameters.

        In evaluation mode the update starts from the theta that is there. Parameters without a gradient keep theta
        and their last prediction.

        Args:
            closure: reevaluates the model, at the weights that the parameters hold, and returns the loss.

        Raises:
            RuntimeError: a gradient that is sparse or does not match its parameter, or options that no back end
                can serve.
            ValueError: a hyperparameter that has left its range.
            In both cases parameters and state are as before.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_loaded()
        self._update()
        # Where a skipped step left theta in place, or the host can't know, the next forward has to look.
        self._switch.turn(True if self._cache.are_all_predicted else None)
        return loss

    @torch.inference_mode(False)
    @torch.no_grad()
    def _update(self) -> None:
        for group in self.param_groups:
            check_options(self.rule, group)
        cache = self._cache
        is_held = cache.holds(self.param_groups, self.state)
        # A collective, where it is one: once in a step, for all ranks to take part.
        placed = self._active().placed() if cache.is_sharded or not is_held else None
        if not (is_held and cache.prepare(placed and placed.grads)):
            self._rebuild(placed or self._active())
        scaling = self._scaling()
        _run(cache.launches, scaling)
        if not scaling.is_skipped_on_host and not cache.are_all_predicted:
            self._swap(to_predicted=True, but=cache.params, scaling=scaling)

    def _scaling(self) -> Scaling:
        """What a GradScaler leaves on the optimizer for the time of a fused step."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return Scaling(1.0 if grad_scale is None else grad_scale, 0.0 if found_inf is None else found_inf)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler that `step` unscales the gradients, and skips itself where they overflowed."""
        return all(bool(group["fused"]) for group in self.param_groups)

    def _active(self) -> Active:
        active = Active([], [], [])
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    active.params.append(param)
                    active.grads.append(param.grad)
                    active.options.append(group)
        return active

    def _rebuild(self, active: Active) -> None:
        """Check everything, create the missing state and divide the step into launches."""
        for param, grad, group in zip(*active, strict=True):
            check_gradient(type(self).__name__, param, grad, group)
        groups = dict(zip(active.params, active.options, strict=True))
        if len(groups) < len(active.params):
            raise ValueError("some parameters appear more than once in the parameter groups: list each one once")
        self._conform_state(groups)
        first = self.rule.state_keys[0]
        created = {
            param: new_state(self.rule, param, group)
            for param, group in groups.items()
            if first not in self.state.get(param, {})
        }
        if created:
            warn_of_replaced(self.state, [param for group in self.param_groups for param in group["params"]])
        tracked = self._tracked() + [(param, state, groups[param]) for param, state in created.items()]
        places = {param: (state, *place) for (param, state, _), place in zip(tracked, self._bind(tracked), strict=True)}
        entries = [Entry(param, group, *places[param]) for param, group in groups.items()]
        launches = build_launches(self.rule, entries)
        for param, state in created.items():
            self.state[param].update(state)
        self._cache.keep(launches, self.param_groups, active, self.state)
        if not self._cache.prepare(active.grads):
            self._cache.clear()
            raise RuntimeError(_UNSTEADY)

    def _conform_state(self, options: Mapping[Tensor, Options]) -> None:
        """Follow a group whose amsgrad or master_weights was switched, or is not what was loaded."""
        switched = [
            (param, state)
            for param, state, _ in self._tracked()
            if param in options and not follows_options(state, options[param])
        ]
        if switched:
            # theta_hat can only be undone with the buffers that made it.
            self._swap(to_predicted=False)
        for param, state in switched:
            follow_options(self.rule, param, state, options[param])


def _run(launches: list[Launch], scaling: Scaling) -> None:
    """Whatever can fail, fails before the first one writes."""
    for launch in launches:
        launch.refresh(scaling)
    for launch in launches:
        launch.run()
    for launch in launches:
        launch.note_versions()
