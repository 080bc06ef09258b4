"""One parameter with its gradient and its state: checked, created, and kept in line with each other."""

import warnings
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from xgrad_optim.layout import is_placed_like, local
from xgrad_optim.numeric import is_supported, master_dtype
from xgrad_optim.rule import Options, Rule

State = dict[str, Tensor]


def new_state(rule: Rule, param: Tensor, options: Options) -> State:
    """The state before the first step, made when that comes: the parameter still holds theta then."""
    state = {"step": torch.zeros((), dtype=torch.float64, device="cpu")}
    keys = (*rule.state_keys, "max_exp_avg_sq") if options.get("amsgrad") else rule.state_keys
    state |= {key: torch.zeros_like(param, requires_grad=False) for key in keys}
    if options["master_weights"]:
        add_master_weights(rule, param, state)
    return state


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


def follows_options(state: State, options: Options) -> bool:
    """Whether the buffers are those that amsgrad and master_weights ask for."""
    has_max, has_master = "max_exp_avg_sq" in state, "master_weights" in state
    return has_max == options.get("amsgrad", False) and has_master == options["master_weights"]


def follow_options(rule: Rule, param: Tensor, state: State, options: Options) -> None:
    """Add and drop what a switch of amsgrad or master_weights asks for. The parameter must hold theta."""
    if not options["master_weights"]:
        state.pop("master_weights", None)
    elif "master_weights" not in state:
        add_master_weights(rule, param, state)
    if not options.get("amsgrad"):
        state.pop("max_exp_avg_sq", None)
    else:
        state.setdefault("max_exp_avg_sq", state["exp_avg_sq"].clone())


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


def warn_of_replaced(states: Mapping[Tensor, State], params: Collection[Tensor]) -> None:
    """Say so where parameters without state seem to replace others, whose predicted weights they then hold."""
    left = [states[param] for param in set(states).difference(params)]
    count = sum(bool(state.get("predicted", 0) * state.get("prediction_shift", 0)) for state in left)
    if count:
        warnings.warn(
            f"{count} parameters that hold predicted weights have left the param groups, and new ones have no "
            "state yet. If the new ones replace them (fully_shard, a conversion of the model), training goes on "
            "without momentum and takes predicted weights for true ones. Make the optimizer after the replacement; in "
            "mid-training save state_dict() of model and optimizer before it and load both afterwards",
            stacklevel=2,
        )


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


def matches(param: Tensor, grad: Tensor) -> bool:
    """Whether they have one dtype, device and local shape."""
    return (
        grad.dtype == param.dtype
        and grad.device == param.device
        and grad.layout == torch.strided
        and local(grad).shape == local(param).shape
    )
