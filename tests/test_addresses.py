"""What a step reads of its tensors, in C++ and in Python: the same tables, and nothing that has changed passes."""

import ctypes

import pytest
import torch
from twins import launches, needs_library, runs

from xgrad_optim import XAdamW
from xgrad_optim.backends import addresses
from xgrad_optim.backends.addresses import NativeReader, PythonReader
from xgrad_optim.launch import NUMBERS, NUMEL, Launch, Member

WHY_NOT = addresses.unavailable()
needs_tensors = pytest.mark.skipif(WHY_NOT is not None, reason=f"no library for tensors: {WHY_NOT}")


@pytest.fixture(params=[pytest.param("c++", marks=needs_tensors), "python"])
def make_reader(request):
    cls = NativeReader if request.param == "c++" else PythonReader
    return lambda launch, writes_numbers=True: cls(launch, writes_numbers)


def trained(shape=(4, 4), dtype=torch.float32, count=2, **options) -> tuple[Launch, list[torch.nn.Parameter]]:
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(count)]
    optimizer = XAdamW(params, backend="torch", **options)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return launches(optimizer)[0], params


def swap_of(launch: Launch) -> Launch:
    """The same tensors without gradients."""
    states = [dict(zip(launch.state, values, strict=True)) for values in zip(*launch.state.values(), strict=True)]
    options = {"capturable": False}
    members = [Member(*pair, i) for i, pair in enumerate(zip(launch.params, [options] * 9, states, strict=False))]
    return Launch(launch.rule, members, launch.grad_indices, launch.numbers, launch.sources, has_grad=False)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("writes_numbers", [False, True])
def test_it_reads_every_address(make_reader, amsgrad, master_weights, writes_numbers):
    launch, params = trained(dtype=torch.bfloat16, amsgrad=amsgrad, master_weights=master_weights)
    assert make_reader(launch, writes_numbers).read(None)
    slots = [launch.state.get(key) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weights")]
    assert [slot is None for slot in slots] == [False, False, not amsgrad, not master_weights]
    for index, (line, param) in enumerate(zip(launch.tables.table.tolist(), params, strict=True)):
        buffers = [0 if slot is None else slot[index].data_ptr() for slot in slots]
        numbers = launch.numbers[index][0].data_ptr() if writes_numbers else 0
        assert line == [param.data_ptr(), *buffers, 16, 0, numbers]
    assert launch.tables.grads.tolist() == [param.grad.data_ptr() for param in params]


CHANGES = {
    "memory": lambda p: setattr(p, "data", p.data.clone()),
    "strides": lambda p: setattr(p, "data", p.data.t()),
    "size": lambda p: setattr(p, "data", p.data[:3]),
    "dtype": lambda p: setattr(p, "data", p.data.view(torch.float16).flatten()[:16].view(4, 4)),
    "gaps": lambda p: setattr(p, "data", torch.randn(4, 8)[:, ::2]),
    "no memory": lambda p: p.untyped_storage().resize_(0),
    "no gradient": lambda p: setattr(p, "grad", None),
    "gradient's dtype": lambda p: setattr(p.grad, "data", torch.randn(4, 4, dtype=torch.float64)),
    "gradient's size": lambda p: setattr(p.grad, "data", torch.randn(4, 2)),
    "sparse gradient": lambda p: setattr(p, "grad", torch.randn(4, 4).to_sparse()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_notices_what_changed_in_place(make_reader, change):
    """All of it can happen to a parameter that stays the same object, most of it at the same address."""
    launch, params = trained()
    reader = make_reader(launch)
    assert reader.read(None) and reader.read(None)
    CHANGES[change](params[1])
    assert not reader.read(None)


SAME = {
    "other gradient": lambda p: setattr(p, "grad", torch.randn(4, 4)),
    "gradient's memory": lambda p: setattr(p.grad, "data", torch.randn(4, 4)),
}
COPIED = {
    "gradient's strides": lambda p: setattr(p, "grad", torch.randn(4, 4).t()),
    "gaps in a gradient": lambda p: setattr(p, "grad", torch.randn(4, 8)[:, ::2]),
    "expanded gradient": lambda p: setattr(p, "grad", torch.randn(4, 1).expand(4, 4)),
    "negated gradient": lambda p: setattr(p, "grad", torch.randn(4, 4, dtype=torch.complex64).conj().imag),
    "gradient of zeros": lambda p: setattr(p, "grad", torch._efficientzerotensor((4, 4))),
}


@pytest.mark.parametrize("change", [*SAME, *COPIED])
def test_gradients_that_lie_otherwise_than_their_parameters_are_copied(make_reader, change):
    launch, params = trained()
    reader = make_reader(launch)
    assert reader.read(None)
    (SAME | COPIED)[change](params[1])
    grad = params[1].grad
    assert reader.read(None)
    address = launch.tables.grads[1].item()
    assert launch.tables.grads[0] == params[0].grad.data_ptr()
    if change in SAME:
        assert address == grad.data_ptr()
    values = torch.tensor(list((ctypes.c_float * 16).from_address(address))).view(4, 4)
    assert torch.equal(values, grad.resolve_neg() + 0)
    reader.finish()


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_it_notices_state_with_other_memory_or_strides(make_reader, key):
    launch, _ = trained()
    for other in (torch.Tensor.clone, torch.Tensor.t):
        reader = make_reader(launch)
        assert reader.read(None)
        launch.state[key][1].data = other(launch.state[key][1].data)
        assert not reader.read(None)


def test_it_notices_a_number_whose_memory_was_replaced(make_reader):
    """`state["step"].data = ...` leaves no trace but its address; a storage that moves takes all its views along."""
    launch, _ = trained()
    reader = make_reader(launch)
    assert reader.read(None)
    vector, step = launch.numbers[1]
    vector.share_memory_()
    assert reader.read(None) and launch.tables.table[1, NUMBERS] == vector.data_ptr()
    step.data = step.data.clone()
    assert not reader.read(None)


def test_complex_tensors_are_twice_as_many_reals_unless_they_are_lazy(make_reader):
    launch, params = trained(dtype=torch.complex64)
    reader = make_reader(launch)
    assert reader.read(None) and launch.tables.table[:, NUMEL].tolist() == [32, 32]
    params[0].grad = params[0].grad.conj()
    assert reader.read(None) and launch.tables.grads[0] != params[0].grad.data_ptr()
    params[1].data = params[1].data.conj()
    assert not reader.read(None)


def test_dimensions_of_one_element_have_no_stride(make_reader):
    launch, params = trained(shape=(6, 4, 1, 1), count=1)
    params[0].grad = torch.randn(6, 4, 1, 1).as_strided((6, 4, 1, 1), (4, 1, 7, 9))
    assert make_reader(launch).read(None) and launch.tables.grads[0] == params[0].grad.data_ptr()


def test_given_gradients_stand_for_the_parameters_own(make_reader):
    launch, params = trained()
    given = [torch.randn(4, 4), torch.randn(4, 4)]
    params[0].grad = None
    assert make_reader(launch).read(given)
    assert launch.tables.grads.tolist() == [grad.data_ptr() for grad in given]


def test_versions_are_read_and_moved(make_reader):
    launch, params = trained()
    reader = make_reader(launch)
    assert reader.read(None)
    states = [launch.state["exp_avg"], launch.state["exp_avg_sq"]]
    before = [[param._version, sum(slot[i]._version for slot in states)] for i, param in enumerate(params)]
    assert launch.tables.versions.tolist() == before
    reader.finish()
    assert reader.versions().tolist() == [[param + 1, state + 2] for param, state in before]


@pytest.mark.parametrize("keys", [(), ("master_weights",)])
def test_a_swap_has_no_gradients_and_writes_no_buffer_but_master_weights(make_reader, keys):
    launch, params = trained(master_weights=bool(keys))
    launch = swap_of(launch)
    params[0].grad = None
    reader = make_reader(launch)
    assert reader.read(None) and launch.tables.grads.numel() == 0
    before = {key: slot[0]._version for key, slot in launch.state.items()}
    reader.finish()
    moved = {key for key, slot in launch.state.items() if slot[0]._version != before[key]}
    assert moved == set(keys)


def test_a_state_buffer_that_turns_lazy_at_its_address_is_noticed(make_reader):
    launch, _ = trained(dtype=torch.complex64)
    reader = make_reader(launch)
    assert reader.read(None)
    buffer = launch.state["exp_avg"][0]
    buffer.data = buffer.data.conj()
    assert not reader.read(None)


def test_gradients_are_held_while_a_launch_runs_on_them(make_reader):
    """Another thread may take them from their parameters meanwhile."""
    launch, params = trained(count=1)
    params[0].grad = torch.full((4, 4), 3.0)
    reader = make_reader(launch)
    assert reader.read(None)
    params[0].grad = None
    others = [torch.full((4, 4), float("nan")) for _ in range(100)]
    numbers = (ctypes.c_float * 16).from_address(launch.tables.grads[0].item())
    assert list(numbers) == [3.0] * 16
    reader.finish()
    others += [torch.full((4, 4), float("nan")) for _ in range(100)]
    assert list(numbers) != [3.0] * 16, "nobody frees it"


@needs_tensors
def test_copy_on_write_gradients_are_not_copied():
    launch, params = trained(count=1)
    source = torch.randn(4, 4)
    address = source.data_ptr()  # asked later, it would be a copy's
    params[0].grad = torch._lazy_clone(source)
    assert NativeReader(launch, True).read(None)
    assert launch.tables.grads[0] == address
    assert torch._C._is_cow_tensor(params[0].grad)


@needs_tensors
def test_thousands_of_tensors_are_read_by_several_threads_alike():
    """Each thread has tensors of its own; gradients that lie otherwise are copied after all have been read."""
    params = [torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3000)]
    optimizer = XAdamW(params, backend="torch")
    for index, param in enumerate(params):
        param.grad = torch.full((2, 3), float(index)) if index % 7 else torch.full((3, 2), float(index)).t()
    optimizer.step()
    (launch,) = launches(optimizer)
    tables = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            reader = NativeReader(launch, True)
            assert reader.read(None)
        finally:
            torch.set_num_threads(before)
        firsts = [ctypes.c_float.from_address(address).value for address in launch.tables.grads.tolist()]
        assert firsts == list(range(3000))
        tables.append(launch.tables.table.tolist())
    assert PythonReader(launch, True).read(None)
    assert all(table == launch.tables.table.tolist() for table in tables)
    reader = NativeReader(launch, True)
    params[2999].data = params[2999].data.clone()
    assert not reader.read(None)


@needs_tensors
def test_the_library_refuses_tables_that_do_not_fit():
    make = torch.classes.xgrad_optim.LaunchTensors
    param, vector = torch.nn.Parameter(torch.ones(3)), torch.zeros(3, dtype=torch.float64)
    for message, tensors, columns, steps in (
        ("as many tensors for each column", [param, param, param], [0, 2], [vector[0]]),
        ("the parameters first", [param], [2], [vector[0]]),
        ("no column 6", [param, param], [0, 6], [vector[0]]),
        ("a vector and a step count", [param], [0], []),
    ):
        with pytest.raises(RuntimeError, match=message):
            make(tensors, tensors, columns, [vector], steps, True, True)
    with pytest.raises(RuntimeError, match="a wrapper for each tensor"):
        make([param], [], [0], [vector], [vector[0]], True, True)
    tensors = make([param], [param], [0], [vector], [vector[0]], False, True)
    table, versions = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64)
    grads = torch.zeros(0, dtype=torch.int64)
    for message, tables in {
        "table must be": (torch.zeros(1, 5, dtype=torch.int64), grads, versions),
        "grad_addresses must be": (table, torch.zeros(1, dtype=torch.int64), versions),
        "versions must be": (table, grads, torch.zeros(1, dtype=torch.int64)),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            tensors.read(*tables, None)
    with pytest.raises(RuntimeError, match="expected 1 gradients, got 2"):
        tensors.read(table, grads, versions, [param, param])
    assert tensors.read(table, grads, versions, None) and table[0, 0] == param.data_ptr()


@needs_library
def test_steps_that_read_tensors_in_python_say_so_once(monkeypatch):
    monkeypatch.setattr(addresses, "unavailable", lambda: "the compiler is broken")
    addresses._note.cache_clear()
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = XAdamW([param], backend="cpu")
    with pytest.warns(UserWarning, match="reads tensors in Python.*the compiler is broken") as caught:
        optimizer.step()
    optimizer.eval()
    assert len(caught) == 1 and caught[0].filename == __file__


@needs_library
@needs_tensors
def test_plain_tensors_are_read_in_cpp():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = XAdamW([param], backend="cpu")
    optimizer.step()
    assert isinstance(runs(optimizer)[0].runner._reader, NativeReader)
