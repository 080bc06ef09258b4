"""The two modes of an optimizer that predicts: theta or theta_hat in the parameters, by hand or by a model's mode."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from xgrad_optim import checkpoint, recorders
from xgrad_optim.attach import attach
from xgrad_optim.exchange import Exchange, Pin
from xgrad_optim.hooks import Attachment
from xgrad_optim.plan import Groups, Planner, States
from xgrad_optim.rule import Rule

P = ParamSpec("P")
R = TypeVar("R")


def alone(method: Callable[P, R]) -> Callable[P, R]:
    """A method that exchanges weights: no other thread steps or swaps meanwhile, and no tracer sees it."""

    @wraps(method)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        optimizer: Any = args[0]
        with optimizer._exchange.lock:
            if not recorders.is_any() or recorders.are_fake(optimizer._params()):
                return method(*args, **kwargs)
            with recorders.outside():
                return method(*args, **kwargs)

    return torch._disable_dynamo(alone)


def recording_nothing() -> AbstractContextManager[object]:
    """No gradients; and no inference mode, for nobody may update what is made there."""
    return _no_inference() if torch.is_inference_mode_enabled() else torch.no_grad()


@contextmanager
def _no_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


class PredictingOptimizer(Optimizer):
    """An optimizer whose parameters hold theta_hat, the predicted weights, or theta, the true ones."""

    rule: ClassVar[Rule]
    _planner: Planner
    _exchange: Exchange

    @property
    def _planned(self) -> tuple[Groups, States]:
        """The param groups and the state that the planner swaps by."""
        return self.param_groups, self.state

    @property
    @alone
    def predicted(self) -> bool:
        """Whether the parameters hold theta_hat. False before the first step, when theta_hat is theta.

        Where only a device knows (a captured graph was replayed), this waits for it, once.
        """
        return bool(self._planner.inventory.predicted(self._planned[1]))

    @alone
    def eval(self) -> None:
        """Put the true weights theta into the parameters. Idempotent and exact: :meth:`train` undoes every bit."""
        self.train(False)

    @alone
    def train(self, mode: bool = True) -> None:
        """Put the predicted weights theta_hat into the parameters; ``train(False)`` is :meth:`eval`. Idempotent.

        A parameter that is frozen (`requires_grad` False, no gradient) holds theta from here on, until a step moves it.
        """
        self._planner.note_frozen(self._planned[0])
        self._put(bool(mode))

    @alone
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

    @alone
    def _open(self, pin: Pin) -> None:
        pin.was_predicted = self._planner.inventory.predicted(self._planned[1])  # nobody waits for a flag on a device
        self._exchange.pins.add(pin)
        self.eval()

    @alone
    def _close(self, pin: Pin) -> None:
        self._exchange.pins.discard(pin)
        if pin.was_predicted is not False:
            for other in self._exchange.pins:  # still open: the last block to end brings theta_hat back
                other.was_predicted = pin.was_predicted
                return
            self._planner.note_frozen(self._planned[0])
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
            self._exchange.check_not_replaced()
        # Trainers call train() before every batch.
        if self._exchange.mode is target and self._planner.inventory.is_current(*self._planned):
            return
        if target is False:
            self._check_loaded()
        self._planner.swap(*self._planned, target)
        self._exchange.turn(target if isinstance(target, bool) and self._planner.inventory.is_known else None)

    def _check_loaded(self) -> None:
        """Look once at what the parameters hold, when a state that calls it theta_hat is first used with them."""
        if self._exchange.is_loaded and self.predicted:
            checkpoint.warn_of_mismatch(self.rule, *self._planned)
        self._exchange.is_loaded = False

    def _as_hooked(self, state_dict: Any) -> dict[str, Any]:
        """What is to be loaded: what the pre-hooks make of a copy."""
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"loaded state dict must be a dict, got {type(state_dict).__name__}")
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = pre_hook(self, state_dict)
            if replaced is not None:
                state_dict = replaced
        return state_dict

    def _note_loaded(self) -> None:
        """The state was replaced as a whole."""
        self._planner.clear()
        self._exchange.turn(None)
        self._exchange.is_loaded = True

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _refuse_recorders(self) -> None:
        name = recorders.of_steps(self._params())
        if name is not None:
            is_fake = name == "FakeTensorMode"
            why = "it can step fake parameters only, these are real" if is_fake else "call it outside"
            raise RuntimeError(f"{type(self).__name__}.step() was called inside {name}: {why}. Nothing was changed")


def tensors_of(params: Any) -> list[Tensor]:
    """Those of a param group's "params", which may be one tensor, a collection, or pairs of name and tensor."""
    params = [params] if isinstance(params, Tensor) else params
    tensors = [param[1] if isinstance(param, tuple) else param for param in params]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
