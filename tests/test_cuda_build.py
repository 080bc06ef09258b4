"""The CUDA library compiles, links and loads on a machine without a GPU or a driver, and then says so."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_kernels import RULES as RULE_NAMES
from cuda_kernels import needs_nvcc
from random_launch import RULES

from xgrad_optim import XAdamW, backends, build_cuda, build_native

ROOT = Path(__file__).resolve().parents[1]

has_gpu = torch.cuda.is_available()


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def library() -> Path:
    """For one architecture, which is enough to link."""
    return build_cuda.build(build_native.cache_directory() / "tests", [90])


CALL = """
import torch
torch.ops.load_library({library!r})
def table(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)
tables = [table(1, 6), table(1), table(1, dtype=torch.int32), table(1, {columns}, dtype=torch.float32),
          table(1, 2, dtype=torch.int32)]
try:
    torch.ops.xgrad_optim.multi_tensor_cuda(*tables, 64, True, False, False, False, "adam", torch.float32,
                                            torch.float32, 0)
except RuntimeError as error:
    print(error)
print("problem:", torch.ops.xgrad_optim.cuda_problem())
"""


@needs_nvcc
def test_the_library_loads_and_knows_whether_there_is_a_device(library):
    output = _python(CALL.format(library=str(library), columns=len(RULES["adam"].columns)))
    if has_gpu:
        assert "all tables must be on one CUDA device" in output and output.endswith("problem: \n")
    else:
        assert output.count("there is no CUDA device (") == 2


@needs_nvcc
def test_it_needs_no_cuda_library_and_no_torch_but_the_stable_one(library):
    needed = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True)
    if needed.returncode != 0:
        pytest.skip("there is no readelf")
    libraries = {line.split("[")[1].rstrip("]") for line in needed.stdout.splitlines() if "NEEDED" in line}
    stems = ("libtorch_cpu.", "libstdc++.", "libm.", "libgcc_s.", "libc.", "libpthread.", "libdl.", "librt.", "ld-")
    assert all(name.startswith(stems) for name in libraries), libraries
    symbols = subprocess.run(["nm", "-DC", "--undefined-only", str(library)], capture_output=True, text=True).stdout
    assert not any(name in symbols for name in (" at::", " c10::", " cuda"))


@needs_nvcc
def test_both_libraries_live_in_one_process(library):
    code = (
        "import torch; from xgrad_optim import backend_native; assert backend_native.unavailable() is None; "
        f"torch.ops.load_library({str(library)!r}); print(torch.ops.xgrad_optim.cpu_isas())"
    )
    assert "baseline" in _python(code)


@pytest.mark.skipif(has_gpu, reason="this machine has a GPU")
def test_without_a_device_the_back_end_says_so():
    reason = backends.unavailable("cuda")
    assert reason is not None and "no CUDA" in reason
    code = """
import torch, xgrad_optim
try:
    xgrad_optim.XAdamW([torch.nn.Parameter(torch.ones(3))], backend="cuda")
except RuntimeError as error:
    print(error)
"""
    assert f"backend='cuda' cannot run this (cuda: {reason})" in _python(code)


def _fake_nvcc(directory: Path, action: str) -> str:
    """A toolkit whose compiler knows sm_90 and otherwise does this; returns its CUDA_HOME."""
    nvcc = directory / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\nif [ "$1" = --list-gpu-arch ]; then echo compute_90; exit; fi\n{action}\n')
    nvcc.chmod(0o755)
    return str(directory)


def test_a_failing_nvcc_is_quoted_whole(tmp_path):
    home = _fake_nvcc(tmp_path, "echo 'first line of it'; echo 'last line of it' >&2; exit 1")
    code = (
        "from xgrad_optim import build_cuda\n"
        "try: build_cuda.find_or_build([90])\n"
        "except RuntimeError as error: print(error)"
    )
    output = _python(code, CUDA_HOME=home, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert "compiling failed" in output and "first line of it" in output and "last line of it" in output
    output = _python(code, CUDA_HOME=str(tmp_path / "nowhere"), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert "there is no nvcc" in output


def test_a_wheel_can_hold_the_library(tmp_path):
    """setup.py and what it asks of the compilers, which here write empty files."""
    home = _fake_nvcc(tmp_path, 'while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done')
    source = tmp_path / "source"
    for name in ("xgrad_optim", "csrc", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy2(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--wheel", "-o", str(tmp_path), str(source)],
        env={**os.environ, "XGRAD_BUILD": "cuda", "CUDA_HOME": home, "CXX": f"{home}/bin/nvcc"},
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert f"xgrad_optim/{build_cuda._stem()}-90.so" in libraries
    for library in build_native.LIBRARIES:
        assert f"xgrad_optim/{build_native.library_name(library)}" in libraries


def test_a_library_is_found_again_where_it_runs_on_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built = []
    monkeypatch.setattr(build_cuda, "build", lambda _directory, architectures: built.append(architectures))
    monkeypatch.setattr(build_cuda, "_known_architectures", lambda: [75, 80, 86, 90, 100])
    present = build_native.cache_directory() / f"{build_cuda._stem()}-80-90.so"
    present.parent.mkdir(parents=True)
    present.touch()
    assert build_cuda.find_or_build([86, 90]) == present  # sm_86 runs sm_80's code
    assert build_cuda.find_or_build([100, 120]) == present  # by the PTX of the newest
    assert built == []
    build_cuda.find_or_build([75, 90])
    build_cuda.find_or_build([75])
    assert built == [[75, 90], [75]]


def test_architectures(monkeypatch):
    monkeypatch.setattr(build_cuda, "_known_architectures", lambda: [75, 80, 90])
    assert build_cuda.architectures_for([120, 86, 90]) == [80, 90]
    with pytest.raises(RuntimeError, match=r"does not compile for compute capability 7\.0"):
        build_cuda.architectures_for([70, 90])
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert build_cuda.architectures_ahead_of_time() == [80, 90]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0+PTX;8.6")
    assert build_cuda.architectures_ahead_of_time() == [86, 90]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(RuntimeError, match="got 'Hopper'"):
        build_cuda.architectures_ahead_of_time()


def test_no_build_begins_where_triton_can_run(monkeypatch):
    """A build takes a minute: it begins where "cuda" is asked for, or where nothing better fits."""
    options = XAdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    fitting = SimpleNamespace(why_not=lambda launch: None, unavailable=lambda: None)
    cuda = SimpleNamespace(why_not=lambda launch: None, unavailable=lambda: pytest.fail("it would be built"))
    modules = {"triton": fitting, "cuda": cuda, "cpu": fitting, "torch": fitting}
    monkeypatch.setattr(backends, "_module", modules.get)
    for wanted in ({}, {"backend": "triton"}, {"fused": True}):
        backends.check_available({**options, **wanted})
        assert backends.choose(None, {**options, **wanted}) is fitting


def test_every_rule_is_compiled():
    assert RULE_NAMES.keys() == RULES.keys()
