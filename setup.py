"""The native libraries of a build; all that is fixed about the package stands in pyproject.toml.

The native CPU libraries are compiled into the wheel where torch can be imported in the build (pip's
--no-build-isolation) and a compiler exists; otherwise the first use compiles it. XGRAD_BUILD=none leaves it out,
XGRAD_BUILD=cpu makes a failure an error, XGRAD_BUILD=cuda adds the CUDA library (nvcc compiles it for
$TORCH_CUDA_ARCH_LIST, or for the common architectures; no GPU is needed).
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
WANTED = os.environ.get("XGRAD_BUILD", "auto")


def is_native() -> bool:
    """Whether this build contains the compiled library, which makes it one for this platform."""
    if WANTED not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"XGRAD_BUILD must be auto, none, cpu or cuda, got {WANTED!r}")
    return WANTED in ("cpu", "cuda") or (WANTED == "auto" and importlib.util.find_spec("torch") is not None)


class BuildWithNativeLibrary(build_py):
    """Copies the Python files, then puts the compiled libraries beside them."""

    def run(self) -> None:
        super().run()
        if is_native() and not getattr(self, "editable_mode", False):
            self.build_native(Path(self.build_lib) / "xgrad_optim")

    def build_native(self, package: Path) -> None:
        spec = importlib.util.spec_from_file_location("build", ROOT / "xgrad_optim" / "backends" / "build.py")
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                for library in native.LIBRARIES:
                    shutil.copy2(native.build(library, scratch), package)
        except RuntimeError as error:
            if WANTED != "auto":
                raise
            self.warn(f"the native CPU libraries are left to the first use: {error}")
        if WANTED == "cuda":
            self.build_cuda(package)

    def build_cuda(self, package: Path) -> None:
        sys.path.insert(0, str(ROOT))
        from xgrad_optim.backends import build_cuda

        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy2(build_cuda.build(scratch, build_cuda.architectures_ahead_of_time()), package)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return is_native()


setup(cmdclass={"build_py": BuildWithNativeLibrary}, distclass=PlatformDistribution)
