"""The device itself: streams run late and in order, memory is handed out again, graphs replay, everything is counted.

What this device lets pass no test on it can notice.
"""

import gc

import pytest
import torch

from late_device import device
from late_device.device import COPY, DOWNLOAD, NAME, UPLOAD
from late_device.memory import is_poison, present


def upload(values) -> torch.Tensor:
    """On the device when its stream runs."""
    return torch.tensor(values).pin_memory().to(NAME, non_blocking=True)


def new_stream() -> torch.Stream:
    return torch.Stream(device=NAME)


def current_stream() -> torch.Stream:
    return torch.accelerator.current_stream()


def test_nothing_runs_until_somebody_waits():
    a = upload([1.0, 2.0])
    b = (a + 1).mul_(2)
    assert is_poison(a) and is_poison(b) and device.pending() > 0
    assert b.cpu().tolist() == [4.0, 6.0] and device.pending() == 0


def test_a_wait_for_one_stream_runs_no_other():
    a, other = upload([1.0]), new_stream()
    with other:
        b = upload([2.0])
    other.synchronize()
    assert is_poison(a) and present(b).tolist() == [2.0]
    device.synchronize()
    assert present(a).tolist() == [1.0]


def test_events_order_streams():
    a, other = upload([1.0]), new_stream()
    event = current_stream().record_event()
    a.add_(1)  # after the event, so nobody waits for it
    with other:
        other.wait_event(event)
        b = a * 10
    other.synchronize()
    assert present(b).tolist() == [10.0] and present(a).tolist() == [1.0]
    assert event.query() and not current_stream().query()


def test_a_stream_that_does_not_wait_comes_too_early():
    a, other = upload([1.0]), new_stream()
    with other:
        b = a.clone()
    other.synchronize()
    assert is_poison(b)


def test_freed_memory_is_handed_out_again_at_once_and_poisoned_in_order():
    a = upload([1.0, 2.0])
    doubled, address = a * 2, a.data_ptr()
    del a
    b = torch.empty(2, device=NAME)
    assert b.data_ptr() == address
    device.synchronize()
    assert doubled.cpu().tolist() == [2.0, 4.0] and is_poison(b)


def test_freed_memory_stays_with_its_stream():
    a, other = upload([1.0]), new_stream()
    address = a.data_ptr()
    del a
    with other:
        b = torch.empty(1, device=NAME)
    assert b.data_ptr() != address and torch.empty(1, device=NAME).data_ptr() == address


def test_memory_that_another_stream_uses_without_saying_so_is_poisoned_under_it():
    results = []
    for says_so in (False, True):
        a, other = upload([1.0]), new_stream()
        address = a.data_ptr()
        other.wait_stream(current_stream())
        with other:
            b = a + 1
        if says_so:
            a.record_stream(other)
        del a
        c = torch.empty(1, device=NAME)
        assert (c.data_ptr() == address) != says_so
        current_stream().synchronize()
        other.synchronize()
        results.append(is_poison(b))
        device.synchronize()
        del b, c
    assert results == [True, False]


def test_pinned_memory_is_handed_out_again_when_its_copies_are_done():
    source = torch.tensor([1.0, 2.0]).pin_memory()
    assert source.is_pinned() and not torch.ones(2).is_pinned()
    address, target = source.data_ptr(), source.to(NAME, non_blocking=True)
    del source
    other = torch.tensor([3.0, 4.0]).pin_memory()
    assert other.data_ptr() != address
    assert target.cpu().tolist() == [1.0, 2.0]
    again = torch.empty(2, pin_memory=True)
    assert again.data_ptr() == address and is_poison(again)


def test_a_copy_reads_pinned_memory_when_its_stream_runs():
    source = torch.tensor([1.0]).pin_memory()
    target = source.to(NAME, non_blocking=True)
    source.fill_(7.0)
    assert target.cpu().tolist() == [7.0]


def test_a_copy_of_other_memory_is_made_at_once():
    source = torch.tensor([1.0])
    with device.counting() as counts:
        target = source.to(NAME, non_blocking=True)
    source.fill_(7.0)
    assert present(target).tolist() == [1.0] and counts.synchronizations == 1


def test_downloads_into_pinned_memory_are_late():
    a, target = upload([1.0]), torch.zeros(1).pin_memory()
    with device.counting() as counts:
        target.copy_(a, non_blocking=True)
    assert counts.synchronizations == 0 and target.tolist() == [0.0]
    device.synchronize()
    assert target.tolist() == [1.0]
    with device.counting() as counts:
        assert a.to("cpu", non_blocking=True).is_pinned()  # torch chooses it for this
    assert counts.synchronizations == 0


WAITS = {
    "item": lambda a: a[0].item(),
    "bool": lambda a: bool(a[0] > 0),
    "tolist": lambda a: a.tolist(),
    "cpu": lambda a: a.cpu(),
    "from pageable memory": lambda a: a.copy_(torch.ones(2)),
    "equal": lambda a: torch.equal(a, a),
    "nonzero": lambda a: a.nonzero(),
    "stream": lambda a: torch.accelerator.current_stream().synchronize(),
    "event": lambda a: torch.accelerator.current_stream().record_event().synchronize(),
}
if torch.__version__ >= (2, 13):  # before that it does not reach devices like this one
    WAITS["device"] = lambda a: torch.accelerator.synchronize()


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_every_wait_of_the_host_is_counted(wait):
    a = upload([1.0, 2.0])
    with device.counting() as counts:
        wait(a)
    assert counts.synchronizations >= 1 and not is_poison(a)


def test_operations_are_counted_by_name():
    a = upload([1.0, 2.0])
    with device.counting() as counts:
        b = torch.empty(2, device=NAME)
        b.copy_(a)
        b.add_(1).view(1, 2).t()
        b.copy_(torch.ones(2).pin_memory(), non_blocking=True)
        b[0].item()
    assert counts.operations == {COPY: 1, "aten::add": 1, UPLOAD: 1, DOWNLOAD: 1} and counts.synchronizations == 1


def test_a_failing_task_is_reported_to_who_waits_and_the_others_can_run():
    a = upload([1.0])

    def fail():
        raise ArithmeticError("on purpose")

    device.enqueue_kernel(lambda: fail)
    a.add_(1)
    with pytest.raises(Exception, match="on purpose"):
        device.synchronize()
    assert a.cpu().tolist() == [2.0]


def test_results_of_operators_are_those_of_the_cpu():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    x, y = a.to(NAME), b.to(NAME)
    assert torch.equal((x @ y).relu().sum(0).cpu(), (a @ b).relu().sum(0))
    out = torch.empty(0, device=NAME)
    torch.add(x[0], x[1], out=out)
    assert torch.equal(out.cpu(), a[0] + a[1])
    model, twin = torch.nn.Linear(4, 2).to(NAME), torch.nn.Linear(4, 2)
    twin.load_state_dict(model.state_dict())
    model(x).square().mean().backward()
    twin(a).square().mean().backward()
    assert torch.equal(model.weight.grad.cpu(), twin.weight.grad)


def test_views_that_the_device_does_not_know_are_refused():
    with pytest.raises(NotImplementedError, match="makes a view"):
        torch.ones(4).to(NAME).unfold(0, 2, 2)


# -- graphs --------------------------------------------------------------------------------------------------------


def test_a_graph_runs_when_it_is_replayed():
    a = upload([1.0])
    with device.capture() as graph:
        assert torch.get_device_module(NAME).is_current_stream_capturing()
        a.mul_(2)
    assert not torch.get_device_module(NAME).is_current_stream_capturing()
    assert graph.n_nodes == 1 and a.cpu().tolist() == [1.0]
    for _ in range(3):
        graph.replay()
    assert a.cpu().tolist() == [8.0]


def test_a_graph_keeps_the_memory_that_was_allocated_in_it():
    a = upload([1.0])
    with device.capture() as graph:
        b = a + 1
        c = b * 10
        del b
    del c
    gc.collect()
    strangers = [torch.full((1,), 5.0, device=NAME) for _ in range(20)]
    graph.replay()
    device.synchronize()
    assert all(stranger.item() == 5.0 for stranger in strangers)


def test_a_graph_reads_pinned_memory_in_every_replay():
    source, target = torch.tensor([1.0]).pin_memory(), torch.zeros(1, device=NAME)
    with device.capture() as graph:
        target.copy_(source, non_blocking=True)
    for value in (3.0, 4.0):
        source.fill_(value)
        graph.replay()
        assert target.cpu().tolist() == [value]


@pytest.mark.parametrize("is_made_inside", [False, True])
def test_pinned_memory_that_a_graph_reads(is_made_inside):
    """Torch keeps what was allocated during the capture; what was there before has to be kept by who captures."""
    target, source = torch.zeros(1, device=NAME), torch.tensor([1.0]).pin_memory()
    with device.capture() as graph:
        if is_made_inside:
            source = torch.tensor([1.0]).pin_memory()
        target.copy_(source, non_blocking=True)
    del source
    graph.replay()
    device.synchronize()
    assert present(target).tolist() == [1.0] if is_made_inside else is_poison(target)


@pytest.mark.parametrize("wait", ["item", "device", "stream"])
def test_the_host_may_not_wait_during_a_capture(wait):
    a = upload([1.0, 2.0])
    with device.capture(), pytest.raises(RuntimeError, match="while a graph is captured"):
        WAITS[wait](a)


def test_a_capture_is_one_stream():
    other = new_stream()
    event = other.record_event()
    with device.capture():
        with pytest.raises(RuntimeError, match="captures one stream"):
            current_stream().wait_event(event)
        with pytest.raises(RuntimeError, match="captures one stream"):
            other.wait_stream(current_stream())
