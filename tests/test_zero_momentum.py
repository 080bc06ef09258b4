"""Where the momentum is zero, the prediction displaces nothing, whatever 0 / 0 its quotient is.

Rows that join a parameter in mid-training (densified Gaussians, a grown embedding) come with zeros for their state.
What can break: AdaM3's direction, the directions that eps = 0 leaves without a divisor, the sign of the zero, and a
guard that also swallows NaN. An update of zero by zero is what torch.optim makes of it: NaN for Adam, 0 for AdaM3.
"""

import copy
import functools
import math

import cuda_kernels
import pytest
import torch
from cases import every_optimizer
from family import FAMILY, MEMBERS, RULES, taking
from random_launch import RandomLaunch, Variant, random_launch
from twins import needs_library, same_bits

from xgrad_optim.backends import cpu

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOMENTA = (0.0, -0.0, math.nan, math.inf, -math.inf, 1.0)
SECOND_MOMENTS = (0.0, -0.0, math.nan, math.inf, 1.0)
either_way = pytest.mark.parametrize("has_grad", [False, True], ids=["swap", "step"])
every_rule = pytest.mark.parametrize("rule", RULES)


def launch_with_zeros(rule, dtype, has_grad, has_optional=False, has_master=False) -> RandomLaunch:
    """Every pair of special numbers as momentum and second moment, twice: the second time with a parameter of -0.0,
    which shows the sign of a displacement, and without a gradient. Rows have an eps and have none."""
    has_optional = has_optional and RULES[rule].optional is not None
    state_dtype = torch.float32 if has_master and dtype.itemsize == 2 else dtype
    launch = random_launch(Variant(rule, dtype, state_dtype, has_grad, has_optional, has_master), (77,) * 7, 64)
    momenta, second_moments = torch.tensor([(m, v) for m in MOMENTA for v in SECOND_MOMENTS]).repeat(2, 1).T
    first, second = slice(len(momenta)), slice(len(momenta) // 2, len(momenta))
    for key in launch.state.keys() - {"master_weights"}:
        for tensor in launch.state[key]:
            # One further in amsgrad's maximum: beside NaN is a number, in either of them.
            tensor[first] = second_moments.roll(int("max" in key)) if "sq" in key else momenta
    for tensor in (*launch.params, *launch.state.get("master_weights", ())):
        tensor[second] = -0.0
    for grad in launch.grads:
        grad[second] = 0.0
    columns = [index for index, name in enumerate(launch.rule.columns) if name in ("eps", "eps_prev")]
    launch.rows[::2, columns] = 0.0
    return launch


def on_torch(launch: RandomLaunch) -> RandomLaunch:
    launch = launch.copied()
    launch.run_on_torch()
    return launch


def assert_agrees(run, launch: RandomLaunch) -> None:
    expected = on_torch(launch)
    run(launch)
    pairs = zip(launch.tensors().items(), expected.tensors().values(), strict=True)
    assert not [name for (name, ours), theirs in pairs if not same_bits(ours, theirs)]


@needs_library
@every_rule
@either_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_optional, has_master", [(False, False), (True, False), (False, True), (True, True)])
def test_the_cpu_agrees_on_zeros_and_on_what_is_none(rule, dtype, has_grad, has_optional, has_master):
    assert_agrees(RandomLaunch.run_on_cpu, launch_with_zeros(rule, dtype, has_grad, has_optional, has_master))


@every_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_optional", [False, True], ids=["", "optional buffer"])
def test_a_swap_leaves_what_has_no_momentum_and_spreads_nan(rule, dtype, has_optional):
    launch = launch_with_zeros(rule, dtype, False, has_optional)
    after = on_torch(launch)
    for index, momentum in enumerate(launch.state[launch.rule.state_keys[0]]):
        shift = launch.rows[launch.row_of[index], [launch.rule.columns.index(name) for name in ("shift", "shift_prev")]]
        is_skipped = launch.rows[launch.row_of[index], 0] != 0
        assert torch.equal(after.params[index][momentum == 0], launch.params[index][momentum == 0])
        assert is_skipped or not shift.any() or after.params[index][momentum.isnan()].isnan().all()


@either_way
@every_rule
def test_triton_agrees(rule, has_grad):
    kernels = pytest.importorskip("triton_kernels", reason="the Triton back end needs the package triton")
    for dtype in DTYPES:
        for has_master in (False, True):
            run = functools.partial(kernels.run_simulated, architecture="sm_90")
            assert_agrees(run, launch_with_zeros(rule, dtype, has_grad, True, has_master))


@cuda_kernels.needs_nvcc
@either_way
@every_rule
def test_cuda_agrees(rule, has_grad):
    for dtype in DTYPES:
        for has_master in (False, True):
            run = functools.partial(cuda_kernels.run_simulated, architecture="sm_90")
            assert_agrees(run, launch_with_zeros(rule, dtype, has_grad, True, has_master))


# -- whole optimizers ------------------------------------------------------------------------------------------------


def grown(case, at_theta: bool, dtype=torch.float32, **options) -> torch.Tensor:
    """theta after training, in the middle of which two rows of zero state have joined."""
    torch.manual_seed(0)
    optimizer = case.make([torch.nn.Parameter(torch.randn(6, 3).to(dtype))], lr=0.05, **options)
    for step in range(6):
        param = optimizer.param_groups[0]["params"][0]
        param.grad = torch.randn(param.shape).to(dtype)
        optimizer.step()
        if step == 3:
            optimizer.train(not at_theta)
            state = optimizer.state.pop(param)
            new = torch.nn.Parameter(torch.cat([param.detach(), torch.ones(2, 3, dtype=dtype)]))
            for key, value in state.items():
                if value.shape == param.shape:
                    state[key] = torch.cat([value, torch.ones(2, 3) if key == "master_weights" else torch.zeros(2, 3)])
                    state[key] = state[key].to(value.dtype)
            optimizer.param_groups[0]["params"][0] = new
            optimizer.state[new] = state
            # Neither undoing the prediction nor making it moves a row without momentum.
            for mode in (at_theta, not at_theta):
                optimizer.train(mode)
                assert torch.equal(new[6:], torch.ones(2, 3, dtype=dtype))
    optimizer.eval()
    return optimizer.param_groups[0]["params"][0].detach()


@every_optimizer
@pytest.mark.parametrize("at_theta", [False, True], ids=["theta_hat", "theta"])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 0.0},
        {"amsgrad": True, "eps": 0.0},
        {"prediction_steps": 2.5},
        {"master_weights": True, "eps": 0.0},
        {"dtype": torch.bfloat16, "eps": 0.0},
        {"dtype": torch.bfloat16, "master_weights": True},
        {"dtype": torch.float64, "eps": 0.0, "prediction_steps": 0.0},
    ],
    ids=str,
)
def test_rows_that_join_with_zero_state_stay_finite(case, at_theta, backend, options):
    forbidden = case.optimizer.rule.positive_options
    options = {
        name: value
        for name, value in options.items()
        if name == "dtype" or (case.takes(name) and not (name in forbidden and value == 0))
    }
    if backend == "cpu" and cpu.unavailable() is not None:
        pytest.skip("no native library")
    theta = grown(case, at_theta, backend=backend, **options)
    assert theta.isfinite().all()


@pytest.mark.parametrize("cls, base", [(cls, MEMBERS[cls].base) for cls in taking("eps") if MEMBERS[cls].base])
def test_an_update_by_zero_over_zero_is_what_torch_optim_makes_of_it(cls, base):
    ours, theirs = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizers = cls([ours], eps=0.0), base([theirs], eps=0.0)
    for grad in (torch.tensor([0.0, -0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 0.0, -1.0])):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        optimizers[0].eval()
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        optimizers[0].train()


@pytest.mark.parametrize("cls", [member.cls for member in FAMILY if "eps" in member.rule.stored_options])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_elements_without_a_gradient_never_move(cls, dtype):
    param = torch.nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = cls([param], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        param.grad = torch.tensor([0.0, -0.0, 1.0, 0.0, 1.0], dtype=dtype)
        optimizer.step()
        assert torch.equal(param.detach()[[0, 1, 3]], torch.ones(3, dtype=dtype))
    before = copy.deepcopy(param)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(param, before)
