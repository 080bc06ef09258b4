"""The operators of the CUDA library, for the late device: they enqueue nvcc's PTX for ptxsim.

Their schemas are read from csrc/bindings_cuda.cpp, so that a call which these take is one that the library takes.
"""

import functools
import re
from typing import Any

import torch
from cuda_kernels import THREADS, KernelLaunch, RowsLaunch, load_ptx, rows_symbol_of, symbol_of
from random_launch import Variant
from torch import Tensor

from late_device.launches import launch
from xgrad_optim.backends import build

ARCHITECTURE = "sm_90"

_variants: list[Variant] = []


def find_kernels_cuda(
    rule: str, dtype: Any, state_dtype: Any, has_grad: bool, has_optional: bool, has_master: bool
) -> int:
    _variants.append(Variant(rule, dtype, state_dtype, has_grad, has_optional, has_master))
    return len(_variants) - 1


def multi_tensor_cuda(
    table: Tensor,
    grads: Tensor | None,
    rows: Tensor,
    next_numbers: Tensor,
    chunks: Tensor,
    chunk_size: int,
    kernel: int,
    stream: int,
) -> None:
    variant = _variants[kernel]
    assert (grads is not None) == variant.has_grad
    argument = KernelLaunch(
        table.data_ptr(),
        None if grads is None else grads.data_ptr(),
        rows.data_ptr(),
        rows.shape[1],
        next_numbers.data_ptr(),
        next_numbers.shape[1],
        chunks.data_ptr(),
        chunk_size,
    )
    launch(load_ptx(variant.rule, ARCHITECTURE)[symbol_of(variant)], (len(chunks),), THREADS, [argument])


def make_rows_cuda(
    table: Tensor, group_of: Tensor, options: Tensor, rows: Tensor, next_numbers: Tensor, kernel: int, stream: int
) -> None:
    variant, n_tensors = _variants[kernel], len(table)
    places = [tensor.data_ptr() for tensor in (table, group_of, options, rows, next_numbers)]
    argument = RowsLaunch(*places, n_tensors, variant.has_grad)
    symbol = rows_symbol_of(variant.rule, variant.dtype == torch.float64)
    launch(load_ptx(variant.rule, ARCHITECTURE)[symbol], (-(-n_tensors // THREADS),), THREADS, [argument])


@functools.cache
def register() -> torch.library.Library:
    """For the rest of the process."""
    text = (build.source_directory() / "bindings_cuda.cpp").read_text()
    schemas = ["".join(re.findall(r'"(.*?)"', call)) for call in re.findall(r"library\.def\((.*?)\);", text, re.DOTALL)]
    library = torch.library.Library("xgrad_optim", "FRAGMENT")
    for schema in schemas:
        library.define(schema)
    library.impl("find_kernels_cuda", find_kernels_cuda, "CompositeExplicitAutograd")
    library.impl("multi_tensor_cuda", multi_tensor_cuda, "PrivateUse1")
    library.impl("make_rows_cuda", make_rows_cuda, "PrivateUse1")
    return library
