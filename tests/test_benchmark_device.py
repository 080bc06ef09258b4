"""The benchmark of a device prints no number of a device that is not there, and compares with the paper's procedure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import every_class
from family import MEMBERS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from literal_procedure import LiteralProcedure  # noqa: E402


def _overhead(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "overhead.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=BENCHMARKS.parent)


@every_class
def test_the_literal_procedure_computes_what_our_step_does(cls):
    start = [torch.randn(5, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)]
    ours, literal = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    steps = (
        cls(ours, lr=0.01).step,
        LiteralProcedure(cls(literal, lr=0.01, prediction_steps=0), MEMBERS[cls].move_ahead).step,
    )
    for _ in range(4):
        for param, other in zip(ours, literal, strict=True):
            param.grad = torch.randn_like(param)
            other.grad = param.grad.clone()
        for step in steps:
            step()
        torch.testing.assert_close(ours, literal, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_number_of_a_device_that_is_not_there(tmp_path):
    done = _overhead("--device", "cuda", "--out", str(tmp_path))
    assert done.returncode != 0 and "there is no CUDA device" in done.stderr
    assert not done.stdout and not list(tmp_path.iterdir())


def test_on_a_cpu_the_numbers_are_labelled_so(tmp_path):
    arguments = ("--workload", "small-tensors", "--scale", "0.001", "--rounds", "2", "--out", str(tmp_path))
    done = _overhead("--device", "cpu", *arguments)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("overhead_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["clock"] for row in rows} == {"perf_counter on a CPU"}
    assert {row["contender"] for row in rows} >= {"torch fused", "torch foreach", "three passes"}
    assert all(row["ms"] > 0 and row["launches"] is None and row["host ms"] is None for row in rows)
    assert path.with_suffix(".png").stat().st_size > 10000
    assert "| AdamW | torch fused |" in path.with_suffix(".md").read_text()
