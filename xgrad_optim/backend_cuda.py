"""The CUDA back end: the rules of csrc/ compiled by nvcc, one launch over the addresses of all tensors of a Launch."""

import torch

from xgrad_optim import backend_device, build_cuda, build_native
from xgrad_optim.device_tables import Uploaded
from xgrad_optim.launch import Launch

DEVICE = "cuda"
"""The type of the devices that it serves."""


def unavailable() -> str | None:
    """Why the library can't be had; the first call may build it, which takes a minute once for each kind of GPU."""
    if torch.version.cuda is None:
        return f"this build of torch, {torch.__version__}, has no CUDA"
    if not torch.cuda.is_available():
        return "there is no CUDA device that torch can use"
    return _why_no_library()


@build_native.reason_why_not
def _why_no_library() -> None:
    capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    build_native.load(build_cuda.find_or_build([10 * major + minor for major, minor in capabilities]))
    if problem := torch.ops.xgrad_optim.cuda_problem():
        raise RuntimeError(problem)


def why_not(launch: Launch) -> str | None:
    return launch.why_no_kernel((DEVICE,))


prepare = backend_device.prepare


def run(launch: Launch) -> bool:
    """Restore, update where there are gradients, and predict every tensor of the launch."""
    return backend_device.run(launch, run_kernel)


def run_kernel(launch: Launch, uploaded: Uploaded) -> None:
    """One launch on the current stream, with a block for each chunk."""
    torch.ops.xgrad_optim.multi_tensor_cuda(
        *uploaded,
        launch.tables.chunk_size,
        launch.has_grad,
        "max_exp_avg_sq" in launch.state,
        "master_weights" in launch.state,
        launch.trusts_master,
        launch.rule.name,
        launch.dtype,
        launch.state_dtype,
        torch.cuda.current_stream(launch.device).cuda_stream,
    )
