"""XGrad: weight prediction around any optimizer, which is stepped as it is."""

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from xgrad_optim import backends, checkpoint, recorders
from xgrad_optim.attach import check_unshared
from xgrad_optim.exchange import Exchange
from xgrad_optim.layout import local
from xgrad_optim.modes import PredictingOptimizer, alone, recording_nothing, tensors_of
from xgrad_optim.notes import warn
from xgrad_optim.numbers import is_capturing
from xgrad_optim.numeric import is_supported
from xgrad_optim.optimizer import XGradOptimizer
from xgrad_optim.options import checked_options, listed_params, number
from xgrad_optim.plan import Groups, Planner, States
from xgrad_optim.sgdm import SGDM
from xgrad_optim.state import State

BUFFER = "momentum_buffer"
"""The last update, as XSGDM has it that predicts by the same number: theta_hat = theta - shift * buffer."""

SAVED = {BUFFER: "xgrad_last_update", "predicted": "xgrad_predicted", "prediction_shift": "xgrad_prediction_shift"}
"""What the planner's state is called in a `state_dict`, beside the base's own entries."""

STEPS = "prediction_steps"

_PROGRAM = {"backend": None, "foreach": None, "fused": None, "capturable": False, "master_weights": False}
"""Which code swaps. The base's own options of these names are about its own step."""


class XGrad(PredictingOptimizer):
    """Any optimizer, with gradients that are taken at the weights that its last update, repeated, would lead to.

    The base is stepped as it is, at the true weights. With theta the weights and base(theta) what its step makes of
    them by the gradient at theta_hat::

        theta_old  <- theta
        theta      <- base(theta)
        update      = theta_old - theta                                      (rounded to the parameter's dtype)
        theta_hat   = theta - prediction_steps * update

    Unlike the native classes, which leave weight decay out, it predicts by the whole last update. Where there is a
    native class for the base, it is faster and takes no memory: XAdamW for AdamW, XSGDM for SGD.

    Param groups, ``state`` and ``defaults`` are the base's own. A parameter without a gradient keeps its last
    prediction, a frozen one holds theta.

    State per parameter: ``xgrad_last_update``, shaped like the parameter, in its dtype, and two 0-dim numbers. They
    stand in ``state_dict()`` alone, beside the base's entries; the base never sees them.

    Sources: XGrad, arXiv 2305.18240, Algorithm 1; the prediction by the last update is Overshoot's for plain SGD
    (arXiv 2501.09556).

    Args:
        base (torch.optim.Optimizer): of the parameters, with its options. From here on step, save and load this
            optimizer in its place; schedulers may be of either.
        prediction_steps (float): how many updates ahead the weights are predicted, >= 0; 0 is the base itself, without
            further memory. A param-group option: groups of the base that have one keep it, and a scheduler may change
            it.
        backend (str, optional): what exchanges the weights: "triton", "cuda", "cpu", "torch", or None for the best
            that can run. The base has options of its own for its step.

    Parameters are float64, float32, bfloat16, float16, complex128 or complex64, and no two of them share memory.

    Raises:
        TypeError: the base is no optimizer, or ``prediction_steps`` no number.
        ValueError: ``prediction_steps`` is out of its range; or the base exchanges weights itself (schedule-free
            optimizers), is attached to a model, or evaluates its closure several times in a step (LBFGS with
            ``max_iter`` > 1 or a line search).
        RuntimeError: a demanded back end that this machine lacks.
    """

    rule = SGDM

    base: Optimizer
    """The optimizer that is stepped."""
    _steps: float
    _program: dict[str, Any]
    _own: dict[Tensor, State]

    def __init__(self, base: Optimizer, prediction_steps: float = 1.0, *, backend: str | None = None) -> None:
        _check_base(base)
        steps = _checked_steps(prediction_steps)
        program = {**_PROGRAM, "backend": backend}
        backends.check_available(checked_options(SGDM, program))
        if isinstance(base, XGradOptimizer):
            base.eval()
            _put_steps(base.param_groups, repeat(steps))
        self.__setstate__({"base": base, "_steps": steps, "_program": program, "_own": {}})

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("base", "_steps", "_program", "_own")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._exchange = Exchange()
        self._planner = Planner(SGDM, type(self).__name__, self._exchange.begin)
        self._views: Groups = []
        self._complete_groups()

    # -- what is the base's own ----------------------------------------------------------------------------------

    @property
    def param_groups(self) -> Groups:
        """The base's own param groups, each with its `prediction_steps`."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self.base.param_groups = groups
        self._complete_groups()

    @property
    def state(self) -> Any:
        """The base's own state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's own defaults."""
        return self.base.defaults

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base's own."""
        self.base.zero_grad(set_to_none=set_to_none)

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base; it may have `prediction_steps` of its own."""
        if isinstance(param_group, dict):
            steps = _checked_steps(param_group.get(STEPS, self._steps))
            params = listed_params(param_group["params"])
            if self._exchange.attachments:
                check_unshared(self, tensors_of(params))
            param_group.update({STEPS: steps, "params": params})
        self.base.add_param_group(param_group)
        self._exchange.extend()

    def _complete_groups(self) -> None:
        for group in self.param_groups:
            group.setdefault(STEPS, self._steps)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler may leave unscaling and skipping to the base's step, as fused ones of torch.optim do."""
        takes_scaler = "grad_scaler" in inspect.signature(self.base.step).parameters  # a protocol that torch has left
        return bool(getattr(self.base, "_step_supports_amp_scaling", False)) and not takes_scaler

    # -- state_dict ----------------------------------------------------------------------------------------------

    @alone
    def state_dict(self) -> dict[str, Any]:
        """The base's `state_dict()`, and for each parameter what its prediction is made of.

        The base can load it, at the weights that the parameters hold: save in evaluation mode for that. An attached
        optimizer first puts theta in place, as its model's `state_dict()` does.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        if self._exchange.attachments:
            self.eval()
        saved = self.base.state_dict()
        state = dict(saved["state"])
        for saved_id, param in checkpoint.params_by_id(saved["param_groups"], self.param_groups).items():
            own = self._own.get(param)
            if own is not None and bool(own.get("prediction_shift", 0.0)):
                state[saved_id] = {**state.get(saved_id, {}), **{name: own[key] for key, name in SAVED.items()}}
        saved = {**saved, "state": state}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            replaced = post_hook(self, saved)
            if replaced is not None:
                saved = replaced
        return saved

    @alone
    @torch.inference_mode(False)  # nobody may update what is made there
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Adopt a state_dict of this optimizer or of its base; the base loads its part by its own method.

        The parameters must hold what they held when it was saved: theta in a base's, and `predicted` tells which in
        one of this class.

        Raises:
            ValueError: it does not fit the parameters. Nothing has changed then, nor where the base raises.
        """
        state_dict = self._as_hooked(state_dict)
        params = checkpoint.params_by_id(checkpoint.groups_in(state_dict, self.param_groups), self.param_groups)
        own: dict[Tensor, State] = {}
        theirs: dict[Any, Any] = {}
        for saved_id, values in state_dict["state"].items():
            mine = {key: values[name] for key, name in SAVED.items() if name in values}
            mine |= {"step": 1.0} if mine else {}
            if mine and saved_id in params:
                own[params[saved_id]] = checkpoint.load_param_state(SGDM, saved_id, params[saved_id], mine)
            rest = {key: value for key, value in values.items() if key not in SAVED.values()}
            if rest or not mine:
                theirs[saved_id] = rest
        if not isinstance(self.base, XGradOptimizer) and any(map(_is_of_predicted, theirs.values())):
            warn(
                "the loaded state was saved by another optimizer while its parameters held predicted weights, which "
                "are taken for the true ones here: save it in evaluation mode, and the model beside it"
            )
        if self._exchange.attachments:
            self.eval()  # what undoes the present prediction is about to go
        loaded: list[None] = []
        try:
            self._adopt({**state_dict, "state": theirs}, own, loaded)
        except BaseException:
            if loaded:
                self._adopt({}, own, loaded)  # an interrupt finds all of it done
            raise
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _adopt(self, theirs: dict[str, Any], own: dict[Tensor, State], loaded: list[None]) -> None:
        if not loaded:
            loaded.append(self.base.load_state_dict(theirs))
        self._own.clear()
        self._own.update(own)
        self._complete_groups()
        self._note_loaded()

    # -- the step ------------------------------------------------------------------------------------------------

    @property
    def _planned(self) -> tuple[Groups, States]:
        """The groups as the planner takes them, the same objects while the base has the same groups; our own state."""
        groups, views = self.param_groups, self._views
        if len(views) != len(groups) or any(view["of"] is not group for view, group in zip(views, groups, strict=True)):
            views[:] = [{**self._program, "of": group} for group in groups]
        for view, group in zip(views, groups, strict=True):
            view["params"] = group["params"]
        return views, self._own

    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Restore theta, let the base update it, and leave theta_hat in the parameters.

        Args:
            closure: reevaluates the model, at the weights that the parameters hold, and returns the loss. It is called
                once; the base gets its result.

        Returns:
            What the base's step returns.

        Raises:
            RuntimeError: the base asks for its closure's result again, a graph is being captured, or parameters that
                share memory or whose dtype is not supported.

        Where the base's step raises, its parameters hold theta from before, unpredicted, and its state is what it has
        made of it. After any other error all is as before.
        """
        if recorders.is_any():
            self._refuse_recorders()
        if any(map(is_capturing, {param.device for param in self._params()})):
            raise RuntimeError(
                "XGrad can't be captured in a graph: only the host knows whether and how far it predicts, which would "
                "be the same in each replay. Step outside of the capture, or use a native class with capturable=True"
            )
        arguments = () if closure is None else (_answer(torch.enable_grad()(closure)()),)
        with self._exchange.lock:
            self._exchange.check_not_replaced()
            self._check_loaded()
            # Known here, or waited for, as for any optimizer that leaves this to the scaler.
            if bool(getattr(self, "found_inf", False)):
                return None
            with recording_nothing():
                result = self._step(arguments)
            self._exchange.turn(True if self._planner.inventory.are_all_predicted else None)
        return result

    def _step(self, arguments: tuple[Callable[[], Any], ...]) -> Any:
        shifts = self._shifts()
        planner, (groups, own) = self._planner, self._planned
        ahead = {param: shift for param, shift in shifts.items() if shift}
        for param in ahead.keys() - own.keys():
            own[param] = {BUFFER: torch.empty_like(param, requires_grad=False)}
        planner.note_frozen(groups)
        planner.swap(groups, own, False)
        unused = own.keys() - set(self._params()) | shifts.keys() - ahead.keys()
        for param in unused:
            own.pop(param, None)  # it holds theta by now
        move = _Move(
            arguments,
            ahead,
            [local(param) for param in ahead],
            [local(own[param][BUFFER]) for param in ahead],
            {name: vars(self)[name] for name in ("grad_scale", "found_inf") if name in vars(self)},
            [group[STEPS] for group in self.param_groups],
        )
        # From here on the buffers hold theta as it was, so nothing may be predicted by them.
        planner.predict_by(dict.fromkeys(ahead, 0.0))
        _copy(move.buffers, move.thetas)
        self._exchange.begin(False)  # forwards of other threads wait from here on
        done: list[Any] = []
        try:
            self._advance(move, done)
        except BaseException:
            if isinstance(self.base, XGradOptimizer) and not all(map(torch.equal, move.thetas, move.buffers)):
                done = done or [None]  # it has stepped as a whole
            if done:
                self._advance(move, done)  # an interrupt finds all of it done
            else:
                self._let_go(move)
                _copy(move.thetas, move.buffers)
            raise
        return done[0]

    def _advance(self, move: "_Move", done: list[Any]) -> None:
        """Step the base and predict, but for what is `done`: after an interrupt it goes on where it was."""
        if not done:
            vars(self.base).update(move.marks)
            if isinstance(self.base, XGradOptimizer):
                _put_steps(self.param_groups, repeat(0.0))  # it is not to predict itself
            done.append(self.base.step(*move.arguments))
        self._let_go(move)
        phases = (partial(_subtract, move.buffers, move.thetas), partial(self._planner.predict_by, move.shifts))
        for phase in phases[len(done) - 1 :]:
            done.append(phase())
        self._planner.swap(*self._planned, True)

    def _let_go(self, move: "_Move") -> None:
        """The base's step has ended: what it was told for its time alone goes."""
        if isinstance(self.base, XGradOptimizer):
            _put_steps(self.param_groups, move.steps)
        for name in move.marks:
            vars(self.base).pop(name, None)

    def _shifts(self) -> dict[Tensor, float]:
        """How many times its update each parameter is to be ahead; of those that the base is about to step."""
        self._complete_groups()
        shifts = {}
        for group in self.param_groups:
            known = number(STEPS, f"{STEPS} value", group[STEPS])
            shift = float(group[STEPS]) if known is None else known
            for param in group["params"]:
                if param.grad is not None:
                    shifts[param] = shift
                    if shift and not is_supported(param.dtype):
                        raise RuntimeError(
                            f"XGrad does not support parameters of dtype {param.dtype}, got a parameter of shape "
                            f"{tuple(param.shape)}: give their group prediction_steps=0"
                        )
        return shifts


class _Move(NamedTuple):
    """A step on its way.

    Attributes:
        arguments: of the base's step.
        shifts: the parameters that it is to move and we to predict, and by how many of their updates.
        thetas, buffers: these parameters, and their theta from before.
        marks: what a GradScaler has left on us for the base.
        steps: the groups' `prediction_steps`.
    """

    arguments: tuple[Callable[[], Any], ...]
    shifts: dict[Tensor, float]
    thetas: list[Tensor]
    buffers: list[Tensor]
    marks: dict[str, Any]
    steps: list[Any]


def _check_base(base: object) -> None:
    name = type(base).__name__
    if not isinstance(base, Optimizer):
        given = f"the class {base.__name__}" if isinstance(base, type) else f"a {name}"
        raise TypeError(
            f"XGrad expects an optimizer, got {given}: make it first, XGrad(torch.optim.AdamW(model.parameters()))"
        )
    if isinstance(base, XGradOptimizer):
        if base._exchange.attachments:
            raise ValueError(
                f"the {name} is attached to a model: call remove() on its handle, and attach the XGrad of it"
            )
    elif callable(getattr(base, "eval", None)) and callable(getattr(base, "train", None)):
        raise ValueError(
            f"{name} has eval() and train() of its own, so that its parameters hold other weights in training than in "
            "evaluation already: use it without XGrad"
        )
    if isinstance(base, torch.optim.LBFGS):
        for group in base.param_groups:
            if group["max_iter"] != 1 or group["line_search_fn"] is not None:
                raise ValueError(
                    "LBFGS evaluates its closure several times in a step, each time at other weights, of which none is "
                    "predicted: use LBFGS(max_iter=1, line_search_fn=None)"
                )


def _checked_steps(value: Any) -> Any:
    return checked_options(SGDM, {STEPS: value})[STEPS]


def _answer(loss: Any) -> Callable[[], Any]:
    """The closure that the base gets: the real one has been called, at theta_hat."""
    answers = iter([loss])

    def closure() -> Any:
        for answer in answers:
            return answer
        raise RuntimeError(
            "the base evaluates its closure more than once in a step, but only the first gradient is taken at "
            "predicted weights. Use the base without XGrad"
        )

    return closure


def _is_of_predicted(state: Any) -> bool:
    """Whether a native class of ours has saved this while its parameters held theta_hat."""
    return isinstance(state, Mapping) and "prediction_shift" in state and bool(state.get("predicted", False))


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _subtract(targets: list[Tensor], others: list[Tensor]) -> None:
    if targets:
        torch._foreach_sub_(targets, others)


def _put_steps(groups: Groups, steps: Iterable[Any]) -> None:
    """Give each group its `prediction_steps`, in one call of C, which no interrupt parts."""
    deque(map(dict.__setitem__, groups, repeat(STEPS), steps), 0)
