"""The native CPU back end: one operator call over the addresses of all tensors of a Launch."""

import os
from typing import Any

import torch

from xgrad_optim import backend_torch, build_native, tensor_reader
from xgrad_optim.launch import Launch

ISA = os.environ.get("XGRAD_CPU_ISA", "")
"""The instruction set to use, "avx512", "avx2" or "baseline"; empty for the best one. It changes no bit."""


@build_native.reason_why_not
def unavailable() -> None:
    """Why the library can't be had; the first call may build it, which takes some seconds once for each machine."""
    if build_native.load(build_native.find_or_build(build_native.KERNELS)):
        _register_fake()


def _register_fake() -> None:
    """Shapes without data have no addresses: under FakeTensorMode and torch.compile the operator does nothing."""

    @torch.library.register_fake("xgrad_optim::multi_tensor_cpu")
    def multi_tensor_cpu(*tables_and_options: Any) -> None:
        return None


def why_not(launch: Launch) -> str | None:
    return launch.why_no_kernel(("cpu",))


prepare = tensor_reader.prepare


def run(launch: Launch) -> bool:
    """Restore, update where there are gradients, and predict every tensor of the launch.

    What is not flat takes the torch back end.
    """
    tables = launch.tables
    torch.ops.xgrad_optim.multi_tensor_cpu(
        tables.addresses,
        tables.numels,
        tables.row_of,
        launch.rows,
        tables.chunks,
        tables.tasks,
        tables.chunk_size,
        launch.trusts_master,
        launch.rule.name,
        launch.dtype,
        launch.state_dtype,
        ISA,
    )
    return backend_torch.run_refused(launch)
