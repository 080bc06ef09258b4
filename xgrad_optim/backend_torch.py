"""The pure PyTorch back end: the readable reference, on any device. One block of one tensor at a time."""

import torch
from torch import Tensor

from xgrad_optim.layout import blocks, plain
from xgrad_optim.launch import Launch
from xgrad_optim.rule import Hyper, Rule

BLOCK = 1 << 18
"""Elements of a block: small enough for a block of every buffer to stay in cache, large enough to hide call costs."""


def unavailable() -> str | None:
    return None


def why_not(launch: Launch) -> str | None:
    if launch.is_capturable:
        return "capturable=True needs coefficients that are computed on the device, it computes them on the host"
    return None


def run(launch: Launch) -> None:
    """Restore, update where there are gradients, and predict every tensor of the launch."""
    slots = {"param": launch.params, **launch.state}
    if launch.grads is not None:
        slots["grad"] = launch.grads
    hypers = [_hyper(launch.rule, row) for row in launch.rows.tolist()]
    scratch = _Scratch(launch.device, launch.compute_dtype)
    for index, row in enumerate(launch.row_of):
        tensors = {name: plain(slot[index]) for name, slot in slots.items()}
        for block in blocks(tensors, BLOCK):
            _run_block(launch.rule, block, hypers[row], scratch)


def _hyper(rule: Rule, row: list[float]) -> Hyper:
    """A row by name; `hyper.prev` is what the direction reads to undo the last prediction."""
    hyper = Hyper(**dict(zip(rule.columns, row, strict=True)))
    hyper.prev = Hyper(**{name: getattr(hyper, f"{name}_prev") for name in rule.direction_columns})
    return hyper


class _Scratch:
    """Named working memory of one block each, reused from block to block."""

    def __init__(self, device: torch.device, compute_dtype: torch.dtype) -> None:
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self.compute_dtype = compute_dtype

    def like(self, name: str, block: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory of the block's shape, of the compute type unless told."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < block.numel():
            buffer = torch.empty(block.numel(), dtype=dtype or self.compute_dtype, device=self._device)
            self._buffers[name] = buffer
        return buffer[: block.numel()].view(block.shape)

    def load(self, name: str, block: Tensor) -> Tensor:
        """The block in the compute type: itself, or a copy."""
        return block if block.dtype == self.compute_dtype else self.like(name, block).copy_(block)

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round x in place to what `dtype` can hold."""
        return x if dtype == self.compute_dtype else x.copy_(self.like("rounded", x, dtype).copy_(x))


def _run_block(rule: Rule, block: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> None:
    state = {key: scratch.load(key, block[key]) for key in (*rule.state_keys, "max_exp_avg_sq") if key in block}
    theta = _restore(rule, block, state, hyper, scratch)
    delta = None
    if "grad" in block:
        delta = _update(rule, block, state, theta, hyper, scratch)
    elif hyper.shift:
        delta = _direction(rule, state, hyper, scratch)
    _predict(block, theta, delta, hyper, scratch)


def _direction(rule: Rule, state: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> Tensor:
    """delta of the stored state; amsgrad's running maximum stands in for the second moment."""
    if "max_exp_avg_sq" in state:
        state = {**state, "exp_avg_sq": state["max_exp_avg_sq"]}
    return rule.direction(state, hyper, scratch.like("delta", state[rule.state_keys[0]]))


def _restore(
    rule: Rule, block: dict[str, Tensor], state: dict[str, Tensor], hyper: Hyper, scratch: _Scratch
) -> Tensor:
    """theta = R(theta_hat + d): exact, because theta_hat was made from a theta for which it is."""
    param, master = block["param"], block.get("master_weights")
    theta = scratch.load("theta", param)
    displacement = None
    if hyper.shift_prev:
        delta = _direction(rule, state, hyper.prev, scratch)
        displacement = torch.mul(delta, hyper.shift_prev, out=scratch.like("displacement", delta))
    if master is None:
        if displacement is not None:
            scratch.round(theta.add_(scratch.round(displacement, param.dtype)), param.dtype)
        return theta
    # The master stands where the parameter still holds what it made of it; a foreign write there counts.
    expected = scratch.like("expected", master).copy_(master)
    edited = scratch.like("edited", master).copy_(theta)
    if displacement is not None:
        expected.sub_(displacement)
        edited.add_(displacement)
    is_ours = scratch.round(expected, param.dtype) == theta
    return torch.where(is_ours, master, edited, out=master)


def _update(
    rule: Rule, block: dict[str, Tensor], state: dict[str, Tensor], theta: Tensor, hyper: Hyper, scratch: _Scratch
) -> Tensor:
    """Weight decay, the rule's own step, theta <- R(theta - step_size * delta). Returns delta."""
    grad = scratch.load("grad", block["grad"])
    if hyper.grad_sign != 1:
        grad = torch.mul(grad, hyper.grad_sign, out=scratch.like("grad", grad))
    if hyper.weight_decay != 0:
        penalty = torch.mul(theta, hyper.weight_decay, out=scratch.like("delta", theta))
        grad = torch.add(grad, penalty, out=scratch.like("grad", grad))
    if hyper.decay_factor != 1:
        theta.mul_(hyper.decay_factor)
    rule.accumulate(grad, state, hyper, scratch.like("delta", grad))
    if "max_exp_avg_sq" in state:
        torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])
    for key, values in state.items():
        if values is not block[key]:
            # The direction is of the state as stored, so that it can be computed again.
            values.copy_(block[key].copy_(values))
    delta = _direction(rule, state, hyper, scratch)
    theta.sub_(torch.mul(delta, hyper.step_size, out=scratch.like("displacement", delta)))
    if "master_weights" not in block:
        scratch.round(theta, block["param"].dtype)
    return delta


def _predict(block: dict[str, Tensor], theta: Tensor, delta: Tensor | None, hyper: Hyper, scratch: _Scratch) -> None:
    """Store theta_hat = R(theta - d), from the theta next to it that survives the round trip."""
    param = block["param"]
    theta_hat = theta
    if delta is not None and hyper.shift:
        displacement = torch.mul(delta, hyper.shift, out=scratch.like("displacement", delta))
        if "master_weights" in block:
            theta_hat = torch.sub(theta, displacement, out=scratch.like("theta_hat", theta))
        else:
            scratch.round(displacement, param.dtype)
            for move in (theta.sub_, theta.add_, theta.sub_):
                scratch.round(move(displacement), param.dtype)
    if theta_hat is not param:
        param.copy_(theta_hat)
