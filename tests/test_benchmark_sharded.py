"""The benchmark of DTensors steps every optimizer on every rank, and its table compares them."""

import sys
from pathlib import Path

import torch
from twins import needs_library

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from measuring import Report
from overhead_sharded import measure_sharded


@needs_library
def test_the_table_of_one_and_two_ranks():
    threads = torch.get_num_threads()
    report = Report("a machine")
    measure_sharded(report, 1, count=3)
    assert [(row["ranks"], row["optimizer"]) for row in report.rows] == [
        (ranks, name) for ranks in (1, 2) for name in ("AdamW default", "AdamW fused", "XAdamW")
    ]
    assert all(row["us"] > 0 and row["tensors"] == 3 for row in report.rows)
    assert all(row["to fused"] == 1 for row in report.rows if row["optimizer"] == "AdamW fused")
    assert torch.get_num_threads() == threads
