"""The benchmark of one thread calls the operator that steps, of every optimizer and dtype."""

import sys
from pathlib import Path

import torch
from cases import every_class
from family import CLASSES, MEMBERS
from twins import needs_library, same_bits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from measuring import Report
from overhead_thread import DTYPES, measure_small_models, measure_thread, operator_of


def _optimizer(make) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    param = torch.randn(50).requires_grad_()
    param.grad = torch.randn(50)
    return make([param])


@needs_library
@every_class
def test_the_operator_does_what_the_step_did(cls):
    make_peer = MEMBERS[cls].make_peer
    for make in (lambda params: cls(params, backend="cpu"), lambda params: make_peer(params, fused=True)):
        optimizer, other = _optimizer(make), _optimizer(make)
        operator = operator_of(optimizer)
        for _ in range(3):
            other.step()
        (param,), (expected,) = optimizer.param_groups[0]["params"], other.param_groups[0]["params"]
        assert same_bits(param, expected)
        operator()
        assert not torch.equal(param, expected)


@needs_library
def test_tables_of_every_optimizer_and_dtype():
    threads = torch.get_num_threads()
    report = Report("a machine")
    measure_thread(report, 1, {"tiny": 4096})
    kernels = report.rows
    assert [row["optimizer"] for row in kernels] == [cls.__name__ for cls in CLASSES] * len(DTYPES)
    assert len({row["table"] for row in kernels}) == len(DTYPES)
    report = Report("a machine")
    measure_small_models(report, ["cpu"], 1)
    assert {row["tensors"] for row in report.rows} == {1, 16, 64, 200}
    assert {row["optimizer"] for row in report.rows} >= {"AdamW default", "AdamW fused", "XAdamW cpu", "XSGDM cpu"}
    assert all(row["us"] > 0 for row in report.rows)
    assert torch.get_num_threads() == threads
