"""What `make gpu` runs on a machine with a GPU: its tests, then the benchmark of all back ends; nine minutes at most.

Everything goes into benchmarks/results, in files named after the GPU: `gpu_tests_<gpu>.xml`, `overhead_<gpu>.jsonl`,
`.md` and `.png`. The tests that did not come to an end in their time are an error; the benchmark then still runs.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch
from overhead_device import slug

TEST_SECONDS, ALL_SECONDS = 240, 500
"""The benchmark takes what the tests leave of the whole, and begins nothing later than that."""

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_command(results: Path, device: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={results / f'gpu_tests_{device}.xml'}"]


def benchmark_command(results: Path, seconds: float) -> list[str]:
    script = ROOT / "benchmarks" / "overhead.py"
    return [sys.executable, str(script), "--device", "cuda", "--seconds", f"{seconds:.0f}", "--out", str(results)]


def main() -> int:
    if not torch.cuda.is_available():
        print(f"make gpu needs a GPU that torch can use; torch {torch.__version__} finds none", file=sys.stderr)
        return 1
    start, device = time.monotonic(), slug(torch.cuda.get_device_name())
    RESULTS.mkdir(parents=True, exist_ok=True)
    try:
        are_passed = subprocess.run(test_command(RESULTS, device), cwd=ROOT, timeout=TEST_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests did not end within {TEST_SECONDS} s", file=sys.stderr)
        are_passed = False
    rest = ALL_SECONDS - (time.monotonic() - start)
    is_measured = subprocess.run(benchmark_command(RESULTS, rest), cwd=ROOT).returncode == 0
    return 0 if are_passed and is_measured else 1


if __name__ == "__main__":
    sys.exit(main())
