"""Compiled kernels on the device: ptxsim runs them when their stream does, at the tensors' real addresses."""

from collections.abc import Callable, Sequence
from typing import Any

import ptxsim
import torch

from late_device import device
from late_device.device import Block


def launch(kernel: ptxsim.Kernel, grid: Sequence[int], block: int, arguments: Sequence[Any], shared: int = 0) -> None:
    """Enqueue a kernel; it may touch what is in use on the device now, at its real address.

    Args:
        arguments: tensors of the device, whose addresses are passed, and what `ptxsim.Kernel.launch` takes else.
    """
    values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
    blocks = device.live_blocks()

    def prepare() -> Callable[[], None]:
        # A graph may read what was in use when it was captured and has not been freed since, and its own memory.
        live = {block.id for block in device.live_blocks()}
        memory = memory_of([block for block in blocks if block.id in live or block.is_of_graph])

        def run() -> None:
            kernel.launch(grid, block, values, memory, shared=shared, counts_traffic=False)

        return run

    device.enqueue_kernel(prepare)


def memory_of(blocks: Sequence[Block]) -> ptxsim.Memory:
    """The memory of these blocks; what was freed in the order of the stream, or never written, may not be read."""
    memory = ptxsim.Memory(poison=True)
    for block in blocks:
        memory.register_bytes(block.address, block.n_bytes, f"block {block.id}")
    return memory
