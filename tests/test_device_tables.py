"""A launch's tables are read from its tensors as they are, and uploaded without waiting or overwriting.

Stale addresses write to memory that is somebody else's; a pinned buffer that is refilled while a copy of it is in
flight, or freed while a captured graph will still read it, does the same, only rarely. The stream here is a list: its
copies are made when the test says so, as late as a GPU could.
"""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from xgrad_optim import device_tables
from xgrad_optim.device_tables import DeviceTables
from xgrad_optim.launch import Tables

GPU = torch.device("cuda", 0)


class FakeGPU:
    """Copies wait on the current stream until `synchronize`; those of a capture are made by `replay`."""

    def __init__(self, monkeypatch) -> None:
        self.stream, self.is_capturing = torch.Stream, False
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.captured: list[tuple[weakref.ref, weakref.ref]] = []
        self.uploads = 0
        self.pinned = 0
        monkeypatch.setattr(device_tables, "_upload", self.upload)
        monkeypatch.setattr(device_tables, "_pinned_like", self.pin)
        monkeypatch.setattr(device_tables, "_is_capturing", lambda device: self.is_capturing)
        monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: self.stream)

    def pin(self, table: Tensor) -> Tensor:
        assert not self.is_capturing, "torch before 2.11 can't allocate pinned memory during a capture"
        return torch.empty_like(table)

    def upload(self, table: Tensor, device: torch.device, pinned: Tensor | None = None) -> tuple[Tensor, Tensor]:
        source = self.pin(table) if pinned is None else pinned
        assert not any(source is other for other, _ in self.pending), "a copy of this buffer is in flight"
        source.copy_(table)
        copy = torch.full_like(table, -1)
        self.uploads += 1
        if self.is_capturing:
            self.captured.append((weakref.ref(source), weakref.ref(copy)))
        else:
            self.pending.append((source, copy))
        return source, copy

    def synchronize(self) -> None:
        for source, copy in self.pending:
            copy.copy_(source)
        self.pending.clear()

    def replay(self) -> None:
        for source, copy in self.captured:
            assert source() is not None and copy() is not None, "the graph reads memory that has been freed"
            copy().copy_(source())


@pytest.fixture
def gpu(monkeypatch) -> FakeGPU:
    return FakeGPU(monkeypatch)


def make_launch() -> SimpleNamespace:
    tables = Tables([5, 0, 9], [0, 1, 0], chunk_size=4)
    tables.addresses.copy_(torch.arange(18).reshape(3, 6))
    params = [torch.nn.Parameter(torch.ones(1))]
    return SimpleNamespace(device=GPU, is_capturable=True, tables=tables, rows=torch.randn(2, 9), params=params)


def rows_on(device: torch.device) -> SimpleNamespace:
    return SimpleNamespace(device=device)


def test_a_steady_step_uploads_its_rows_alone(gpu):
    launch = make_launch()
    tables = DeviceTables()
    first = tables.upload(launch)
    assert gpu.uploads == 5
    launch.rows = launch.rows + 1
    second = tables.upload(launch)
    assert gpu.uploads == 6
    gpu.synchronize()
    for name in ("addresses", "numels", "row_of", "chunks"):
        assert getattr(first, name) is getattr(second, name)
        assert torch.equal(getattr(second, name), getattr(launch.tables, name))
    assert torch.equal(first.rows + 1, second.rows) and torch.equal(second.rows, launch.rows)


def test_rows_that_are_on_the_device_are_used_there(gpu):
    launch = make_launch()
    launch.rows = rows_on(GPU)
    assert DeviceTables().upload(launch).rows is launch.rows
    assert gpu.uploads == 4


def test_steps_in_flight_keep_their_own_tables(gpu):
    """Ten steps are enqueued before the first copy is made, each with other addresses."""
    launch = make_launch()
    tables = DeviceTables()
    steps = []
    for _ in range(10):
        launch.tables.addresses += 1
        launch.rows = launch.rows + 1
        steps.append((launch.tables.addresses.clone(), launch.rows, tables.upload(launch)))
    gpu.synchronize()
    for addresses, rows, uploaded in steps:
        assert torch.equal(uploaded.addresses, addresses) and torch.equal(uploaded.rows, rows)


def test_another_stream_gets_tables_of_its_own(gpu):
    launch = make_launch()
    tables = DeviceTables()
    first = tables.upload(launch)
    gpu.stream = "another"
    second = tables.upload(launch)
    assert not any(a is b for a, b in zip(first, second, strict=True))
    gpu.synchronize()
    assert torch.equal(second.addresses, launch.tables.addresses) and torch.equal(second.chunks, launch.tables.chunks)


def test_a_graph_reads_the_same_however_training_goes_on(gpu):
    """Captured with other addresses than the steps before and after, on another stream, and replayed in between."""
    launch = make_launch()
    launch.rows = rows_on(GPU)
    tables = DeviceTables()
    tables.upload(launch)
    gpu.synchronize()
    launch.tables.addresses += 100
    captured_addresses = launch.tables.addresses.clone()
    gpu.stream, gpu.is_capturing = "capture", True
    captured = tables.upload(launch)
    gpu.is_capturing = False
    assert len(gpu.captured) == 1  # the addresses: the rest was on the device, and stays
    shape = [table.clone() for table in (captured.numels, captured.row_of, captured.chunks)]
    for step in range(3):
        gpu.stream = f"stream {step}"
        launch.tables.addresses += 1
        tables.upload(launch)
        gc.collect()
        gpu.synchronize()
        gpu.replay()
        assert torch.equal(captured.addresses, captured_addresses)
        for table, before in zip((captured.numels, captured.row_of, captured.chunks), shape, strict=True):
            assert torch.equal(table, before)


def test_a_graph_outlives_the_launch_but_not_the_parameters(gpu):
    launch = make_launch()
    launch.rows = rows_on(GPU)
    tables = DeviceTables()
    tables.upload(launch)
    launch.tables.addresses += 1
    gpu.is_capturing = True
    held = weakref.ref(tables.upload(launch).addresses)
    params = launch.params
    del launch, tables
    gc.collect()
    gpu.replay()
    del params
    gc.collect()
    assert held() is None and gpu.captured[0][0]() is None


def test_two_steps_of_one_graph_have_a_buffer_each(gpu, monkeypatch):
    """The second pinned buffer has to be made during the capture, where torch can."""
    launch = make_launch()
    launch.rows = rows_on(GPU)
    tables = DeviceTables()
    tables.upload(launch)
    gpu.synchronize()
    gpu.is_capturing = True
    monkeypatch.setattr(gpu, "pin", torch.empty_like)
    steps = []
    for _ in range(2):
        launch.tables.addresses += 1
        steps.append((launch.tables.addresses.clone(), tables.upload(launch)))
    gpu.replay()
    for addresses, uploaded in steps:
        assert torch.equal(uploaded.addresses, addresses)


def test_a_step_whose_numbers_the_host_computes_is_not_captured(gpu):
    launch = make_launch()
    gpu.is_capturing = True
    with pytest.raises(RuntimeError, match="use capturable=True"):
        DeviceTables().upload(launch)
