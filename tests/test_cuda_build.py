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
from cuda_kernels import STRUCTS, needs_nvcc
from family import RULES

from xgrad_optim import XAdamW, backends
from xgrad_optim.backends import build, build_cuda

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
    return build_cuda.build(build.cache_directory() / "tests", [90])


CALL = """
import torch
torch.ops.load_library({library!r})
ops = torch.ops.xgrad_optim
kernel = ops.find_kernels_cuda("adam", torch.float32, torch.float32, True, False, False)
def table(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)
rows, numbers = table(1, {columns}, dtype=torch.float32), table(1, {numbers}, dtype=torch.float64)
for operator, *arguments in (
    (ops.multi_tensor_cuda, table(1, 8), table(1), rows, numbers, table(1, 2, dtype=torch.int32), 64, kernel, 0),
    (ops.make_rows_cuda, table(1, 8), table(1), table(1, 11, 2), rows, numbers, kernel, 0),
    (ops.find_kernels_cuda, "adan", torch.float32, torch.float32, True, False, False),
    (ops.find_kernels_cuda, "adam", torch.float32, torch.float64, True, False, False),
):
    try:
        operator(*arguments)
    except RuntimeError as error:
        print(str(error).splitlines()[0])
print("problem:", ops.cuda_problem())
"""


@needs_nvcc
def test_the_library_loads_and_knows_whether_there_is_a_device(library):
    rule = RULES["adam"]
    output = _python(CALL.format(library=str(library), columns=len(rule.columns), numbers=len(rule.number_keys)))
    assert output.count("all tables must be on one CUDA device") == 2, output
    assert 'there is no rule "adan"' in output and "no CUDA kernel for parameters of dtype" in output
    assert output.endswith("problem: \n") if has_gpu else "problem: there is no CUDA device (" in output


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
        "import torch; from xgrad_optim.backends import cpu; assert cpu.unavailable() is None; "
        f"torch.ops.load_library({str(library)!r}); print(torch.ops.xgrad_optim.cpu_isas())"
    )
    assert "baseline" in _python(code)


def test_asking_builds_nothing(tmp_path):
    """Whether it can be had, by name or for a report; a torch that believes in a GPU is all that this needs."""
    home = _fake_nvcc(tmp_path, "exit 1")
    code = """
import torch
torch.version.cuda = "13.0"
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.get_device_capability = lambda index: (9, 0)
import xgrad_optim
print(xgrad_optim.available_backends()["cuda"])
xgrad_optim.XAdamW([torch.nn.Parameter(torch.ones(3))], backend="cuda")
"""
    cache = tmp_path / "cache"
    assert _python(code, CUDA_HOME=home, TORCH_EXTENSIONS_DIR=str(cache)).splitlines()[-1] == "None"
    assert not list(cache.glob("**/*cuda*"))


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


def test_a_failing_nvcc_gives_one_line_and_a_log(tmp_path):
    home = _fake_nvcc(tmp_path, "echo 'first line of it'; echo 'x.cu(3): error: the cause' >&2; exit 1")
    code = (
        "from xgrad_optim.backends import build_cuda\n"
        "try: build_cuda.find_or_build([90])\n"
        "except RuntimeError as error: print(error)"
    )
    output = _python(code, CUDA_HOME=home, TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert output.startswith("compiling failed: x.cu(3): error: the cause (all of it is in ")
    assert output.count("\n") == 1
    (log,) = (tmp_path / "cache" / "xgrad_optim").glob("*.log")
    assert str(log) in output and "first line of it" in log.read_text()
    output = _python(code, CUDA_HOME=str(tmp_path / "nowhere"), TORCH_EXTENSIONS_DIR=str(tmp_path / "cache"))
    assert "there is no nvcc" in output


def test_a_wheel_can_hold_the_library(tmp_path):
    """setup.py and what it asks of the compilers, which here write empty files."""
    home = _fake_nvcc(tmp_path, 'while [ $# -gt 1 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done')
    source = tmp_path / "source"
    for name in ("xgrad_optim", "csrc", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
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
    for library in build.LIBRARIES:
        assert f"xgrad_optim/{build.library_name(library)}" in libraries


def test_a_library_is_found_again_where_it_runs_on_the_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    built = []
    monkeypatch.setattr(build_cuda, "build", lambda _directory, architectures: built.append(architectures))
    monkeypatch.setattr(build_cuda, "_known_architectures", lambda: [75, 80, 86, 90, 100])
    present = build.cache_directory() / f"{build_cuda._stem()}-80-90.so"
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


def test_no_build_begins_where_it_was_not_asked_for_by_name(monkeypatch):
    """A build takes a minute."""
    options = XAdamW([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    launch = SimpleNamespace(device=torch.device("cuda"))

    def backend(name: str, reason: str | None = None, why_not: str | None = None) -> SimpleNamespace:
        bind = lambda launch, numbers: name  # noqa: E731
        return SimpleNamespace(why_not=lambda launch: why_not, unavailable=lambda: reason, bind=bind)

    cuda = SimpleNamespace(why_not=lambda launch: None, unavailable=lambda: pytest.fail("it would be built"))
    cpu = backend("cpu", why_not="it runs on cpu")
    modules = {"cuda": cuda, "cpu": cpu, "torch": backend("torch"), "triton": backend("triton")}
    monkeypatch.setattr(backends, "_module", modules.get)
    for wanted in ({}, {"backend": "triton"}, {"fused": True}):
        backends.check_available({**options, **wanted})
        assert backends.bind(launch, None, {**options, **wanted}) == "triton"
    modules["triton"] = backend("triton", "no compiler")
    with pytest.warns(UserWarning, match="uses its 'torch' back end, as 'triton' is unavailable: no compiler"):
        assert backends.bind(launch, None, options) == "torch"
    with pytest.raises(RuntimeError, match=r"fused=True cannot run this \(triton: no compiler; cpu: it runs on cpu\)"):
        backends.bind(launch, None, {**options, "fused": True})


def test_every_rule_is_compiled():
    assert STRUCTS.keys() == RULES.keys()
