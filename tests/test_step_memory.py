"""Scratch memory stays bounded, however large the model and whatever its layout."""

import weakref

import pytest
import torch
from cases import every_class
from family import MEMBERS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from training import PARAM, options

from xgrad_optim import XAdamW


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors created under it held at one time."""

    def __init__(self):
        super().__init__()
        self.peak = self.live = 0
        self._storages = {}

    def _forget(self, key):
        self.live -= self._storages.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        arguments = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        known = {value.untyped_storage()._cdata for value in arguments}
        result = function(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self._storages:
                    self._storages[key] = storage.nbytes()
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._forget, key)
        return result


def test_the_meter_of_memory_measures():
    with PeakMemory() as memory:
        first = torch.zeros(1000)
        second = first.view(10, 100) + 1.0
        del first
        third = second.double()
        del second, third
    assert memory.peak == 4000 + 8000
    assert memory.live == 0


MIB = 1 << 20
MEMORY_CASES = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16 with master": (torch.bfloat16, {"master_weights": True}),
    "float32 with master": (torch.float32, {"master_weights": True}),
    "float64 with everything": (torch.float64, {"master_weights": True, "maximize": True}),
    "complex64": (torch.complex64, {}),
}


def peak_memory(optimizer):
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
        optimizer.eval()
        optimizer.train()
    assert memory.live < MIB, "scratch memory is kept"
    return memory.peak


def assert_bounded(peak_of):
    """Below 64 MiB, whatever the model: a model of twice the size takes no more."""
    small, large = peak_of(1_600_000), peak_of(3_200_000)
    assert 0 < large < 64 * MIB
    assert large <= 1.2 * small


@every_class
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_scratch_memory_is_bounded(cls, case):
    dtype, kwargs = MEMORY_CASES[case]
    if MEMBERS[cls].takes("amsgrad"):
        kwargs = kwargs | {"amsgrad": True}

    def peak_of(numel):
        param = PARAM(torch.full((numel,), 0.5, dtype=dtype))
        param.grad = torch.full((numel,), 0.25, dtype=dtype)
        return peak_memory(cls([param], **options(cls, **kwargs), backend="torch"))

    assert_bounded(peak_of)


@pytest.mark.parametrize("layout", ["strided", "grad of other strides", "conjugate grad", "many small"])
def test_scratch_memory_is_bounded_in_any_layout(layout):
    def peak_of(numel):
        rows = numel // 400
        if layout == "many small":
            params = [PARAM(torch.full((10_000,), 0.5)) for _ in range(numel // 10_000)]
            grads = [torch.full((10_000,), 0.25) for _ in params]
        elif layout == "strided":
            params = [PARAM(torch.full((rows, 400, 2), 0.5)[..., 0])]
            grads = [torch.full((rows, 400), 0.25)]
        elif layout == "grad of other strides":
            params = [PARAM(torch.full((rows, 400), 0.5))]
            grads = [torch.full((400, rows), 0.25).t()]
        else:
            params = [PARAM(torch.full((numel,), 0.5 + 0.5j, dtype=torch.complex64))]
            grads = [torch.full((numel,), 0.25j, dtype=torch.complex64).conj()]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        return peak_memory(XAdamW(params, backend="torch"))

    assert_bounded(peak_of)
