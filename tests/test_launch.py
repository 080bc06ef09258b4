"""A step is divided into as few launches as devices and dtypes allow, with the right row for every tensor.

A row that is shared by tensors of different step counts, or a launch that outlives what it was built from, updates
with wrong numbers and says nothing. No kernel runs here: launches are looked at, not executed, where possible.
"""

import dataclasses
import weakref

import pytest
import torch
from cases import every_optimizer
from twins import launches, runs

from xgrad_optim import XSGDM, XAdam, XAdamW
from xgrad_optim.layout import blocks, is_dense
from xgrad_optim.rule import OptionalBuffer


def params_of(*shapes, dtype=torch.float32) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def set_gradients(params, skip=()) -> None:
    for index, param in enumerate(params):
        param.grad = None if index in skip else torch.randn(param.shape).to(param.dtype)


def rows_of(run) -> torch.Tensor:
    """The rows of the run before, whose numbers they were made of."""
    return run.runner.rows


def column(run, name: str) -> list[float]:
    return rows_of(run)[:, run.launch.rule.columns.index(name)].tolist()


def test_groups_share_one_launch_and_dtypes_do_not():
    singles, halves = params_of((3, 4), (5,), ()), params_of((2, 2), (6,), dtype=torch.bfloat16)
    optimizer = XAdamW(
        [
            {"params": [singles[0], halves[0]], "lr": 0.1},
            {"params": [singles[1], halves[1]], "lr": 0.2, "weight_decay": 0.0, "maximize": True},
            {"params": [singles[2]], "prediction_steps": 0.0},
        ]
    )
    set_gradients(singles + halves)
    optimizer.step()
    by_dtype = {run.launch.dtype: run for run in runs(optimizer)}
    assert len(runs(optimizer)) == 2 and by_dtype.keys() == {torch.float32, torch.bfloat16}
    single = by_dtype[torch.float32]
    assert single.launch.params == singles and single.launch.sources.row_of == [0, 1, 2]
    assert column(single, "step_size") == pytest.approx([1.0, 2.0, 0.01])
    assert column(single, "shift") == pytest.approx([1.0, 2.0, 0.0])
    assert column(single, "decay_factor") == pytest.approx([0.999, 1.0, 0.99999])
    assert column(single, "grad_factor") == [1.0, -1.0, 1.0]
    assert column(single, "shift_prev") == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("n_states, optional", [(4, None), (3, OptionalBuffer("amsgrad", "d"))], ids=["4", "3 and one"])
def test_kernels_refuse_a_rule_with_more_states_than_a_line_has_room_for(n_states, optional):
    (param,) = params_of((3,))
    optimizer = XAdam([param])
    set_gradients([param])
    optimizer.step()
    (launch,) = launches(optimizer)
    assert launch.why_no_kernel(("cpu",)) is None
    launch.rule = dataclasses.replace(launch.rule, state_keys=tuple("abcd"[:n_states]), optional=optional)
    assert f"has {n_states} states, it has room for {n_states - 1}" in launch.why_no_kernel(("cpu",))


def test_skipped_gradients_still_make_one_launch_and_get_rows_of_their_own():
    params = params_of((3,), (4,), (5,), (6,))
    optimizer = XAdam(params, lr=0.01, betas=(0.5, 0.9))
    set_gradients(params)
    optimizer.step()
    set_gradients(params, skip=(1, 2))
    optimizer.step()
    assert [launch.params for launch in launches(optimizer)] == [[params[0], params[3]]]
    set_gradients(params)
    optimizer.step()
    (run,) = runs(optimizer)
    assert run.launch.sources.row_of == [0, 1, 1, 0]
    # lr / (1 - beta1^t) with t = 3 and t = 2; undone is what the second and the first step predicted
    assert column(run, "step_size") == pytest.approx([0.01 / 0.875, 0.01 / 0.75])
    assert column(run, "shift_prev") == pytest.approx([0.01 / 0.75, 0.01 / 0.5])
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 2, 2, 3]


@every_optimizer
def test_a_steady_step_rebuilds_nothing(case):
    params = params_of((3, 4), (5,), ())
    optimizer = case.make(params)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for step in range(6):
        set_gradients(params)
        optimizer.step()
        scheduler.step()
        if step % 2:
            optimizer.eval()
            optimizer.train()
    assert optimizer._planner.builds == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer, params: optimizer.add_param_group({"params": params_of((2,))}),
        lambda optimizer, params: optimizer.load_state_dict(optimizer.state_dict()),
        lambda optimizer, params: optimizer.state[params[0]].update(exp_avg=torch.ones(3)),
        lambda optimizer, params: optimizer.state[params[0]]["step"].fill_(7),
        lambda optimizer, params: optimizer.param_groups[0].update(amsgrad=True),
        lambda optimizer, params: optimizer.param_groups[0].update(foreach=True),
        lambda optimizer, params: setattr(params[0], "grad", None),
    ],
    ids=["add_param_group", "load_state_dict", "replaced state", "edited step", "amsgrad", "foreach", "no gradient"],
)
def test_what_a_launch_was_built_from_is_noticed_when_it_changes(change):
    params = params_of((3,), (4,))
    optimizer = XAdam(params)
    for _ in range(2):
        set_gradients(params)
        optimizer.step()
    change(optimizer, params)
    for group in optimizer.param_groups[1:]:
        set_gradients(group["params"])
    optimizer.step()
    assert optimizer._planner.builds == 2


def test_rows_are_rounded_once_from_float64():
    """1 - beta formed in float32 would be off by 1.3e-5."""
    params = params_of((3,))
    optimizer = XAdam(params, lr=0.1, betas=(0.9, 0.9999))
    set_gradients(params)
    optimizer.step()
    (run,) = runs(optimizer)
    assert rows_of(run).dtype == torch.float32
    assert column(run, "one_minus_beta2") == torch.tensor([1 - 0.9999]).tolist()
    assert column(run, "rsqrt_bias_correction2") == torch.tensor([(1 - 0.9999) ** -0.5]).tolist()


def test_the_numbers_of_a_model_are_one_buffer():
    params = params_of(*[(2,)] * 20)
    optimizer = XSGDM(params)
    set_gradients(params)
    optimizer.step()
    storages = {optimizer.state[param][key].untyped_storage().data_ptr() for param in params for key in ("step",)}
    assert len(storages) == 1
    assert all(optimizer.state[param]["step"].shape == () for param in params)


def test_cached_launches_keep_no_gradient_alive():
    params = params_of((3,))
    optimizer = XAdam(params)
    set_gradients(params)
    gradient = weakref.ref(params[0].grad)
    optimizer.step()
    optimizer.zero_grad()
    assert gradient() is None


@pytest.mark.parametrize(
    "tensor, dense",
    [
        (torch.zeros(3, 4), True),
        (torch.zeros(4, 3).t(), True),
        (torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(()), True),
        (torch.zeros(5, 1).expand(5, 3), False),
        (torch.zeros(4, 6)[:, ::2], False),
        (torch.zeros(4, 6)[:, :3], False),
        (torch.zeros(9)[::3], False),
        (torch.zeros(1, 9)[:, :4], True),
    ],
)
def test_is_dense(tensor, dense):
    assert is_dense(tensor) == dense


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (5, 1, 7)])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_blocks_cover_every_element_once_whatever_the_strides(shape, size):
    flat = torch.zeros(shape)
    strided = torch.zeros((*shape, 2))[..., 0]
    transposed = torch.zeros(shape[::-1]).permute(*reversed(range(len(shape)))) if shape else torch.zeros(shape)
    for tensors in ({"a": flat, "b": flat.clone()}, {"a": flat, "b": strided}, {"a": transposed, "b": strided}):
        for tensor in tensors.values():
            tensor.zero_()
        for block in blocks(tensors, size):
            assert 0 < block["a"].numel() <= size and block["a"].shape == block["b"].shape
            for part in block.values():
                part.add_(1)
        assert all((tensor == 1).all() for tensor in tensors.values())


@every_optimizer
def test_a_tensor_that_is_replaced_by_its_equal_is_noticed(case):
    """Launches are compared by identity: an equal tensor is other memory."""
    (param,) = params_of(())
    optimizer = case.make([param])
    for key in optimizer.rule.state_keys + optimizer.rule.number_keys:
        for _ in range(2):
            set_gradients([param])
            optimizer.step()
        builds, step = optimizer._planner.builds, optimizer.state[param]["step"].item()
        optimizer.state[param][key] = optimizer.state[param][key].clone()
        set_gradients([param])
        optimizer.step()
        assert optimizer._planner.builds == builds + 1, key
        assert optimizer.state[param]["step"].item() == step + 1
