"""Numbers that live on a device, as capturable and fused need: step count, the prediction's coefficients, rows.

Here the CPU plays the device, so that the formulas run as tensor operations. What can break: a coefficient that only
the host computes, a step that advances though it was skipped, a parameter whose mode the host believes to know.
"""

import copy

import pytest
import torch
from cases import CASES, every_case, every_optimizer

from xgrad_optim import XAdamW, optimizer, scalars
from xgrad_optim import rows as rows_module

SHAPES = ((3, 4), (5,), (), (70,))


@pytest.fixture(autouse=True)
def _cpu_is_a_device(monkeypatch):
    """Numbers are made as a device's where IS_DEVICE says so, and tensors that come to them stay tensors."""
    make, as_number = scalars.make_scalars, rows_module.as_number

    def as_device_number(value, device=None):
        if device is not None and isinstance(value, torch.Tensor):
            return value.reshape(()).to(torch.float64)
        return as_number(value, device)

    monkeypatch.setattr(rows_module, "as_number", as_device_number)
    monkeypatch.setattr(rows_module.Scaling, "is_skipped_on_host", property(_is_skipped_on_host))

    def make_device_scalars(rule, states, device):
        return scalars.DeviceScalars(rule, states, device) if IS_DEVICE[0] else make(rule, states, device)

    monkeypatch.setattr(optimizer, "make_scalars", make_device_scalars)
    yield
    IS_DEVICE[0] = True


IS_DEVICE = [True]


def _is_skipped_on_host(scaling) -> bool:
    return not IS_DEVICE[0] and bool(scaling.found_inf)


def make_pair(case, **options):
    """The same parameters with numbers on the device and on the host."""
    values = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    params = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    return [(case.make(some, **options), some) for some in params]


def each(pair, act) -> None:
    for is_device, (each_optimizer, params) in zip((True, False), pair, strict=True):
        IS_DEVICE[0] = is_device
        act(each_optimizer, params)


def step(pair, seed: int, skip=(), **scaling) -> None:
    def act(each_optimizer, params):
        generator = torch.Generator().manual_seed(seed)
        for index, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            param.grad = None if index in skip else grad
        for name, value in scaling.items():
            setattr(each_optimizer, name, torch.tensor(value))
        each_optimizer.step()
        for name in scaling:
            delattr(each_optimizer, name)

    each(pair, act)
    assert_same(pair)


def assert_same(pair) -> None:
    """Equal but for the last bit of a power, which the C library and torch may round differently."""
    (device, device_params), (host, host_params) = pair
    assert device.predicted == host.predicted
    for ours, theirs in zip(device_params, host_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert device.state[ours].keys() == host.state[theirs].keys()
        for key in host.state[theirs]:
            torch.testing.assert_close(device.state[ours][key], host.state[theirs][key], rtol=1e-12, atol=1e-14)


@every_case
@pytest.mark.parametrize("prediction_steps", [1.0, 2.5])
def test_the_device_computes_what_the_host_does(case, prediction_steps):
    """Changing hyperparameters, a skipped gradient, both modes, a step from evaluation mode."""
    pair = make_pair(case, prediction_steps=prediction_steps)
    for index in range(5):
        step(pair, index, skip=(1,) if index in (0, 2) else ())
        each(pair, lambda each_optimizer, _: each_optimizer.param_groups[0].update(lr=0.01 / (index + 1)))  # noqa: B023
        for mode in ("eval", "eval", "train", "eval")[index:]:
            each(pair, lambda each_optimizer, _: getattr(each_optimizer, mode)())  # noqa: B023
            assert_same(pair)
    assert isinstance(pair[0][0]._cache.scalars[torch.device("cpu")], scalars.DeviceScalars)
    assert isinstance(pair[1][0]._cache.scalars[torch.device("cpu")], scalars.HostScalars)


@every_optimizer
def test_several_groups_and_tensor_hyperparameters(case):
    def make(params, **options):
        groups = [
            {"params": params[:2], "lr": torch.tensor(0.1, dtype=torch.float64)},
            {"params": params[2:], "prediction_steps": 3, "weight_decay": 0.2, "maximize": True},
        ]
        return case.make(groups, **options)

    values = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    params = [[torch.nn.Parameter(value.clone()) for value in values] for _ in range(2)]
    pair = [(make(some), some) for some in params]
    for index in range(4):
        step(pair, index, skip=(index,))
        each(pair, lambda each_optimizer, _: each_optimizer.param_groups[0]["lr"].mul_(0.5))


@every_optimizer
def test_a_step_that_overflows_is_skipped_by_the_device(case):
    """The very first one too, in either mode; the gradients of the others are unscaled."""
    pair = make_pair(case)
    step(pair, 0, found_inf=1.0, grad_scale=4.0)
    assert not pair[0][0].predicted
    step(pair, 1, found_inf=0.0, grad_scale=4.0)
    step(pair, 2, found_inf=1.0, grad_scale=4.0)
    each(pair, lambda each_optimizer, _: each_optimizer.eval())
    step(pair, 3, found_inf=1.0, grad_scale=2.0)
    assert not pair[0][0].predicted
    step(pair, 4, skip=(1, 2), found_inf=0.0, grad_scale=2.0)
    assert pair[0][0].predicted
    assert pair[0][0].state[pair[0][1][0]]["step"] == 2


@every_optimizer
def test_rows_are_computed_without_reading_a_number(case, monkeypatch):
    """Whatever reads one waits for the device."""
    pair = make_pair(case, lr=torch.tensor(0.1, dtype=torch.float64))
    for index in range(2):
        step(pair, index)
    launch = pair[0][0]._cache.launches[0]
    scaling = rows_module.Scaling(torch.tensor(2.0), torch.tensor(0.0))
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, _forbidden(name))
    launch._rows.compute(torch.float64, None, scaling)
    launch._rows.advance()


def _forbidden(name):
    def read(tensor, *args):
        raise AssertionError(f"{name}() waits for the device")

    return read


def test_copies_and_checkpoints_go_on(tmp_path):
    pair = make_pair(next(case for case in CASES if case.optimizer is XAdamW))
    for index in range(2):
        step(pair, index)
    each(pair, lambda each_optimizer, _: each_optimizer.load_state_dict(copy.deepcopy(each_optimizer.state_dict())))
    step(pair, 2)
    copies = []
    for is_device, (each_optimizer, params) in zip((True, False), pair, strict=True):
        IS_DEVICE[0] = is_device
        copies.append(copy.deepcopy((each_optimizer, params)))
    for index in (3, 4):
        step(copies, index)
        each(copies, lambda each_optimizer, _: each_optimizer.eval())
