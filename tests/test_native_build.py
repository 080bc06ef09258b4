"""The library is built once whoever asks at the same time, leaves the process as it was, and may be absent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from twins import needs_library

from xgrad_optim.backends import build

ROOT = Path(__file__).resolve().parents[1]


def _python(code: str, **environment: str) -> subprocess.Popen:
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", code],
        env={**{k: v for k, v in os.environ.items() if k != "CXX"}, **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


STEP = """
import torch, xgrad_optim
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
for _ in range(2):
    xgrad_optim.XAdamW([p], {options}).step()
o = xgrad_optim.XAdamW([p], {options}); o.step()
print(type(o._planner.last_step.runs[0].runner).__module__)
"""


@needs_library
def test_loading_leaves_the_subnormal_mode_alone():
    code = """
import torch
from xgrad_optim.backends import cpu
tiny = torch.tensor([1e-40, 2e-40])
assert cpu.unavailable() is None
assert (tiny * 0.5 != 0).all() and float(tiny[0]) / 2 != 0, "subnormals are flushed"
assert not hasattr(torch.ops.xgrad_optim, "nothing")
print("kept")
"""
    assert "kept" in _finish(_python(code))


@needs_library
@pytest.mark.parametrize("library", build.LIBRARIES, ids=lambda library: library.stem)
def test_threads_of_torch_and_no_other_openmp(library):
    path = build.find_or_build(library)
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True)
    if needed.returncode != 0:
        pytest.skip("there is no readelf")
    libraries = {line.split("[")[1].rstrip("]") for line in needed.stdout.splitlines() if "NEEDED" in line}
    known = ("libtorch_cpu.", "libstdc++.", "libm.", "libgcc_s.", "libc.", *(() if library.is_stable else ("libc10.",)))
    assert all(name.startswith(known) for name in libraries)
    command = ["nm", "-D", "--undefined-only", "-C", str(path)]
    symbols = subprocess.run(command, capture_output=True, text=True).stdout
    assert "torch_parallel_for" in symbols and "GOMP_" not in symbols
    if library.is_stable:
        assert not any(name in symbols for name in (" at::", " c10::"))


@needs_library
def test_concurrent_first_builds(tmp_path):
    """Three processes find an empty cache at the same time: one compiles, all load the same whole files."""
    code = STEP.format(options="backend='cpu'")
    processes = [_python(code, TORCH_EXTENSIONS_DIR=str(tmp_path)) for _ in range(3)]
    assert all("backends.cpu" in _finish(process) for process in processes)
    names = [path.name for path in (tmp_path / "xgrad_optim").iterdir()]
    libraries = [build.library_name(library) for library in build.LIBRARIES]
    assert sorted(names) == sorted([*libraries, *(f"{name}.lock" for name in libraries)])


def test_without_a_compiler_one_note_and_the_torch_back_end(tmp_path):
    environment = {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    output = _finish(_python(STEP.format(options=""), **environment))
    assert "backends.torch" in output
    assert output.count("there is no C++ compiler") == 1
    assert "RuntimeError" in _python(STEP.format(options="fused=True"), **environment).communicate(timeout=300)[0]
    silent = _finish(_python(STEP.format(options="backend='torch'"), **environment))
    assert "compiler" not in silent


def test_a_failing_compiler_is_quoted(tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'no space left for you' >&2\nexit 1\n")
    compiler.chmod(0o755)
    code = "from xgrad_optim.backends import cpu; print(cpu.unavailable())"
    environment = {"CXX": str(compiler), "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    assert "no space left for you" in _finish(_python(code, **environment))
