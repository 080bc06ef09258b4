"""Lightning: one line, `optimizer.attach(self)`, in configure_optimizers.

Lightning calls neither optimizer.eval() nor train(), it calls `module.training_step` and no forward of the whole one,
runs forward and backward inside the closure of step(), and saves after every other callback: all of it is up to attach.
Names say which trap of clients.md a test is about.
"""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn
from watch import Watch, clones, equal, every_kind, every_native, weights_in_mode

from xgrad_optim import XAdamW

pytest.importorskip("lightning", reason="needs lightning: make test-clients")
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, TensorDataset

pytestmark = [
    pytest.mark.filterwarnings("ignore:::lightning"),
]

X = torch.randn(48, 5, generator=torch.Generator().manual_seed(3))
Y = torch.randn(48, 3, generator=torch.Generator().manual_seed(4))
TRAIN = DataLoader(TensorDataset(X[:32], Y[:32]), batch_size=4)
VALIDATE = DataLoader(TensorDataset(X[32:], Y[32:]), batch_size=8)
either_precision = pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])


class Module(LightningModule):
    def __init__(self, make=XAdamW, **options):
        super().__init__()
        self.make, self.options = make, {"lr": 0.01, "prediction_steps": 2.0} | options
        self.encoder = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh())
        self.head = nn.Linear(7, 3)

    def loss(self, batch):
        x, y = batch
        return (self.head(self.encoder(x)) - y).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        self.raw = self.make(self.parameters(), **self.options)
        self.raw.attach(self)
        self.watch = Watch(self.encoder[0], self.raw)
        return [self.raw], [torch.optim.lr_scheduler.ExponentialLR(self.raw, 0.5)]


def fit(module, folder, ckpt_path=None, callbacks=(), seed=0, **options):
    defaults = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 1, "logger": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    trainer = Trainer(default_root_dir=folder, callbacks=list(callbacks), **defaults | quiet | options)
    torch.manual_seed(seed)
    trainer.fit(module, TRAIN, VALIDATE, ckpt_path=ckpt_path)
    return trainer


def new_module(cls=Module, seed=0, **options):
    seed_everything(seed, verbose=False)
    return cls(**options)


def names(module):
    return [name for name, _ in module.named_parameters()]


@every_kind
@either_precision
def test_training_forwards_see_theta_hat_and_validation_theta(cls, precision, tmp_path):
    """Traps 7 and 11: the submodules are called, inside the closure of step()."""
    module = new_module(make=cls)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "val_check_interval": 3}
    trainer = fit(module, tmp_path, precision=precision, **options)
    assert trainer.global_step == 12
    assert module.watch.counts == {True: 24, False: 1 + 3 * 2 * 2}
    assert module.watch.wrong == 0


@every_kind
@either_precision
def test_validating_and_saving_changes_no_bit_of_training(cls, precision, tmp_path):
    plain = new_module(make=cls)
    fit(plain, tmp_path, precision=precision, limit_val_batches=0)
    busy = new_module(make=cls)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(busy, tmp_path, precision=precision, val_check_interval=2, callbacks=[saving])
    assert equal(weights_in_mode(busy.raw, True), weights_in_mode(plain.raw, True))


@every_kind
@either_precision
@pytest.mark.parametrize("saving", [{"every_n_train_steps": 8}, {"every_n_epochs": 1}], ids=["predicted", "true"])
def test_a_run_resumes_bit_for_bit(cls, precision, saving, tmp_path):
    """Trap 6: Lightning restores the model before configure_optimizers, and the optimizer after.

    It saves before a validation or after one. At the end of an epoch, because its data does not resume within one.
    """
    callback = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **saving)
    module = new_module(make=cls)
    fit(module, tmp_path, precision=precision, callbacks=[callback])
    resumed = new_module(make=cls, seed=9)
    fit(resumed, tmp_path / "resumed", precision=precision, ckpt_path=tmp_path / "step=8.ckpt")
    for predicted in (True, False):
        assert equal(weights_in_mode(resumed.raw, predicted), weights_in_mode(module.raw, predicted))


class TrueWeights(Callback):
    """theta after every step, taken where it can't disturb: in a copy of the optimizer."""

    def __init__(self):
        self.theta = {}

    def on_train_batch_end(self, trainer, module, *_):
        self.theta[trainer.global_step] = weights_in_mode(module.raw, predicted=False)


def test_checkpoint_files_hold_theta(tmp_path):
    """Trap 5: in mid-training, after validation, at the end; and the optimizer's part of the file says so."""
    recorder = TrueWeights()
    saving = [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="val-{step}", monitor="val_loss", save_top_k=-1),
    ]
    module = new_module()
    trainer = fit(module, tmp_path, callbacks=[recorder, *saving])
    trainer.save_checkpoint(tmp_path / "final-step=24.ckpt")
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 8 + 3 + 1
    for file in files:
        saved = torch.load(file, weights_only=False)
        step = int(file.stem.rpartition("=")[2])
        assert equal([saved["state_dict"][name] for name in names(module)], recorder.theta[step])
        assert not any(state["predicted"] for state in saved["optimizer_states"][0]["state"].values())


def test_a_second_fit_starts_at_theta_with_an_optimizer_of_its_own(tmp_path):
    """configure_optimizers runs again, while the first optimizer's hooks are on the module."""
    module = new_module()
    fit(module, tmp_path)
    first, theta = module.raw, weights_in_mode(module.raw, predicted=False)
    seen = []

    class FirstBatch(Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(equal(module.parameters(), theta))

    fit(module, tmp_path, callbacks=[FirstBatch()], enable_checkpointing=False)
    assert seen[0] and not any(seen[1:])
    assert module.raw is not first
    assert module.watch.counts == {True: 24, False: 7} and module.watch.wrong == 0


class FindsItsRate(Module):
    def __init__(self):
        super().__init__()
        self.lr = 0.01

    def configure_optimizers(self):
        self.options["lr"] = self.lr
        return super().configure_optimizers()


def test_finding_the_learning_rate_leaves_the_model_as_it_was(tmp_path):
    """Tuner.lr_find trains, and loads the model of before into a model that holds theta_hat."""
    module = new_module(FindsItsRate)
    before = clones(module.parameters())
    trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, max_epochs=1, logger=False)
    Tuner(trainer).lr_find(module, TRAIN, num_training=8, update_attr=False)
    assert equal(module.parameters(), before)
    trainer.fit(module, TRAIN, VALIDATE)
    assert module.watch.wrong == 0


class Manual(Module):
    """Manual optimization: two optimizers, one of them with a closure, toggled like the halves of a GAN."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        encoder, head = self.optimizers()
        with encoder.toggle_model():
            encoder.zero_grad()
            self.manual_backward(self.loss(batch))
            self.clip_gradients(encoder, gradient_clip_val=0.5)
            encoder.step()

        def closure():
            head.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        with head.toggle_model():
            head.step(closure=closure)

    def configure_optimizers(self):
        parts = (self.encoder, self.head)
        self.raws = [self.make(part.parameters(), **self.options) for part in parts]
        for raw in self.raws:
            raw.attach(self)
        self.watches = [Watch(part, raw) for part, raw in zip(parts, self.raws, strict=True)]
        return self.raws


@every_kind
@either_precision
def test_manual_optimization_with_two_optimizers(cls, precision, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=16, save_top_k=-1)
    module = new_module(Manual, make=cls)
    fit(module, tmp_path, precision=precision, val_check_interval=3, callbacks=[saving])
    for watch in module.watches:
        assert watch.counts == {True: 48, False: 1 + 3 * 2 * 2}
        assert watch.wrong == 0
    resumed = new_module(Manual, make=cls, seed=9)
    fit(resumed, tmp_path / "resumed", precision=precision, ckpt_path=tmp_path / "step=16.ckpt")
    for ours, theirs in zip(resumed.raws, module.raws, strict=True):
        assert equal(weights_in_mode(ours, True), weights_in_mode(theirs, True))


class UsesTheWrapper(Module):
    """Trap 3: what `self.optimizers()` returns is of our class, but has attributes of its own."""

    def on_train_batch_end(self, *_):
        wrapper = self.optimizers()
        assert wrapper is not self.raw and isinstance(wrapper, self.make)
        theta, theta_hat = (weights_in_mode(self.raw, predicted) for predicted in (False, True))
        with wrapper.true_weights():
            assert equal(self.parameters(), theta)
            self.loss((X[:4], Y[:4]))
            assert equal(self.parameters(), theta)
        assert equal(self.parameters(), theta_hat)
        wrapper.eval()
        assert equal(self.parameters(), theta) and not self.raw.predicted


def test_the_wrapper_switches_the_optimizer_itself(tmp_path):
    plain, module = new_module(), new_module(UsesTheWrapper)
    fit(plain, tmp_path)
    fit(module, tmp_path)
    assert module.watch.wrong == 24, "the look into true_weights(), with the module in training mode"
    assert equal(weights_in_mode(module.raw, True), weights_in_mode(plain.raw, True))


class AverageTrueWeights(EMAWeightAveraging):
    """The recipe of examples/lightning_module.py: averages are of theta, and are exchanged with theta."""

    def _at_theta(hook):
        def wrapped(self, trainer, *args):
            for optimizer in trainer.optimizers:
                optimizer.eval()
            return hook(self, trainer, *args)

        return wrapped

    on_train_batch_end = _at_theta(EMAWeightAveraging.on_train_batch_end)
    on_validation_epoch_start = _at_theta(EMAWeightAveraging.on_validation_epoch_start)
    on_train_end = _at_theta(EMAWeightAveraging.on_train_end)


class Averages(Callback):
    """The average as it must come out, and the weights that validation runs at."""

    def __init__(self, decay):
        self.mix, self.average, self.validated = get_ema_avg_fn(decay), None, []

    def on_train_batch_end(self, trainer, module, *_):
        theta = weights_in_mode(module.raw, predicted=False)
        if self.average is None:
            self.average = theta
        else:
            self.average = [self.mix(a, t, None) for a, t in zip(self.average, theta, strict=True)]

    def on_validation_batch_start(self, trainer, module, *_):
        if self.average is not None:
            self.validated.append(equal(module.parameters(), self.average))


@every_native
@pytest.mark.parametrize("master_weights", [False, True], ids=["plain", "master"])
def test_averages_of_theta(cls, master_weights, tmp_path):
    """Trap 9: EMAWeightAveraging exchanges p.data around validation."""
    plain = new_module(make=cls, master_weights=master_weights)
    fit(plain, tmp_path)
    module = new_module(make=cls, master_weights=master_weights)
    expected, averaging = Averages(decay=0.5), AverageTrueWeights(decay=0.5)
    trained = {}

    class Last(Callback):
        def on_train_epoch_end(self, trainer, module):
            trained["theta_hat"] = weights_in_mode(module.raw, predicted=True)

    fit(module, tmp_path, callbacks=[expected, averaging, Last()], enable_checkpointing=False)
    assert expected.validated == [True] * 6
    assert equal(trained["theta_hat"], weights_in_mode(plain.raw, predicted=True))
    assert equal(module.parameters(), expected.average), "on_train_end leaves the average in the model"
