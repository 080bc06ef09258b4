"""What a GPU back end does around its kernel, whoever compiled it."""

from collections.abc import Callable

from torch.autograd.graph import increment_version

from xgrad_optim import backend_torch
from xgrad_optim.device_tables import Uploaded, guard, refused, tables_of
from xgrad_optim.launch import Launch


def prepare(launch: Launch) -> bool:
    """Read the tensors as they now are; False where the Launch must be built anew."""
    try:
        is_steady = tables_of(launch).read(launch)
    except RuntimeError:  # a sparse gradient, say: the optimizer's own checks find the words for it
        return False
    return is_steady and (launch.tables.n_refused == 0 or launch.fits())


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
