"""Packaging of xgrad-optim: `kernels/` installs as xgrad_optim.kernels, `csrc/` ships inside xgrad_optim as data."""

from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent

DEMO = ["scikit-learn>=1.3", "matplotlib>=3.7", "rich>=13", "scipy>=1.10"]
TEST = [*DEMO, "pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.6", "mypy>=1.11", "build>=1"]

setup(
    name="xgrad-optim",
    version="0.1.0",
    description="XGrad optimizers for PyTorch: gradients are taken at the weights that the optimizer is about to reach",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy>=1.24"],
    extras_require={"demo": DEMO, "test": TEST},
    packages=["xgrad_optim", "xgrad_optim.kernels", "xgrad_optim.csrc"],
    package_dir={"xgrad_optim": "xgrad_optim", "xgrad_optim.kernels": "kernels", "xgrad_optim.csrc": "csrc"},
    package_data={"xgrad_optim": ["py.typed"], "xgrad_optim.csrc": ["*.h", "*.cpp", "*.cu"]},
    zip_safe=False,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
