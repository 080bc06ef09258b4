"""What a GPU back end does around its kernel, whoever compiled it."""

from collections.abc import Callable

from torch.autograd.graph import increment_version

from xgrad_optim import backend_torch
from xgrad_optim.device_tables import Uploaded, guard, refused, tables_of
from xgrad_optim.launch import Launch


def prepare(launch: Launch) -> bool:
    """Read the tensors as they now are; False where the Launch must be built anew.

    Raises:
        RuntimeError: capturable=True, and a tensor that only the torch back end can take.
    """
    try:
        is_steady = tables_of(launch).read(launch)
    except RuntimeError:  # a sparse gradient, say: the optimizer's own checks find the words for it
        return False
    if launch.tables.n_refused == 0:
        return is_steady
    if not launch.fits():
        return False
    if launch.is_capturable:
        shapes = sorted({tuple(launch.params[index].shape) for index in refused(launch)})
        raise RuntimeError(
            "capturable=True needs a parameter, its gradient and its state to lie in memory alike and without gaps, "
            f"those of shapes {shapes} do not: make them contiguous, or use capturable=False"
        )
    return is_steady


def run(launch: Launch, run_kernel: Callable[[Launch, Uploaded], None]) -> bool:
    """Run the kernel on the current stream of the launch's device; what is not flat takes the torch back end.

    Returns what `Backend.run` does.
    """
    if len(launch.tables.chunks):
        with guard(launch.device):
            run_kernel(launch, tables_of(launch).upload(launch))
    increment_version(launch.written)
    if launch.tables.n_refused:
        backend_torch.run(launch.part(refused(launch)))
    return launch.tables.n_refused == 0
