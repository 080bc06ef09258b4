"""A forward of an attached model sees theta_hat in training mode and theta in evaluation mode, however it is called.

A hook on the outer module alone misses `module.training_step`; a hook that asks each module swaps in the middle of a
forward with a frozen BatchNorm; one that counts is off for good after a forward that raised. Names say which trap of
clients.md a test is about.
"""

import pytest
import torch
from cases import every_optimizer, loss_of, small_model, train_step
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from xgrad_optim import XSGDM, XAdamW

X = torch.randn(16, 5, generator=torch.Generator().manual_seed(7))
either_precision = pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])


def clones(params):
    return [param.detach().clone() for param in params]


def equal(tensors, others):
    return all(torch.equal(tensor, other) for tensor, other in zip(tensors, others, strict=True))


def both_weights(optimizer):
    """Copies of theta and of theta_hat; the optimizer holds theta_hat afterwards."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    optimizer.eval()
    theta = clones(params)
    optimizer.train()
    assert not equal(theta, params)
    return theta, clones(params)


class Watch:
    """What the parameters of a module held whenever its forward ran."""

    def __init__(self, *modules):
        self.seen = []
        for module in modules:
            module.register_forward_pre_hook(lambda module, _: self.seen.append(clones(module.parameters())))

    def saw(self, *expected):
        seen, self.seen = self.seen, []
        return len(seen) == len(expected) and all(map(equal, seen, expected))


def attached(make=XAdamW, model=None, steps=3, **options):
    """A trained model and its optimizer, attached."""
    model = small_model(torch.float32) if model is None else model
    optimizer = make(model.parameters(), **{"lr": 0.01, "prediction_steps": 2.0} | options)
    optimizer.attach(model)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


class Normalized(nn.Module):
    """An encoder with a BatchNorm, and a head; like a LightningModule it is trained without a call of its own."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh())
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(self.encoder(x))

    def training_step(self, x):
        return self.head(self.encoder(x)).square().mean()


# -- which weights a forward sees ------------------------------------------------------------------------------------


@every_optimizer
@either_precision
def test_the_mode_of_the_model_decides(case, master_weights):
    model, optimizer = attached(case.optimizer, master_weights=master_weights)
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    for mode, weights in ((True, theta_hat), (False, theta), (False, theta), (True, theta_hat), (False, theta)):
        model.train(mode)
        model(X)
        assert watch.saw(weights)
        assert optimizer.predicted is mode


@every_optimizer
@either_precision
def test_evaluating_and_saving_changes_no_bit_of_training(case, master_weights):
    twin = small_model(torch.float32)
    twin_optimizer = case.make(twin.parameters(), lr=0.01, master_weights=master_weights)
    model, optimizer = attached(case.optimizer, steps=0, master_weights=master_weights, prediction_steps=1.0)
    for step in range(6):
        train_step(twin, twin_optimizer, step)
        train_step(model, optimizer, step)
        if step % 2:
            model.state_dict()
            optimizer.state_dict()
        model.eval()
        with torch.no_grad():
            model(X)
        model.train()
        if step % 3 == 0:
            model(X)
    model(X)
    assert equal(model.parameters(), twin.parameters())


def test_no_grad_forwards_in_training_mode_see_the_predicted_weights():
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    optimizer.eval()
    watch = Watch(model)
    with torch.no_grad():
        model(X)
    with torch.inference_mode():
        model(X)
    assert watch.saw(theta_hat, theta_hat)


def test_a_steady_forward_asks_nobody(monkeypatch):
    model, optimizer = attached()
    model(X)
    for name in ("_swap", "train", "eval", "_tracked"):
        monkeypatch.setattr(optimizer, name, lambda *args: pytest.fail("a steady forward called the optimizer"))
    for _ in range(3):
        model(X)
        model[0](X)


def test_the_closure_of_a_step_runs_at_the_predicted_weights():
    """Trap 11: Lightning's forward and backward are inside the closure."""
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    optimizer.eval()
    watch = Watch(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 3)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert watch.saw(theta_hat)
    assert optimizer.predicted


def test_a_model_in_evaluation_mode_trains_and_evaluates_at_the_true_weights():
    model, optimizer = attached()
    model.eval()
    for step in range(3, 6):
        train_step(model, optimizer, step)
        assert optimizer.predicted
        theta_hat = clones(model.parameters())
        model(X)
        assert not optimizer.predicted
        assert not equal(model.parameters(), theta_hat)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_at_the_same_weights(use_reentrant):
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    optimizer.eval()
    x = X.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()
    assert watch.saw(theta_hat, theta_hat)


def test_autocast_does_not_reuse_the_cast_of_the_other_weights():
    """Autocast keeps the bfloat16 copies of parameters until its block ends."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    expected = {}
    for weights in (theta, theta_hat):
        copy = small_model(torch.float32)
        with torch.no_grad():
            for param, value in zip(copy.parameters(), weights, strict=True):
                param.copy_(value)
        with torch.autocast("cpu", torch.bfloat16):
            expected[weights is theta_hat] = copy(X)
    assert not torch.equal(expected[True], expected[False])
    with torch.autocast("cpu", torch.bfloat16):
        for mode in (True, False, True):
            assert torch.equal(model.train(mode)(X), expected[mode])


# -- trap 7: submodules, and modules of another mode inside ----------------------------------------------------------


def test_a_call_of_any_submodule_is_covered():
    model = Normalized()
    optimizer = XAdamW(model.parameters(), lr=0.01)
    optimizer.attach(model)
    for _ in range(3):
        optimizer.zero_grad()
        model.training_step(X).backward()
        optimizer.step()
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model.encoder[0])
    for mode, weights in ((False, theta), (True, theta_hat)):
        for call in (lambda: model.training_step(X), lambda: model.encoder[0](X)):
            optimizer.train(not mode)
            model.train(mode)
            call()
            assert watch.saw(weights[:2])


@pytest.mark.parametrize("outer", [True, False], ids=["frozen BatchNorm", "BatchNorm left in training mode"])
def test_the_outermost_running_module_decides(outer):
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)
    optimizer.train(not outer)
    model.train(outer)
    model.encoder[1].train(not outer)
    watch = Watch(model.encoder[0], model.encoder[1], model.head)
    loss = model(X).sum()
    expected = theta_hat if outer else theta
    assert watch.saw(expected[:2], expected[2:4], expected[4:])
    loss.backward()


def test_a_teacher_in_evaluation_mode_beside_the_model_swaps_nothing():
    """It has no parameter of the optimizer, so its mode is none of its business."""
    model = nn.ModuleDict({"student": small_model(torch.float32), "teacher": small_model(torch.float32, seed=1)})
    model["teacher"].requires_grad_(False)
    optimizer = XAdamW(model["student"].parameters())
    optimizer.attach(model)
    for _ in range(3):
        model["teacher"].eval()
        optimizer.zero_grad()
        student = model["student"](X)
        (student - model["teacher"](X)).square().mean().backward()
        optimizer.step()
    assert optimizer.predicted


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_raises_leaves_no_trace(error):
    """always_call hooks see to a ValueError; nobody calls them for a KeyboardInterrupt."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)

    def interrupt(module, args):
        raise error

    for mode, weights in ((True, theta), (False, theta_hat)):
        optimizer.train(mode)
        model.train(mode)
        handle = model[2].register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(X)
        handle.remove()
        watch = Watch(model[0])
        model.train(not mode)
        model(X)
        assert watch.saw(weights[:2])


def test_a_forward_that_raises_does_not_speak_for_the_next_module():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X.T)
    watch = Watch(model[0])
    model.eval()[0](X)
    assert watch.saw(theta[:2])


def test_the_hook_comes_ahead_of_those_that_were_there():
    """FSDP's all-gather is a pre-hook that was prepended."""
    model = small_model(torch.float32)
    optimizer = XAdamW(model.parameters())
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(optimizer.predicted), prepend=True)
    optimizer.attach(model)
    train_step(model, optimizer, 0)
    model.eval()(X)
    model.train()(X)
    assert seen == [False, False, True]


# -- trap 13: autograd -----------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("disturb", ["evaluate", "save", "save the optimizer"])
def test_a_swap_between_forward_and_backward_raises(case, disturb):
    model, optimizer = attached(case.optimizer)
    loss = loss_of(model, 3)
    if disturb == "evaluate":
        model.eval()(X)
    elif disturb == "save":
        model.state_dict()
    else:
        optimizer.state_dict()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- true_weights() pins ---------------------------------------------------------------------------------------------


def test_true_weights_pins_forwards_in_training_mode():
    """update_bn puts the model into training mode to collect statistics."""
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model.head)
    with optimizer.true_weights():
        update_bn([X, X], model)
        with optimizer.true_weights():
            model.train()(X)
        model(X)
        assert watch.saw(*[theta[4:]] * 4)
    assert optimizer.predicted
    model(X)
    assert watch.saw(theta_hat[4:])


def test_true_weights_that_fail_release_the_pin():
    model, optimizer = attached()
    _, theta_hat = both_weights(optimizer)
    with pytest.raises(KeyError), optimizer.true_weights():
        raise KeyError
    optimizer.eval()
    watch = Watch(model)
    model(X)
    assert watch.saw(theta_hat)


# -- several optimizers, several models ------------------------------------------------------------------------------


def test_two_optimizers_on_one_model():
    model = small_model(torch.float32)
    optimizers = XAdamW(model[0].parameters()), XSGDM(model[2].parameters())
    for optimizer in optimizers:
        optimizer.attach(model)
    for step in range(3):
        model.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    (theta, theta_hat), (head_theta, head_theta_hat) = map(both_weights, optimizers)
    watch = Watch(model)
    model.eval()(X)
    assert watch.saw(theta + head_theta)
    model.train()(X)
    assert watch.saw(theta_hat + head_theta_hat)
    optimizers[1].eval()
    model(X)
    assert watch.saw(theta_hat + head_theta_hat)


def test_the_halves_of_a_gan_switch_on_their_own():
    model = nn.ModuleDict({"generator": nn.Linear(5, 5), "critic": nn.Linear(5, 1)})
    optimizers = {name: XAdamW(model[name].parameters(), lr=0.01) for name in model}
    for optimizer in optimizers.values():
        optimizer.attach(model)
    for _ in range(3):
        model.zero_grad()
        model["critic"](model["generator"](X)).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
    model["generator"].eval()
    # In the order of a critic's update: samples of the true generator, then the critic, which is in training mode.
    score = model["critic"](model["generator"](X).detach())
    assert not optimizers["generator"].predicted
    assert optimizers["critic"].predicted
    score.sum().backward()


def test_one_optimizer_over_two_models():
    models = [small_model(torch.float32, seed) for seed in (0, 1)]
    optimizer = XAdamW([param for model in models for param in model.parameters()])
    handles = [optimizer.attach(model) for model in models]
    for step in range(3):
        optimizer.zero_grad()
        (loss_of(models[0], step) + loss_of(models[1], step)).backward()
        optimizer.step()
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(*models)
    models[0].eval()(X)
    models[1](X)
    assert watch.saw(theta[:4], theta_hat[4:])
    handles[0].remove()
    models[0](X)
    models[1](X)
    assert watch.saw(theta_hat[:4], theta_hat[4:])


def test_attaching_twice_and_to_a_part_is_the_same_as_once():
    model, optimizer = attached(model=Normalized())
    theta, theta_hat = both_weights(optimizer)
    handles = [optimizer.attach(model), optimizer.attach(model.encoder)]
    model.encoder.eval()
    watch = Watch(model.encoder[0], model.head)
    model(X).sum().backward()
    assert watch.saw(theta_hat[:2], theta_hat[4:])
    for handle in handles:
        handle.remove()
    model.eval()(X)
    assert watch.saw(theta[:2], theta[4:])


def test_remove_restores_the_model():
    def hooks(model):
        return [
            {name: dict(value) for name, value in vars(module).items() if "hooks" in name and isinstance(value, dict)}
            for module in model.modules()
        ]

    model = small_model(torch.float32)
    model.register_forward_pre_hook(lambda *_: None)
    before = hooks(model)
    optimizer = XAdamW(model.parameters())
    with optimizer.attach(model) as handle:
        assert hooks(model) != before
        train_step(model, optimizer, 0)
    assert hooks(model) == before
    handle.remove()
    _, theta_hat = both_weights(optimizer)
    model.eval()(X)
    assert equal(model.parameters(), theta_hat)
    assert optimizer.state_dict()["state"][0]["predicted"] != 0, "it is no longer attached"


def test_parameters_that_join_later():
    """A part that is unfrozen in mid-training, and then called by itself."""
    model = nn.ModuleDict({"body": nn.Linear(5, 5), "head": nn.Linear(5, 3)})
    model["body"].requires_grad_(False)
    optimizer = XAdamW(model["head"].parameters(), lr=0.01)
    optimizer.attach(model)
    model["head"](model["body"](X)).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": list(model["body"].requires_grad_(True).parameters())})
    model["head"](model["body"](X)).sum().backward()
    optimizer.step()
    theta, _ = both_weights(optimizer)
    watch = Watch(model["body"])
    model["body"].eval()(X)
    assert watch.saw(theta[2:])


# -- trap 15: what can't be attached ---------------------------------------------------------------------------------


def test_trainable_parameters_without_an_attached_owner_are_refused():
    model = small_model(torch.float32)
    optimizer = XAdamW(model[0].parameters())
    train_step(model, optimizer, 0)
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"2 trainable parameters of the attached model, '2.weight' the first"):
        model(X)
    model[2].requires_grad_(False)
    train_step(model, optimizer, 0)


def test_a_new_optimizer_takes_the_model_over():
    """A cell that is run again: the old optimizer can't be reached any more, but its hooks are on the model."""
    model, old = attached()
    theta, _ = both_weights(old)
    new = XAdamW(model.parameters(), lr=0.01)
    new.attach(model[0])
    assert equal(model.parameters(), theta)
    new.attach(model)
    train_step(model, new, 3)
    theta, theta_hat = both_weights(new)
    watch = Watch(model)
    model.eval()(X)
    model.train()(X)
    assert watch.saw(theta, theta_hat)


def test_two_optimizers_with_predictions_for_the_same_parameters_are_refused():
    model, old = attached()
    new = XAdamW(model.parameters())
    new.load_state_dict(old.state_dict())
    before = old._switch.attachments.copy()
    with pytest.raises(RuntimeError, match="attached to another optimizer with the same parameters"):
        new.attach(model)
    assert old._switch.attachments == before
    assert not new._switch.attachments


def test_parameters_that_were_replaced_are_refused():
    """After load_state_dict(assign=True) the optimizer holds tensors that the model has not."""
    model, _ = attached()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match=r"4 trainable parameters .* make the optimizer anew"):
        model(X)


def test_a_model_of_somebody_else_is_refused():
    optimizer = XAdamW(small_model().parameters())
    with pytest.raises(ValueError, match="none of the optimizer's parameters"):
        optimizer.attach(small_model())
    with pytest.raises(TypeError, match=r"expects a torch.nn.Module, got list"):
        optimizer.attach(list(small_model().parameters()))


def test_the_replicas_of_data_parallel_can_not_swap():
    model, _ = attached()
    model.eval()
    with pytest.raises(RuntimeError, match="attach the DataParallel module itself"):
        model._replicate_for_data_parallel()(X)
