"""Swaps, attached models, checkpoints and GradScaler on the late device, between steps that nobody has waited for."""

import copy
import io
from operator import methodcaller

import pytest
import torch
from twins import same_bits

from late_device import device
from late_device.device import NAME
from late_device.models import MODES, Net
from late_device.twins import OneStream, Twins, gradients, parameters, upload
from xgrad_optim import XSGDM, XAdam, XAdamW

every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def check_same(late, host, where: str) -> None:
    for index, pair in enumerate(zip(late, host, strict=True)):
        assert same_bits(*pair), f"parameter {index} {where}"


@every_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_attached_model_sees_what_its_mode_says(options, dtype):
    twins = Twins(XAdamW, dtype, lr=0.1, **options)
    nets = [Net(params) for params in (twins.late, twins.host)]
    for net, optimizer in zip(nets, twins.optimizers, strict=True):
        optimizer.attach(net)
    seen: list = []
    for step in range(5):
        seen.append((f"in the forward of step {step}", *(net.train()() for net in nets)))
        twins.step(step, OneStream())
        if step % 2:
            seen.append((f"in evaluation {step}", *(net.eval()() for net in nets)))
        if step == 3:
            saved = [[value.clone() for value in net.state_dict().values()] for net in nets]
            seen.append(("saved", *saved))
    for where, late, host in seen:
        check_same(late, host, where)
    twins.check()


@every_mode
@pytest.mark.parametrize("saved_in", ["training", "evaluation"])
def test_a_checkpoint_goes_on_as_if_nothing_had_been(options, saved_in):
    twins = Twins(XAdam, **options)
    for step in range(3):
        twins.step(step, OneStream())
    if saved_in == "evaluation":
        twins.do(lambda optimizer: optimizer.eval())
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in twins.late], "optimizer": twins.late_optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twins.late = [torch.nn.Parameter(param.clone()) for param in saved["params"]]
    twins.late_optimizer = XAdam(twins.late, backend="triton", **options)
    twins.late_optimizer.load_state_dict(saved["optimizer"])
    for step in range(3, 6):
        twins.step(step, OneStream())
        twins.look(f"step {step}")
    twins.check()


@every_mode
def test_checkpoints_move_between_the_cpu_and_the_device(options):
    twins = Twins(XAdamW, **options)
    for step in range(2):
        twins.step(step, OneStream())
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in twins.optimizers]
    weights = [[param.detach().cpu() for param in params] for params in (twins.late, twins.host)]
    with torch.no_grad():
        for params, others in ((twins.late, weights[1]), (twins.host, weights[0])):
            for param, other in zip(params, others, strict=True):
                param.copy_(other)
    for optimizer, other in zip(twins.optimizers, reversed(states), strict=True):
        optimizer.load_state_dict(other)
    for step in range(2, 4):
        twins.step(step, OneStream())
    twins.check()


@every_mode
def test_true_weights_and_writes_in_them(options):
    twins = Twins(XSGDM, lr=0.1, **options)
    for step in range(3):
        twins.step(step, OneStream())
        with twins.late_optimizer.true_weights(), twins.host_optimizer.true_weights(), torch.no_grad():
            twins.look(f"theta {step}")
            for param in (*twins.late, *twins.host):
                param.clamp_(-1.0, 1.0)
    twins.check()


@every_mode
@pytest.mark.parametrize("saved_in", [True, False], ids=["saved in training", "saved in evaluation"])
@pytest.mark.parametrize("loaded_in", [True, False], ids=["loaded in training", "loaded in evaluation"])
def test_a_reload_into_the_optimizer_that_has_saved(options, saved_in, loaded_in):
    """Its numbers have their memory already, which is written over; what the host noted of them is of another time."""
    twins = Twins(XAdamW, lr=0.1, **options)
    nets = [Net(params) for params in (twins.late, twins.host)]
    for step in range(2):
        twins.step(step, OneStream())
    twins.do(lambda optimizer: optimizer.train(saved_in))
    saved = copy.deepcopy([(optimizer.state_dict(), [*params]) for optimizer, params in twins.optimized()])
    twins.step(2, OneStream(), without=1)
    for first_use in ("eval", "train", "step", "attached training", "attached evaluation"):
        twins.do(lambda optimizer: optimizer.train(loaded_in))
        for optimizer, net, (state_dict, weights) in zip(twins.optimizers, nets, saved, strict=True):
            with torch.no_grad():
                for param, weight in zip(net.params, weights, strict=True):
                    param.copy_(weight)
            optimizer.load_state_dict(state_dict)
        if first_use.startswith("attached"):
            handles = [optimizer.attach(net) for optimizer, net in zip(twins.optimizers, nets, strict=True)]
            check_same(*(net.train(first_use == "attached training")() for net in nets), first_use)
            for handle in handles:
                handle.remove()
        elif first_use == "step":
            twins.step(3, OneStream())
        else:
            twins.do(methodcaller(first_use))
        twins.look(first_use)
        for mode in (False, True, False):
            twins.do(methodcaller("train", mode))
            twins.look(f"{first_use}, then {mode}")
    twins.step(4, OneStream())
    twins.check()


def scaled_step(scaler, optimizer, params, grads) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad if param.is_cpu else upload(grad)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"fused": True, "master_weights": True}], ids=str)
@pytest.mark.parametrize("first_overflow", [0, 2])
def test_grad_scaler_skips_steps(options, first_overflow):
    """Steps whose gradients overflow change nothing; an optimizer that unscales itself is not waited for."""
    twins = Twins(XAdam, **options)
    scalers = [torch.amp.GradScaler(kind, init_scale=1024.0, growth_interval=2) for kind in (NAME, "cpu")]
    for scaler, params in zip(scalers, (twins.late, twins.host), strict=True):
        scaler.scale(torch.zeros((), device=params[0].device))
    for step in range(6):
        grads = [1024.0 * grad for grad in gradients(twins.host, step)]
        if step in (first_overflow, first_overflow + 1):
            grads[0][3] = float("inf")
        with device.counting() as counts:
            scaled_step(scalers[0], twins.late_optimizer, twins.late, grads)
        scaled_step(scalers[1], twins.host_optimizer, twins.host, grads)
        assert counts.synchronizations == (0 if "fused" in options else 1)
        twins.look(f"step {step}")
        if step == 4:
            twins.do(lambda optimizer: optimizer.eval())
            twins.look("evaluation")
    assert [scaler.get_scale() for scaler in scalers[:1]] == [scaler.get_scale() for scaler in scalers[1:]]
    twins.check()


@pytest.mark.parametrize("n_before", [0, 2])
def test_an_overflow_skips_what_no_kernel_takes_too(n_before):
    """A parameter with gaps, which the host steps, beside one that the device does: both or none."""
    params = [torch.nn.Parameter(upload(torch.randn(6, 4))[:, :2]), torch.nn.Parameter(upload(torch.randn(5)))]
    optimizer = XAdamW(params, backend="triton", fused=True)
    for step in range(n_before + 1):
        for param in params:
            param.grad = torch.full_like(param, float("inf") if step == n_before else 1.0)
        before = [param.detach().clone() for param in params]
        optimizer.found_inf = upload(torch.full((), float(step == n_before)))
        optimizer.step()
    check_same(params, before, "after a skipped step")
    assert [float(optimizer.state[param].get("step", 0)) for param in params] == [n_before] * 2
    optimizer.eval()
    optimizer.train()
    check_same(params, before, "after two swaps")


def test_a_step_whose_skip_only_the_device_knows_leaves_the_mode_to_it():
    """The very first step is skipped: there is no prediction to undo, in either mode."""
    params = [torch.nn.Parameter(upload(param.detach())) for param in parameters()]
    before = [param.detach().clone() for param in params]
    optimizer = XAdamW(params, backend="triton", fused=True)
    optimizer.found_inf = upload(torch.ones(()))
    for param in params:
        param.grad = torch.full_like(param, float("inf"))
    optimizer.step()
    for action in (optimizer.eval, optimizer.train, optimizer.eval):
        action()
        check_same(params, before, "after a skipped step")
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_train_after_a_skipped_step_moves_all():
    """At theta one parameter is idle in the step, which moves it on by a swap of its own. No plan of that is kept."""
    twins = Twins(XAdam, fused=True)
    for step in range(2):
        twins.step(step, OneStream())
    twins.do(lambda optimizer: optimizer.eval())
    for param, grad in zip(twins.late[1:], gradients(twins.host, 2)[1:], strict=True):
        param.grad = upload(grad)
    twins.late[0].grad = None
    twins.late_optimizer.found_inf = upload(torch.ones(()))
    twins.late_optimizer.step()
    del twins.late_optimizer.found_inf
    twins.do(lambda optimizer: optimizer.train())
    twins.look("predicted after a skipped step at theta")
    twins.do(lambda optimizer: optimizer.eval())
    twins.check()


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_numbers_that_somebody_has_set(options):
    """A step count of another tensor, as a script puts it that warms up anew, counts from there."""
    twins = Twins(XAdam, **options)
    for step in range(2):
        twins.step(step, OneStream())
    for optimizer in twins.optimizers:
        for state in optimizer.state.values():
            state["step"] = torch.full_like(state["step"], 30.0)
    for step in range(2, 4):
        twins.step(step, OneStream())
    twins.check()
    assert {float(state["step"]) for state in twins.host_optimizer.state.values()} == {32.0}


@pytest.mark.parametrize("act", ["train", "forward", "true_weights"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_master_weights_where_the_host_does_not_know_the_mode(dtype, act):
    """A step from theta under a GradScaler: only the device knows whether it was skipped. What is in place stays so."""
    twins = Twins(XAdam, dtype, fused=True, master_weights=True)
    net = Net(twins.late)
    twins.late_optimizer.attach(net)
    for step in range(3):
        twins.do(lambda optimizer: optimizer.eval())
        for optimizer, zero in zip(twins.optimizers, (upload(torch.zeros(())), torch.zeros(())), strict=True):
            optimizer.found_inf = zero
        twins.step(step, OneStream())
        for optimizer in twins.optimizers:
            del optimizer.found_inf
        if act == "train":
            twins.do(lambda optimizer: optimizer.train())
        elif act == "forward":
            net.train()()
        else:
            with twins.late_optimizer.true_weights():
                pass
        twins.look(f"step {step}")
    twins.check()
