"""What people do beside a training loop, as docs/attach.md says to do it: averages, batch statistics, clipping, tied
weights and the optimizer inside of backward.

Each of them reads or writes parameters, or steps at another time than usual, and each has a way to get theta_hat where
theta is meant. (Averages by AveragedModel are in test_training_loop.py.)
"""

import copy

import pytest
import torch
from cases import every_optimizer, loss_of, small_model, train_step
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

OPTIONS = {"lr": 0.05, "weight_decay": 0.1, "prediction_steps": 2.0}

either_precision = pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])


def trained(case, steps=3, **options):
    model = small_model()
    optimizer = case.make(model.parameters(), **OPTIONS, **options)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def values(model):
    return [param.detach().clone() for param in model.parameters()]


def thetas(model, optimizer):
    with optimizer.true_weights():
        return values(model)


def assert_equal(tensors, others):
    for tensor, other in zip(tensors, others, strict=True):
        assert torch.equal(tensor, other)


# -- averages and batch statistics ------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("is_attached", [False, True], ids=["alone", "attached"])
def test_update_bn_inside_true_weights_collects_the_statistics_of_theta(case, is_attached):
    """It runs the model in training mode, where an attached one would otherwise go to theta_hat."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3)).double()
    optimizer = case.make(model.parameters(), **OPTIONS)
    if is_attached:
        optimizer.attach(model)
    for step in range(3):
        train_step(model, optimizer, step)
    batches = [torch.randn(16, 5, dtype=torch.float64) for _ in range(3)]
    with optimizer.true_weights():
        at_theta = copy.deepcopy(model)
        update_bn(batches, model)
    update_bn(batches, at_theta)
    assert_equal(model[1].buffers(), at_theta[1].buffers())
    assert optimizer.predicted


@every_optimizer
@either_precision
@pytest.mark.parametrize("is_attached", [False, True], ids=["alone", "attached"])
def test_evaluating_an_ema_in_the_model_leaves_no_trace(case, master_weights, is_attached):
    """Foreign weights come in after eval() and leave before train(): the run goes on with the bits that it had."""
    (model, optimizer), (twin, expected) = (trained(case, 0, master_weights=master_weights) for _ in range(2))
    if is_attached:
        optimizer.attach(model)
    averaged = AveragedModel(small_model(), multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(5):
        model.train()
        train_step(model, optimizer, step)
        train_step(twin, expected, step)
        with optimizer.true_weights():
            averaged.update_parameters(model)
        model.eval()
        optimizer.eval()
        theta = values(model)
        with torch.no_grad():
            for param, average in zip(model.parameters(), averaged.parameters(), strict=True):
                param.copy_(average)
            assert torch.equal(loss_of(model, 50), loss_of(averaged, 50))
            for param, value in zip(model.parameters(), theta, strict=True):
                param.copy_(value)
        optimizer.train()
        assert_equal(values(model), values(twin))
    assert_equal(thetas(model, optimizer), thetas(twin, expected))


# -- clipping ---------------------------------------------------------------------------------------------------------

BOUND = 0.1


def clip_data(model):
    for param in model.parameters():
        param.data.clamp_(-BOUND, BOUND)


def clip_in_place(model):
    with torch.no_grad():
        for param in model.parameters():
            param.clamp_(-BOUND, BOUND)


either_clip = pytest.mark.parametrize("clip", [clip_data, clip_in_place], ids=["data", "no_grad"])


@every_optimizer
@either_precision
@either_clip
def test_clipping_inside_true_weights_bounds_theta(case, master_weights, clip):
    """The WGAN critic: theta keeps the bound, up to the rounding of one addition, and with master weights exactly."""
    model, optimizer = trained(case, 0, master_weights=master_weights)
    for step in range(4):
        train_step(model, optimizer, step)
        with optimizer.true_weights():
            clip(model)
            clipped = values(model)
        for theta, value in zip(thetas(model, optimizer), clipped, strict=True):
            torch.testing.assert_close(theta, value, rtol=0, atol=0 if master_weights else 1e-15)
            assert value.abs().max() <= BOUND


@every_optimizer
@either_precision
def test_clipping_after_step_bounds_theta_hat_only(case, master_weights):
    """torch's WGAN line as it stands: the clipped theta_hat is what the model sees, and theta is a prediction away. By
    way of no_grad a warning says so; `.data` hides the write even from autograd."""
    for clip in (clip_in_place, clip_data):
        model, optimizer = trained(case, master_weights=master_weights)
        before = thetas(model, optimizer)
        displacement = [hat - theta for hat, theta in zip(values(model), before, strict=True)]
        clip(model)
        clipped = values(model)
        if clip is clip_in_place:
            with pytest.warns(UserWarning, match="true_weights"):
                optimizer.eval()
        else:
            optimizer.eval()
        for theta, hat, moved in zip(values(model), clipped, displacement, strict=True):
            torch.testing.assert_close(theta, hat - moved, rtol=0, atol=1e-15)
        assert max(theta.abs().max() for theta in values(model)) > BOUND


@every_optimizer
@pytest.mark.parametrize("clip", [torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_])
def test_clipping_gradients(case, clip):
    """The step takes what clipping has left in .grad."""
    (model, optimizer), (twin, expected) = (trained(case, 0) for _ in range(2))
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        raw = [param.grad.clone() for param in model.parameters()]
        clip(model.parameters(), 0.01)
        for param, grad, own in zip(twin.parameters(), raw, model.parameters(), strict=True):
            assert not torch.equal(own.grad, grad)
            param.grad = own.grad.clone()
        optimizer.step()
        expected.step()
        assert_equal(values(model), values(twin))


# -- tied weights -----------------------------------------------------------------------------------------------------


class LanguageModel(torch.nn.Module):
    """The smallest with an input embedding that is the output layer, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 5)
        self.body = torch.nn.Linear(5, 5)
        self.head = torch.nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)).tanh())


@every_optimizer
def test_tied_weights_are_updated_once(case):
    """One parameter under two names: one state, one step, and one storage in what is saved."""
    model = LanguageModel()
    optimizer = case.make(model.parameters(), **OPTIONS)
    optimizer.attach(model)
    lone = torch.nn.Parameter(model.head.weight.detach().clone())
    expected = case.make([lone], **OPTIONS)
    tokens = torch.arange(11)
    for _ in range(4):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens), tokens.roll(1)).backward()
        lone.grad = model.head.weight.grad.clone()
        optimizer.step()
        expected.step()
        assert torch.equal(model.head.weight, lone)
    assert model.head.weight is model.embedding.weight
    assert optimizer.state[model.head.weight]["step"] == 4
    saved = model.state_dict()
    assert saved["head.weight"].data_ptr() == saved["embedding.weight"].data_ptr()
    expected.eval()
    assert torch.equal(saved["head.weight"], lone)


# -- the optimizer inside of backward ---------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("is_attached", [False, True], ids=["alone", "attached"])
def test_one_optimizer_per_parameter_inside_of_backward(case, is_attached):
    """Each gradient is used and freed as soon as it is complete; the bits are those of one optimizer after backward."""
    model, twin = small_model(), small_model()
    optimizers = {param: case.make([param], **OPTIONS) for param in model.parameters()}
    expected = case.make(twin.parameters(), **OPTIONS)
    if is_attached:
        for optimizer in optimizers.values():
            optimizer.attach(model)
        expected.attach(twin)

    def step_and_free(param):
        optimizers[param].step()
        param.grad = None

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step_and_free)
    for step in range(4):
        loss_of(model, step).backward()
        train_step(twin, expected, step)
        assert all(param.grad is None for param in model.parameters())
        assert_equal(values(model), values(twin))
        if is_attached:
            model.eval(), twin.eval()
            assert torch.equal(loss_of(model, 50), loss_of(twin, 50))
            model.train(), twin.train()
        else:
            for optimizer in (*optimizers.values(), expected):
                optimizer.eval()
            assert_equal(values(model), values(twin))
            for optimizer in (*optimizers.values(), expected):
                optimizer.train()
