"""The pure PyTorch back end: the readable reference, on any device. One block of one tensor at a time."""

from collections.abc import Iterator
from itertools import islice

import numpy
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim.launch import Launch
from xgrad_optim.layout import DTensor, as_real, blocks, local, matches, owns_memory, versions_of
from xgrad_optim.numbers import HostNumbers
from xgrad_optim.rows import Scaling, Target
from xgrad_optim.rule import Hyper, Rule

BLOCK_BYTES = 1 << 21
"""A block in the compute type, on the CPU: small enough for all its buffers to stay in a cache, large enough to hide
call costs. On a GPU a block is a tensor: there calls are what costs."""

SMALL = 1 << 14
"""Tensors of up to this many elements are bundled into one block: copying them costs less than calls for each."""


def unavailable() -> str | None:
    return None


def why_not(launch: Launch) -> str | None:
    if launch.is_capturable:
        return "capturable=True needs coefficients that are computed on the device, it computes them on the host"
    return None


def bind(launch: Launch, numbers: HostNumbers) -> "Runner":
    return Runner(launch, numbers)


class Runner:
    """Runs one launch, block after block.

    A block is saved before it changes: where the last run was interrupted, `resume` puts the block back that was
    changing then, and goes on from there.
    """

    def __init__(self, launch: Launch, numbers: HostNumbers) -> None:
        self._launch, self._numbers = launch, numbers
        self._dtypes = {name: slot[0].dtype for name, slot in launch.slots.items()}
        self._grads: list[Tensor] | None = None
        self._scratch: _Scratch
        self._saved: tuple[int, list[Tensor], list[Tensor]] = (-1, [], [])

    def read(self, grads: list[Tensor] | None) -> bool:
        """Whether every tensor still has the dtype, shape and device that the launch was built for."""
        launch = self._launch
        for name, slot in launch.slots.items():
            dtype = self._dtypes[name]
            for tensor, param in zip(slot, launch.params, strict=True):
                if tensor.dtype != dtype or tensor.device != launch.device or tensor.shape != param.shape:
                    return False
        if launch.has_grad:
            found = [param.grad for param in launch.params] if grads is None else grads
            if not all(map(matches, launch.params, found)):
                return False
            self._grads = [grad for grad in found if grad is not None]
        launch.tables.versions.copy_(torch.from_numpy(self.versions()))
        return True

    def versions(self) -> numpy.ndarray:
        return versions_of(self._launch.slots)

    def load(self, target: Target, scaling: Scaling) -> None:
        launch = self._launch
        rows = self._numbers.rows(launch, target, scaling)
        self._after = rows.next_numbers.numpy()[launch.sources.row_of]
        self.rows = rows.rows
        self._hypers = [_hyper(launch.rule, row) for row in self.rows]
        self._scratch = _Scratch(launch.device, launch.compute_dtype)
        self._n_done, self._is_done = 0, False

    def run(self) -> None:
        """Restore, update where there are gradients, predict every tensor of the launch, and write its numbers."""
        launch, scratch = self._launch, self._scratch
        for block in islice(_all_blocks(launch, self._grads), self._n_done, None):
            scratch.fit(block.tensors["param"])
            before = {name: scratch.save(name, block.tensors[name]) for name in block.written}
            self._saved = self._n_done, block.originals(), block.parts(before)
            _run_block(launch.rule, block.tensors, self._hypers[block.row], scratch)
            block.write_back()
            self._n_done += 1
        # The shards' own counters have moved, autograd looks at those of the DTensors.
        increment_version([tensor for tensor in launch.written if isinstance(tensor, DTensor)])
        self._numbers.values[launch.indices] = self._after
        self._is_done = True

    def resume(self) -> None:
        """Finish the run."""
        if self._is_done:
            return
        n_done, originals, before = self._saved
        if n_done == self._n_done:
            torch._foreach_copy_(originals, before)
        self.run()

    def finish(self) -> None:
        self._grads, self._saved = None, (-1, [], [])
        self._scratch.clear()


class _Block:
    """A piece of one tensor, or many small tensors side by side, and the row that they share.

    Attributes:
        tensors: by slot, as real numbers: views of the launch's tensors, or copies of them in one range.
        written: the slots that a run writes.
    """

    def __init__(self, tensors: dict[str, Tensor], row: int, bundle: dict[str, list[Tensor]] | None = None) -> None:
        self.tensors, self.row, self._bundle = tensors, row, bundle
        self.written = [name for name in tensors if name != "grad"]

    def originals(self) -> list[Tensor]:
        """The launch's own memory of what is written."""
        if self._bundle is None:
            return [self.tensors[name] for name in self.written]
        return [original for name in self.written for original in self._bundle[name]]

    def parts(self, values: dict[str, Tensor]) -> list[Tensor]:
        """Values like `tensors`, each beside its original."""
        if self._bundle is None:
            return [values[name] for name in self.written]
        return [
            part.view(original.shape)
            for name in self.written
            for part, original in zip(
                values[name].split([original.numel() for original in self._bundle[name]]),
                self._bundle[name],
                strict=True,
            )
        ]

    def write_back(self) -> None:
        if self._bundle is not None:
            torch._foreach_copy_(self.originals(), self.parts(self.tensors))


def _all_blocks(launch: Launch, grads: list[Tensor] | None) -> Iterator[_Block]:
    """Every element of the launch once: large tensors in blocks, small ones in bundles of one row."""
    slots = launch.slots if grads is None else {**launch.slots, "grad": grads}
    # The element of a complex parameter is two numbers.
    size = BLOCK_BYTES // (launch.compute_dtype.itemsize * (2 if launch.params[0].is_complex() else 1))
    bundles: dict[int, list[dict[str, Tensor]]] = {}
    for index, row in enumerate(launch.sources.row_of):
        tensors = {name: local(slot[index]) for name, slot in slots.items()}
        numel = tensors["param"].numel()
        if not owns_memory(tensors["param"]):  # a subclass that is a wrapper need not know how to be cut or joined
            yield _Block({name: as_real(tensor) for name, tensor in tensors.items()}, row)
        elif numel > SMALL:
            for block in blocks(tensors, size if launch.device.type == "cpu" else numel):
                yield _Block(block, row)
        else:
            bundle = bundles.setdefault(row, [])
            bundle.append(tensors)
            if len(bundle) * SMALL >= size:
                yield _bundled(bundles.pop(row), row)
    for row, bundle in bundles.items():
        yield _bundled(bundle, row)


def _bundled(members: list[dict[str, Tensor]], row: int) -> _Block:
    bundle = {name: [as_real(tensors[name]) for tensors in members] for name in members[0]}
    copies = {name: torch.cat([tensor.reshape(-1) for tensor in tensors]) for name, tensors in bundle.items()}
    return _Block(copies, row, bundle)


def _hyper(rule: Rule, row: Tensor) -> Hyper:
    """A row by name, as 0-dim tensors; `hyper.prev` is what the direction reads to undo the last prediction."""
    hyper = Hyper(**dict(zip(rule.columns, row.unbind(), strict=True)))
    hyper.prev = Hyper(**{name: getattr(hyper, f"{name}_prev") for name in rule.direction_columns})
    hyper.restores, hyper.predicts = bool(hyper.shift_prev), bool(hyper.shift)
    hyper.predicts_the_update = rule.update is None and hyper.shift.item() == hyper.step_size.item()
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
        self._wrapper: Tensor | None = None
        self.compute_dtype = compute_dtype

    def clear(self) -> None:
        self._memory, self._views, self._shape, self._wrapper = {}, {}, None, None

    def fit(self, block: Tensor) -> None:
        """Hand out memory of this block's shape from now on; for a subclass that is a wrapper, such wrappers."""
        wrapper = None if owns_memory(block) else block
        if wrapper is not None or self._wrapper is not None or block.shape != self._shape:
            self._views = {}  # first: who is interrupted in between must not find old views of another shape
            self._shape, self._wrapper = block.shape, wrapper

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this name, of the compute type unless told; it holds what was last written there, or nothing."""
        view = self._views.get(name)
        if view is None and self._wrapper is not None:
            view = self._views[name] = torch.empty_like(self._wrapper, dtype=dtype or self.compute_dtype)
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

    def save(self, name: str, block: Tensor) -> Tensor:
        """A copy of the block as it is."""
        return self.get(f"saved {name}", block.dtype).copy_(block)

    def round(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Round x in place to what `dtype` can hold."""
        return x if dtype == self.compute_dtype else x.copy_(self.get("rounded", dtype).copy_(x))


def _run_block(rule: Rule, block: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> None:
    state = {key: scratch.load(key, block[key]) for key in rule.buffer_keys if key in block and key != "master_weights"}
    theta = _restore(rule, block, state, hyper, scratch)
    delta = None
    if "grad" in block:
        delta = _update(rule, block, state, theta, hyper, scratch)
    elif hyper.predicts:
        delta = _predicted_direction(rule, state, hyper, scratch)
    _predict(block, theta, delta, hyper, scratch)


def _predicted_direction(rule: Rule, state: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> Tensor:
    """delta for a displacement: rows that join with zeros for their state must not be moved by 0 / 0."""
    delta, momentum = rule.direction(state, hyper, scratch.get("delta")), state[rule.state_keys[0]]
    return delta if delta is momentum else torch.where(momentum == 0, momentum, delta, out=delta)


def _restore(rule: Rule, block: dict[str, Tensor], state: dict[str, Tensor], hyper: Hyper, scratch: _Scratch) -> Tensor:
    """theta = R(theta_hat + d): exact, because theta_hat was made from a theta for which it is."""
    param, master = block["param"], block.get("master_weights")
    theta = scratch.load("theta", param)
    displacement = None
    if hyper.restores:
        delta = _predicted_direction(rule, state, hyper.prev, scratch)
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
    for key, values in state.items():
        if values is not block[key]:
            # The direction is of the state as stored, so that it can be computed again.
            values.copy_(block[key].copy_(values))
    delta = moved = rule.direction(state, hyper, scratch.get("delta"))
    if rule.update is not None:
        moved = rule.update(grad, state, hyper, scratch.get("displacement"), scratch.get("update"))
    theta.sub_(torch.mul(moved, hyper.step_size, out=scratch.get("displacement")))
    if "master_weights" not in block:
        scratch.round(theta, block["param"].dtype)
    return delta


def _predict(block: dict[str, Tensor], theta: Tensor, delta: Tensor | None, hyper: Hyper, scratch: _Scratch) -> None:
    """Store theta_hat = R(theta - d), from the theta next to it that survives the round trip."""
    param = block["param"]
    theta_hat = theta
    if delta is not None and hyper.predicts:
        displacement = scratch.get("displacement")
        if not hyper.predicts_the_update:  # else that is what it holds
            torch.mul(delta, hyper.shift, out=displacement)
        if "master_weights" in block:
            theta_hat = torch.sub(theta, displacement, out=scratch.get("theta_hat"))
        else:
            scratch.round(displacement, param.dtype)
            for move in (theta.sub_, theta.add_, theta.sub_):
                scratch.round(move(displacement), param.dtype)
    if theta_hat is not param:
        param.copy_(theta_hat)
