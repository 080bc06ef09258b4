"""What is built and installed is whole, and works away from the checkout.

From the repository's root the local package shadows an installed one, so a wheel that lacks csrc/ or kernels/ looks
fine there and fails for everyone else.
"""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import xgrad_optim

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XGRAD_BUILD")}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A wheel without the native library and an sdist, made from a copy of what git would clone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    run("git", "clone", "--quiet", str(ROOT), str(source), cwd=ROOT)
    for command in ("--sdist", "--wheel"):
        run(sys.executable, "-m", "build", "--no-isolation", command, "-o", str(out), cwd=source, XGRAD_BUILD="none")
    return out


def test_the_wheel_holds_python_kernels_and_sources(dist):
    (wheel,) = dist.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "csrc", "kernels", "xgrad_optim", cwd=ROOT).split()
    expected = {
        re.sub(r"^(csrc|kernels)/", r"xgrad_optim/\1/", name)
        for name in tracked
        if name.endswith((".py", ".h", ".cpp", ".cu", "py.typed"))
    }
    assert expected <= names
    assert wheel.name.endswith("-py3-none-any.whl")


def test_the_sdist_can_be_tested_and_built(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "README.md", "Makefile", "csrc/rules.h", "tests/cases.py"} <= names
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/attach.md", "examples/quickstart.py"} <= names


def test_the_metadata_is_that_of_pyproject(dist):
    """The version stands in the package alone, the license goes with the wheel."""
    (wheel,) = dist.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
    assert (metadata["Name"], metadata["Version"]) == ("xgrad-optim", xgrad_optim.__version__)
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert f"{folder}/licenses/LICENSE" in archive.namelist()
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.split(r"\W", line.replace("-", "_"))[0] for line in required} == {"torch", "numpy", "typing_extensions"}


def test_an_installed_wheel_trains_away_from_the_checkout(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    script = (
        "import torch, xgrad_optim, xgrad_optim.kernels\n"
        "p = torch.nn.Parameter(torch.ones(3))\n"
        "p.grad = torch.ones(3)\n"
        "o = xgrad_optim.XAdamW([p], backend='torch'); o.step(); o.eval()\n"
        "print(xgrad_optim.__file__, p.tolist())\n"
    )
    printed = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    assert printed.startswith(str(site))
    report = run(sys.executable, "-m", "xgrad_optim", cwd=tmp_path, PYTHONPATH=str(site))
    assert f"torch       {torch.__version__}" in report


def test_the_report_gives_a_reason_for_every_absent_back_end():
    report = run(sys.executable, "-m", "xgrad_optim", cwd=ROOT)
    assert f"xgrad_optim {xgrad_optim.__version__}" in report
    reasons = dict(re.findall(r"^back end +(\w+) +(.+)$", report, re.MULTILINE))
    assert reasons.keys() == xgrad_optim.available_backends().keys() == {"triton", "cuda", "cpu", "torch"}
    assert reasons["torch"] == "available"
    for name, why in xgrad_optim.available_backends().items():
        assert reasons[name] == (why or "available").splitlines()[0]


def test_no_optional_dependency_is_needed_to_import():
    """torch and numpy alone: not triton, not the demo's or the tests' packages."""
    script = (
        "import sys\n"
        "for name in ('triton', 'scipy', 'sklearn', 'matplotlib', 'rich', 'ninja', 'hypothesis', 'pytest'):\n"
        "    sys.modules[name] = None\n"
        "import xgrad_optim\n"
    )
    run(sys.executable, "-c", script, cwd=ROOT)
