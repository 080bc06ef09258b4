"""The numeric contract's PyTorch side: which type computes, and a square root that rounds correctly."""

import math
from typing import Any

import numpy
import torch
from torch import Tensor

COMPUTE_DTYPES = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
Number = Any
"""A float, or a float64 tensor of such numbers where the host must not know them."""

REAL_DTYPES = {torch.complex128: torch.float64, torch.complex64: torch.float32}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of an element as the kernels see it: complex numbers are pairs of reals."""
    return REAL_DTYPES.get(dtype, dtype)


def is_supported(dtype: torch.dtype) -> bool:
    return real_dtype(dtype) in COMPUTE_DTYPES


def master_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the master weights, and of the state beside them, of a parameter of this dtype."""
    return dtype if dtype.is_complex else COMPUTE_DTYPES[dtype]


def square_root(x: Number) -> Number:
    """Of a coefficient."""
    return x.sqrt() if isinstance(x, Tensor) else math.sqrt(x)


def sqrt(x: Tensor, out: Tensor) -> Tensor:
    """The correctly rounded square root. `torch.sqrt` is that on GPUs; on x86 CPUs it is vector math that is not."""
    if x.device.type == "cpu":
        numpy.sqrt(x.numpy(), out=out.numpy())
        return out
    return torch.sqrt(x, out=out)
