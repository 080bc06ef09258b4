"""What a GPU back end does around its kernel, whoever compiled it."""

from collections.abc import Callable
from itertools import chain

from torch import Tensor
from torch.autograd.graph import increment_version

from xgrad_optim import backend_torch
from xgrad_optim.device_tables import Uploaded, guard, refused, tables_of
from xgrad_optim.launch import Launch
from xgrad_optim.layout import local


def prepare(launch: Launch) -> bool:
    """Read the tensors as they now are; False where the Launch must be built anew."""
    try:
        tables_of(launch).read(launch)
    except RuntimeError:  # a sparse gradient, say: the optimizer's own checks find the words for it
        return False
    return launch.tables.n_refused == 0 or launch.fits()


def run(launch: Launch, run_kernel: Callable[[Launch, Uploaded], None]) -> bool:
    """Run the kernel on the current stream of the launch's device; what is not flat takes the torch back end.

    Returns what `Backend.run` does.
    """
    if len(launch.tables.chunks):
        with guard(launch.device):
            run_kernel(launch, tables_of(launch).upload(launch))
    if launch.bound is None:
        launch.bound = _written(launch)
    increment_version(launch.bound)
    if launch.tables.n_refused:
        backend_torch.run(launch.part(refused(launch)))
    return launch.tables.n_refused == 0


def _written(launch: Launch) -> list[Tensor]:
    """The tensors whose version counters tell autograd of a run, as torch's own in-place operators do."""
    is_swap = launch.grads is None
    slots = [launch.state.get("master_weights", [])] if is_swap else launch.state.values()
    tensors = list(chain(launch.params, *slots))
    return tensors + [shard for tensor in tensors if (shard := local(tensor)) is not tensor]
