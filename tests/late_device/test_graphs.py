"""Steps captured in a graph and replayed, equal to the same steps without one, and to the CPU back end."""

import gc

import pytest
import torch
from cases import PLAIN
from twins import same_bits

from late_device import device
from late_device.captured import LRS, Captured
from late_device.device import NAME
from late_device.models import Net
from late_device.twins import OneStream, Twins, gradients, upload
from xgrad_optim import XAdam, XAdamW

OPTIONS = {
    "default": {},
    "amsgrad": {"amsgrad": True},
    "master weights": {"master_weights": True},
    "three steps ahead": {"prediction_steps": 3},
    "maximize": {"maximize": True},
}
CONFIGURATIONS = {
    f"{case.optimizer.__name__} {name}": (case.make, options)
    for case in PLAIN
    for name, options in OPTIONS.items()
    if case.takes(*options)
}


@pytest.mark.parametrize(("make", "options"), CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_follows_the_lr_tensor(make, options, dtype):
    pair = Captured(make, dtype, **options)
    pair.warm_up()
    graph = pair.capture()
    for step in range(2, len(LRS)):
        with device.counting() as counts:
            pair.replayed_step(step, graph)
        assert counts.synchronizations == 0
    pair.check("after the replays")
    for optimizer in (pair.late_optimizer, pair.host_optimizer):
        optimizer.eval()
    pair.check("in evaluation")


def test_a_graph_survives_eager_steps_with_other_gradients():
    pair = Captured(XAdamW)
    pair.warm_up()
    graph = pair.capture()
    for step in range(2, 8):
        if step % 2:
            pair.replayed_step(step, graph)
        else:
            pair.eager_step(step, moves_gradients=True)
        gc.collect()
    pair.check("after both")


def test_gradients_made_inside_of_the_graph():
    """As zero_grad and backward in the capture: their addresses are new there."""
    pair = Captured(XAdam)
    pair.warm_up()
    for param in pair.late:
        param.grad = None
    with device.capture() as graph:
        for param, source in zip(pair.late, pair.static, strict=True):
            param.grad = source * 1
        pair.late_optimizer.step()
    strangers = []
    for step in range(2, 5):
        pair.replayed_step(step, graph)
        strangers += [torch.full_like(param, 7.0) for param in pair.late]
    pair.check("after the replays")
    assert all(bool((stranger == 7.0).all()) for stranger in strangers)


def test_two_steps_in_one_graph():
    pair = Captured(XAdamW)
    pair.warm_up()
    with device.capture() as graph:
        for _ in range(2):
            for param, source in zip(pair.late, pair.static, strict=True):
                param.grad = source * 1
            pair.late_optimizer.step()
    for step in (2, 3):
        pair.replayed_step(step, graph)
        pair.host_step(step)
    pair.check("after two steps in each replay")


def test_a_parameter_that_joins_leaves_the_graph_as_it_was():
    """Its state makes new tables; the graph goes on with the ones that it has captured, which must stay right."""
    pair = Captured(XAdamW)
    pair.warm_up()
    graph = pair.capture()
    for optimizer, params, place in (
        (pair.late_optimizer, pair.late, upload),
        (pair.host_optimizer, pair.host, torch.clone),
    ):
        joined = torch.nn.Parameter(place(torch.ones(9)))
        optimizer.add_param_group({"params": [joined], "lr": 0.01})
        joined.grad = place(torch.ones(9))
        params.append(joined)
    pair.static.append(torch.ones(9, device=NAME))
    pair.eager_step(2)
    device.synchronize()
    strangers = [torch.full((size,), 7.0, dtype=torch.float64, device=NAME) for size in (8, 16, 32, 64) * 8]
    for step in range(3, 5):
        pair.host[-1].grad = None
        pair.set_lr(step)
        pair.fill(step)
        graph.replay()
        for param, grad in zip(pair.host[:-1], gradients(pair.host[:-1], step), strict=True):
            param.grad = grad
        pair.host_optimizer.step()
    pair.check("after a parameter has joined")
    assert all(bool((stranger == 7.0).all()) for stranger in strangers)


def test_evaluation_after_replays():
    """What the host noted at the last swap may be wrong: a replay has predicted again without telling it."""
    pair = Captured(XAdamW)
    nets = [Net(params) for params in (pair.late, pair.host)]
    for net, optimizer in zip(nets, (pair.late_optimizer, pair.host_optimizer), strict=True):
        optimizer.attach(net)
    pair.warm_up()
    graph = pair.capture()
    for step in range(2, 6):
        pair.replayed_step(step, graph)
        for late, host in zip(*(net.eval()() for net in nets), strict=True):
            assert same_bits(late, host), f"evaluation after step {step}"
    pair.replayed_step(6, graph)
    for optimizer in (pair.late_optimizer, pair.host_optimizer):
        optimizer.eval()
    pair.check("after eval()")


def test_a_checkpoint_after_replays():
    """A swap, then replays that predict again without telling the host."""
    pair = Captured(XAdamW)
    optimizers = (pair.late_optimizer, pair.host_optimizer)
    pair.warm_up()
    graph = pair.capture()
    for optimizer in optimizers:
        optimizer.eval()
    for step in range(2, 4):
        pair.replayed_step(step, graph)
    assert all(optimizer.predicted for optimizer in optimizers)
    late, host = (list(optimizer.state_dict()["state"].values()) for optimizer in optimizers)
    for ours, theirs in zip(late, host, strict=True):
        assert float(ours["step"]) == float(theirs["step"]) and float(ours["predicted"]) == float(theirs["predicted"])
    with pair.late_optimizer.true_weights(), pair.host_optimizer.true_weights():
        pair.check("in true_weights()")
    pair.check("after true_weights()")


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_a_step_that_a_graph_can_not_repeat_is_refused(options):
    """Without capturable=True the graph would repeat one step's numbers, or one variant, for ever."""
    twins = Twins(XAdamW, **options)
    for step in range(2):
        twins.step(step, OneStream())
    before = [param.detach().clone() for param in twins.late]
    with device.capture(), pytest.raises(RuntimeError, match="capturable"):
        twins.late_optimizer.step()
    for param, value in zip(twins.late, before, strict=True):
        assert same_bits(param, value)


def test_a_parameter_that_the_warm_up_left_out():
    """Its state is made inside of the graph, or the capture is refused in words."""
    pair = Captured(XAdamW)
    pair.late[1].grad = None
    for step in range(2):
        pair.fill(step)
        pair.use_static_gradients()
        pair.late[1].grad = None
        pair.late_optimizer.step()
    before = [param.detach().clone() for param in pair.late]
    try:
        graph = pair.capture()
    except RuntimeError as error:
        assert "graph" in str(error) or "capture" in str(error)
        for param, value in zip(pair.late, before, strict=True):
            assert same_bits(param, value)
    else:
        graph.replay()
        device.synchronize()
