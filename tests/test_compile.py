"""torch.compile around a model that trains with our optimizer, and around the optimizer itself.

What can break it: numbers that change at every step (a schedule, the mode) and make dynamo compile anew each time until
it gives up, hooks that cut a model's graph into pieces, and python numbers that dynamo bakes into a graph for good.
"""

import pytest
import torch
from cases import every_optimizer, loss_of, small_model
from torch._dynamo.utils import counters

from xgrad_optim import XAdamW

OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "prediction_steps": 2.0}
# The compiled graph is the same operations, so the bits are.
BACKEND = "aot_eager"

pytestmark = pytest.mark.filterwarnings("default")  # torch's own, of its own deprecations


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def batch(step):
    return torch.randn(16, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def train_and_evaluate(model, optimizer, steps=10):
    """Training under a schedule with an evaluation after each step; how many frames were compiled by each step."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    frames, outputs = [], []
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()
        schedule.step()
        model.eval()
        with torch.no_grad():
            outputs.append(model(batch(100 + step)))
        frames.append(counters["stats"]["unique_graphs"] + sum(counters["graph_break"].values()))
    return frames, outputs


@every_optimizer
@pytest.mark.parametrize("attach_to", ["compiled", "model"])
def test_a_compiled_model_is_compiled_once_for_each_mode(case, attach_to):
    """Attached to the compiled module, the hooks run outside of the graph and leave it whole."""
    model, twin = small_model(), small_model()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=attach_to == "compiled")
    optimizer, expected = (case.make(each.parameters(), **OPTIONS) for each in (model, twin))
    optimizer.attach(compiled if attach_to == "compiled" else model)
    expected.attach(twin)
    frames, outputs = train_and_evaluate(compiled, optimizer)
    # One with gradients, one without; torch 2.11 counts the hooks in front of the compiled module for a third.
    assert counters["stats"]["unique_graphs"] in ((2, 3) if attach_to == "model" else (2,))
    assert frames[2:] == [frames[2]] * 8, "nothing is compiled anew while lr and mode change"
    if attach_to == "compiled":
        assert not counters["graph_break"]
    _, expected_outputs = train_and_evaluate(twin, expected)
    assert all(map(torch.equal, outputs, expected_outputs))
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize("compile_model", [torch.compile, lambda model, **options: model.compile(**options) or model])
def test_a_part_in_another_mode_adds_no_graph(compile_model):
    """A frozen BatchNorm inside follows the model: no swap, and none that dynamo would have to leave a graph for."""
    counts = []
    for freezes in (False, True):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        linear = [torch.nn.Linear(5, 5, dtype=torch.float64) for _ in range(3)]
        norms = [torch.nn.BatchNorm1d(5, dtype=torch.float64) for _ in range(2)]
        model = torch.nn.Sequential(linear[0], norms[0], torch.nn.Sequential(linear[1], norms[1]), linear[2])
        optimizer = XAdamW(model.parameters(), **OPTIONS)
        optimizer.attach(model)
        if freezes:
            for norm in norms:
                norm.training, norm.train = False, lambda mode=True, norm=norm: norm
        frames, _ = train_and_evaluate(compile_model(model, backend=BACKEND), optimizer, steps=6)
        counts.append(frames)
        assert optimizer._exchange.traced == 0
    assert counts[0] == counts[1] and frames[1:] == [frames[1]] * 5


def test_a_compiled_model_with_explicit_swaps():
    model, twin = small_model(), small_model()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    for step in range(10):
        for each, of in ((compiled, optimizer), (twin, expected)):
            of.param_groups[0]["lr"] = 0.05 / (step + 1)
            of.zero_grad()
            each(batch(step)).square().mean().backward()
            of.step()
        with optimizer.true_weights(), expected.true_weights(), torch.no_grad():
            assert torch.equal(compiled(batch(50)), twin(batch(50)))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_training_step_with_the_optimizer_inside():
    """The step runs as it is, between two graphs, whatever lr is by then."""
    model, twin = small_model(), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))

    def training_step(model, optimizer, x):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    compiled = torch.compile(training_step, backend=BACKEND)
    seen = []
    for step in range(10):
        for of in (optimizer, expected):
            of.param_groups[0]["lr"] = 0.05 / (step + 1)
        loss = compiled(model, optimizer, batch(step))
        assert torch.equal(loss, training_step(twin, expected, batch(step)))
        seen.append(counters["frames"]["total"])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert seen[3:] == [seen[3]] * 7


def test_a_compiled_step_runs_as_it_is_and_refuses_fullgraph():
    """torch.compile finds nothing to gain in step(): it leaves it alone, or says so where it must not."""
    model, twin = small_model(), small_model()
    optimizer, expected = (XAdamW(each.parameters(), **OPTIONS) for each in (model, twin))
    compiled = torch.compile(optimizer.step, backend=BACKEND)
    for step in range(5):
        for each, of, act in ((model, optimizer, compiled), (twin, expected, expected.step)):
            of.param_groups[0]["lr"] = 0.05 / (step + 1)
            of.zero_grad()
            loss_of(each, step).backward()
            act()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"XGradOptimizer\.step"):
        torch.compile(optimizer.step, backend=BACKEND, fullgraph=True)()
    assert all(map(torch.equal, model.parameters(), twin.parameters())), "and nothing has moved"
