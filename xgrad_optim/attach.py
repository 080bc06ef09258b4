"""Attaching an optimizer to a model: once, to a model that it can serve, and with no other optimizer in its way."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Module

from xgrad_optim.exchange import exchanges
from xgrad_optim.hooks import FSDP1, Attachment, are_flattened, attachments_of, owned_by

if TYPE_CHECKING:
    from xgrad_optim.modes import PredictingOptimizer


def attach(optimizer: "PredictingOptimizer", model: Module, partial: bool) -> Attachment:
    """Hook the model. See :meth:`PredictingOptimizer.attach`."""
    if not isinstance(model, Module):
        raise TypeError(f"attach expects a torch.nn.Module, got {type(model).__name__}")
    owned, exchange = owned_by(optimizer), optimizer._exchange
    present = next((each for each in exchange.attachments if each.model is model), None)
    attachment = present or Attachment(optimizer, model)
    attachment.reshard()
    if owned.isdisjoint(model.parameters()):
        raise ValueError(
            "attach(model) found none of the optimizer's parameters in the model: attach the model whose parameters() "
            "the optimizer was made of, after whatever replaces them (fully_shard, accelerate's prepare)"
        )
    if are_flattened(owned):
        raise RuntimeError(FSDP1)
    predecessors = _predecessors(optimizer, model)
    try:
        attachment.add_hooks()
        for predecessor in predecessors:
            predecessor.eval()
            predecessor._exchange.hand_over(type(optimizer).__name__)
        attachment.is_partial = partial
        exchange.successor = None
        return attachment
    except BaseException:
        if present is None:
            attachment.remove()
        raise


def _predecessors(optimizer: "PredictingOptimizer", model: Module) -> list["PredictingOptimizer"]:
    """The optimizers from which this one takes the model over, as it has not stepped yet: a cell was run again.

    Raises RuntimeError where an attached optimizer with some of the same parameters can't be meant to go.
    """
    rivals = _rivals(optimizer, owned_by(optimizer))
    if not rivals:
        return []
    on_model = {attachment.exchange for module in model.modules() for attachment in attachments_of(module)}
    for rival, shared in rivals.items():
        is_on_model = rival._exchange in on_model
        if not is_on_model or any(optimizer.state.values()):
            names = [name for name, param in model.named_parameters() if param in shared]
            raise RuntimeError(
                f"{'the' if is_on_model else 'another'} model is attached to another optimizer with the same "
                f"parameters: {_of_both(optimizer, rival, shared)}{', ' * bool(names)}{', '.join(names[:3])}. Only one "
                "optimizer can predict a parameter: make them of parameters of their own, or call remove() on the "
                "handle of the one that is to go. A new one takes a model over where it is attached before it has state"
            )
    return list(rivals)


def check_unshared(optimizer: "PredictingOptimizer", params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where parameters that are to join an attached optimizer belong to another attached one."""
    for rival, shared in _rivals(optimizer, set(params)).items():
        raise RuntimeError(f"only one attached optimizer can predict a parameter: {_of_both(optimizer, rival, shared)}")


def _rivals(optimizer: "PredictingOptimizer", params: set[Tensor]) -> dict["PredictingOptimizer", set[Tensor]]:
    """Other attached optimizers that own some of these parameters, with these."""
    attached = {attachment.optimizer for exchange in list(exchanges) for attachment in exchange.attachments}
    others = [other for other in attached if other is not None and other._exchange is not optimizer._exchange]
    shared = {other: params & owned_by(other) for other in others}
    return {other: common for other, common in shared.items() if common}


def _of_both(optimizer: "PredictingOptimizer", rival: "PredictingOptimizer", shared: set[Tensor]) -> str:
    return f"this {type(optimizer).__name__} and that {type(rival).__name__} have {len(shared)} in common"
