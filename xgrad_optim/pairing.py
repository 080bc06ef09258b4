"""Whether the weights in a model are the predicted ones that a loaded optimizer state says they are."""

import warnings
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xgrad_optim.layout import local

if TYPE_CHECKING:
    from xgrad_optim.optimizer import XGradOptimizer

SAMPLE = 1 << 12
"""Elements of each parameter that are looked at."""


@torch.inference_mode(False)
@torch.no_grad()
def warn_of_mismatch(optimizer: "XGradOptimizer") -> None:
    """Say so where the parameters do not hold the predicted weights that the state was saved with.

    Going to theta and back returns every bit of those. Of any others it changes the ones whose sums round differently
    on the way back, a few in a hundred or thousand: enough to tell, but for the tiniest of models. One pair passes
    unseen, theta itself one step ahead: it is what the theta before it predicted. A state that calls the weights the
    true ones says nothing: they may have been loaded or clipped since.
    """
    sample = _sample(optimizer)
    held = _held(sample)
    sample.eval()
    sample.train()
    if not all(map(torch.equal, held, _held(sample))):
        warnings.warn(
            "the parameters do not hold the predicted weights that the loaded optimizer state was saved with: the "
            "model's file is of another mode or moment. Save both in one mode, as an attached optimizer and its model "
            "are, and load both before they are used, the model first",
            stacklevel=4,
        )


def _sample(optimizer: "XGradOptimizer") -> "XGradOptimizer":
    """A copy of the optimizer for the first elements of each parameter that holds predicted weights."""
    rule = optimizer.rule
    sampled: defaultdict[Tensor, Any] = defaultdict(dict)
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        groups.append({**group, "params": []})
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if bool(state.get("predicted", False)):
                piece = _first_elements(param)
                groups[-1]["params"].append(piece)
                sampled[piece] = {key: _first_elements(state[key]) for key in rule.buffer_keys if key in state}
                sampled[piece] |= {key: state[key].clone() for key in rule.number_keys}
    # The class of the rule: a wrapper that poses as one of our classes has no state of its own.
    cls: type[XGradOptimizer] = next(cls for cls in type(optimizer).__mro__ if "rule" in vars(cls))
    sample = cls.__new__(cls)
    sample.__setstate__({"defaults": optimizer.defaults, "state": sampled, "param_groups": groups})
    return sample


def _first_elements(tensor: Tensor) -> Tensor:
    return local(tensor.detach()).reshape(-1)[:SAMPLE].clone()


def _held(optimizer: "XGradOptimizer") -> list[Tensor]:
    """The weights in full: a master copy tells what a 16-bit parameter can't."""
    states = optimizer.state.items()
    return [state.get("master_weights", param).clone() for param, state in states] + [p.clone() for p, _ in states]
