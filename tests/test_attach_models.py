"""Which models and optimizers go together: several of each, parts, parameters of other optimizers, what is refused."""

import pytest
import torch
from attached import Normalized, Watch, X, attached, both_weights, equal, hooks_of, set_mode
from cases import loss_of, small_model, train_step
from torch import nn
from torch.nn.parallel import DataParallel
from training import clones

from xgrad_optim import XSGDM, XAdamW

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


def test_attaching_again_adds_nothing():
    """A cell that is run again, on_train_start of every epoch."""
    model, optimizer = attached(model=Normalized(), steps=0)
    handle, before = optimizer.attach(model), hooks_of(model)
    assert optimizer.attach(model) is handle
    assert hooks_of(model) == before
    train_step(model, optimizer, 0)
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    for mode, weights in ((False, theta), (True, theta_hat)):
        optimizer.attach(model)
        model.train(mode)(X)
        assert watch.saw(weights)
    handle.remove()
    watch = Watch(model)
    model.eval()(X)
    assert watch.saw(theta_hat)


@pytest.mark.parametrize("wrap", [nn.Sequential, DataParallel])
def test_attaching_a_wrapper_or_a_part_too_hooks_no_module_twice(wrap):
    model = Normalized()
    optimizer = XAdamW(model.parameters(), lr=0.01)
    wrapped = wrap(model)
    handles = [optimizer.attach(model), optimizer.attach(model.encoder), optimizer.attach(wrapped)]
    assert max(len(module._forward_pre_hooks) for module in model.modules()) == 1
    train_step(model, optimizer, 0)
    theta, theta_hat = both_weights(optimizer)
    for handle in handles:
        watch = Watch(model.encoder[0], model.head)
        model.train()(X)
        model.eval()(X)
        assert watch.saw(theta_hat[:2], theta_hat[4:], theta[:2], theta[4:]), "those that remain still hold"
        handle.remove()
    model.train()
    optimizer.train()
    model.eval()(X)
    assert equal(model.parameters(), theta_hat)


def test_remove_restores_the_model():
    model = small_model(torch.float32)
    model.register_forward_pre_hook(lambda *_: None)
    before = hooks_of(model)
    optimizer = XAdamW(model.parameters())
    with optimizer.attach(model) as handle:
        assert hooks_of(model) != before
        train_step(model, optimizer, 0)
    assert hooks_of(model) == before
    handle.remove()
    _, theta_hat = both_weights(optimizer)
    model.eval()(X)
    assert equal(model.parameters(), theta_hat)
    assert optimizer.state_dict()["state"][0]["predicted"] != 0, "it is no longer attached"


def test_an_optimizer_outlives_its_model():
    """Nobody is left to be told when the weights change."""
    model, optimizer = attached()
    loss_of(model, 3).backward()
    del model
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["predicted"]


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


@pytest.mark.parametrize("again", [False, True], ids=["inside the model", "by itself, attached again"])
def test_a_part_that_joins_the_model_later(again):
    body, head = nn.Linear(5, 5), nn.Linear(5, 3)
    model = nn.Sequential(body)
    optimizer = XAdamW([*body.parameters(), *head.parameters()], lr=0.01)
    optimizer.attach(model)
    model.append(head)
    if again:
        optimizer.attach(model)
    train_step(model, optimizer, 0)
    theta, theta_hat = both_weights(optimizer)
    called = head if again else model
    watch = Watch(head)
    called.eval()(X)
    called.train()(X)
    assert watch.saw(theta[2:], theta_hat[2:])


def test_a_part_that_joins_with_parameters_of_nobody_is_found_when_attached_again():
    model, optimizer = attached()
    model.append(nn.Linear(3, 3))
    optimizer.attach(model)
    with pytest.raises(RuntimeError, match=r"2 trainable parameters .* '3.weight' the first"):
        model(X)


@pytest.mark.filterwarnings("ignore")  # torch's, that scripting is deprecated
def test_scripted_parts():
    """Their own methods refuse hooks; they are called by Python all the same."""
    model, optimizer = attached(model=nn.Sequential(nn.Linear(5, 4), torch.jit.script(nn.Linear(4, 3))))
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model[0])
    for mode, weights in ((False, theta), (True, theta_hat)):
        optimizer.train(not mode)
        set_mode(model, mode)
        output = model(X)
        assert watch.saw(weights[:2])
        optimizer.train(not mode)
        assert torch.equal(model[1](nn.functional.linear(X, *weights[:2])), output), "the scripted part by itself"
    model.eval()
    assert not optimizer.predicted
    model[1].load_state_dict(model[1].state_dict())
    optimizer.attach(model).remove()
    assert not model[1]._forward_pre_hooks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trace", [torch.jit.script, lambda model: torch.jit.trace(model, X)])
def test_scripted_models(trace):
    model, optimizer = attached(model=trace(small_model(torch.float32)))
    theta, theta_hat = both_weights(optimizer)
    model.eval()
    assert equal(model.parameters(), theta)
    model.train()(X)
    assert equal(model.parameters(), theta_hat)
    model.state_dict()
    assert not optimizer.predicted


def test_lazy_modules():
    """Their parameters have no shape yet when they are attached, and their class changes with the first forward."""
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3))
    optimizer = XAdamW(model.parameters(), lr=0.01)
    optimizer.attach(model)
    model.eval()
    model.train()(X)
    for step in range(3):
        train_step(model, optimizer, step)
    theta, theta_hat = both_weights(optimizer)
    watch = Watch(model)
    model.eval()(X)
    model.train()(X)
    assert watch.saw(theta, theta_hat)
    assert type(model[0]) is nn.Linear


# -- parameters of other optimizers ----------------------------------------------------------------------------------


def divided():
    """Muon for the matrices, ours for the rest, of the same modules."""
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    matrices = [param for param in model.parameters() if param.ndim == 2]
    return model, torch.optim.Muon(matrices), XAdamW([param for param in model.parameters() if param.ndim != 2])


def test_parameters_of_another_optimizer_hold_the_same_in_both_modes():
    model, muon, rest = divided()
    rest.attach(model, partial=True)
    for step in range(3):
        model.zero_grad()
        loss_of(model.train(), step).backward()
        muon.step()
        rest.step()
    both = [[param for param in model.parameters() if param.ndim == ndim] for ndim in (1, 2)]
    matrices = clones(both[1])
    theta, theta_hat = both_weights(rest)
    for mode, weights in ((False, theta), (True, theta_hat)):
        model.train(mode)(X)
        assert equal(both[0], weights) and equal(both[1], matrices)
    assert equal([value for value in model.state_dict().values() if value.ndim == 1], theta)


def test_a_partial_attach_must_be_asked_for():
    model, _, rest = divided()
    handle = rest.attach(model)
    with pytest.raises(RuntimeError, match=r"2 trainable parameters .* say attach\(model, partial=True\)"):
        model(X)
    assert rest.attach(model, partial=True) is handle
    model(X)
    rest.attach(model)
    with pytest.raises(RuntimeError, match="partial=True"):
        model(X)


@pytest.mark.parametrize("first", [lambda model, optimizer: model.eval(), lambda model, optimizer: optimizer.train()])
def test_the_refusal_does_not_depend_on_who_sets_a_mode_first(first):
    """Trainers do before the first forward."""
    model, _, rest = divided()
    rest.attach(model)
    first(model, rest)
    with pytest.raises(RuntimeError, match="partial=True"):
        model(X)


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


def test_the_optimizer_that_was_taken_over_says_so_when_it_goes_on():
    """Else both would write their theta_hat, each taking the other's for theta."""
    model, old = attached()
    new = XSGDM(model.parameters(), lr=0.01)
    handle = new.attach(model)
    theta = clones(model.parameters())
    loss_of(model, 3).backward()
    for go_on in (old.step, old.train):
        with pytest.raises(RuntimeError, match="detached from its model when XSGDM"):
            go_on()
    assert equal(model.parameters(), theta)
    new.step()
    new.eval()
    with pytest.raises(RuntimeError, match="this XAdamW and that XSGDM have 4 in common"):
        old.attach(model)
    handle.remove()
    old.attach(model)
    train_step(model, old, 4)


def test_a_take_over_inside_of_true_weights_leaves_theta():
    model, old = attached()
    theta, _ = both_weights(old)
    with old.true_weights():
        XSGDM(model.parameters()).attach(model)
    assert equal(model.parameters(), theta)


def test_two_optimizers_with_predictions_for_the_same_parameters_are_refused():
    model, old = attached()
    new = XAdamW(model.parameters())
    new.load_state_dict(old.state_dict())
    before, hooks = old._exchange.attachments.copy(), hooks_of(model)
    with pytest.raises(RuntimeError, match="attached to another optimizer with the same parameters"):
        new.attach(model)
    assert old._exchange.attachments == before and hooks_of(model) == hooks
    assert not new._exchange.attachments


def test_a_parameter_that_two_models_share_has_one_optimizer():
    """Tied embeddings of an encoder and a decoder with an optimizer each."""
    encoder, decoder = nn.Linear(4, 4), nn.Linear(4, 4)
    decoder.weight = encoder.weight
    first, second = XAdamW(encoder.parameters()), XSGDM(decoder.parameters())
    first.attach(encoder)
    message = "another model .* this XSGDM and that XAdamW have 1 in common, weight. Only one"
    with pytest.raises(RuntimeError, match=message):
        second.attach(decoder)
    assert not decoder._forward_pre_hooks and first._exchange.attachments


def test_a_group_that_joins_must_not_belong_to_another_attached_optimizer():
    model = small_model(torch.float32)
    optimizers = XAdamW(model[0].parameters()), XSGDM(model[2].parameters())
    for optimizer in optimizers:
        optimizer.attach(model)
    with pytest.raises(RuntimeError, match="this XSGDM and that XAdamW have 2 in common"):
        optimizers[1].add_param_group({"params": model[0].named_parameters()})
    assert len(optimizers[1].param_groups) == 1


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
    model, optimizer = attached()
    replica = model.eval()._replicate_for_data_parallel()
    optimizer.train()
    with pytest.raises(RuntimeError, match="attach the DataParallel module itself"):
        replica(X)
