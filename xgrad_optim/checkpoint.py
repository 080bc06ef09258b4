"""What `load_state_dict` makes of a saved state: checked as a whole first, no number rounded, no tensor shared.

And whether the weights in a model are the ones that a loaded state says they are.
"""

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from xgrad_optim.inventory import Groups
from xgrad_optim.layout import DTensor, place_like
from xgrad_optim.notes import warn
from xgrad_optim.options import EXECUTION_OPTIONS, checked_options
from xgrad_optim.plan import round_trip
from xgrad_optim.rule import Options, Rule
from xgrad_optim.state import state_dtype


@torch.inference_mode(False)
@torch.no_grad()
def warn_of_mismatch(rule: Rule, groups: Groups, state: Mapping[Tensor, Any]) -> None:
    """Say so where the parameters do not hold the predicted weights that the state was saved with.

    A state that calls the weights the true ones says nothing: they may have been loaded or clipped since.
    """
    if not round_trip(rule, groups, state)[0]:
        warn(
            "the parameters do not hold the predicted weights that the loaded optimizer state was saved with: the "
            "model's file is of another mode or moment. Save both in one mode, as an attached optimizer and its model "
            "are, and load both before they are used, the model first"
        )


def load(
    rule: Rule, fixed: Options, groups: Groups, state_dict: Mapping[str, Any]
) -> tuple[Groups, defaultdict[Tensor, dict[str, Any]]]:
    """The param groups, with `fixed` entries, and the state to adopt. Raises ValueError where they do not fit."""
    saved_groups = groups_in(state_dict, groups)
    new_groups = [_load_group(rule, fixed, *pair) for pair in zip(groups, saved_groups, strict=True)]
    params = params_by_id(saved_groups, groups)
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for saved_id, saved_state in state_dict["state"].items():
        if saved_id not in params:
            state[saved_id] = deepcopy(saved_state)
        elif loaded := load_param_state(rule, saved_id, params[saved_id], saved_state):
            state[params[saved_id]] = loaded
    return new_groups, state


def params_by_id(saved_groups: Groups, groups: Groups) -> dict[Any, Tensor]:
    """The parameters of these groups by what a state_dict calls them."""
    return {
        saved_id: param
        for saved, group in zip(saved_groups, groups, strict=True)
        for saved_id, param in zip(saved["params"], group["params"], strict=True)
    }


def groups_in(state_dict: Mapping[str, Any], groups: Groups) -> Groups:
    """Its param groups. Raises ValueError where they are not as many and as large as these."""
    saved_groups: Groups = state_dict.get("param_groups", [{}])
    if "state" not in state_dict or any("params" not in saved for saved in saved_groups):
        raise ValueError('loaded state dict has no "state", or a parameter group without "params"')
    if len(groups) != len(saved_groups):
        raise ValueError("loaded state dict has a different number of parameter groups")
    if any(len(group["params"]) != len(saved["params"]) for group, saved in zip(groups, saved_groups, strict=True)):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    return saved_groups


def _load_group(rule: Rule, fixed: Options, group: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The saved options, completed by the present ones; which code runs stays as it is on this machine."""
    owner = saved.get("rule", rule.name)
    missing = [name for name in rule.required_options if name not in saved]
    if owner != rule.name or missing:
        what = f"is of the rule {owner!r}" if owner != rule.name else f"has no {', '.join(map(repr, missing))}"
        raise ValueError(
            f"loaded state dict belongs to another optimizer: its param group {what}, this one's rule is {rule.name!r}"
        )
    kept = ("params", *EXECUTION_OPTIONS)
    loaded = {name: deepcopy(value) for name, value in saved.items() if name not in kept}
    name = "decoupled_weight_decay"
    if name in fixed and saved.get(name, fixed[name]) != fixed[name] and saved.get("weight_decay"):
        warn(
            f"the loaded state dict has {name}={saved[name]}, this optimizer always has {name}={fixed[name]}: the same "
            f"weight_decay={saved['weight_decay']} is another regularization here"
        )
    try:
        # A run's own numbers come back as they were: a schedule may have ended a rounding error below 0.
        return checked_options(rule, {**group, **loaded, **fixed}, check_ranges=False)
    except TypeError as error:
        raise ValueError(f"loaded state dict: {error}") from error


def load_param_state(rule: Rule, saved_id: Any, param: Tensor, saved: Any) -> dict[str, Any]:
    """What a parameter's saved state says, checked and copied. Raises ValueError where it does not fit."""
    where = f"loaded state dict: the state of parameter {saved_id}"
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} must be a dict, got {saved!r}")
    ours = {*rule.number_keys, *rule.buffer_keys}
    foreign = {key: _moved(param, deepcopy(value)) for key, value in saved.items() if key not in ours}
    if all(saved.get(key) is None for key in ours):  # nothing yet, or torch.optim.SGD without momentum
        return foreign
    for key in rule.required_state:
        if saved.get(key) is None:
            raise ValueError(f"{where} has no {key!r}")
    buffers = {key: saved[key] for key in rule.buffer_keys if key in saved}
    for key, buffer in buffers.items():
        if not isinstance(buffer, Tensor):
            raise ValueError(f"{where}: {key!r} must be a tensor, got {buffer!r}")
        if isinstance(buffer, DTensor) and not isinstance(param, DTensor):
            raise ValueError(
                f"{where}: {key!r} is sharded and the parameter is not. Save with torch.distributed.checkpoint's "
                "get_optimizer_state_dict, options=StateDictOptions(full_state_dict=True)"
            )
        if buffer.shape != param.shape:
            raise ValueError(
                f"{where}: the parameter has shape {tuple(param.shape)}, its {key!r} has shape {tuple(buffer.shape)}"
            )
    numbers = {key: _number(f"{where}: {key!r}", saved[key]) for key in rule.number_keys if key in saved}
    dtype = state_dtype(param, buffers)  # torch's own load_state_dict would round to the parameter's
    # torch.optim keeps no buffer that its options leave unused, as momentum=0 does.
    unused = [key for key in rule.state_keys if key not in buffers]
    zeros = {key: torch.zeros_like(param, dtype=dtype, requires_grad=False) for key in unused}
    return foreign | numbers | zeros | {key: _like(param, buffer, dtype) for key, buffer in buffers.items()}


def _moved(param: Tensor, value: Any) -> Any:
    """What users keep beside our state, on the parameter's device as in torch.optim."""
    return value.to(param.device) if isinstance(value, Tensor) else value


def _number(where: str, value: Any) -> Tensor:
    if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)):
        raise ValueError(f"{where} must be a number or a 1-element Tensor, got {value!r}")
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _like(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of value on the parameter's device, with its strides, and sharded as it is."""
    value = place_like(value.to(param.device), param)
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
