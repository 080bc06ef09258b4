"""No address outlives what it was the address of, what is written is known to autograd, and bad tables are refused.

Gradients, state, parameters and their storages are replaced between steps, as trainers do.
"""

import gc
import warnings
import weakref

import pytest
import torch
from twins import REASON, Twins, needs_library, runs

from xgrad_optim import XAdamW
from xgrad_optim import launch as launch_module
from xgrad_optim.backends import addresses, cpu
from xgrad_optim.backends import torch as torch_backend


@pytest.fixture(autouse=True, params=["c++", "python"])
def reader(request, monkeypatch):
    """All holds whoever reads the tensors."""
    if request.param == "python":
        monkeypatch.setattr(addresses, "unavailable", lambda: "not asked for")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            addresses._note("not asked for")  # said once in a process


def _warm() -> Twins:
    twins = Twins(XAdamW, [torch.randn(5000)], lr=0.1)
    twins.step([torch.randn(5000)])
    twins.step([torch.randn(5000)])
    return twins


def _replace_gradient(param, state):
    param.grad = torch.linspace(0, 1, 5000)


def _free_gradient(param, state):
    param.grad = None
    torch.full((5000,), float("nan"))  # takes the freed memory
    param.grad = torch.linspace(0, 1, 5000)


def _swap_gradients_data(param, state):
    param.grad.data = torch.linspace(0, 1, 5000)


def _swap_parameters_data(param, state):
    param.data = param.data.clone()


def _swap_states_data(param, state):
    state["exp_avg"].data = state["exp_avg"].data * 2


def _replace_state(param, state):
    state["exp_avg_sq"] = state["exp_avg_sq"] + 0.5


def _spread_state(param, state):
    state["exp_avg"].data = state["exp_avg"].repeat_interleave(2)[::2]


def _shrink_storage_and_back(param, state):
    values = state["exp_avg"].clone()
    state["exp_avg"].untyped_storage().resize_(0)
    state["exp_avg"].untyped_storage().resize_(5000 * 4)
    state["exp_avg"].copy_(values)


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        _replace_gradient,
        _free_gradient,
        _swap_gradients_data,
        _swap_parameters_data,
        _swap_states_data,
        _replace_state,
        _spread_state,
        _shrink_storage_and_back,
    ],
)
def test_what_is_replaced_between_steps_is_used(change):
    twins = _warm()
    for name, (param,) in twins.params.items():
        param.grad = torch.zeros(5000)
        change(param, twins.optimizers[name].state[param])
    twins.do(lambda optimizer: optimizer.step())
    assert twins.params["cpu"][0].grad.abs().sum() > 0 or "gradient" not in change.__name__
    twins.do(lambda optimizer: optimizer.eval())


@needs_library
def test_zero_grad_and_load_state_dict_between_steps():
    twins = _warm()
    for set_to_none in (True, False):
        twins.do(lambda optimizer, set_to_none=set_to_none: optimizer.zero_grad(set_to_none))
        twins.step([torch.randn(5000)])
        twins.do(lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()))
        twins.step([torch.randn(5000)])


@needs_library
def test_parameter_that_changes_dtype_between_steps():
    twins = _warm()
    for (param,) in twins.params.values():
        param.data = param.data.to(torch.bfloat16)
        param.grad = torch.ones(5000, dtype=torch.bfloat16)
    twins.do(lambda optimizer: optimizer.step())


@needs_library
def test_gradients_are_read_only():
    param = torch.nn.Parameter(torch.randn(1000))
    param.grad = torch.randn(1000)
    before = param.grad.clone()
    XAdamW([param], backend="cpu", maximize=True, weight_decay=0.1).step()
    assert torch.equal(param.grad, before)


@needs_library
@pytest.mark.parametrize("write", ["step", "eval", "train"])
def test_autograd_sees_the_write(write):
    weight = torch.nn.Parameter(torch.randn(4))
    optimizer = XAdamW([weight], backend="cpu", master_weights=True)
    weight.grad = torch.ones(4)
    optimizer.step()
    if write == "train":
        optimizer.eval()
    loss = (weight * weight).sum()
    getattr(optimizer, write)()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_library
def test_a_step_bumps_every_written_tensor_and_no_gradient():
    param = torch.nn.Parameter(torch.randn(4))
    param.grad = torch.ones(4)
    optimizer = XAdamW([param], backend="cpu", amsgrad=True, master_weights=True)
    optimizer.step()
    buffers = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_weights")
    written = [param, *(optimizer.state[param][key] for key in buffers)]
    before, grads_version = [t._version for t in written], param.grad._version
    optimizer.step()
    assert all(t._version > version for t, version in zip(written, before, strict=True))
    assert param.grad._version == grads_version


@needs_library
def test_chosen_by_default_and_on_demand():
    for options in ({}, {"backend": "cpu"}, {"fused": True}):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = XAdamW([param], **options)
        optimizer.step()
        assert isinstance(runs(optimizer)[0].runner, cpu.Runner)


@needs_library
def test_the_operator_refuses_tables_that_lead_outside():
    ops = torch.ops.xgrad_optim
    float32, float64 = torch.float32, torch.float64
    kernel = ops.find_kernel_cpu("sgdm", float32, float32, "")

    def call(row=0, **changes):
        tables = launch_module.Tables([8], [row], chunk_size=4, has_grad=True)
        values = {key: getattr(tables, key) for key in ("table", "grads", "chunks", "tasks")}
        rows, numbers = torch.zeros(1, 9), torch.zeros(1, 3, dtype=float64)
        rows[0, 0] = 1  # is_skipped
        values |= {"rows": rows, "next_numbers": numbers, "chunk_size": 4, "kernel": kernel, **changes}
        ops.multi_tensor_cpu(**values)

    call()
    for message, changes in {
        "no kernel the number": {"kernel": 1 << 20},
        "rows must be": {"rows": torch.zeros(1, 9, dtype=float64)},
        "has 9 columns": {"rows": torch.zeros(1, 8)},
        "and 3 numbers": {"next_numbers": torch.zeros(1, 4, dtype=float64)},
        "has row 3": {"row": 3},
        "outside": {"chunks": torch.tensor([[0, 0], [0, 2]], dtype=torch.int32)},
        "tasks must cover": {"tasks": torch.tensor([0, 5])},
        "chunk_size": {"chunk_size": 0},
        "number of tensors": {"grads": torch.tensor([8, 8])},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**changes)
    for message, asked in {
        "no rule": ("adan", float32, float32, ""),
        "instruction set": ("sgdm", float32, float32, "mmx"),
        "no kernel": ("sgdm", float32, float64, ""),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.find_kernel_cpu(*asked)


@needs_library
def test_fake_tensors_are_accepted():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        table, chunks = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)
        rows, numbers = torch.zeros(1, 9), torch.zeros(1, 3, dtype=torch.float64)
        torch.ops.xgrad_optim.multi_tensor_cpu(table, None, rows, numbers, chunks, torch.tensor([0, 1]), 16, 0)


def test_why_not():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = XAdamW([param], backend="torch")
    optimizer.step()
    (run,) = runs(optimizer)
    launch = run.launch
    assert isinstance(run.runner, torch_backend.Runner) and cpu.why_not(launch) is None
    launch.device = torch.device("meta")
    assert "meta" in cpu.why_not(launch)
    launch.device, launch.state_dtype = torch.device("cpu"), torch.float16
    assert "float16" in cpu.why_not(launch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.unavailable() == REASON


@needs_library
def test_a_bound_tensor_is_freed_with_its_optimizer():
    param = torch.nn.Parameter(torch.ones(1000))
    param.grad = torch.ones(1000)
    optimizer = XAdamW([param], backend="cpu")
    optimizer.step()
    state = weakref.ref(optimizer.state[param]["exp_avg"])
    storage = weakref.ref(optimizer.state[param]["exp_avg"].untyped_storage())
    del optimizer
    gc.collect()
    assert state() is None and storage() is None


@needs_library
@pytest.mark.parametrize("last", ["step", "eval"])
def test_tensors_can_be_exchanged_where_modules_convert_by_exchanging_them(last):
    """torch.utils.swap_tensors wants no reference but its own: nothing may stay bound between steps or swaps then."""
    twins = _warm()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        twins.step([torch.randn(5000)])
        if last == "eval":
            twins.do(lambda optimizer: optimizer.eval())
        for (param,) in twins.params.values():
            param.grad = None
            torch.utils.swap_tensors(param, torch.nn.Parameter(param.detach() + 1))
        for name in twins.params:
            twins.params[name][0].grad = torch.ones(5000)
        twins.do(lambda optimizer: optimizer.step())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@needs_library
@pytest.mark.parametrize("swap_tensors", [False, True])
def test_memory_given_to_a_parameter_is_no_master_weight_of_ours(swap_tensors):
    """Also where every reader is new because modules convert by exchanging tensors."""
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = XAdamW([param], backend="cpu", master_weights=True, lr=0.1, weight_decay=0)
    torch.__future__.set_swap_module_params_on_conversion(swap_tensors)
    try:
        for _ in range(3):
            param.grad = torch.ones_like(param)
            optimizer.step()
        param.data = torch.full_like(param, 5.0)
        param.grad = torch.ones_like(param)
        optimizer.step()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert (param > 4.5).all() and (optimizer.state[param]["master_weights"] > 4.5).all()


@needs_library
def test_views_of_one_tensor_share_a_version_counter():
    """Also with a parameter of another launch: our own writes are nobody else's."""
    whole = torch.zeros(10)
    params = [torch.nn.Parameter(whole[:5]), torch.nn.Parameter(whole[5:])]
    optimizer = XAdamW([{"params": params[:1]}, {"params": params[1:], "amsgrad": True}], backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            for param in params:
                param.grad = torch.ones(5)
            optimizer.step()
            with optimizer.true_weights():
                pass
    assert len(runs(optimizer)) == 2


@needs_library
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_real_parameters_take_no_step_under_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    param = torch.nn.Parameter(torch.ones(3))
    optimizer = XAdamW([param], backend="cpu")
    for _ in range(2):
        param.grad = torch.ones(3)
        optimizer.step()
    before = param.detach().clone()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="these are real"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param]["step"] == 2
    optimizer.step()
    assert optimizer.state[param]["step"] == 3


@needs_library
def test_state_made_in_inference_mode_is_stepped():
    """It has no version counter to move."""
    twins = _warm()
    (param,) = twins.params["cpu"]
    state = twins.optimizers["cpu"].state[param]
    with torch.inference_mode():
        state["exp_avg"] = state["exp_avg"].clone()
    assert state["exp_avg"].is_inference()
    for _ in range(2):
        twins.step([torch.randn(5000)])
