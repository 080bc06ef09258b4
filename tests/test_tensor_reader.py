"""What a step reads of its tensors, in C++ and in Python: the same tables, and nothing that has changed passes."""

import ctypes

import pytest
import torch
from twins import needs_library

from xgrad_optim import XAdamW, tensor_reader
from xgrad_optim.launch import Launch
from xgrad_optim.tensor_reader import NativeReader, PythonReader

WHY_NOT = tensor_reader.unavailable()
needs_tensors = pytest.mark.skipif(WHY_NOT is not None, reason=f"no library for tensors: {WHY_NOT}")


@pytest.fixture(params=[pytest.param("c++", marks=needs_tensors), "python"])
def make_reader(request):
    return NativeReader if request.param == "c++" else lambda launch: PythonReader()


def trained(shape=(4, 4), dtype=torch.float32, count=2, **options) -> tuple[Launch, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(count)]
    optimizer = XAdamW(params, backend="torch", **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return optimizer._cache.launches[0], params


def read(launch: Launch, make_reader) -> int:
    assert make_reader(launch).read(launch)
    return launch.tables.n_refused


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("master_weights", [False, True])
def test_it_reads_every_address(make_reader, amsgrad, master_weights):
    launch, params = trained(dtype=torch.bfloat16, amsgrad=amsgrad, master_weights=master_weights)
    assert read(launch, make_reader) == 0
    slots = [launch.state.get(key) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weights")]
    assert [slot is None for slot in slots] == [False, False, not amsgrad, not master_weights]
    expected = [
        [param.data_ptr(), param.grad.data_ptr(), *(0 if slot is None else slot[index].data_ptr() for slot in slots)]
        for index, param in enumerate(params)
    ]
    assert launch.tables.addresses.tolist() == expected


CHANGES = {
    "memory": (lambda p: setattr(p, "data", p.data.clone()), 0),
    "strides": (lambda p: setattr(p, "data", p.data.t()), 1),
    "size": (lambda p: setattr(p, "data", p.data[:3]), 1),
    "dtype": (lambda p: setattr(p, "data", p.data.view(torch.float16).flatten()[:16].view(4, 4)), 1),
    "gaps": (lambda p: setattr(p, "data", torch.randn(4, 8)[:, ::2]), 1),
    "no memory": (lambda p: p.untyped_storage().resize_(0), 1),
    "other gradient": (lambda p: setattr(p, "grad", torch.randn(4, 4)), 0),
    "gradient's memory": (lambda p: setattr(p.grad, "data", torch.randn(4, 4)), 0),
    "gradient's strides": (lambda p: setattr(p, "grad", torch.randn(4, 4).t()), 1),
    "negated gradient": (lambda p: setattr(p, "grad", torch.randn(4, 4, dtype=torch.complex64).conj().imag), 1),
    "gradient of zeros": (lambda p: setattr(p, "grad", torch._efficientzerotensor((4, 4))), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_notices_what_changed_in_place(make_reader, change):
    """All of it can happen to a parameter that stays the same object, most of it at the same address."""
    launch, params = trained()
    reader = make_reader(launch)
    assert reader.read(launch) and reader.read(launch) and launch.tables.n_refused == 0
    act, n_refused = CHANGES[change]
    act(params[1])
    launch.prepare()
    assert reader.read(launch) == ("gradient" in change)
    assert read(launch, make_reader) == n_refused
    lines = launch.tables.addresses.tolist()
    assert lines[0][:2] == [params[0].data_ptr(), params[0].grad.data_ptr()]
    assert lines[1][:2] == ([0, 0] if n_refused else [params[1].data_ptr(), params[1].grad.data_ptr()])


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_it_notices_state_with_other_memory_or_strides(make_reader, key):
    launch, _ = trained()
    for other in (torch.Tensor.clone, torch.Tensor.t):
        reader = make_reader(launch)
        assert reader.read(launch)
        launch.state[key][1].data = other(launch.state[key][1].data)
        assert not reader.read(launch)
    assert read(launch, make_reader) == 1


def test_a_gradient_that_is_gone_asks_for_another_launch(make_reader, monkeypatch):
    monkeypatch.setattr(tensor_reader, "make_reader", make_reader)
    launch, params = trained()
    launch.backend = tensor_reader  # only its prepare() is asked for
    assert launch.prepare()
    params[1].grad = None
    assert not launch.prepare()


def test_complex_tensors_are_twice_as_many_reals_unless_they_are_lazy(make_reader):
    launch, params = trained(dtype=torch.complex64)
    assert read(launch, make_reader) == 0 and launch.tables.numels.tolist() == [32, 32]
    params[0].grad = params[0].grad.conj()
    assert launch.prepare() and read(launch, make_reader) == 1
    params[1].data = params[1].data.conj()
    assert read(launch, make_reader) == 2


def test_dimensions_of_one_element_have_no_stride(make_reader):
    launch, params = trained(shape=(6, 4, 1, 1), count=1)
    params[0].grad = torch.randn(6, 4, 1, 1).as_strided((6, 4, 1, 1), (4, 1, 7, 9))
    assert launch.prepare() and read(launch, make_reader) == 0


def test_permuted_and_empty_parameters_are_flat_and_those_with_gaps_are_not(make_reader):
    for shape, strides, n_refused in (
        ((6, 4), (1, 6), 0),
        ((2, 3, 4), (4, 8, 1), 0),
        ((0, 4), (4, 1), 0),
        ((), (), 0),
        ((6, 4), (1, 7), 1),
        ((6, 4), (0, 1), 1),
    ):
        param = torch.nn.Parameter(torch.zeros(100).as_strided(shape, strides))
        param.grad = torch.zeros(100).as_strided(shape, strides)
        state = {key: [torch.zeros(100).as_strided(shape, strides)] for key in ("exp_avg", "exp_avg_sq")}
        launch, _ = trained(shape=shape, count=1)
        launch.params, launch.state = [param], state
        launch.prepare()
        assert read(launch, make_reader) == n_refused, (shape, strides)


def test_versions_are_read_and_moved(make_reader):
    launch, params = trained()
    reader = make_reader(launch)
    assert reader.read(launch)
    written = [*params, *launch.state["exp_avg"], *launch.state["exp_avg_sq"]]
    before = [tensor._version for tensor in written]
    assert reader.versions(launch).tolist() == before[:2]
    reader.finish(launch)
    assert [tensor._version for tensor in written] == [version + 1 for version in before]


@pytest.mark.parametrize("keys", [(), ("master_weights",)])
def test_a_swap_has_no_gradients_and_writes_no_buffer_but_master_weights(make_reader, keys):
    launch, params = trained(master_weights=bool(keys))
    launch.has_grad = False
    params[0].grad = None
    launch.prepare()
    reader = make_reader(launch)
    assert reader.read(launch) and launch.tables.addresses[:, 1].tolist() == [0, 0]
    before = {key: slot[0]._version for key, slot in launch.state.items()}
    reader.finish(launch)
    moved = {key for key, slot in launch.state.items() if slot[0]._version != before[key]}
    assert moved == set(keys)


def test_a_state_buffer_that_turns_lazy_at_its_address_is_noticed(make_reader):
    launch, _ = trained(dtype=torch.complex64)
    reader = make_reader(launch)
    assert reader.read(launch)
    buffer = launch.state["exp_avg"][0]
    buffer.data = buffer.data.conj()
    assert not reader.read(launch)


@needs_tensors
def test_gradients_are_held_while_a_launch_runs_on_them():
    """Another thread may take them from their parameters meanwhile."""
    launch, params = trained(count=1)
    params[0].grad = torch.full((4, 4), 3.0)
    reader = NativeReader(launch)
    assert reader.read(launch)
    params[0].grad = None
    others = [torch.full((4, 4), float("nan")) for _ in range(100)]
    numbers = (ctypes.c_float * 16).from_address(launch.tables.addresses[0, 1].item())
    assert list(numbers) == [3.0] * 16
    reader.finish(launch)
    others += [torch.full((4, 4), float("nan")) for _ in range(100)]
    assert list(numbers) != [3.0] * 16, "nobody frees it"


@needs_tensors
def test_copy_on_write_gradients_are_not_copied():
    launch, params = trained(count=1)
    source = torch.randn(4, 4)
    address = source.data_ptr()  # asked later, it would be a copy's
    params[0].grad = torch._lazy_clone(source)
    assert read(launch, NativeReader) == 0
    assert launch.tables.addresses[0, 1] == address
    assert torch._C._is_cow_tensor(params[0].grad)


@needs_tensors
def test_thousands_of_tensors_are_read_by_several_threads_alike():
    """Each thread has tensors of its own; the refused ones are counted over all."""
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3000)]
    optimizer = XAdamW(params, backend="torch")
    for index, param in enumerate(params):
        param.grad = torch.ones(2, 3) if index % 7 else torch.ones(3, 2).t()
    optimizer.step()
    (launch,) = optimizer._cache.launches
    tables = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            assert read(launch, NativeReader) == len(range(0, 3000, 7))
        finally:
            torch.set_num_threads(before)
        tables.append(launch.tables.addresses.tolist())
    assert read(launch, lambda launch: PythonReader()) == len(range(0, 3000, 7))
    assert all(table == launch.tables.addresses.tolist() for table in tables)
    reader = NativeReader(launch)
    params[2999].data = params[2999].data.clone()
    assert not reader.read(launch)


@needs_tensors
def test_the_library_refuses_tables_that_do_not_fit():
    make, numels = torch.classes.xgrad_optim.LaunchTensors, torch.tensor([3])
    param = torch.nn.Parameter(torch.ones(3))
    for message, tensors, slots, sizes in (
        ("got 2", [param, param], [0], numels),
        ("got 1", [param], [0, 2], numels),
        ("got 1", [param], [2], numels),
        ("no slot 6", [param, param], [0, 6], numels),
        ("numels must be", [param], [0], torch.tensor([3.0])),
    ):
        with pytest.raises(RuntimeError, match=message):
            make(tensors, slots, torch.float32, torch.float32, sizes, True)
    tensors = make([param], [0], torch.float32, torch.float32, numels, False)
    addresses, versions = torch.zeros(1, 6, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    for message, tables in {
        "addresses must be": (torch.zeros(1, 5, dtype=torch.int64), versions),
        "versions must be": (addresses, torch.zeros(2, dtype=torch.int64)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            tensors.read(*tables)
    assert tensors.read(addresses, versions) == 0 and addresses[0, 0] == param.data_ptr()


@needs_library
@needs_tensors
def test_plain_tensors_are_read_in_cpp():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = XAdamW([param], backend="cpu")
    optimizer.step()
    assert isinstance(optimizer._cache.launches[0].reader, NativeReader)
