"""What `load_state_dict` makes of a saved state: checked as a whole first, no number rounded, no tensor shared."""

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from xgrad_optim.layout import DTensor, place_like
from xgrad_optim.options import EXECUTION_OPTIONS, check_options
from xgrad_optim.rule import Rule
from xgrad_optim.state import state_dtype

Groups = list[dict[str, Any]]


def load(
    rule: Rule, groups: Groups, state_dict: Mapping[str, Any]
) -> tuple[Groups, defaultdict[Tensor, dict[str, Any]]]:
    """The param groups and the state to adopt. Raises ValueError, having changed nothing, where they do not fit."""
    saved_groups = _saved_groups(groups, state_dict)
    new_groups = [_load_group(rule, *pair) for pair in zip(groups, saved_groups, strict=True)]
    params = {
        saved_id: param
        for group, saved in zip(groups, saved_groups, strict=True)
        for param, saved_id in zip(group["params"], saved["params"], strict=True)
    }
    state: defaultdict[Any, dict[str, Any]] = defaultdict(dict)
    for saved_id, saved_state in state_dict["state"].items():
        if saved_id not in params:
            if isinstance(saved_state, Mapping):
                state[saved_id] = dict(saved_state)
        elif loaded := _load_param_state(rule, saved_id, params[saved_id], saved_state):
            state[params[saved_id]] = loaded
    return new_groups, state


def _saved_groups(groups: Groups, state_dict: Mapping[str, Any]) -> Groups:
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


def _load_group(rule: Rule, group: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
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
    new_group = {**group, **loaded}
    check_options(rule, new_group)
    return new_group


def _load_param_state(rule: Rule, saved_id: Any, param: Tensor, saved: Any) -> dict[str, Any]:
    where = f"loaded state dict: the state of parameter {saved_id}"
    if not isinstance(saved, Mapping):
        raise ValueError(f"{where} must be a dict, got {saved!r}")
    if all(value is None for value in saved.values()):  # nothing yet, or torch.optim.SGD without momentum
        return {}
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
    loaded = {key: deepcopy(value) for key, value in saved.items() if key not in buffers and key not in numbers}
    return loaded | numbers | {key: _like(param, buffer, dtype) for key, buffer in buffers.items()}


def _number(where: str, value: Any) -> Tensor:
    if not (value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)):
        raise ValueError(f"{where} must be a number or a 1-element Tensor, got {value!r}")
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def _like(param: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of value on the parameter's device, with its strides, and sharded as it is."""
    value = place_like(value.to(param.device), param)
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
