"""`python -m xgrad_optim`: which back ends this machine has, and for each absent one the reason."""

import platform
import sys

import torch

from xgrad_optim import __version__, available_backends
from xgrad_optim.backends import addresses


def _devices() -> list[str]:
    """The CPU and every accelerator that this build of torch can see."""
    names = [f"cpu ({torch.get_num_threads()} threads, {platform.machine()})"]
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        module = torch.get_device_module(accelerator)
        for index in range(torch.accelerator.device_count()):
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else "no name known"
            names.append(f"{accelerator.type}:{index} ({name})")
    return names


def report() -> str:
    """What `python -m xgrad_optim` prints."""
    why_python = addresses.unavailable()
    lines = [
        f"xgrad_optim {__version__}",
        f"python      {platform.python_version()} on {platform.system()}",
        f"torch       {torch.__version__}",
        *(f"device      {name}" for name in _devices()),
        *(f"back end    {name:<7} {why or 'available'}" for name, why in available_backends().items()),
        f"tensors     read in {'C++' if why_python is None else f'Python: {why_python}'}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit("usage: python -m xgrad_optim (it takes no arguments)")
    print(report())
