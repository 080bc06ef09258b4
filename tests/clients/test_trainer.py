"""transformers.Trainer: one line, `optimizer.attach(model)`, beside `optimizers=(optimizer, scheduler)`.

Trainer calls optimizer.train() in its training step and optimizer.eval() in its evaluation loop, and nothing around
its checkpoints, the final model or load_best_model_at_end: those need attach. Names say which trap of clients.md a test
is about.
"""

from pathlib import Path

import pytest
import torch
from watch import Watch, equal, every_kind, lr_of, weights_in_mode

from xgrad_optim import XAdamW

pytest.importorskip("transformers", reason="needs transformers: make test-clients")
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

pytestmark = pytest.mark.filterwarnings("default:::transformers", "default:::accelerate", "default:::huggingface_hub")

TOKENS = torch.randint(32, (48, 8), generator=torch.Generator().manual_seed(3))
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def tiny_model(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32, max_position_embeddings=16, tie_word_embeddings=True))


def make_trainer(folder, make=XAdamW, lr=0.01, seed=0, callbacks=(), **arguments):
    model = tiny_model(seed)
    optimizer = make(model.parameters(), lr=lr, prediction_steps=2.0)
    optimizer.attach(model)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(output_dir=str(folder), **defaults | arguments)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=DATA[:40],
        eval_dataset=DATA[40:],
        optimizers=(optimizer, scheduler),
        callbacks=list(callbacks),
    )
    return trainer, model, optimizer


def model_of(weights):
    """A model that has no optimizer."""
    model = tiny_model()
    with torch.no_grad():
        for param, value in zip(model.parameters(), weights, strict=True):
            param.copy_(value)
    return model


def evaluation_of(weights, folder, **arguments):
    settings = TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **arguments)
    return Trainer(model_of(weights), settings, eval_dataset=DATA[40:]).evaluate()["eval_loss"]


@every_kind
def test_training_forwards_see_theta_hat_and_evaluations_theta(cls, tmp_path):
    trainer, model, optimizer = make_trainer(tmp_path, cls, lr_of(cls), eval_strategy="steps", eval_steps=2)
    watch = Watch(model.model.layers[1].mlp, optimizer)
    trainer.train()
    assert watch.counts == {True: 12, False: 3}
    assert watch.wrong == 0
    assert trainer.evaluate()["eval_loss"] == evaluation_of(weights_in_mode(optimizer, False), tmp_path)


@every_kind
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16 autocast"])
def test_evaluating_and_saving_changes_no_bit_of_training(cls, bf16, tmp_path):
    trainer, _, optimizer = make_trainer(tmp_path / "plain", cls, lr_of(cls), bf16=bf16)
    trainer.train()
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer, _, busy = make_trainer(tmp_path / "busy", cls, lr_of(cls), bf16=bf16, **often)
    trainer.train()
    assert equal(weights_in_mode(busy, predicted=True), weights_in_mode(optimizer, predicted=True))


def test_an_evaluation_under_autocast_is_that_of_theta(tmp_path):
    trainer, _, optimizer = make_trainer(tmp_path, bf16=True)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == evaluation_of(weights_in_mode(optimizer, False), tmp_path, bf16=True)


class TrueWeightsAtSaves(TrainerCallback):
    """theta at every checkpoint, taken where it can't disturb: in a copy of the optimizer."""

    def __init__(self):
        self.theta = {}

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.theta[state.global_step] = weights_in_mode(optimizer.optimizer, predicted=False)


def test_saved_model_files_hold_theta(tmp_path):
    """Trap 5: at a step without an evaluation, and at the end. Trap 17: the tied head is written once."""
    recorder = TrueWeightsAtSaves()
    trainer, model, _ = make_trainer(tmp_path, save_strategy="steps", save_steps=2, callbacks=[recorder])
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    names = [name for name, _ in model.named_parameters()]
    for folder, step in (("checkpoint-2", 2), ("checkpoint-4", 4), ("checkpoint-6", 6), ("final", 6)):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == set(names)
        assert equal([saved[name] for name in names], recorder.theta[step])
        reloaded = LlamaForCausalLM.from_pretrained(tmp_path / folder)
        assert equal(reloaded.parameters(), recorder.theta[step])


@every_kind
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_run_resumes_bit_for_bit(cls, evaluates, tmp_path):
    """Trap 6, in Trainer's order: the model is saved first and loaded first. Trap 10: prepare() reloads the state."""
    arguments = {"save_strategy": "steps", "save_steps": 3}
    if evaluates:
        arguments |= {"eval_strategy": "steps", "eval_steps": 1}
    trainer, _, optimizer = make_trainer(tmp_path, cls, lr_of(cls), **arguments)
    trainer.train()
    resumed, _, resumed_optimizer = make_trainer(tmp_path, cls, lr_of(cls), seed=9, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6
    for predicted in (True, False):
        assert equal(weights_in_mode(resumed_optimizer, predicted), weights_in_mode(optimizer, predicted))


def test_the_best_model_comes_back_as_it_was_evaluated(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, model, _ = make_trainer(tmp_path, lr=0.2, max_steps=5, load_best_model_at_end=True, **often)
    trainer.train()
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert all(torch.equal(saved[name], param) for name, param in model.named_parameters())
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_weights_loaded_after_training_are_evaluated_as_they_are(tmp_path):
    """Trap 4: the model holds theta_hat when they come."""
    trainer, model, optimizer = make_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    optimizer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    model.load_state_dict(saved, strict=False)
    weights = [saved[name] for name, _ in model.named_parameters()]
    assert trainer.evaluate()["eval_loss"] == evaluation_of(weights, tmp_path)


def test_the_optimizer_file_says_what_the_model_file_holds(tmp_path):
    trainer, _, _ = make_trainer(tmp_path, save_strategy="steps", save_steps=6)
    trainer.train()
    saved = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)
    assert not any(state["predicted"] for state in saved["state"].values())


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    optimizers = []
    for checkpoints in (False, True):
        trainer, _, optimizer = make_trainer(tmp_path, activation_checkpointing=checkpoints)
        trainer.train()
        optimizers.append(optimizer)
    assert equal(*(weights_in_mode(optimizer, predicted=True) for optimizer in optimizers))


def test_generation_in_evaluation_mode_is_that_of_theta(tmp_path):
    trainer, model, optimizer = make_trainer(tmp_path, lr=0.3)
    trainer.train()
    assert optimizer.predicted
    reference = model_of(weights_in_mode(optimizer, predicted=False))
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ours, theirs = (m.eval().generate(TOKENS[:2, :3], **options) for m in (model, reference))
    assert equal(ours.logits, theirs.logits)
    assert not optimizer.predicted
