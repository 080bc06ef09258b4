"""The hooks by which a model's forwards, copies and checkpoints find the weights that they need in place.

A model holds theta_hat, or theta, or nobody can tell without a look at the optimizer's state: `Exchange.mode`. A
forward compares it with the mode of its module, and only where they differ asks who has called it and has the weights
exchanged. Nothing is noted about running forwards, so an interrupted one leaves nothing behind; threads that find
their weights in place never wait for each other.
"""

import sys
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from xgrad_optim.covers import cover, uncover, without
from xgrad_optim.exchange import Exchange
from xgrad_optim.notes import warn
from xgrad_optim.recorders import untraced

if TYPE_CHECKING:
    from xgrad_optim.modes import PredictingOptimizer

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
else:  # builds of torch without distributed
    FSDPModule = ()  # type: ignore[assignment,misc]


FSDP1 = (
    "FullyShardedDataParallel keeps gathered copies of its weights from one forward to the next, which a swap does not "
    "reach, so that forwards would see the weights of the other mode. Shard the model with "
    "torch.distributed.fsdp.fully_shard (accelerate: fsdp_version 2), then attach"
)

_BEFORE_TRACING = (
    "the optimizer exchanges the weights here, which no graph can hold: before you compile, export or trace the model, "
    "call model.eval() or optimizer.eval(), for training mode optimizer.train()"
)


class Attachment:
    """The hooks of one optimizer on one model, and the handle to remove them.

    Every module that contains a parameter of the optimizer is hooked, because training stacks call submodules as well
    as the whole. Copies and pickles of the model are made without the hooks, at theta. Where a class copies a module's
    attributes by its own code, the copy carries an attachment without an optimizer, which does nothing.

    Attributes:
        is_partial: whether the model may have trainable parameters that no attached optimizer owns.
    """

    def __init__(self, optimizer: Optional["PredictingOptimizer"] = None, model: Module | None = None) -> None:
        self.optimizer = optimizer
        self.exchange = Exchange() if optimizer is None else optimizer._exchange
        self.is_partial = False
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self._handles: weakref.WeakKeyDictionary[Module, list[RemovableHandle]] = weakref.WeakKeyDictionary()
        self._params: list[tuple[str, weakref.ref[Tensor]]] = []

    @property
    def model(self) -> Module | None:
        """The model, while it lives."""
        return self._model()

    def remove(self) -> None:
        """Take the hooks off the model. The parameters keep the weights that they hold."""
        self.optimizer = None
        self.exchange.attachments.discard(self)
        for module, handles in list(self._handles.items()):
            for handle in handles:
                handle.remove()
            if not attachments_of(module):
                uncover(module)
        # Where another attachment covers some of the same modules, its hooks were these.
        self.exchange.extend()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, object]) -> "Attachment":
        self._warn_of_copy()
        return Attachment()

    def __reduce__(self) -> tuple[type["Attachment"], tuple[()]]:
        self._warn_of_copy()
        return Attachment, ()

    def _warn_of_copy(self) -> None:
        if self.optimizer is not None and self.optimizer.predicted:
            warn(
                "a model was copied or pickled while its parameters held predicted weights, and so does the copy. "
                "For the true weights copy it inside `with optimizer.true_weights():`"
            )

    # -- the hooks -----------------------------------------------------------------------------------------------

    def add_hooks(self) -> None:
        """Hook the modules that contain a parameter of the optimizer and are not hooked yet."""
        model = self.model
        if model is None or self.optimizer is None:
            return
        self.exchange.attachments.add(self)
        self._forget_check()
        self._note_params(model)
        owned = owned_by(self.optimizer)
        for module in model.modules():
            if not self._covers(module) and not owned.isdisjoint(module.parameters()):
                self._hook(module)
        for module in _wrapped_by(model):
            cover(module, "train", _train)

    def _hook(self, module: Module) -> None:
        """Each hook is noted before the next one is set: what fails half-way can be removed, or done again."""
        handles = self._handles.setdefault(module, [])
        # By methods of Module, as scripted modules refuse their own.
        handles.append(Module.register_forward_hook(module, self.leave))
        handles.append(Module.register_state_dict_pre_hook(module, self.save))
        handles.append(Module._register_load_state_dict_pre_hook(module, self.load, with_module=True))
        cover(module, "__getstate__", _getstate)
        # Classes that copy their modules by code of their own: parametrized ones, those of torch.fx.
        if hasattr(type(module), "__deepcopy__"):
            cover(module, "__deepcopy__", _at_theta)
        if type(module).__reduce__ is not object.__reduce__:
            cover(module, "__reduce__", _at_theta)
        # Ahead of all others: FSDP's pre-forward hook gathers what the parameters hold by then.
        handles.append(Module.register_forward_pre_hook(module, self.enter, prepend=True))

    def _covers(self, module: Module) -> bool:
        """Whether the module has the hooks of this optimizer, here or by another attachment."""
        return any(attachment.exchange is self.exchange for attachment in attachments_of(module))

    def hook_ids(self, module: Module) -> set[int]:
        """The keys of this attachment's hooks in the module's tables of hooks."""
        return {handle.id for handle in self._handles.get(module, ())}

    def enter(self, module: Module, args: object) -> None:
        """Forward pre-hook: the outermost module that runs decides which weights it and those inside it see."""
        exchange = self.exchange
        if torch.compiler.is_dynamo_compiling():
            # Forwards that dynamo inlines are not on the stack, where `_swap_for` looks for those that run.
            exchange.traced = exchange.traced or id(module)
            if exchange.traced != id(module):
                return
        if exchange.mode is not module.training:
            self._swap_for(module)

    def leave(self, module: Module, args: object, output: object) -> None:
        """Forward hook."""
        if self.exchange.traced == id(module):
            self.exchange.traced = 0

    def save(self, module: Module, *args: object) -> None:
        """Pre-hook of state_dict: what is saved is theta."""
        if self.optimizer is not None and self.exchange.mode is not False:
            self.optimizer.eval()

    def load(self, module: Module, state_dict: object, prefix: str, metadata: dict[str, Any], *args: object) -> None:
        """Pre-hook of load_state_dict: what is loaded is theta."""
        if self.optimizer is not None and self.exchange.is_loaded and self.optimizer.predicted:
            self.exchange.is_loaded = False
            warn(
                "the optimizer's state was saved while its parameters held predicted weights, but the weights that "
                "are loaded after it into the attached model are taken for the true ones. Where both are of one "
                "checkpoint, load the model first"
            )
        self.save(module)
        if metadata.get("assign_to_params_buffers"):  # load_state_dict(assign=True) replaces the parameters
            self._params.clear()
            self._forget_check()

    def follow_eval(self, module: Module) -> None:
        """The module is in evaluation mode now: put theta in place if it is the model, or what the model wraps."""
        if self.exchange.mode is not False:
            self._place_theta(module)

    @untraced(_BEFORE_TRACING)
    def _place_theta(self, module: Module) -> None:
        models = [attachment.model for attachment in self.exchange.attachments]
        is_whole = any(model is not None and module in _wrapped_by(model) for model in models)
        # In the middle of a forward it is left to the next one.
        if self.optimizer is not None and is_whole and not self._is_running():
            self.optimizer.eval()

    @untraced(_BEFORE_TRACING)
    def _swap_for(self, module: Module) -> None:
        """Put the weights in place that a forward of this module is to see, if no other module's has called it."""
        optimizer, exchange, mode = self.optimizer, self.exchange, module.training
        # Inside a running one it follows that one: a frozen BatchNorm must not swap mid-forward.
        if optimizer is None or (mode and exchange.pins) or self._is_running(but=module):
            return
        # What is recomputed in a backward sees what the first forward has seen.
        if torch._C._current_graph_task_id() != -1:
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "DataParallel copies the weights before its replicas run: attach the DataParallel module itself"
            )
        with exchange.lock:
            if exchange.mode is mode:  # another thread has just done it
                return
            if not exchange.is_checked:
                exchange.check()
            self.reshard()
            # Weights that the caller has handed in (torch.func.functional_call) are its own business; torch.export's
            # stand for ours.
            if owned_by(optimizer).isdisjoint(module.parameters()) and not torch.compiler.is_exporting():
                return
            traced = exchange.traced
            if mode:
                optimizer._predict()
            else:
                optimizer.eval()
            exchange.traced = traced  # the module that asked for the swap still runs

    def _is_running(self, but: Module | None = None) -> bool:
        """Whether this thread is inside a forward of a module that the optimizer is attached to, `but` this call."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "_call_impl":
                module = frame.f_locals.get("self")
                if module is but:
                    but = None
                elif isinstance(module, Module) and self._covers(module):
                    return True
            frame = frame.f_back
        return False

    # -- what the model must be ----------------------------------------------------------------------------------

    def _note_params(self, model: Module) -> None:
        """Note the model's own parameters: during a forward it may hold others, which the caller has handed in."""
        self.reshard()
        self._params = [(name, weakref.ref(param)) for name, param in model.named_parameters()]

    def _forget_check(self) -> None:
        self.exchange.is_checked, self.exchange.mode = False, None

    def problem(self) -> str | None:
        """Why the hooks would leave some weights of the model as they are, or come too late; None where they are right.

        The first forward raises it, when all optimizers of the model are attached.
        """
        model = self.model
        if model is None:
            return None
        if not self._params:
            self._note_params(model)
        owned: set[Tensor] = set()
        for module in model.modules():
            attachments = attachments_of(module)
            owned.update(*(owned_by(attachment.optimizer) for attachment in attachments if attachment.optimizer))
            first = next(iter(module._forward_pre_hooks.values()), None)
            if isinstance(module, FSDPModule) and attachments and getattr(first, "__self__", None) not in attachments:
                return "a module was sharded after attach(model): call fully_shard first, then attach"
        if are_flattened(owned):
            return FSDP1
        params = [(name, ref()) for name, ref in self._params]
        missed = [name for name, param in params if param is not None and param.requires_grad and param not in owned]
        if missed and not self.is_partial:
            return (
                f"{len(missed)} trainable parameters of the attached model, {missed[0]!r} the first, belong to no "
                "attached optimizer, so that nothing takes them to the weights that a forward needs. Attach the XGrad "
                "optimizer that owns them as well. If another optimizer owns them, or none, so that they hold the same "
                "weights in both modes, say attach(model, partial=True). The optimizer inside a "
                "ZeroRedundancyOptimizer can't be attached: call zero.optim.eval() or train() and then "
                "zero._sync_params(). After load_state_dict(assign=True) make the optimizer anew"
            )
        return None

    def reshard(self) -> None:
        """Drop the weights that FSDP has gathered: it keeps them after a forward without a backward."""
        model = self.model
        for module in () if model is None else model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
                for gathered in _gathered(module):
                    # FSDP hides its own writes from autograd: a backward that is still to come would not notice.
                    torch.autograd.graph.increment_version(gathered)


def _gathered(module: Any) -> list[Tensor]:
    """The tensors into which FSDP gathers this module's parameters, as far as it has made them."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # torch < 2.13 has one
    params = [param for group in groups if group is not None for param in group.fsdp_params]
    return [param._unsharded_param for param in params if hasattr(param, "_unsharded_param")]


def are_flattened(params: Iterable[Tensor]) -> bool:
    """Whether they lie in the flat parameters of FullyShardedDataParallel (FSDP1)."""
    return any(getattr(param, "_fsdp_flattened", False) for param in params)


def _wrapped_by(model: Module) -> list[Module]:
    """The model, and the module with all of its parameters that DistributedDataParallel, torch.compile, ... wrap."""
    modules, n_params = [model], sum(1 for _ in model.parameters())
    for module in modules:
        modules += [child for child in module.children() if sum(1 for _ in child.parameters()) == n_params]
    return modules


def owned_by(optimizer: "PredictingOptimizer") -> set[Tensor]:
    """The optimizer's parameters."""
    return {param for group in optimizer.param_groups for param in group["params"]}


def attachments_of(module: Module) -> list[Attachment]:
    """Those whose hooks are on the module."""
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment)]


# -- methods that an attached module has of its own ------------------------------------------------------------------


def _train(module: Module, train: Callable[[bool], Module], mode: bool = True) -> Module:
    """`Module.train` of an attached model, and so `eval`: evaluation mode puts theta in place at once.

    What merges, exports, converts, prunes or serves a model reads its weights without a forward. theta_hat is for the
    forwards of training alone, so training mode leaves it to the first one.
    """
    result = train(mode)
    if not mode:
        for attachment in attachments_of(module):
            attachment.follow_eval(module)
    return result


def _getstate(module: Module, getstate: Callable[[], Any]) -> Any:
    """`Module.__getstate__` of an attached module: copies and pickles are made of it, at theta and without hooks."""
    state = _at_theta(module, getstate)
    ids = frozenset().union(*(attachment.hook_ids(module) for attachment in attachments_of(module)))
    return without(state, ids) if isinstance(state, dict) else state


def _at_theta(module: Module, method: Callable[..., Any], *args: Any) -> Any:
    """A method that makes a copy of an attached module."""
    for attachment in attachments_of(module):
        attachment.save(module)
    return method(*args)
