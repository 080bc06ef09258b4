"""No address outlives what it was the address of, what is written is known to autograd, and bad tables are refused.

Gradients, state, parameters and their storages are replaced between steps, as trainers do.
"""

import gc
import warnings
import weakref

import pytest
import torch
from twins import REASON, Twins, needs_library

from xgrad_optim import XAdamW, backend_native, backend_torch, tensor_reader
from xgrad_optim import launch as launch_module


@pytest.fixture(autouse=True, params=["c++", "python"])
def reader(request, monkeypatch):
    """All holds whoever reads the tensors."""
    if request.param == "python":
        monkeypatch.setattr(tensor_reader, "unavailable", lambda: "not asked for")


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
        assert optimizer._cache.launches[0].backend is backend_native


@needs_library
def test_the_operator_refuses_tables_that_lead_outside():
    def call(**changes):
        tables = launch_module.Tables([8], [0], chunk_size=4)
        values = {key: getattr(tables, key) for key in ("addresses", "numels", "row_of", "chunks", "tasks")}
        values |= {"rows": torch.zeros(1, 9), "chunk_size": 4, "trusts_master": False, "rule": "sgdm", "isa": ""}
        values |= {"param_dtype": torch.float32, "state_dtype": torch.float32, **changes}
        torch.ops.xgrad_optim.multi_tensor_cpu(**values)

    call()  # addresses of 0 are passed over
    for message, changes in {
        "no rule": {"rule": "adan"},
        "instruction set": {"isa": "mmx"},
        "no kernel": {"state_dtype": torch.float64},
        "rows must be": {"rows": torch.zeros(1, 9, dtype=torch.float64)},
        "has 9 columns": {"rows": torch.zeros(1, 8)},
        "has row 3": {"row_of": torch.tensor([3], dtype=torch.int32)},
        "outside": {"chunks": torch.tensor([[0, 0], [0, 2]], dtype=torch.int32)},
        "tasks must cover": {"tasks": torch.tensor([0, 5])},
        "chunk_size": {"chunk_size": 0},
        "number of tensors": {"numels": torch.tensor([8, 8])},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(**changes)


@needs_library
def test_fake_tensors_are_accepted():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        numels, table = torch.tensor([2]), torch.zeros(1, 6, dtype=torch.int64)
        chunks, tasks = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([0, 1])
        shape = (table, numels, torch.zeros(1, dtype=torch.int32), torch.zeros(1, 9), chunks, tasks, 16)
        torch.ops.xgrad_optim.multi_tensor_cpu(*shape, False, "sgdm", torch.float32, torch.float32, "")


def test_why_not():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = XAdamW([param], backend="torch")
    optimizer.step()
    launch = optimizer._cache.launches[0]
    assert launch.backend is backend_torch and backend_native.why_not(launch) is None
    launch.device = torch.device("meta")
    assert "meta" in backend_native.why_not(launch)
    launch.device, launch.state_dtype = torch.device("cpu"), torch.float16
    assert "float16" in backend_native.why_not(launch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_native.unavailable() == REASON


@needs_library
def test_master_weights_are_trusted_only_while_nobody_can_have_written_to_the_parameter():
    """A trusted launch does not read the parameter: 28 bytes instead of 30 for each bfloat16 element."""
    param = torch.nn.Parameter(torch.randn(40, dtype=torch.bfloat16))
    optimizer = XAdamW([param], backend="cpu", master_weights=True, lr=0.1)

    def trusts_after(change) -> bool:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            change()
            param.grad = torch.randn_like(param)
            optimizer.step()
        return optimizer._cache.launches[0].trusts_master

    assert not trusts_after(lambda: None), "the first step reads what the parameter holds"
    assert trusts_after(lambda: None)
    for change in (
        lambda: param.clamp_(-0.1, 0.1),
        optimizer.eval,
        lambda: setattr(param, "data", param.data.clone()),
        lambda: optimizer.load_state_dict(optimizer.state_dict()),
    ):
        assert not trusts_after(change)
        assert trusts_after(lambda: None)


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
def test_tensors_can_be_exchanged_where_modules_convert_by_exchanging_them():
    """torch.utils.swap_tensors wants no reference but its own: nothing may stay bound between steps then."""
    twins = _warm()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        twins.step([torch.randn(5000)])
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
    assert len(optimizer._cache.launches) == 2


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
