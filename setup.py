"""Packaging of xgrad-optim: `kernels/` installs as xgrad_optim.kernels, `csrc/` ships inside xgrad_optim as data.

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

DEMO = ["scikit-learn>=1.3", "matplotlib>=3.7", "rich>=13", "scipy>=1.10"]
TEST = [*DEMO, "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11", "build>=1", "ninja"]
TEST += ["triton>=3.6; platform_system == 'Linux'"]
CLIENTS = ["transformers>=5.24", "accelerate>=1.15", "lightning>=2.6"]


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
        spec = importlib.util.spec_from_file_location("build_native", ROOT / "xgrad_optim" / "build_native.py")
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
        from xgrad_optim import build_cuda

        with tempfile.TemporaryDirectory() as scratch:
            shutil.copy2(build_cuda.build(scratch, build_cuda.architectures_ahead_of_time()), package)


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return is_native()


setup(
    name="xgrad-optim",
    version="0.1.0",
    description="XGrad optimizers for PyTorch: gradients are taken at the weights that the optimizer is about to reach",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy>=1.24"],
    extras_require={"demo": DEMO, "test": TEST, "clients": CLIENTS},
    packages=["xgrad_optim", "xgrad_optim.kernels", "xgrad_optim.csrc"],
    package_dir={"xgrad_optim": "xgrad_optim", "xgrad_optim.kernels": "kernels", "xgrad_optim.csrc": "csrc"},
    package_data={"xgrad_optim": ["py.typed"], "xgrad_optim.csrc": ["*.h", "*.cpp", "*.cu"]},
    cmdclass={"build_py": BuildWithNativeLibrary},
    distclass=PlatformDistribution,
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
