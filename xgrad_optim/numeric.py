"""The numeric contract's Python side: which type computes, and functions that round the same way everywhere."""

import numpy
import torch
from torch import Tensor

from xgrad_optim.layout import owns_memory

COMPUTE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
REAL_DTYPES = {torch.complex128: torch.float64, torch.complex64: torch.float32}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an element as the kernels see it: complex numbers are pairs of reals."""
    return REAL_DTYPES.get(dtype, dtype)


def is_supported(dtype: torch.dtype) -> bool:
    """Whether parameters may have this dtype."""
    return real_dtype(dtype) in COMPUTE_DTYPES


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the master weights, and of the state beside them, of a parameter of this dtype."""
    return dtype if dtype.is_complex else COMPUTE_DTYPES[dtype]


def power(base: float, exponent: int) -> float:
    """base**exponent by repeated squaring, each product rounded once: the bits of csrc/numeric.h and kernels/rows.py.

    No library promises the bits of its pow.
    """
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def sqrt(x: Tensor, out: Tensor) -> Tensor:
    """The correctly rounded square root. `torch.sqrt` is that on GPUs; on x86 CPUs it is vector math that is not."""
    if x.device.type == "cpu" and owns_memory(x) and owns_memory(out):
        with numpy.errstate(invalid="ignore"):  # of a negative number, NaN without a warning, as torch has it
            numpy.sqrt(x.numpy(), out=out.numpy())
        return out
    return torch.sqrt(x, out=out)
