"""The benchmark of a device on the late device: every line but those that ask CUDA for times, launches and memory."""

import json
import sys
import time
from pathlib import Path

from late_device import device
from late_device.device import KERNEL, NAME

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import overhead_device


class LateClock(overhead_device.CpuClock):
    """Times of a simulation, which say nothing; launches are counted."""

    device, label = NAME, "a simulated device"

    def __init__(self):
        self.machine = "Late GPU (simulated)"

    def seconds(self, call, rounds):
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            call()
            device.synchronize()
            times.append(time.perf_counter() - start)
        return times

    def launches(self, call):
        with device.counting() as counts:
            call()
        return counts.operations[KERNEL]


def test_the_benchmark_of_a_device(tmp_path):
    families = {name: member for name, member in overhead_device.FAMILIES.items() if not member.is_base}
    assert "AdaM3" in families  # of the others torch's fused step would run, which this device lacks
    names = ["small-tensors", "gpt2-small"]
    overhead_device.measure_with(LateClock(), families, names, 1e-4, 2, tmp_path, seconds=120)
    path = tmp_path / "overhead_late-gpu-simulated.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ours = [row for row in rows if row["contender"].startswith("triton")]
    assert {row["contender"] for row in ours} == {"triton s=0", "triton s=1"}
    assert len(ours) == 2 * len(names) * len(families)
    assert all(row["launches"] == 1 and row["ms"] > 0 for row in ours)
    assert "| AdaM3 | triton s=1 |" in path.with_suffix(".md").read_text()
    assert path.with_suffix(".png").exists()


def test_nothing_begins_after_its_time(tmp_path, capsys):
    families = overhead_device.FAMILIES
    overhead_device.measure_with(LateClock(), families, ["small-tensors"], 1e-3, 1, tmp_path, seconds=-1)
    assert "left out after -1 s: small-tensors SGDM" in capsys.readouterr().out
