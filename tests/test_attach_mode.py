"""`model.eval()` of the attached model puts theta in place at once, for what reads the weights without a forward.

Merging adapters, fusing, pruning, converting, exporting and methods beside `forward` do. Only the attached model's own
mode counts, or that of what it merely wraps: a frozen BatchNorm's eval() comes in the middle of training.
"""

import pytest
import torch
from attached import Normalized, Watch, X, attached, both_weights, equal, set_mode
from cases import small_model, train_step
from torch import nn
from torch.nn.parallel import DataParallel
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from xgrad_optim import XSGDM, XAdamW


class Wrapper(nn.Module):
    """What DistributedDataParallel, Lightning and accelerate do: the model is a child, and runs in the forward."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


def compiled(model):
    return torch.compile(model, backend="eager")


wrappers = pytest.mark.parametrize("wrap", [Wrapper, DataParallel, compiled, lambda model: Wrapper(Wrapper(model))])


# -- the mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", [nn.Module.eval, lambda model: model.train(False), lambda model: model.eval()])
def test_evaluation_mode_puts_theta_in_place(evaluate):
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    assert evaluate(model) is model
    assert not any(module.training for module in model.modules())
    assert equal(model.parameters(), theta) and not optimizer.predicted


def test_training_mode_leaves_it_to_the_first_forward():
    """theta_hat is for forwards alone; trainers call train() before every batch, and unmerge adapters after it."""
    model, optimizer = attached()
    theta, theta_hat = both_weights(optimizer)
    model.eval()
    model.train()
    assert model.training and equal(model.parameters(), theta)
    model(X)
    assert equal(model.parameters(), theta_hat)


def test_a_wrong_mode_is_refused_as_ever():
    model, optimizer = attached()
    with pytest.raises(ValueError, match="expected to be boolean"):
        model.train("evaluation")
    assert model.training and optimizer.predicted


@wrappers
def test_a_wrapper_puts_theta_in_place(wrap):
    """They reach the model by train(mode) of their children."""
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    wrap(model).eval()
    assert not model.training and equal(model.parameters(), theta)


@wrappers
def test_what_an_attached_wrapper_holds_puts_theta_in_place(wrap):
    """Who attaches the compiled model still merges or exports the one inside."""
    model = small_model(torch.float32)
    wrapped, optimizer = attached(model=wrap(model))
    theta, _ = both_weights(optimizer)
    model.eval()
    assert equal(model.parameters(), theta)
    wrapped.train()(X)
    wrapped.eval()
    assert equal(model.parameters(), theta)


def test_a_frozen_batchnorm_puts_nothing_in_place():
    """Not even between a forward and its backward, where it would end the training."""
    model, optimizer = attached(model=Normalized())
    loss = model(X).sum()
    model.encoder[1].eval()
    model.encoder.eval()
    assert optimizer.predicted
    loss.backward()


def test_a_part_that_another_optimizer_is_attached_to_decides_for_that_one():
    model = Normalized()
    biases = [param for param in model.parameters() if param.ndim == 1]
    matrices = [param for param in model.parameters() if param.ndim == 2]
    whole, part = XAdamW(biases), XSGDM(matrices)
    whole.attach(model, partial=True)
    part.attach(model.encoder)
    part.attach(model.head)
    train_step(model, whole, 0)
    part.step()
    model.encoder.eval()
    assert whole.predicted and not part.predicted


class FreezesItself(Normalized):
    """As detectors do: training mode leaves the BatchNorms in evaluation mode."""

    def train(self, mode=True):
        super().train(mode)
        self.encoder[1].eval()
        return self


def test_a_class_that_overrides_train_keeps_its_own():
    model, optimizer = attached(model=FreezesItself())
    theta, theta_hat = both_weights(optimizer)
    assert model.train() is model and model.encoder[0].training and not model.encoder[1].training
    assert optimizer.predicted
    watch = Watch(model)
    model(X).sum().backward()
    model.eval()
    assert equal(model.parameters(), theta)
    model(X)
    assert watch.saw(theta_hat, theta)


def test_a_model_that_has_a_train_of_its_own_keeps_it():
    """torch.export's do, and guarded teachers."""
    model = small_model(torch.float32)
    calls = []

    def train(mode=True):
        calls.append(mode)
        return nn.Module.train(model, mode)

    model.train = train
    optimizer = XAdamW(model.parameters())
    with optimizer.attach(model):
        train_step(model, optimizer, 0)
        model.eval()
        assert calls == [False] and not model.training and not optimizer.predicted
    assert model.train is train


def test_a_model_in_its_own_forward_changes_nothing_but_its_mode():
    class Teaches(Normalized):
        def forward(self, x):
            hidden = self.encoder(x)
            self.eval()
            seen.append(optimizer.predicted)
            self.train()
            return self.head(hidden)

    seen = []
    model = Teaches()
    optimizer = XAdamW(model.parameters())
    optimizer.attach(model)
    for step in range(3):
        train_step(model, optimizer, step)
    assert seen == [False, True, True]


def test_two_optimizers_on_one_model_both_follow():
    model = small_model(torch.float32)
    optimizers = XAdamW(model[0].parameters()), XSGDM(model[2].parameters())
    handles = [optimizer.attach(model) for optimizer in optimizers]
    model(X).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    model.eval()
    assert not any(optimizer.predicted for optimizer in optimizers)
    model.train()(X)
    handles[0].remove()
    model.eval()
    assert [optimizer.predicted for optimizer in optimizers] == [True, False]
    handles[1].remove()
    assert "train" not in vars(model)


def test_a_model_that_is_detached_has_its_class_s_methods_again():
    model = Normalized()
    before = [vars(module).keys() for module in model.modules()]
    optimizer = XAdamW(model.parameters())
    handle = optimizer.attach(model)
    train_step(model, optimizer, 0)
    handle.remove()
    assert [vars(module).keys() for module in model.modules()] == before
    model.eval()
    assert optimizer.predicted


def test_a_class_that_changes_under_the_hooks():
    """fully_shard and parametrizations give a module another class."""

    class Other(Normalized):
        def train(self, mode=True):
            self.calls = [*getattr(self, "calls", ()), mode]
            return super().train(mode)

    model, optimizer = attached(model=Normalized())
    model.__class__ = Other
    model.eval()
    assert model.calls == [False] and not model.training and not optimizer.predicted


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_may_set_the_mode(fullgraph):
    """A swap breaks its graph; where theta is in place there is none."""
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)

    def evaluate(x):
        model.eval()
        y = model(x)
        model.train()
        return y

    if fullgraph:
        model.eval()
    output = torch.compile(evaluate, backend="eager", fullgraph=fullgraph)(X)
    assert equal(model.parameters(), theta)
    assert torch.equal(output, model.eval()(X))
    torch._dynamo.reset()


# -- what reads the weights without a forward ------------------------------------------------------------------------


class Adapted(nn.Module):
    """A low-rank adapter beside a frozen layer, merged as peft does."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(5, 5).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self, sign=1):
        self.base.weight += sign * self.up.weight @ self.down.weight
        return self.base


def trained(model):
    """It holds theta_hat."""
    optimizer = XAdamW([param for param in model.parameters() if param.requires_grad], lr=0.05, prediction_steps=2.0)
    optimizer.attach(model)
    for _ in range(4):
        optimizer.zero_grad()
        model.train()(X).square().mean().backward()
        optimizer.step()
    assert optimizer.predicted
    return model


def twins(make):
    """A trained model, and what its equal computes in evaluation mode."""
    twin = trained(make())
    torch.manual_seed(0)
    model = trained(make())
    output = twin.eval()(X)
    assert not torch.allclose(output, model(X), atol=1e-3)
    return model, output


def test_an_adapter_is_merged_at_theta():
    model, right = twins(Adapted)
    assert torch.allclose(model.eval().merged()(X), right, atol=1e-6)


def test_an_adapter_is_unmerged_as_it_was_merged():
    """After training mode and before its first forward."""
    model = trained(Adapted())
    before = model.base.weight.clone()
    model.eval().merged()
    model.train().merged(-1)
    assert torch.allclose(model.base.weight, before, atol=1e-6)


def test_layers_are_fused_at_theta():
    model = trained(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    model.eval()
    norm = model[1]
    fused = fusion.fuse_linear_bn_weights(
        model[0].weight, model[0].bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    assert torch.allclose(nn.functional.linear(X, *fused), model(X), atol=1e-6)


def test_a_method_beside_forward_computes_at_theta():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    model.eval()
    assert torch.equal(nn.functional.linear(X, model[0].weight, model[0].bias), X @ theta[0].T + theta[1])


def test_pruning_and_parametrizations_are_removed_at_theta():
    def make():
        model = nn.Sequential(nn.Linear(5, 4), parametrizations.weight_norm(nn.Linear(4, 3)))
        prune.l1_unstructured(model[0], "weight", 0.5)
        return model

    model, right = twins(make)
    model.eval()
    prune.remove(model[0], "weight")
    parametrize.remove_parametrizations(model[1], "weight")
    assert torch.allclose(nn.Sequential(*model)(X), right, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch's, of its own deprecations
def test_a_model_is_quantized_at_theta():
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    model.eval()
    converted = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    plain = small_model(torch.float32)
    with torch.no_grad():
        for param, value in zip(plain.parameters(), theta, strict=True):
            param.copy_(value)
    assert torch.equal(converted(X), torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})(X))


def test_a_cached_parametrization_is_computed_anew():
    """Inside cached() torch keeps what it has computed of the weights."""
    model = trained(nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 3))))
    right = {mode: model.train(mode)(X) for mode in (True, False)}
    assert not torch.equal(*right.values())
    with parametrize.cached():
        for mode in (True, False, True):
            assert torch.equal(model.train(mode)(X), right[mode])


def test_a_mode_that_nobody_announced_waits_for_the_forward():
    """Lightning puts module.training back as an attribute."""
    model, optimizer = attached()
    theta, _ = both_weights(optimizer)
    set_mode(model, False)
    assert optimizer.predicted
    watch = Watch(model)
    model(X)
    assert watch.saw(theta)
