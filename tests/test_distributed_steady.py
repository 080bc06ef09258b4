"""What a steady step on sharded parameters costs: no DTensor operation, and no memory that stays.

Also what happens when somebody replaces, moves or writes to what it was built from, or swaps between forward and
backward: the right result, or a warning or error that says what to do.
"""

import gc
import resource
import sys
from itertools import product

import pytest
import torch
from cases import loss_of, small_model, train_step
from ranks import on_ranks, share, whole, with_every_optimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from xgrad_optim import XAdamW

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "prediction_steps": 2.0}


class DTensorOperations(TorchDispatchMode):
    """Collects every operation on a DTensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(each, DTensor) for each in types):
            self.seen.append(func)
        return func(*args, **kwargs or {})


def sharded(model):
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def tensor_parallel(model):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (2,)), plan)


@on_ranks(2)
@with_every_optimizer
def test_a_steady_step_dispatches_no_dtensor_operation(case):
    operations = DTensorOperations()
    for options in ({"backend": "torch", "master_weights": True}, {}):
        model = sharded(small_model())
        optimizer = case.make(model.parameters(), **OPTIONS, **options)
        train_step(model, optimizer, 0, share())
        with operations:
            optimizer.eval()
            optimizer.train()
        for step in range(1, 4):
            optimizer.zero_grad()
            loss_of(model, step, share()).backward()
            optimizer.param_groups[0]["lr"] *= 0.5
            with operations:
                optimizer.step()
                with optimizer.true_weights():
                    assert not optimizer.predicted
    assert operations.seen == []
    with operations, torch.no_grad():
        next(model.parameters()).mul_(1)
    assert operations.seen == [torch.ops.aten.mul_.Tensor], "the counter counts"


@on_ranks(2)
def test_host_memory_does_not_grow_over_2000_steps():
    model = sharded(small_model())
    params = list(model.parameters())
    optimizer = XAdamW(params, **OPTIONS)
    grads = [[torch.zeros_like(param).add_(step) for param in params] for step in range(3)]

    def train(steps):
        for step in range(steps):
            for param, grad in zip(params, grads[step % 3], strict=True):
                param.grad = grad
            optimizer.param_groups[0]["lr"] = 0.02 / (1 + step)
            optimizer.step()
            if step % 10 == 0:
                with optimizer.true_weights():
                    pass
            optimizer.zero_grad()

    def held():
        """Python's live blocks of memory, and the peak of the process in KiB."""
        gc.collect()
        return sys.getallocatedblocks(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    train(500)
    blocks, peak = held()
    train(2000)
    more_blocks, higher_peak = held()
    assert more_blocks - blocks < 1000, "not one object for every other step"
    assert higher_peak - peak < 1024, "not half a KiB for each step"


@on_ranks(2)
def test_sharding_the_model_before_any_state_exists():
    """accelerate makes the optimizer first, then puts the sharded parameters into its groups."""
    model, twin = small_model(), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    optimizer.param_groups[0]["params"] = list(sharded(model).parameters())
    for step in range(4):
        train_step(model, optimizer, step, share())
        train_step(twin, expected, step)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(whole(param), other.detach())


@on_ranks(2)
def test_sharding_the_model_in_mid_training_is_not_silent():
    """The new parameters start without the state of those that they replace, from theta_hat as if it were theta."""
    model = small_model()
    optimizer = XAdamW(model.parameters(), **OPTIONS)
    train_step(model, optimizer, 0)
    optimizer.param_groups[0]["params"] = list(sharded(model).parameters())
    with pytest.warns(UserWarning, match="4 parameters that hold predicted weights have left the param groups"):
        train_step(model, optimizer, 1, share())


@on_ranks(2)
def test_other_memory_under_the_shards_in_mid_training():
    """model.to() puts other memory, of another dtype, under a DTensor."""
    model, twin = tensor_parallel(small_model(hidden=8)), small_model(hidden=8)
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    dtypes = {2: torch.float32, 4: torch.float64}
    for step in range(6):
        for each, of in ((model, optimizer), (twin, expected)):
            of.zero_grad()
            if step in dtypes:
                each.to(dtypes[step])
            train_step(each, of, step)
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert param.dtype == other.dtype
            torch.testing.assert_close(whole(param), other.detach())


def clip_shards(model):
    with torch.no_grad():
        for param in model.parameters():
            param.to_local().clamp_(-0.1, 0.1)


def clip(model):
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-0.1, 0.1)


def load(model):
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


@on_ranks(2)
def test_writes_to_shards_that_hold_theta_hat_are_not_silent():
    """And count as what they are where the parameters hold theta, also beside master weights."""
    for wrap, write, master_weights in product((sharded, tensor_parallel), (load, clip, clip_shards), (False, True)):
        model = wrap(small_model(hidden=8))
        optimizer = XAdamW(model.parameters(), **OPTIONS, master_weights=master_weights)
        for step in range(3):
            train_step(model, optimizer, step, share() if wrap is sharded else slice(None))
        with optimizer.true_weights():
            write(model)
            written = [whole(param) for param in model.parameters()]
        with optimizer.true_weights():
            for param, value in zip(model.parameters(), written, strict=True):
                torch.testing.assert_close(whole(param), value, rtol=0, atol=1e-15)
        write(model)
        with pytest.warns(UserWarning, match="4 parameters were written to while they held predicted weights"):
            optimizer.eval()


@on_ranks(2)
def test_a_swap_between_forward_and_backward_raises_in_autograd():
    """As far as autograd holds the parameters: FSDP gathers them anew for backward, which nobody can notice."""
    for backend in ("torch", None):
        model = tensor_parallel(small_model(hidden=8))
        optimizer = XAdamW(model.parameters(), **OPTIONS, backend=backend)
        train_step(model, optimizer, 0)
        loss = loss_of(model, 1)
        optimizer.eval()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
