"""Going from theta_hat to theta and back changes no bit of training, however often and wherever.

The swap recomputes what it added, so any operation that is rounded differently the second time, a coefficient taken
from today's learning rate, or a state that is not the stored one, moves weights a little with every evaluation.
"""

import copy
import io

import hypothesis.strategies as st
import pytest
import torch
from cases import Case, every_optimizer, small_model, train_step
from hypothesis import given, settings
from training import assert_all_same_bits

from xgrad_optim import XAdamW, plan

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
with_and_without_master = pytest.mark.parametrize("master_weights", [False, True], ids=["", "master"])


def random_values(shape, dtype, seed: int, scale: float) -> torch.Tensor:
    """Normal numbers of widely different sizes, with some zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values *= scale * 10.0 ** torch.randint(-3, 3, shape, generator=generator)
    values[torch.rand(shape, generator=generator) < 0.05] = 0.0
    return values.to(dtype)


programs = st.lists(st.sampled_from(["step", "eval", "train", "skip", "lr"]), min_size=4, max_size=24)


def run_program(case: Case, dtype, program, swapping: bool, master_weights: bool, scale: float, seed: int):
    """Run the steps of a program; the swaps in it only where asked, with lr and betas changing between steps."""
    shapes = [(3, 5), (7,), ()]
    params = [torch.nn.Parameter(random_values(shape, dtype, seed + index, 1.0)) for index, shape in enumerate(shapes)]
    optimizer = case.make(params, lr=0.01, master_weights=master_weights)
    for position, command in enumerate(program):
        if command in ("step", "skip"):
            optimizer.train()
            for index, param in enumerate(params):
                missing = command == "skip" and index == 1
                param.grad = None if missing else random_values(param.shape, dtype, 31 * position + index, scale)
            optimizer.step()
        elif command == "lr":
            optimizer.param_groups[0]["lr"] *= 0.7
            optimizer.param_groups[0]["prediction_steps"] += 0.25
        elif swapping:
            (optimizer.eval if command == "eval" else optimizer.train)()
    optimizer.train()
    return params, optimizer


@every_optimizer
@every_dtype
@with_and_without_master
@settings(max_examples=12, deadline=None, derandomize=True)
@given(program=programs, scale=st.sampled_from([1e-3, 1.0, 30.0]), seed=st.integers(0, 2**31))
def test_swaps_change_no_bit_of_training(case, dtype, master_weights, program, scale, seed):
    swapped, swapping = run_program(case, dtype, program, True, master_weights, scale, seed)
    plain, not_swapping = run_program(case, dtype, program, False, master_weights, scale, seed)
    assert_all_same_bits(swapped, plain)
    for ours, theirs in zip(swapped, plain, strict=True):
        for key, value in not_swapping.state[theirs].items():
            assert_all_same_bits([swapping.state[ours][key]], [value])


@every_optimizer
@every_dtype
@with_and_without_master
def test_a_hundred_round_trips_hold_the_same_two_weights(case, dtype, master_weights):
    param = torch.nn.Parameter(random_values((2000,), dtype, 5, 1.0))
    optimizer = case.make([param], lr=0.03, master_weights=master_weights)
    for step in range(3):
        param.grad = random_values((2000,), dtype, 50 + step, 1.0)
        optimizer.step()
    theta_hat = param.detach().clone()
    optimizer.eval()
    theta = param.detach().clone()
    assert not torch.equal(theta, theta_hat)
    for _ in range(100):
        optimizer.train()
        assert_all_same_bits([param], [theta_hat])
        optimizer.eval()
        assert_all_same_bits([param], [theta])


@every_optimizer
@with_and_without_master
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_saved_run_goes_on_bit_for_bit(case, dtype, master_weights, mode):
    model = small_model(dtype)
    optimizer = case.make(model.parameters(), master_weights=master_weights)
    for step in range(5):
        train_step(model, optimizer, step)
    getattr(optimizer, mode)()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_model(dtype, seed=99)
    resumed_optimizer = case.make(resumed.parameters(), lr=0.5)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert resumed_optimizer.predicted == (mode == "train")
    for the_model, the_optimizer in ((model, optimizer), (resumed, resumed_optimizer)):
        the_optimizer.train()
        for step in range(5, 10):
            train_step(the_model, the_optimizer, step)
    assert_all_same_bits(model.parameters(), resumed.parameters())


def test_modes_are_idempotent_and_write_only_when_they_change_something():
    model = small_model(torch.float32)
    optimizer = XAdamW(model.parameters())
    train_step(model, optimizer, 0)
    versions = [param._version for param in model.parameters()]
    optimizer.train()
    optimizer.train()
    assert optimizer.predicted and versions == [param._version for param in model.parameters()]
    optimizer.eval()
    versions = [param._version for param in model.parameters()]
    optimizer.eval()
    optimizer.train(False)
    assert not optimizer.predicted and versions == [param._version for param in model.parameters()]


@every_optimizer
def test_true_weights_restores_the_mode_that_it_found(case):
    model = small_model()
    optimizer = case.make(model.parameters())
    train_step(model, optimizer, 0)
    for mode in (True, False):
        optimizer.train(mode)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(KeyError), optimizer.true_weights():
            assert not optimizer.predicted
            raise KeyError
        assert optimizer.predicted == mode
        assert_all_same_bits(model.state_dict().values(), before.values())


def _count_builds(monkeypatch) -> list[int]:
    builds = []
    build = plan.Planner._launch
    monkeypatch.setattr(plan.Planner, "_launch", lambda *what, **how: builds.append(1) or build(*what, **how))
    return builds


@every_optimizer
def test_swaps_of_steady_training_build_no_launches_after_the_first(case, monkeypatch):
    model = small_model()
    optimizer = case.make(model.parameters(), lr=0.01)
    train_step(model, optimizer, 0)
    with optimizer.true_weights():
        pass
    builds = _count_builds(monkeypatch)
    for step in range(1, 4):
        train_step(model, optimizer, step)
        optimizer.param_groups[0]["lr"] *= 0.9
        with optimizer.true_weights():
            pass
    assert not builds


def _other_memory(optimizer, params):
    params[1].data = params[1].data.clone()


def _states_other_memory(optimizer, params):
    buffer = optimizer.state[params[0]][optimizer.rule.state_keys[0]]
    buffer.data = buffer.data.clone()


def _other_state(optimizer, params):
    key = optimizer.rule.state_keys[0]
    optimizer.state[params[0]][key] = optimizer.state[params[0]][key] * 1.5


def _other_number(optimizer, params):
    optimizer.state[params[0]]["prediction_shift"] = optimizer.state[params[0]]["prediction_shift"] * 0.5


def _a_parameter_skips_a_step(optimizer, params):
    params[0].grad = None
    optimizer.step()


def _another_group_steps(optimizer, params):
    params.append(torch.nn.Parameter(torch.linspace(-1, 1, 6)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.5})
    for param in params:
        param.grad = torch.linspace(-1, 2, param.numel()).view(param.shape)
    optimizer.step()


def _loaded(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _the_torch_back_end(optimizer, params):
    optimizer.param_groups[0]["backend"] = "torch"


@every_optimizer
@pytest.mark.parametrize("master_weights", [False, True], ids=["", "master"])
@pytest.mark.parametrize(
    "change",
    [
        _other_memory,
        _states_other_memory,
        _other_state,
        _other_number,
        _a_parameter_skips_a_step,
        _another_group_steps,
        _loaded,
        _the_torch_back_end,
    ],
)
def test_a_swap_sees_what_has_changed_since_the_last_one(case, master_weights, change):
    """As an optimizer does that remembers no swap."""
    results = []
    for remembers in (True, False):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 7)]
        optimizer = case.make(params, lr=0.01, master_weights=master_weights)
        seen = []
        for turn in range(6):
            for index, param in enumerate(params):
                param.grad = torch.linspace(-2, 1, param.numel()) * (1 + index + turn)
            optimizer.step()
            for position, move in enumerate((optimizer.eval, optimizer.train, optimizer.eval, optimizer.train)):
                if (turn, position) == (3, 1):
                    change(optimizer, params)
                if not remembers:
                    optimizer._planner.clear()
                move()
                seen.extend(param.detach().clone() for param in params)
        results.append(seen)
    assert len(results[0]) >= 48
    assert_all_same_bits(*results)


@every_optimizer
def test_what_is_loaded_in_inference_mode_trains_on(case):
    """What is made there nobody may update; loaded state is no such thing."""
    models = [small_model(), small_model()]
    optimizers = [case.make(model.parameters(), lr=0.01) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train_step(model, optimizer, 0)
    with torch.inference_mode():
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    for step in (1, 2):
        for model, optimizer in zip(models, optimizers, strict=True):
            train_step(model, optimizer, step)
    for pair in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(*pair)


@every_optimizer
@with_and_without_master
@pytest.mark.parametrize("backend", ["torch", None])
def test_where_nothing_is_predicted_a_swap_writes_nothing(case, master_weights, backend):
    """Not even a version counter, beside a parameter that moves; before a prediction is made and once it is undone."""
    still, moving = params = [torch.nn.Parameter(random_values((40,), torch.float32, index, 1.0)) for index in range(2)]
    groups = [{"params": [still], "prediction_steps": 0}, {"params": [moving], "prediction_steps": 2}]
    optimizer = case.make(groups, lr=0.1, master_weights=master_weights, backend=backend)

    def step():
        for index, param in enumerate(params):
            param.grad = random_values((40,), torch.float32, 10 + index, 1.0)
        optimizer.step()

    def moved_by_swaps():
        """Which of the two a swap writes to, there and back."""
        found = set()
        for mode in (False, True, False, True):
            before = [(param._version, param.detach().clone()) for param in params]
            optimizer.train(mode)
            written = tuple(param._version != version for param, (version, _) in zip(params, before, strict=True))
            assert written == tuple(not torch.equal(*pair) for pair in zip(params, (b for _, b in before), strict=True))
            found.add(written)
        (written,) = found
        return written

    step()
    assert moved_by_swaps() == (False, True)
    optimizer.param_groups[0]["prediction_steps"] = 3
    assert moved_by_swaps() == (False, True)
    step()
    optimizer.param_groups[0]["prediction_steps"] = 0
    optimizer.param_groups[1]["prediction_steps"] = 0
    assert moved_by_swaps() == (True, True)
    step()
    optimizer.eval()
    before = [param._version for param in params]
    optimizer.train()
    assert [param._version for param in params] == before
