"""`attach`: the hooks by which a model's forwards and checkpoints find the weights that they need in place."""

import warnings
import weakref
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from xgrad_optim.optimizer import XGradOptimizer

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
else:  # builds of torch without distributed
    FSDPModule = ()  # type: ignore[assignment,misc]


class Switch:
    """Which weights an optimizer has put in place last, and the models that must hear of it.

    One for each optimizer, changed in place and never replaced: hooks and wrappers of the optimizer share it.

    Attributes:
        position: True where `train()` would change nothing, False where `eval()` would not, None where it takes a look
            at the state to know.
        is_loaded: whether the state was loaded and not used since: the model that belongs to it may still be to come.
        pins: how many `true_weights()` blocks are open.
        outermost: of the attached modules that are running, the id of the one that was called first, or 0. The module
            itself would be one object by two names to torch.compile, which refuses that.
        attachments: the optimizer's own, as long as their models live.
    """

    def __init__(self) -> None:
        self.position: bool | None = None
        self.is_loaded = False
        self.pins = 0
        self.outermost = 0
        self.attachments: weakref.WeakSet[Attachment] = weakref.WeakSet()

    def turn(self, position: bool | None) -> None:
        """Note what the parameters now hold; None where the state has been replaced, or only a device knows."""
        self.position = position

    def drop_copies(self) -> None:
        """Parameters have changed outside of a step: drop the copies of them that torch keeps for the next forward."""
        torch.clear_autocast_cache()
        for attachment in self.attachments:
            attachment.reshard()

    def extend(self) -> None:
        """The optimizer has new parameters, so more modules may concern it."""
        for attachment in self.attachments:
            attachment.add_hooks()


class Attachment:
    """The hooks of one optimizer on one model, and the handle to remove them.

    Every module that contains a parameter of the optimizer is hooked, because training stacks call submodules as well
    as the whole. A copy of the model (deepcopy, pickle) carries an attachment without an optimizer, which does nothing.
    """

    def __init__(self, optimizer: Optional["XGradOptimizer"] = None, model: Module | None = None) -> None:
        self.optimizer = optimizer
        self.switch = Switch() if optimizer is None else optimizer._switch
        self._model = (lambda: None) if model is None else weakref.ref(model)
        self._hooked: weakref.WeakSet[Module] = weakref.WeakSet()
        self._handles: list[RemovableHandle] = []
        self._is_checked = False
        self.reshard()
        self.add_hooks()

    def remove(self) -> None:
        """Take the hooks off the model. The parameters keep the weights that they hold."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        self.switch.attachments.discard(self)

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
            warnings.warn(
                "a model was copied or pickled while its parameters held predicted weights, and so does the copy. "
                "For the true weights copy it inside `with optimizer.true_weights():`",
                stacklevel=3,
            )

    # -- the hooks -----------------------------------------------------------------------------------------------

    def add_hooks(self) -> None:
        """Hook the modules that contain a parameter of the optimizer and are not hooked yet."""
        model = self._model()
        if model is None or self.optimizer is None:
            return
        owned = _owned(self.optimizer)
        for module in model.modules():
            if module not in self._hooked and any(param in owned for param in module.parameters()):
                self._hooked.add(module)
                self._handles += (
                    # Ahead of all others: FSDP's pre-forward hook gathers what the parameters hold by then.
                    module.register_forward_pre_hook(self.enter, prepend=True),
                    module.register_forward_hook(self.leave, always_call=True),
                    module.register_state_dict_pre_hook(self.save),
                    module.register_load_state_dict_pre_hook(self.load),
                )

    def enter(self, module: Module, args: object) -> None:
        """Forward pre-hook. Modules inside a running one follow it: a frozen BatchNorm must not swap mid-forward."""
        switch = self.switch
        # The outermost one anew is what an interrupted forward leaves behind, or a recursion, of the same mode.
        if switch.outermost == 0 or switch.outermost == id(module):
            switch.outermost = id(module)
            if switch.position is not module.training:
                self._place(module)

    def leave(self, module: Module, args: object, output: object) -> None:
        """Forward hook, called also where the forward raises."""
        if self.switch.outermost == id(module):
            self.switch.outermost = 0

    def save(self, module: Module, *args: object) -> None:
        """Pre-hook of state_dict: what is saved is theta."""
        if self.optimizer is not None and self.switch.position is not False:
            self.optimizer.eval()

    def load(self, module: Module, *args: object) -> None:
        """Pre-hook of load_state_dict: what is loaded is theta."""
        if self.optimizer is not None and self.switch.is_loaded and self.optimizer.predicted:
            self.switch.is_loaded = False
            warnings.warn(
                "the optimizer's state was saved while its parameters held predicted weights, but the weights that "
                "are loaded after it into the attached model are taken for the true ones. Where both are of one "
                "checkpoint, load the model first",
                stacklevel=2,
            )
        self._is_checked = False
        self.save(module)

    @torch._disable_dynamo
    def _place(self, module: Module) -> None:
        """Put the weights in place that a forward in this module's mode is to see."""
        if self.optimizer is None or (module.training and self.switch.pins):
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "DataParallel copies the weights before its replicas run: attach the DataParallel module itself"
            )
        if not self._is_checked:
            self._check()
            self._is_checked = True
        self.optimizer.train(module.training)

    # -- what the model must be ----------------------------------------------------------------------------------

    def _check(self) -> None:
        """Raise RuntimeError where the hooks would leave some weights of the model as they are, or come too late.

        Asked at the first forward, when all optimizers of the model are attached.
        """
        self.reshard()
        model = self._model()
        assert model is not None
        owned: set[Tensor] = set()
        for module in model.modules():
            attachments = _attachments(module)
            owned.update(*(_owned(attachment.optimizer) for attachment in attachments if attachment.optimizer))
            first = next(iter(module._forward_pre_hooks.values()), None)
            if isinstance(module, FSDPModule) and attachments and getattr(first, "__self__", None) not in attachments:
                raise RuntimeError("a module was sharded after attach(model): call fully_shard first, then attach")
        missed = [name for name, param in model.named_parameters() if param.requires_grad and param not in owned]
        if missed:
            raise RuntimeError(
                f"{len(missed)} trainable parameters of the attached model, {missed[0]!r} the first, belong to no "
                "attached optimizer, so that nothing takes them to the weights that a forward needs. Attach the XGrad "
                "optimizer that owns them as well, or attach this one to the submodules whose parameters it owns. The "
                "optimizer inside a ZeroRedundancyOptimizer can't be attached: call zero.optim.eval() or train() and "
                "then zero._sync_params(). After load_state_dict(assign=True) make the optimizer anew"
            )

    def reshard(self) -> None:
        """Drop the weights that FSDP has gathered: it keeps them after a forward without a backward."""
        model = self._model()
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


def attach(optimizer: "XGradOptimizer", model: Module) -> Attachment:
    """Hook the model. See :meth:`XGradOptimizer.attach`."""
    if not isinstance(model, Module):
        raise TypeError(f"attach expects a torch.nn.Module, got {type(model).__name__}")
    attachment = Attachment(optimizer, model)
    if not attachment._handles:
        raise ValueError(
            "attach(model) found none of the optimizer's parameters in the model: attach the model whose parameters() "
            "the optimizer was made of, after whatever replaces them (fully_shard, accelerate's prepare)"
        )
    rivals = _rivals(optimizer, model)
    if rivals and any(optimizer.state.values()):
        attachment.remove()
        raise RuntimeError(
            "the model is attached to another optimizer with the same parameters, and both hold predictions for them: "
            "attach before the first step, or call remove() on the handle of the other one"
        )
    # A cell that is run again, or Lightning's fit, makes the optimizer anew: the old one leaves theta and goes.
    for rival in rivals:
        rival.eval()
        for old in list(rival._switch.attachments):
            old.remove()
    optimizer._switch.attachments.add(attachment)
    # The next forward asks whether all parameters have an owner.
    optimizer._switch.position = None
    return attachment


def _rivals(optimizer: "XGradOptimizer", model: Module) -> set["XGradOptimizer"]:
    """Other optimizers that are attached to the model and own some of the same parameters."""
    owned = _owned(optimizer)
    others = {attachment.optimizer for module in model.modules() for attachment in _attachments(module)}
    return {
        other
        for other in others
        if other is not None and other._switch is not optimizer._switch and not owned.isdisjoint(_owned(other))
    }


def _owned(optimizer: "XGradOptimizer") -> set[Tensor]:
    return {param for group in optimizer.param_groups for param in group["params"]}


def _attachments(module: Module) -> list[Attachment]:
    owners = [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]
    return [owner for owner in owners if isinstance(owner, Attachment)]
