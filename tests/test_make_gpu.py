"""`make gpu` says in one line that there is no GPU; and what it will run takes its arguments."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import overhead  # noqa: E402

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@without_a_gpu
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("make gpu needs a GPU") and done.stderr.count("\n") == 1


def test_the_benchmark_takes_the_arguments(tmp_path):
    command = gpu.benchmark_command(tmp_path, 123.4)
    assert Path(command[1]).samefile(BENCHMARKS / "overhead.py")
    options = overhead.parse(command[2:])
    assert (options.device, options.seconds, options.out) == ("cuda", 123, tmp_path)


@without_a_gpu
def test_the_tests_of_a_gpu_are_found_and_skip(tmp_path):
    command = gpu.test_command(tmp_path, "none")
    done = subprocess.run([*command, "-rs", "-k", "two_devices"], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert done.returncode == 0, done.stdout
    assert "needs a GPU" in done.stdout or "needs two GPUs" in done.stdout
    assert (tmp_path / "gpu_tests_none.xml").exists()
