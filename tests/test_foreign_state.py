"""What users and wrappers keep in `optimizer.state` and in the param groups, and how they cut its rows.

torch.optim leaves entries of others alone, also under keys that are no parameters and of any kind. It breaks where a
loop over the state believes that every value is a dict of ours, or that every group entry is a number of ours.
"""

import copy

import pytest
import torch
from cases import every_optimizer
from family import RULES

from xgrad_optim import XAdamW

VALUES = {
    "int": 5,
    "float": 0.5,
    "tensor": torch.ones(3),
    "tensors": [torch.ones(2), torch.zeros(1)],
    "dict": {"a": 1},
    "dict like ours": {"predicted": True, "prediction_shift": 1.0, "step": 3},
    "none": None,
    "text": "x",
    "set": {1, 2},
    "module": torch.nn.Linear(2, 2),
}
every_value = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)


class Run:
    """Two parameters, the second of which is idle until late, under an optimizer."""

    def __init__(self, case, **options):
        generator = torch.Generator().manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(2)]
        self.optimizer = case.make(self.params, lr=0.05, **options)
        self.steps = 0

    def step(self, *indices):
        for index, param in enumerate(self.params):
            generator = torch.Generator().manual_seed(10 + 2 * self.steps + index)
            param.grad = torch.randn(param.shape, generator=generator) if index in indices else None
        self.optimizer.step()
        self.steps += 1

    def use(self):
        """All that looks at the state."""
        optimizer = self.optimizer
        self.step(0)
        assert optimizer.predicted
        optimizer.eval()
        assert not optimizer.predicted
        optimizer.train()
        with optimizer.true_weights():
            self.step(0, 1)
        model = torch.nn.ParameterList(self.params)
        with optimizer.attach(model):
            model.state_dict()
        copy.deepcopy(optimizer).step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.step(0, 1)
        late = torch.nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [late]})
        self.params.append(late)
        self.step(0, 1, 2)
        optimizer.eval()


def assert_alike(run, undisturbed):
    assert all(map(torch.equal, run.params, undisturbed.params))


@every_optimizer
@every_value
@pytest.mark.parametrize("steps_before", [0, 2])
def test_entries_under_keys_that_are_no_parameters(case, value, steps_before):
    run, undisturbed = Run(case), Run(case)
    for each in (run, undisturbed):
        for _ in range(steps_before):
            each.step(0)
    run.optimizer.state["mine"] = value
    for each in (run, undisturbed):
        each.use()
    assert_alike(run, undisturbed)
    kept = run.optimizer.state["mine"]
    assert type(kept) is type(value)
    assert kept is value or repr(kept) == repr(value)


@every_optimizer
@every_value
@pytest.mark.parametrize("steps_before", [0, 2])
def test_entries_beside_a_parameter_s_own(case, value, steps_before):
    run, undisturbed = Run(case), Run(case)
    for each in (run, undisturbed):
        for _ in range(steps_before):
            each.step(0)
    for param in run.params:
        run.optimizer.state[param]["mine"] = value
    for each in (run, undisturbed):
        each.use()
    assert_alike(run, undisturbed)
    assert all(type(run.optimizer.state[param]["mine"]) is type(value) for param in run.params[:2])


@every_optimizer
@every_value
def test_entries_of_a_group(case, value):
    run, undisturbed = Run(case), Run(case)
    run.optimizer.param_groups[0]["mine"] = value
    for each in (run, undisturbed):
        each.use()
    assert_alike(run, undisturbed)
    assert type(run.optimizer.param_groups[0]["mine"]) is type(value)


@every_optimizer
def test_a_counter_that_changes_between_steps(case):
    run, undisturbed = Run(case), Run(case)
    for count in range(4):
        run.optimizer.state["count"] = count
        run.optimizer.state[run.params[0]]["count"] = count
        for each in (run, undisturbed):
            each.step(0, 1)
            each.optimizer.eval()
            each.optimizer.train()
        assert_alike(run, undisturbed)


@every_optimizer
def test_a_parameter_that_has_entries_of_others_only_is_saved_and_loaded(case):
    run, other = Run(case), Run(case)
    run.step(0)
    run.optimizer.state[run.params[1]]["ema"] = torch.ones(5, 3)
    for param, source in zip(other.params, run.params, strict=True):
        param.data.copy_(source)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    loaded = other.optimizer.state[other.params[1]]
    assert list(loaded) == ["ema"] and torch.equal(loaded["ema"], torch.ones(5, 3))
    assert loaded["ema"] is not run.optimizer.state[run.params[1]]["ema"]
    other.steps = run.steps
    run.step(0, 1)
    other.step(0, 1)
    assert_alike(run, other)


@every_optimizer
def test_tensors_of_others_are_loaded_on_the_parameter_s_device(case):
    """And keep their dtype, as ours do."""
    run = Run(case)
    run.step(0, 1)
    run.optimizer.state[run.params[0]]["ema"] = torch.ones(5, 3, dtype=torch.float64)
    elsewhere = case.make([torch.nn.Parameter(torch.empty(5, 3, device="meta")) for _ in range(2)])
    elsewhere.load_state_dict(run.optimizer.state_dict())
    ema = next(iter(elsewhere.state.values()))["ema"]
    assert ema.device.type == "meta" and ema.dtype == torch.float64


# -- rows ------------------------------------------------------------------------------------------------------------


def replace_rows(optimizer, cut, takes):
    """As Gaussian splatting prunes and clones: every tensor of the state that `takes` names, then the parameter."""
    (group,) = optimizer.param_groups
    param = group["params"][0]
    state = optimizer.state.pop(param)
    for key, value in state.items():
        if takes(key, value, param):
            state[key] = cut(value)
    new = torch.nn.Parameter(cut(param.detach()))
    group["params"][0] = new
    optimizer.state[new] = state
    return new


BUFFERS = {key for rule in RULES.values() for key in (*rule.state_keys, "max_exp_avg_sq")}
TAKES = {
    "by name": lambda key, value, param: key in BUFFERS,
    "by shape": lambda key, value, param: value.shape == param.shape,
    "by dimension": lambda key, value, param: value.dim() > 0,
}


@every_optimizer
@pytest.mark.parametrize("takes", TAKES.values(), ids=TAKES)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("at_theta", [False, True], ids=["theta_hat", "theta"])
def test_rows_may_be_cut_and_repeated(case, takes, backend, at_theta):
    """What is left trains on as if the other rows had never been there."""
    rows = torch.tensor([4, 0, 2, 2])
    values = torch.randn(5, 3)
    whole, part = (torch.nn.Parameter(each.clone()) for each in (values, values[rows]))
    optimizer, alone = (case.make([param], lr=0.05, backend=backend) for param in (whole, part))
    for step in range(5):
        if step == 3:
            optimizer.train(not at_theta)
            whole = replace_rows(optimizer, lambda tensor: tensor[rows], takes)
            optimizer.train()
            assert torch.equal(whole, part)
        grad = torch.randn(5, 3)
        whole.grad = grad if step < 3 else grad[rows]
        part.grad = grad[rows]
        optimizer.step()
        alone.step()
    for each in (optimizer, alone):
        each.eval()
    assert torch.equal(whole, part)


@pytest.mark.parametrize(
    "cut",
    [
        lambda value: value[torch.tensor([True, False, True, True, False])],
        lambda value: value[torch.tensor([0, 2])],
        lambda value: value[:3],
        lambda value: torch.cat([value, torch.zeros(2, *value.shape[1:])]),
    ],
    ids=["mask", "index", "slice", "cat"],
)
def test_a_loop_that_takes_every_key_fails_loudly(cut):
    """0-dim numbers have no rows: torch says so, at the number, and the state that is put back trains on."""
    param = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = XAdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    before = dict(optimizer.state[param])
    with pytest.raises((IndexError, RuntimeError), match="dim"):
        replace_rows(optimizer, cut, lambda key, value, param: key != "step")
    optimizer.state[param] = before
    optimizer.step()
    optimizer.eval()
