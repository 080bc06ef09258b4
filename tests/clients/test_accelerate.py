"""accelerate: one line, `optimizer.attach(model)`, before or after `prepare`.

prepare() reloads the optimizer's own state and wraps it in an AcceleratedOptimizer, whose forward of the model runs
under autocast; save_state() writes models first, load_state() reads them first. Names say which trap of clients.md a
test is about.
"""

import pytest
import torch
from cases import small_model
from watch import Watch, equal, every_kind, weights_in_mode

from xgrad_optim import XAdamW

pytest.importorskip("accelerate", reason="needs accelerate: make test-clients")
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("default:::accelerate")

X = torch.randn(64, 5, generator=torch.Generator().manual_seed(3))
Y = torch.randn(64, 3, generator=torch.Generator().manual_seed(4))
either_precision = pytest.mark.parametrize("mixed_precision", ["no", "bf16"])


@pytest.fixture(autouse=True)
def _new_accelerator():
    """Its state is one for the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A training run as accelerate's own examples write it."""

    def __init__(self, make=XAdamW, mixed_precision="no", seed=0, attaches_first=True, **options):
        self.accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
        model = small_model(torch.float32, seed)
        self.raw = make(model.parameters(), **{"lr": 0.01, "prediction_steps": 2.0} | options)
        if attaches_first:
            self.raw.attach(model)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.raw, 0.9)
        self.model, self.optimizer, self.data, self.scheduler = self.accelerator.prepare(
            model, self.raw, DataLoader(TensorDataset(X, Y), batch_size=8), scheduler
        )
        if not attaches_first:
            self.raw.attach(self.model)
        self.watch = Watch(self.accelerator.unwrap_model(self.model)[0], self.raw)

    def loss(self, x, y):
        return (self.model(x) - y).square().mean()

    def train(self):
        """One epoch: 8 batches, 4 steps."""
        self.model.train()
        for x, y in self.data:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.loss(x, y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()

    def evaluate(self):
        self.model.eval()
        with torch.no_grad():
            return self.loss(X, Y).item()


@every_kind
@either_precision
@pytest.mark.parametrize("attaches_first", [True, False], ids=["attach, prepare", "prepare, attach"])
def test_training_forwards_see_theta_hat_and_evaluations_theta(cls, mixed_precision, attaches_first):
    run = Run(cls, mixed_precision, attaches_first=attaches_first)
    for _ in range(2):
        run.train()
        run.evaluate()
    assert run.watch.counts == {True: 16, False: 2}
    assert run.watch.wrong == 0


@every_kind
@either_precision
def test_evaluating_and_saving_changes_no_bit_of_training(cls, mixed_precision, tmp_path):
    plain, busy = Run(cls, mixed_precision), Run(cls, mixed_precision)
    for _ in range(3):
        plain.train()
        busy.train()
        busy.accelerator.get_state_dict(busy.model)
        busy.evaluate()
        busy.accelerator.save_model(busy.model, tmp_path)
    assert equal(weights_in_mode(busy.raw, True), weights_in_mode(plain.raw, True))


@every_kind
@either_precision
def test_a_run_resumes_bit_for_bit(cls, mixed_precision, tmp_path):
    """Trap 6, in accelerate's order, and trap 10: prepare() has loaded the state of a run of its own before."""
    run = Run(cls, mixed_precision)
    run.train()
    run.accelerator.save_state(tmp_path)
    run.train()
    resumed = Run(cls, mixed_precision, seed=9)
    resumed.train()
    resumed.accelerator.load_state(tmp_path)
    resumed.train()
    for predicted in (True, False):
        assert equal(weights_in_mode(resumed.raw, predicted), weights_in_mode(run.raw, predicted))


def test_saved_model_files_hold_theta(tmp_path):
    """Trap 5."""
    run = Run()
    run.train()
    theta_of_state = weights_in_mode(run.raw, predicted=False)
    assert run.raw.predicted
    run.accelerator.save_state(tmp_path / "state")
    run.train()
    theta = weights_in_mode(run.raw, predicted=False)
    run.accelerator.save_model(run.model, tmp_path / "model")
    for folder, expected in (("state", theta_of_state), ("model", theta)):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert equal([saved[name] for name, _ in small_model().named_parameters()], expected)


def test_prepare_in_mid_training_changes_no_bit():
    """Trap 10: it calls load_state_dict(state_dict()), and an attached state_dict() says theta."""
    plain, twice = Run(), Run()
    plain.train()
    twice.train()
    twice.optimizer = twice.accelerator.prepare_optimizer(twice.raw)
    plain.train()
    twice.train()
    assert equal(weights_in_mode(twice.raw, True), weights_in_mode(plain.raw, True))


@pytest.mark.parametrize("mode", [True, False], ids=["predicted", "true"])
def test_a_step_that_the_scaler_skips_changes_nothing(mode):
    """Trap 14: fp16 needs a GPU, but the scaler's protocol through AcceleratedOptimizer does not."""
    run = Run()
    optimizer = AcceleratedOptimizer(run.raw, scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100))
    for step, factor in enumerate((1.0, float("inf"), 1.0)):
        run.model.train(mode)
        optimizer.scaler.scale(run.loss(X, Y) * factor).backward()
        before = weights_in_mode(run.raw, True), weights_in_mode(run.raw, False)
        was_predicted = run.raw.predicted
        optimizer.step()
        assert optimizer.step_was_skipped is (step == 1)
        after = weights_in_mode(run.raw, True), weights_in_mode(run.raw, False)
        assert all(map(equal, after, before)) is (step == 1)
        assert run.raw.predicted is (was_predicted if step == 1 else True)
        optimizer.zero_grad()
    assert run.watch.wrong == 0
