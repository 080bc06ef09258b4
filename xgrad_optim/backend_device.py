"""What a GPU back end does around its kernel, whoever compiled it."""

from collections.abc import Callable

from xgrad_optim import backend_torch, tensor_reader
from xgrad_optim.device_tables import Uploaded, guard, tables_of
from xgrad_optim.launch import Launch


def prepare(launch: Launch) -> bool:
    """Read the tensors as they now are; False where the Launch must be built anew.

    Raises:
        RuntimeError: capturable=True, and a tensor that only the torch back end can take.
    """
    is_steady = tensor_reader.prepare(launch)
    if is_steady and launch.tables.n_refused and launch.is_capturable:
        shapes = sorted({tuple(launch.params[index].shape) for index in launch.tables.refused()})
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
    return backend_torch.run_refused(launch)
