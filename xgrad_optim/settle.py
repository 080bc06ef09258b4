"""What leaves, leaves at theta: who takes no more steps, and whether its prediction can be undone."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xgrad_optim.layout import local, owns_memory, version
from xgrad_optim.numbers import PREDICTED, UNKNOWN, Numbers
from xgrad_optim.rule import Options
from xgrad_optim.state import State


class Known(NamedTuple):
    """A parameter as it was when it was last looked at: what it takes to bring it back to theta."""

    options: Options
    buffers: State


class Leaving(NamedTuple):
    """Parameters for which nothing is to be predicted any more.

    Attributes:
        gone: they have left the groups with a prediction in place, which may be undone or not.
        undone: their prediction has to be undone, with the state that made it.
        spoiled: somebody wrote to the state that made theirs, so that it can't be undone of it.
        settled: they hold theta already.
    """

    gone: list[Tensor]
    undone: list[Tensor]
    spoiled: list[Tensor]
    settled: list[Tensor]


def find_leaving(
    all_numbers: Iterable[Numbers],
    known: Mapping[Tensor, Known],
    present: Collection[Tensor],
    frozen: Collection[Tensor],
    state: Mapping[Any, Any],
) -> Leaving:
    """Parameters that have left the groups (those `present`), are frozen, or whose state was replaced or written to."""
    leaving = Leaving([], [], [], [])
    owner_of = {id(values.get("predicted")): param for param, values in state.items() if isinstance(values, Mapping)}
    for numbers in all_numbers:
        modes, are_shifted = numbers.modes(), numbers.are_shifted()
        for index, param in enumerate(numbers.params):
            owner = owner_of.get(id(numbers.views[index][PREDICTED]), param)
            if not are_shifted[index] or owner is not param or param not in known:
                # Nothing is predicted; or the state moved to another parameter, and its prediction with it; or the step
                # that was to make the state was interrupted.
                continue
            is_frozen = param in frozen and param in present
            if modes[index] == 0:
                leaving.settled.extend([param] * is_frozen)
                continue
            leaving.gone.extend([param] * (param not in present))
            buffers = known[param].buffers
            is_replaced = not _holds(state.get(param), buffers)
            counts = version(param), sum(map(version, buffers.values()))
            is_followed = (modes[index] == 1) & (numbers.versions[index] != UNKNOWN)
            was_written, was_spoiled = (counts != numbers.versions[index]) & is_followed
            if was_written or not all(map(_is_there, (param, *buffers.values()), [param.device] * (1 + len(buffers)))):
                continue  # somebody else has put there what they hold now, or moved it: the state says what it is
            if was_spoiled:
                leaving.spoiled.append(param)
            elif is_frozen or is_replaced or param not in present:
                leaving.undone.append(param)
    return leaving


def _holds(state: Any, buffers: State) -> bool:
    """Whether the state still has these buffers, or others that are equal, which undo a prediction as well."""
    return isinstance(state, Mapping) and all(_is_equal(state.get(key), buffer) for key, buffer in buffers.items())


def _is_equal(found: Any, buffer: Tensor) -> bool:
    if found is buffer or not isinstance(found, Tensor):
        return found is buffer
    return found.dtype == buffer.dtype and found.device == buffer.device and torch.equal(local(found), local(buffer))


def _is_there(tensor: Tensor, device: Any) -> bool:
    """Whether there is memory behind it, on this device still."""
    storage = local(tensor)
    has_memory = owns_memory(storage) and (storage.numel() == 0 or storage.untyped_storage().nbytes() > 0)
    return has_memory and storage.device == device
