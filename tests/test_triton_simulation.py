"""The Triton back end's machine instructions, executed without a GPU, equal the CPU back end in every bit.

It can break where the compiler contracts or reorders operations, where a rounding to 16 bits differs, at the ragged end
of a chunk, at misaligned addresses, and by touching memory that is nobody's.
"""

import pytest
import torch
from cases import every_optimizer
from simulation import check_traffic, needs_simulator
from triton_kernels import SimulatedKernel, multi_tensor
from twins import Twins, needs_library, train


@pytest.fixture
def simulated(monkeypatch) -> SimulatedKernel:
    kernel = SimulatedKernel()
    monkeypatch.setattr(multi_tensor, "multi_tensor_kernel", kernel)
    return kernel


@needs_simulator
@needs_library
@every_optimizer
def test_equals_the_cpu_back_end(case, simulated):
    tensors = [torch.randn(n) for n in (0, 1, 3, 1023, 1024, 1025, 5000)]
    train(Twins(case.make, tensors, names=("cpu", "triton")), tensors)
    for stats in simulated.simulator.runs:
        check_traffic(stats)
