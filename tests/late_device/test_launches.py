"""Triton's JIT launches on the device: late, at real addresses, and a kernel that touches what is nobody's faults."""

import pytest
import torch

pytest.importorskip("triton", reason="these are launches of Triton's")
import ptxsim
import triton
import triton.language as tl

from late_device import device
from late_device.device import KERNEL, NAME, UPLOAD
from late_device.memory import is_poison, present

N = 100


@triton.jit
def add_through_table(table_ptr, out_ptr, scale, n, BLOCK: tl.constexpr):
    """out = the sum of the two tensors whose addresses are in the table, times a number."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    b_ptr = tl.load(table_ptr + 1).to(tl.pointer_type(tl.float32))
    total = tl.load(a_ptr + i, mask=i < n) + tl.load(b_ptr + i, mask=i < n)
    tl.store(out_ptr + i, total * scale, mask=i < n)


@triton.jit
def powers(base_ptr, step_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out = 1 - base**step in float64, one thread for each tensor."""
    i = tl.arange(0, BLOCK)
    base = tl.load(base_ptr + i, mask=i < n, other=1.0)
    step = tl.load(step_ptr + i, mask=i < n, other=1.0)
    tl.store(out_ptr + i, 1.0 - tl.exp(step * tl.log(base)), mask=i < n)


def upload(values: torch.Tensor) -> torch.Tensor:
    return values.pin_memory().to(NAME, non_blocking=True)


def table_of(*tensors: torch.Tensor) -> torch.Tensor:
    return upload(torch.tensor([tensor.data_ptr() for tensor in tensors]))


def launch(table: torch.Tensor, out: torch.Tensor, n: int = N) -> None:
    add_through_table[(triton.cdiv(n, 64),)](table, out, 2.5, n, BLOCK=64, enable_fp_fusion=False)


def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    a, b = torch.arange(float(N)), torch.ones(N)
    return upload(a), upload(b), (a + b) * 2.5


def test_a_kernel_runs_when_its_stream_does():
    a, b, expected = operands()
    out = torch.empty(N, device=NAME)
    with device.counting() as counts:
        launch(table_of(a, b), out)
    assert counts.operations == {UPLOAD: 1, KERNEL: 1} and counts.synchronizations == 0 and is_poison(out)
    assert torch.equal(out.cpu(), expected)


def test_a_kernel_may_read_what_is_freed_after_its_launch():
    a, b, expected = operands()
    out = torch.empty(N, device=NAME)
    launch(table_of(a, b), out)
    del a, b
    others = [torch.zeros(N, device=NAME) for _ in range(4)]
    assert torch.equal(out.cpu(), expected) and all(not other.any() for other in others)


def test_float64_numbers_of_each_tensor():
    base, step = torch.full((5,), 0.9, dtype=torch.float64), torch.arange(1.0, 6.0, dtype=torch.float64)
    out = torch.empty(5, dtype=torch.float64, device=NAME)
    powers[(1,)](upload(base), upload(step), out, 5, BLOCK=16, enable_fp_fusion=False)
    torch.testing.assert_close(out.cpu(), 1 - base**step, rtol=1e-15, atol=1e-15)


def fails(match: str, launch_it) -> None:
    launch_it()
    with pytest.raises(Exception, match=match):
        device.synchronize()
    device.abandon()


def test_accesses_beyond_a_tensor_fault():
    a, b, _ = operands()
    out = torch.empty(N, device=NAME)
    fails("out-of-bounds load", lambda: launch(table_of(a, b), out, n=N + 1))
    fails("out-of-bounds store", lambda: launch(table_of(a, b), out[:-1].clone()))


def test_memory_that_was_freed_before_the_launch_faults():
    a, b, _ = operands()
    table, out = table_of(a, b), torch.empty(N, device=NAME)
    del b
    fails("out-of-bounds load", lambda: launch(table, out))


def test_memory_that_was_never_written_is_poison():
    a, _, _ = operands()
    out, never_written = (torch.empty(N, device=NAME) for _ in range(2))
    fails("poison load", lambda: launch(table_of(a, never_written), out))
    fails("poison load", lambda: launch(torch.empty(2, dtype=torch.int64, device=NAME), out))


def test_a_graph_replays_launches():
    a, b, _ = operands()
    out, table = torch.empty(N, device=NAME), table_of(a, b)
    with device.capture() as graph:
        launch(table, out)
    assert is_poison(out)
    for factor in (1, 2):
        graph.replay()
        assert torch.equal(out.cpu(), (present(a) + present(b)) * 2.5), factor
        a.mul_(2)
    del a
    graph.replay()
    with pytest.raises(Exception, match="out-of-bounds load"):
        device.synchronize()


def test_memory_of_a_graph_serves_its_replays():
    a, b, expected = operands()
    out, table = torch.empty(N, device=NAME), table_of(a, b)
    with device.capture() as graph:
        middle = torch.empty(N, device=NAME)
        launch(table, middle)
        out.copy_(middle)
        del middle
    for _ in range(2):
        graph.replay()
        assert torch.equal(out.cpu(), expected)
        out.zero_()


def test_pinned_memory_that_is_reused_in_flight_is_noticed():
    """The control for all tests of uploads: with the fault on, what a kernel reads is wrong."""
    a, b, expected = operands()
    outs = [torch.empty(N, device=NAME) for _ in range(2)]
    with device.reusing_pinned_memory_at_once():
        launch(table_of(a, b), outs[0])
        launch(table_of(b, b), outs[1])
    assert torch.equal(outs[1].cpu(), torch.full((N,), 5.0))
    assert not torch.equal(outs[0].cpu(), expected)


def test_a_table_that_is_uploaded_after_the_launch_is_noticed():
    a, b, _ = operands()
    out = torch.empty(N, device=NAME)
    with device.uploading_after_the_launch():
        fails("poison load", lambda: launch(table_of(a, b), out))


def test_launches_follow_their_stream():
    a, b, expected = operands()
    out, other = torch.empty(N, device=NAME), torch.Stream(device=NAME)
    table = table_of(a, b)
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        launch(table, out)
    torch.accelerator.current_stream().synchronize()
    assert is_poison(out)
    other.synchronize()
    assert torch.equal(present(out), expected)


def test_errors_of_the_simulator_keep_their_type():
    with pytest.raises(ptxsim.MemoryFault):
        launch(torch.zeros(2, dtype=torch.int64, device=NAME), torch.empty(N, device=NAME))
        device.synchronize()
