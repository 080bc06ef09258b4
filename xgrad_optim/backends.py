"""Which back end runs a Launch, and for each one passed over, why. The only place that imports optional code."""

import functools
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, cast

from xgrad_optim.rule import Options

if TYPE_CHECKING:
    from xgrad_optim.launch import Launch

NAMES = ("triton", "cuda", "cpu", "torch")
"""Every back end, best first; a back end that does not fit a Launch's device says so."""

_MODULES = {
    "triton": "xgrad_optim.kernels.multi_tensor",
    "cuda": "xgrad_optim.backend_cuda",
    "cpu": "xgrad_optim.backend_native",
    "torch": "xgrad_optim.backend_torch",
}
_CHECKOUT_KERNELS = Path(__file__).resolve().parent.parent / "kernels" / "__init__.py"


class Backend(Protocol):
    """What a back end's module provides."""

    def unavailable(self) -> str | None:
        """Why this machine can't run the back end at all; None where it can."""

    def why_not(self, launch: "Launch") -> str | None:
        """Why this back end can't run this Launch; None where it can."""

    def prepare(self, launch: "Launch") -> bool:
        """Read the tensors as they now are, before anything runs; False where the Launch must be built anew."""

    def run(self, launch: "Launch") -> bool:
        """Restore, update where the Launch has gradients, and predict every tensor of the Launch.

        Returns whether all was written through addresses, which moves no version counter.
        """


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
    return tuple(name for name in NAMES if name != "torch") if options["fused"] else NAMES


def check_available(options: Options) -> None:
    """Raise RuntimeError where the options demand a back end that this machine does not have."""
    reasons: dict[str, str | None] = {}
    for name in reversed(_candidates(options)):  # "torch" first: nothing is built for the sake of the question
        reasons[name] = unavailable(name)
        if reasons[name] is None:
            return
    _refuse(options, reasons)


def choose(launch: "Launch", options: Options) -> Backend:
    """The best back end that the options admit and the Launch allows; RuntimeError names why each was passed over."""
    reasons: dict[str, str | None] = {}
    missing: dict[str, str] = {}
    for name in _candidates(options):
        module = _module(name)
        if isinstance(module, str):
            reasons[name] = unavailable(name)
            continue
        backend = cast(Backend, module)
        reasons[name] = backend.why_not(launch)
        if reasons[name] is None:
            # Asked last: the answer may take a build, and only where it is needed.
            reasons[name] = reason = unavailable(name)
            if reason is None:
                for passed_over in missing.items():
                    _note(name, *passed_over)
                return backend
            missing[name] = reason
    _refuse(options, reasons)
    raise AssertionError("unreachable")


@functools.cache
def _note(chosen: str, name: str, reason: str) -> None:
    """Say once that a faster back end would have fitted."""
    warnings.warn(f"xgrad_optim uses its {chosen!r} back end, as {name!r} is unavailable: {reason}", stacklevel=2)


def _refuse(options: Options, reasons: dict[str, str | None]) -> None:
    asked = f"backend={options['backend']!r}" if options["backend"] else f"fused={options['fused']}"
    because = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise RuntimeError(f"{asked} cannot run this ({because}). Use backend=None for the best back end that can")
