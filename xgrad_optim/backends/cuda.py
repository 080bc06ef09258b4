"""The CUDA back end: the rules of csrc/ compiled by nvcc, one launch over the addresses of all tensors of a Launch.

It is used where it is asked for by name, and built when the first launch needs it.
"""

import functools

import torch

from xgrad_optim.backends import build, build_cuda
from xgrad_optim.backends.gpu import GpuRunner, Uploaded
from xgrad_optim.launch import Launch
from xgrad_optim.numbers import Numbers

DEVICE = "cuda"
"""The type of the devices that it serves."""


def unavailable() -> str | None:
    """Why there is no library and none can be built, as far as can be told without building it."""
    if torch.version.cuda is None:
        return f"this build of torch, {torch.__version__}, has no CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    try:
        if build_cuda.find(_capabilities()) is None:
            build_cuda.find_nvcc()
    except RuntimeError as error:
        return str(error)
    return None


def _capabilities() -> list[int]:
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    return [10 * major + minor for major, minor in capabilities]


@build.reason_why_not
def why_no_library() -> None:
    """Why the library can't be had; the first call may build it, which takes a minute once for each kind of GPU."""
    build.load(build_cuda.find_or_build(_capabilities()))
    if problem := torch.ops.xgrad_optim.cuda_problem():
        raise RuntimeError(problem)


def why_not(launch: Launch) -> str | None:
    return launch.why_no_kernel((DEVICE,))


@functools.cache
def _kernels(
    rule: str, dtype: torch.dtype, state_dtype: torch.dtype, has_grad: bool, has_optional: bool, has_master: bool
) -> int:
    find = torch.ops.xgrad_optim.find_kernels_cuda
    return find(rule, dtype, state_dtype, has_grad, has_optional, has_master)


def kernels_of(launch: Launch) -> int:
    has_optional, has_master = launch.rule.has_optional(launch.state), "master_weights" in launch.state
    return _kernels(launch.rule.name, launch.dtype, launch.state_dtype, launch.has_grad, has_optional, has_master)


class Kernels:
    """The operators, on the current stream."""

    def make_rows(self, launch: Launch, uploaded: Uploaded) -> None:
        torch.ops.xgrad_optim.make_rows_cuda(
            uploaded.table,
            uploaded.group_of,
            uploaded.options,
            uploaded.rows,
            uploaded.next_numbers,
            kernels_of(launch),
            stream_of(launch.device),
        )

    def run(self, launch: Launch, uploaded: Uploaded) -> object:
        return torch.ops.xgrad_optim.multi_tensor_cuda(
            uploaded.table,
            uploaded.grads,
            uploaded.rows,
            uploaded.next_numbers,
            uploaded.chunks,
            launch.tables.chunk_size,
            kernels_of(launch),
            stream_of(launch.device),
        )


def stream_of(device: torch.device) -> int:
    """The current stream as CUDA knows it."""
    return torch.cuda.current_stream(device).cuda_stream


def bind(launch: Launch, numbers: Numbers) -> GpuRunner:
    if reason := why_no_library():
        raise RuntimeError(reason)
    return GpuRunner(launch, numbers, Kernels())
