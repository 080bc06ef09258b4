"""The base class of the five optimizers: the step, the two modes and the state. It knows no formula."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from xgrad_optim import backends, checkpoint, recorders
from xgrad_optim.attach import attach, check_unshared
from xgrad_optim.hooks import Attachment
from xgrad_optim.options import checked_options, listed_params
from xgrad_optim.plan import Planner
from xgrad_optim.rows import UNSCALED, Scaling
from xgrad_optim.rule import COMMON, Common, Rule
from xgrad_optim.switch import Pin, Switch

P = ParamSpec("P")
R = TypeVar("R")


def _alone(method: Callable[P, R]) -> Callable[P, R]:
    """A method that exchanges weights: no other thread steps or swaps meanwhile, and no tracer sees it."""

    @wraps(method)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        with optimizer._switch.lock:
            if not recorders.is_any() or recorders.are_fake(optimizer._params()):
                return method(*args, **kwargs)
            with recorders.outside():
                return method(*args, **kwargs)

    return torch._disable_dynamo(alone)


def _recording_nothing() -> AbstractContextManager[object]:
    """No gradients; and no inference mode, for nobody may update what is made there."""
    return _no_inference() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextmanager
def _no_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class XGradOptimizer(Optimizer):
    """Base of the XGrad family (arXiv 2305.18240): a subclass adds a `rule` and a constructor."""

    rule: ClassVar[Rule]
    fixed_options: ClassVar[dict[str, object]] = {}
    """Param-group entries that the class decides: no argument and no checkpoint changes them."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **common: Unpack[Common]) -> None:
        if unknown := common.keys() - COMMON.keys():
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {min(unknown)!r}")
        params = listed_params(params)
        defaults = checked_options(self.rule, {**defaults, **COMMON, **common})
        backends.check_available(defaults)
        self._switch = Switch()
        self._planner = Planner(self.rule, type(self).__name__, self._switch.begin)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            group.update(self._fixed())
        # What exists is emptied, not replaced: wrappers hold it through a copy of our __dict__.
        switch = self.__dict__.setdefault("_switch", Switch())
        switch.turn(None)
        self.__dict__.setdefault("_planner", Planner(self.rule, type(self).__name__, switch.begin)).clear()

    def _fixed(self) -> dict[str, object]:
        return {**self.fixed_options, "rule": self.rule.name}

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group with options of its own or the defaults; checked before anything is added."""
        if isinstance(param_group, dict):
            options = checked_options(self.rule, {**self.defaults, **param_group, **self._fixed()})
            backends.check_available(options)
            params = listed_params(param_group["params"])
            if isinstance(params, list):
                distinct = {id(param[1] if isinstance(param, tuple) else param) for param in params}
                if len(distinct) != len(params):
                    raise ValueError("a parameter appears more than once in one parameter group")
            if self._switch.attachments:
                check_unshared(self, _tensors(params))
            param_group.update(options, params=params)
        super().add_param_group(param_group)
        self._switch.extend()

    @_alone
    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups, as torch.optim's `state_dict()`.

        An attached optimizer first puts theta in place, as its model's `state_dict()` does.
        """
        if self._switch.attachments:
            self.eval()
        return super().state_dict()

    @_alone
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
        groups, state = checkpoint.load(self.rule, self._fixed(), self.param_groups, state_dict)
        if self._switch.attachments:
            # The numbers that undo the present prediction are about to go.
            self.eval()
        try:
            self._adopt(groups, state)
        except BaseException:
            self._adopt(groups, state)  # an interrupt finds all of it done
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _adopt(self, groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> None:
        """Take these groups and this state for our own, in place: wrappers and schedulers hold the same dicts."""
        self.state.clear()
        self.state.update(state)
        for group, loaded in zip(self.param_groups, groups, strict=True):
            group.clear()
            group.update(loaded)
        self._planner.clear()
        self._switch.turn(None)
        self._switch.is_loaded = True

    # -- the two modes -------------------------------------------------------------------------------------------

    @property
    @_alone
    def predicted(self) -> bool:
        """Whether the parameters hold theta_hat. False before the first step, when theta_hat is theta.

        Where only a device knows (a captured graph was replayed), this waits for it, once.
        """
        return bool(self._planner.inventory.predicted(self.state))

    @_alone
    def eval(self) -> None:
        """Put the true weights theta into the parameters. Idempotent and exact: :meth:`train` undoes every bit."""
        self.train(False)

    @_alone
    def train(self, mode: bool = True) -> None:
        """Put the predicted weights theta_hat into the parameters; ``train(False)`` is :meth:`eval`. Idempotent.

        A parameter that is frozen (`requires_grad` False, no gradient) holds theta from here on, until a step moves it.
        """
        self._planner.note_frozen(self.param_groups)
        self._put(bool(mode))

    @_alone
    def _predict(self) -> None:
        """`train()` for a forward: what is frozen only in it, as one half of a GAN at a time, keeps its prediction."""
        self._put(True)

    @contextmanager
    def true_weights(self) -> Iterator[None]:
        """The parameters hold theta inside the block, and afterwards what they held before.

        The place to evaluate, save, average or clip: what is written to the parameters inside is written to theta.
        Forwards of an attached model in training mode see theta too (`torch.optim.swa_utils.update_bn`). Where blocks
        overlap, of several threads say, theta stays until the last one ends.
        """
        pin = Pin()
        try:
            self._open(pin)
            yield
        finally:
            self._close(pin)

    @_alone
    def _open(self, pin: Pin) -> None:
        pin.was_predicted = self._planner.inventory.predicted(self.state)  # nobody waits for a flag on a device
        self._switch.pins.add(pin)
        self.eval()

    @_alone
    def _close(self, pin: Pin) -> None:
        self._switch.pins.discard(pin)
        if pin.was_predicted is not False:
            for other in self._switch.pins:  # still open: the last block to end brings theta_hat back
                other.was_predicted = pin.was_predicted
                return
            self._planner.note_frozen(self.param_groups)
            self._put(pin.was_predicted)

    def attach(self, model: torch.nn.Module, partial: bool = False) -> Attachment:
        """Let a model's own mode decide: in training mode a forward sees theta_hat, in evaluation mode theta.

        The mode is that of the outermost module that runs, whether or not gradients are recorded. ``model.eval()``
        puts theta in place at once, for all that reads the weights without a forward (merging adapters, pruning,
        converting, exporting); ``model.train()`` leaves theta_hat to the first forward. What counts is the attached
        model's own mode, or that of the module that it wraps, so a frozen BatchNorm changes nothing; a wrapper's
        ``train(mode)`` reaches it, as PyTorch calls it for all children. ``state_dict()`` of the model, of its
        submodules and of this optimizer hold theta, ``load_state_dict()`` of the model sets theta. Copies and pickles
        of the model hold theta and none of the hooks. All this leaves theta in place until the next forward in training
        mode, and raises autograd's error where a backward is still to come.

        A forward that finds its weights in place costs one comparison for each module with parameters of the
        optimizer, and takes no lock. Threads may evaluate at once.
        Inside a tracer, a transform of ``torch.func`` or a FakeTensorMode weights are exchanged outside of it; where
        torch.compile and torch.export may not break a graph, they say to call ``model.eval()`` first. Weights that are
        handed in by ``torch.func.functional_call`` are left alone.

        Attach after what replaces parameters or moves their all-gather into hooks (``fully_shard``), before or after
        what wraps the model (``DistributedDataParallel``, ``torch.compile``). Attaching again adds nothing and
        returns the same handle. Several optimizers may attach to one model, and one optimizer to several; all its
        parameters then change together. A module that joins the model later is covered when it runs inside one that
        is attached; for calls of its own, attach again.

        An optimizer that has not stepped yet takes the model over from one that was attached to the same parameters:
        that one leaves theta in them, is detached, and raises when it steps.

        Args:
            model: contains parameters of this optimizer.
            partial: the model's other trainable parameters belong to optimizers that do not predict, or to none, and
                hold the same weights in both modes. Without it, trainable parameters that no attached optimizer owns
                make the first forward raise RuntimeError.

        Returns:
            A handle: ``remove()`` takes the hooks off.

        Raises:
            TypeError: it is no module.
            ValueError: it has none of this optimizer's parameters.
            RuntimeError: another attached optimizer owns some of the same parameters, and this one has state or that
                one another model; or the model is sharded by FullyShardedDataParallel (FSDP1).
        """
        return attach(self, model, partial)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _put(self, target: bool | Tensor) -> None:
        """Put theta_hat or theta in place; a flag on a device says which where the host can't know."""
        if target is not False:
            self._switch.check_not_replaced()
        # Trainers call train() before every batch.
        if self._switch.position is target and self._planner.inventory.is_current(self.param_groups, self.state):
            return
        if target is False:
            self._check_loaded()
        self._planner.swap(self.param_groups, self.state, target)
        self._switch.turn(target if isinstance(target, bool) and self._planner.inventory.is_known else None)

    def _check_loaded(self) -> None:
        """Look once at what the parameters hold, when a state that calls it theta_hat is first used with them."""
        if self._switch.is_loaded and self.predicted:
            checkpoint.warn_of_mismatch(self.rule, self.param_groups, self.state)
        self._switch.is_loaded = False

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    # -- the step ------------------------------------------------------------------------------------------------

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restore theta, update it with the gradients, and leave theta_hat in the parameters.

        In evaluation mode the update starts from the theta that is there. Parameters without a gradient keep theta
        and their last prediction; frozen ones (`requires_grad` False, no gradient) hold theta.

        Args:
            closure: reevaluates the model, at the weights that the parameters hold, and returns the loss.

        Raises:
            RuntimeError: a gradient that is sparse or does not match its parameter, parameters that share memory, or
                options that no back end can serve.
            TypeError, ValueError: a hyperparameter that was replaced by something that can't be computed with.

        After an error parameters and state are as before.
        """
        if recorders.is_any():
            self._refuse_recorders()
        loss = None
        if closure is not None:
            loss = torch.enable_grad()(closure)()
        with self._switch.lock:
            self._switch.check_not_replaced()
            self._check_loaded()
            with _recording_nothing():
                self._planner.note_frozen(self.param_groups)
                are_predicted = self._planner.step(self.param_groups, self.state, self._scaling())
            # Where a skipped step left theta in place, or the host can't know, the next forward has to look.
            self._switch.turn(True if are_predicted else None)
        return loss

    def _refuse_recorders(self) -> None:
        name = recorders.of_steps(self._params())
        if name is not None:
            is_fake = name == "FakeTensorMode"
            why = "it can step fake parameters only, these are real" if is_fake else "call it outside"
            raise RuntimeError(f"{type(self).__name__}.step() was called inside {name}: {why}. Nothing was changed")

    def _scaling(self) -> Scaling:
        """What a GradScaler leaves on the optimizer for the time of a fused step."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is None and found_inf is None:
            return UNSCALED
        return Scaling(1.0 if grad_scale is None else grad_scale, 0.0 if found_inf is None else found_inf)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells torch.amp.GradScaler that `step` unscales the gradients, and skips itself where they overflowed."""
        return all(bool(group["fused"]) for group in self.param_groups)


def _tensors(params: Any) -> list[Tensor]:
    """Those of a param group's "params", which may be one tensor, a collection, or pairs of name and tensor."""
    params = [params] if isinstance(params, Tensor) else params
    tensors = [param[1] if isinstance(param, tuple) else param for param in params]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
