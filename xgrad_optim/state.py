"""One parameter with its gradient and its state: checked, created, and kept in line with each other."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xgrad_optim.layout import is_placed_like, matches, shared_memory
from xgrad_optim.notes import warn
from xgrad_optim.numeric import is_supported, master_dtype
from xgrad_optim.options import number
from xgrad_optim.rule import Options, Rule

State = dict[str, Tensor]


def new_state(rule: Rule, param: Tensor, options: Options) -> State:
    """The state before the first step, made when that comes: the parameter still holds theta then."""
    state = {"step": torch.zeros((), dtype=torch.float64, device="cpu")}
    state |= {key: torch.zeros_like(param, requires_grad=False) for key in rule.state_keys}
    _follow_flag(rule, state, options)
    if options["master_weights"]:
        add_master_weights(rule, param, state)
    return state


def has_state(rule: Rule, state: object) -> bool:
    """Whether a parameter with this state has taken a step."""
    return isinstance(state, Mapping) and rule.state_keys[0] in state


def add_master_weights(rule: Rule, param: Tensor, state: State) -> None:
    """theta in full precision, and the buffers beside it likewise."""
    dtype = master_dtype(param.dtype)
    state["master_weights"] = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(param)
    fit_dtype(rule, param, state)


def fit_dtype(rule: Rule, param: Tensor, state: State) -> None:
    """All buffers in one dtype: after model.double(), say, or where master weights have joined."""
    buffers = {key: state[key] for key in rule.buffer_keys if key in state}
    dtype = state_dtype(param, buffers)
    state.update({key: buffer.to(dtype) for key, buffer in buffers.items() if buffer.dtype != dtype})


def state_dtype(param: Tensor, buffers: Mapping[str, Tensor]) -> torch.dtype:
    """The parameter's own dtype, unless a buffer is wider: fp32 state of 16-bit parameters stays fp32."""
    wide = master_dtype(param.dtype)
    is_wide = "master_weights" in buffers or any(buffer.dtype == wide for buffer in buffers.values())
    return wide if is_wide else param.dtype


def follows_options(rule: Rule, state: State, options: Options) -> bool:
    """Whether the buffers are those that the group's flags ask for."""
    has_master = "master_weights" in state
    return rule.has_optional(state) == rule.asks_for_optional(options) and has_master == options["master_weights"]


def follow_options(rule: Rule, param: Tensor, state: State, options: Options) -> None:
    """Add and drop what the group's flags ask for. The parameter must hold theta."""
    if not options["master_weights"]:
        state.pop("master_weights", None)
    elif "master_weights" not in state:
        add_master_weights(rule, param, state)
    _follow_flag(rule, state, options)


def _follow_flag(rule: Rule, state: State, options: Options) -> None:
    if rule.optional is None:
        return
    if not rule.asks_for_optional(options):
        state.pop(rule.optional.key, None)
    elif not rule.has_optional(state):
        initial = rule.optional.initial
        state[rule.optional.key] = state[initial].clone() if initial else torch.zeros_like(state[rule.state_keys[0]])


def check_state(rule: Rule, param: Tensor, state: State) -> None:
    """Raise RuntimeError where a buffer does not lie beside its parameter element by element."""
    for key in rule.buffer_keys:
        buffer = state.get(key, param)
        if buffer.shape != param.shape or buffer.device != param.device or not is_placed_like(buffer, param):
            raise RuntimeError(
                f"a parameter has {_described(param)}, but its state[{key!r}] has {_described(buffer)}: "
                "replace or move both"
            )


def _described(tensor: Tensor) -> str:
    placements = getattr(tensor, "placements", None)
    return f"shape {tuple(tensor.shape)} on {tensor.device}" + ("" if placements is None else f", placed {placements}")


def warn_of_lost_options(
    rule: Rule, states: Mapping[Any, Any], created: Mapping[Tensor, State], groups: Mapping[Tensor, Options]
) -> None:
    """Say so once, before the first of the states that are made now, where float16 rounds an eps to 0."""
    buffer = rule.state_keys[0]
    own = [state for param, state in states.items() if isinstance(param, Tensor)]
    is_first = not any(_is_float16(state.get(buffer)) for state in own)
    for name in rule.stored_options if is_first else ():
        values = {number(name, name, groups[param][name]) for param in created if _is_float16(created[param][buffer])}
        lost = [value for value in values if value is not None and torch.tensor(value, dtype=torch.float16) == 0]
        if lost:
            warn(
                f"{name}={min(lost)} is 0 in float16, and the state that it is added to is float16 as its parameters "
                "are: where gradients are small, updates are divided by next to nothing. Use master_weights=True, "
                f"which keeps the state in float32, or a larger {name}, of 1e-7 at least"
            )


def _is_float16(buffer: object) -> bool:
    return isinstance(buffer, Tensor) and buffer.dtype == torch.float16


def check_memory(groups: Sequence[Options], params: Sequence[Tensor]) -> None:
    """Raise RuntimeError where an element would be updated and predicted twice, as parts of two parameters."""
    shared = shared_memory(params)
    if shared is None:
        return
    first, second = (_named(groups, params[index]) for index in shared)
    if first == second:
        raise RuntimeError(f"{first} has elements that share memory, as expand() makes them: use a clone() of it")
    raise RuntimeError(
        f"{first} and {second} share memory, so that each would be updated and predicted over the other. Tie the "
        "Parameter itself (b.weight = a.weight), which model.parameters() then lists once, or give the optimizer only "
        "one of them"
    )


def _named(groups: Sequence[Options], param: Tensor) -> str:
    """Where the parameter stands in the groups, with its name if they have names."""
    for group_index, group in enumerate(groups):
        for index, own in enumerate(group["params"]):
            if own is param:
                name = f" ({group['param_names'][index]})" if "param_names" in group else ""
                return f"parameter {index} of group {group_index}{name}, shape {tuple(param.shape)},"
    raise KeyError("the parameter is in no group")


def check_gradient(name: str, param: Tensor, grad: Tensor, options: Options) -> None:
    """Raise RuntimeError where the optimizer of this name can't update the parameter with this gradient."""
    where = f"parameter of shape {tuple(param.shape)}"
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} does not support sparse gradients, the gradient of a {where} is {grad.layout}")
    if not is_supported(param.dtype):
        raise RuntimeError(f"{name} does not support parameters of dtype {param.dtype}, got a {where}")
    if not matches(param, grad):
        raise RuntimeError(
            f"the gradient of a {where}, dtype {param.dtype} on {param.device} must match it, "
            f"got shape {tuple(grad.shape)}, dtype {grad.dtype} on {grad.device}"
        )
    if param.is_inference():
        raise RuntimeError(f"a {where} was made in torch.inference_mode(), so that nobody may update it: clone it")
    if param.is_conj() or param.is_neg():
        raise RuntimeError(f"a {where} is a lazy conjugate or negative view: make it a tensor of its own")
    if options["capturable"] and param.device.type == "cpu":
        raise RuntimeError(
            f"If capturable=True, parameters must be on a GPU, got a {where} on cpu. Use capturable=False"
        )
