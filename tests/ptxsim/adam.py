"""Adam over a table of addresses, for tests of what compilers make of it: its numpy reference and its tables."""

from collections.abc import Sequence

import numpy

from ptxsim import Memory
from ptxsim.programs import F32, apart

SIZES = (1, 3, 1023, 1025, 5000)

COEFFICIENTS = numpy.array([1e-3, 0.9, 0.999, 1e-8, 0.99], F32)
"""lr, beta1, beta2, eps, decay."""


def adam_reference(
    p: numpy.ndarray, g: numpy.ndarray, m: numpy.ndarray, v: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """The new p, m and v; each operation is rounded once, in the kernels' order."""
    lr, beta1, beta2, eps, decay = COEFFICIENTS
    m = m + (F32(1) - beta1) * (g - m)
    v = beta2 * v + (F32(1) - beta2) * g * g
    return p * decay - lr * (m / (numpy.sqrt(v) + eps)), m, v


def address_table(
    sizes: Sequence[int], memory: Memory, chunk: int, offset: int = 0
) -> tuple[list[list[numpy.ndarray]], numpy.ndarray, numpy.ndarray]:
    """Random p, g, m and v of these sizes, registered as p0, g0, ..., `offset` elements after an aligned address.

    Also the tables `[tensor, (addresses of p, g, m, v; elements)]` and `[chunk, (tensor, first element)]`.
    """
    random = numpy.random.default_rng(0)
    tensors, lines, chunks = [], [], []
    for index, size in enumerate(sizes):
        scales = (1.0, 1.0, 0.1, 0.01)
        buffers = [apart((scale * random.standard_normal(size)).astype(F32), offset) for scale in scales]
        buffers[3][:] = numpy.abs(buffers[3])
        for name, buffer in zip("pgmv", buffers, strict=True):
            memory.register(buffer, f"{name}{index}", writable=name != "g")
        tensors.append(buffers)
        lines.append([buffer.ctypes.data for buffer in buffers] + [size])
        chunks += [(index, start) for start in range(0, size, chunk)]
    tables = numpy.array(lines, numpy.int64), numpy.array(chunks, numpy.int64)
    for name, table in zip(("lines", "chunks"), tables, strict=True):
        memory.register(table, name, writable=False)
    return tensors, *tables
