"""The base class of the native optimizers: the step and the state. It knows no formula."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from xgrad_optim import backends, checkpoint, recorders
from xgrad_optim.attach import check_unshared
from xgrad_optim.exchange import Exchange
from xgrad_optim.modes import PredictingOptimizer, alone, recording_nothing, tensors_of
from xgrad_optim.options import checked_options, listed_params
from xgrad_optim.plan import Planner
from xgrad_optim.rows import UNSCALED, Scaling
from xgrad_optim.rule import COMMON, Common


class XGradOptimizer(PredictingOptimizer):
    """Base of the XGrad family (arXiv 2305.18240): a subclass adds a `rule` and a constructor."""

    fixed_options: ClassVar[dict[str, object]] = {}
    """Param-group entries that the class decides: no argument and no checkpoint changes them."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **common: Unpack[Common]) -> None:
        if unknown := common.keys() - COMMON.keys():
            raise TypeError(f"{type(self).__name__}.__init__() got an unexpected keyword argument {min(unknown)!r}")
        params = listed_params(params)
        defaults = checked_options(self.rule, {**defaults, **COMMON, **common})
        backends.check_available(defaults)
        self._exchange = Exchange()
        self._planner = Planner(self.rule, type(self).__name__, self._exchange.begin)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            group.update(self._fixed())
        # What exists is emptied, not replaced: wrappers hold it through a copy of our __dict__.
        exchange = self.__dict__.setdefault("_exchange", Exchange())
        exchange.turn(None)
        self.__dict__.setdefault("_planner", Planner(self.rule, type(self).__name__, exchange.begin)).clear()

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
            if self._exchange.attachments:
                check_unshared(self, tensors_of(params))
            param_group.update(options, params=params)
        super().add_param_group(param_group)
        self._exchange.extend()

    @alone
    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups, as torch.optim's `state_dict()`.

        An attached optimizer first puts theta in place, as its model's `state_dict()` does.
        """
        if self._exchange.attachments:
            self.eval()
        return super().state_dict()

    @alone
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
        state_dict = self._as_hooked(state_dict)
        groups, state = checkpoint.load(self.rule, self._fixed(), self.param_groups, state_dict)
        if self._exchange.attachments:
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
        self._note_loaded()

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
        with self._exchange.lock:
            self._exchange.check_not_replaced()
            self._check_loaded()
            with recording_nothing():
                self._planner.note_frozen(self.param_groups)
                are_predicted = self._planner.step(self.param_groups, self.state, self._scaling())
            # Where a skipped step left theta in place, or the host can't know, the next forward has to look.
            self._exchange.turn(True if are_predicted else None)
        return loss

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
