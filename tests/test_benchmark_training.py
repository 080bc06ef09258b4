"""The benchmark of whole training steps trains a model with each optimizer, and its table compares them."""

import sys
from pathlib import Path

from twins import needs_library

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from measuring import Report
from overhead_training import PAIRS, Training, measure_training


@needs_library
def test_the_table_has_a_row_for_each_optimizer():
    report = Report("a machine")
    measure_training(report, 1, {"tiny": (8, 1)}, batch_size=2)
    names = ["AdamW default", "AdamW fused", "XAdamW", "SGD default", "SGD fused", "XSGDM"]
    assert [row["optimizer"] for row in report.rows] == names
    assert all(row["ms"] > 0 for row in report.rows)
    assert [row["optimizer"] for row in report.rows if row["two swaps to a step"]] == ["XAdamW", "XSGDM"]


def test_it_trains():
    for makers in PAIRS.values():
        for make in makers.values():
            training = Training(make, 8, 1, batch_size=2)
            before = [param.detach().clone() for param in training.model.parameters()]
            training.step()
            assert all((old != new).any() for old, new in zip(before, training.model.parameters(), strict=True))
