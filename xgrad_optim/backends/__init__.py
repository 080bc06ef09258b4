"""Which back end runs a Launch, and for each one passed over, why. The only place that imports optional code."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

from xgrad_optim.notes import warn
from xgrad_optim.rule import Options

if TYPE_CHECKING:
    import numpy
    from torch import Tensor

    from xgrad_optim.launch import Launch
    from xgrad_optim.rows import Scaling, Target

NAMES = ("triton", "cuda", "cpu", "torch")
"""Every back end, best first; a back end that does not fit a Launch's device says so."""

BY_NAME_ONLY = ("cuda",)
"""Those that take minutes to build, and are used by who asks for them."""

_GPUS = ("cuda", "xpu")
"""Types of devices that Triton serves; ROCm's GPUs are "cuda" to torch."""

_MODULES = {
    "triton": "xgrad_optim.kernels.multi_tensor",
    "cuda": "xgrad_optim.backends.cuda",
    "cpu": "xgrad_optim.backends.cpu",
    "torch": "xgrad_optim.backends.torch",
}
_CHECKOUT_KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels" / "__init__.py"


class Runner(Protocol):
    """Runs one launch, again and again: `read` and `load` before each run, `finish` after it."""

    def read(self, grads: "list[Tensor] | None") -> bool:
        """Look at the tensors as they now are, with these gradients or the parameters' own; counts their versions.

        False where a gradient is missing, or a tensor is not what the launch was built for.
        """

    def load(self, target: "Target", scaling: "Scaling") -> None:
        """Make the rows, and ready all else that the run needs, so that it can't fail half-way."""

    def run(self) -> None:
        """Restore, update where the launch has gradients, predict, and write the numbers."""

    def resume(self) -> None:
        """Finish a run that was interrupted, if it has not happened."""

    def finish(self) -> None:
        """Tell autograd of the run, and let the gradients go."""

    def versions(self) -> "numpy.ndarray":
        """int64 `[n_tensors, 2]`: the version counters of each parameter and of its state buffers (a sum)."""


class Backend(Protocol):
    """What a back end's module provides."""

    def unavailable(self) -> str | None:
        """Why this machine can't run the back end at all; None where it can."""

    def why_not(self, launch: "Launch") -> str | None:
        """Why this back end can't run this Launch; None where it can."""

    def bind(self, launch: "Launch", numbers: Any) -> Runner:
        """A runner of the launch; RuntimeError says why there is none after all."""


@functools.cache
def _module(name: str) -> ModuleType | str:
    """The back end's module, or why there is none."""
    if name not in _MODULES:
        return "this release does not contain it"
    try:
        _find_kernels()
        return importlib.import_module(_MODULES[name])
    except ImportError as error:
        return f"it can't be imported: {error}"


def _find_kernels() -> None:
    """Make xgrad_optim.kernels importable in a checkout, where it lies beside this package, not inside."""
    name = "xgrad_optim.kernels"
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        return
    spec = importlib.util.spec_from_file_location(name, _CHECKOUT_KERNELS)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def unavailable(name: str) -> str | None:
    """Why the named back end can't run on this machine, or None."""
    module = _module(name)
    return module if isinstance(module, str) else cast(Backend, module).unavailable()


def available_backends() -> dict[str, str | None]:
    """Every back end by name, best first: None where it can run on this machine, else the reason why not."""
    return {name: unavailable(name) for name in NAMES}


def _candidates(options: Options) -> tuple[str, ...]:
    if options["foreach"] or options["fused"] is False:
        return ("torch",)
    if options["backend"] is not None:
        return (options["backend"],)
    admitted = tuple(name for name in NAMES if name not in BY_NAME_ONLY)
    return tuple(name for name in admitted if name != "torch") if options["fused"] else admitted


def check_available(options: Options) -> None:
    """Raise RuntimeError where the options demand a back end that this machine does not have."""
    reasons: dict[str, str | None] = {}
    for name in reversed(_candidates(options)):  # "torch" first: nothing is built for the sake of the question
        reasons[name] = unavailable(name)
        if reasons[name] is None:
            return
    _refuse(options, reasons)


def bind(launch: "Launch", numbers: Any, options: Options) -> Runner:
    """A runner by the best back end that the options admit and the Launch allows.

    Raises:
        RuntimeError: there is none; the text says why each back end was passed over.
    """
    reasons: dict[str, str | None] = {}
    missing: dict[str, str] = {}
    for name in _candidates(options):
        module = _module(name)
        if isinstance(module, str):
            reasons[name] = module
            if launch.device.type in _GPUS:
                missing[name] = module
            continue
        backend = cast(Backend, module)
        reasons[name] = backend.why_not(launch)
        if reasons[name] is None:
            # Asked last: the answer may take a build, and only where it is needed.
            reason = backend.unavailable()
            try:
                runner = None if reason else backend.bind(launch, numbers)
            except RuntimeError as error:
                reason, runner = str(error), None
            if runner is not None:
                for passed_over in missing.items():
                    _note(name, *passed_over)
                return runner
            reasons[name] = missing[name] = reason or ""
    _refuse(options, reasons)
    raise AssertionError("unreachable")


@functools.cache
def _note(chosen: str, name: str, reason: str) -> None:
    """Say once that a faster back end would have fitted."""
    warn(f"xgrad_optim uses its {chosen!r} back end, as {name!r} is unavailable: {reason}")


def _refuse(options: Options, reasons: dict[str, str | None]) -> None:
    asked = f"backend={options['backend']!r}" if options["backend"] else f"fused={options['fused']}"
    because = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{asked} cannot run this ({because}). Use backend=None for the best back end that can")
