"""The pure PyTorch back end: the readable reference, on any device. One block of one tensor at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim.launch import Launch
from xgrad_optim.layout import DTensor, as_real, blocks, local
from xgrad_optim.rule import Hyper, Rule

BLOCK_BYTES = 1 << 21
"""A block in the compute type: small enough for all its buffers to stay in a cache, large enough to hide call costs."""

SMALL = 1 << 14
"""Tensors of up to this many elements are bundled into one block: copying them costs less than calls for each."""


def unavailable() -> str | None:
    return None


def why_not(launch: Launch) -> str | None:
    if launch.is_capturable:
        return "capturable=True needs coefficients that are computed on the device, it computes them on the host"
    return None


def prepare(launch: Launch) -> bool:
    return launch.fits()


def run(launch: Launch) -> bool:
    """Restore, update where there are gradients, and predict every tensor of the launch."""
    hypers = [_hyper(launch.rule, row) for row in launch.rows]
    scratch = _Scratch(launch.device, launch.compute_dtype)
    for block, row in _all_blocks(launch):
        if not hypers[row].is_skipped:
            _run_block(launch.rule, block, hypers[row], scratch)
    # The shards' own counters have moved, autograd looks at those of the DTensors.
    pairs = zip(launch.params, launch.row_of, strict=True)
    increment_version([param for param, row in pairs if isinstance(param, DTensor) and not hypers[row].is_skipped])
    return False


def run_refused(launch: Launch) -> bool:
    """Run what a kernel over addresses has passed over; returns whether there was nothing to run."""
    refused = launch.tables.refused()
    if refused:
        run(launch.part(refused))
    return not refused


def _all_blocks(launch: Launch) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Every element of the launch once, with its row: large tensors in blocks, small ones in bundles."""
    slots = {"param": launch.params, **launch.state}
    if launch.grads is not None:
        slots["grad"] = launch.grads
    # The element of a complex parameter is two numbers.
    size = BLOCK_BYTES // (launch.compute_dtype.itemsize * (2 if launch.params[0].is_complex() else 1))
    bundles: dict[int, list[dict[str, Tensor]]] = {}
    for index, row in enumerate(launch.row_of):
        tensors = {name: local(slot[index]) for name, slot in slots.items()}
        if tensors["param"].numel() > SMALL:
            for block in blocks(tensors, size):
                yield block, row
        else:
            bundle = bundles.setdefault(row, [])
            bundle.append(tensors)
            if len(bundle) * SMALL >= size:
                yield from ((block, row) for block in _bundled(bundles.pop(row)))
    for row, bundle in bundles.items():
        yield from ((block, row) for block in _bundled(bundle))


def _bundled(bundle: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """One block that holds copies of these tensors; what it holds when the caller comes back is copied home."""
    copies = {name: torch.cat([tensors[name].reshape(-1) for tensors in bundle]) for name in bundle[0]}
    yield {name: as_real(values) for name, values in copies.items()}
    copies.pop("grad", None)
    for name, values in copies.items():
        homes = [tensors[name] for tensors in bundle]
        parts = values.split([home.numel() for home in homes])
        torch._foreach_copy_(homes, [part.view(home.shape) for part, home in zip(parts, homes, strict=True)])


def _hyper(rule: Rule, row: Tensor) -> Hyper:
    """A row by name, as 0-dim tensors; `hyper.prev` is what the direction reads to undo the last prediction."""
    hyper = Hyper(**dict(zip(rule.columns, row.unbind(), strict=True)))
    hyper.prev = Hyper(**{name: getattr(hyper, f"{name}_prev") for name in rule.direction_columns})
    hyper.restores, hyper.predicts = bool(hyper.shift_prev), bool(hyper.shift)
    hyper.predicts_one_step = hyper.shift.item() == hyper.step_size.item()
    hyper.scales_grad, hyper.penalizes = hyper.grad_factor.item() != 1, bool(hyper.weight_decay)
    hyper.decays = hyper.decay_factor.item() != 1
    return hyper


class _Scratch:
    """Named working memory of one block each, reused from block to block."""

    def __init__(self, device: torch.device, compute_dtype: torch.dtype) -> None:
        self._device = device
        self._memory: dict[str, Tensor] = {}
        self._views: dict[str, Tensor] = {}
        self._shape: torch.Size | None = None
        self.compute_dtype = compute_dtype

    def fit(self, shape: torch.Size) -> None:
        """Hand out memory of this shape from now on."""
        if shape != self._shape:
            self._shape = shape
            self._views = {}

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this name, of the compute type unless told; it holds what was last written there, or nothing."""
        view = self._views.get(name)
        if view is None:
            assert self._shape is not None
            numel = self._shape.numel()
            memory = self._memory.get(name)
            if memory is None or memory.numel() < numel:
                memory = torch.empty(numel, dtype=dtype or self.compute_dtype, device=self._device)
                self._memory[name] = memory
            view = self._views[name] = memory[:numel].view(self._shape)
        return view

    def load(self, name: str, block: Tensor) -> Tensor:
        """The block in the compute type: itself, or a copy."""
        return block if block.dtype == self.compute_dtype else self.get(name).copy_(block)

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round x in place to what `dtype` can hold."""
        return x if dtype == self.compute_dtype else x.copy_(self.get("rounded", dtype).copy_(x))


def _run_block(rule: Rule, block: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> None:
    scratch.fit(block["param"].shape)
    state = {key: scratch.load(key, block[key]) for key in (*rule.state_keys, "max_exp_avg_sq") if key in block}
    theta = _restore(rule, block, state, hyper, scratch)
    delta = None
    if "grad" in block:
        delta = _update(rule, block, state, theta, hyper, scratch)
    elif hyper.predicts:
        delta = _direction(rule, state, hyper, scratch)
    _predict(block, theta, delta, hyper, scratch)


def _direction(rule: Rule, state: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> Tensor:
    """delta of the stored state; amsgrad's running maximum stands in for the second moment."""
    if "max_exp_avg_sq" in state:
        state = {**state, "exp_avg_sq": state["max_exp_avg_sq"]}
    return rule.direction(state, hyper, scratch.get("delta"))


def _restore(
    rule: Rule, block: dict[str, Tensor], state: dict[str, Tensor], hyper: Hyper, scratch: _Scratch
) -> Tensor:
    """theta = R(theta_hat + d): exact, because theta_hat was made from a theta for which it is."""
    param, master = block["param"], block.get("master_weights")
    theta = scratch.load("theta", param)
    displacement = None
    if hyper.restores:
        delta = _direction(rule, state, hyper.prev, scratch)
        displacement = torch.mul(delta, hyper.shift_prev, out=scratch.get("displacement"))
    if master is None:
        if displacement is not None:
            scratch.round(theta.add_(scratch.round(displacement, param.dtype)), param.dtype)
        return theta
    # The master stands where the parameter still holds what it made of it; a foreign write there counts.
    expected = scratch.get("expected").copy_(master)
    edited = scratch.get("edited").copy_(theta)
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
    if hyper.scales_grad:
        grad = torch.mul(grad, hyper.grad_factor, out=scratch.get("grad"))
    if hyper.penalizes:
        penalty = torch.mul(theta, hyper.weight_decay, out=scratch.get("delta"))
        grad = torch.add(grad, penalty, out=scratch.get("grad"))
    if hyper.decays:
        theta.mul_(hyper.decay_factor)
    rule.accumulate(grad, state, hyper, scratch.get("delta"))
    if "max_exp_avg_sq" in state:
        torch.maximum(state["max_exp_avg_sq"], state["exp_avg_sq"], out=state["max_exp_avg_sq"])
    for key, values in state.items():
        if values is not block[key]:
            # The direction is of the state as stored, so that it can be computed again.
            values.copy_(block[key].copy_(values))
    delta = _direction(rule, state, hyper, scratch)
    theta.sub_(torch.mul(delta, hyper.step_size, out=scratch.get("displacement")))
    if "master_weights" not in block:
        scratch.round(theta, block["param"].dtype)
    return delta


def _predict(block: dict[str, Tensor], theta: Tensor, delta: Tensor | None, hyper: Hyper, scratch: _Scratch) -> None:
    """Store theta_hat = R(theta - d), from the theta next to it that survives the round trip."""
    param = block["param"]
    theta_hat = theta
    if delta is not None and hyper.predicts:
        displacement = scratch.get("displacement")
        if not hyper.predicts_one_step:  # else it still holds the update, which is the same number
            torch.mul(delta, hyper.shift, out=displacement)
        if "master_weights" in block:
            theta_hat = torch.sub(theta, displacement, out=scratch.get("theta_hat"))
        else:
            scratch.round(displacement, param.dtype)
            for move in (theta.sub_, theta.add_, theta.sub_):
                scratch.round(move(displacement), param.dtype)
    if theta_hat is not param:
        param.copy_(theta_hat)
