"""What convergence.py trains: the tasks, the pairs of optimizers, and one run of one of them."""

import dataclasses
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))  # the table of optimizers

from family import FAMILY

from xgrad_optim.optimizer import XGradOptimizer

Variant = Literal["base", "x"]

EVALUATIONS = 20
"""Validations in a run, evenly spaced; the last one is at the last step."""

CONTEXT = 32
"""Characters that the language model sees."""

VALIDATION_WINDOWS = 256
"""Windows of the held-out text that are evaluated: all of them would take longer than the training."""


@dataclass(frozen=True)
class Pair:
    """An optimizer and its X class. `options` go to both; what is not among them has its default."""

    names: dict[Variant, str]
    base: Callable[..., torch.optim.Optimizer]
    x: Callable[..., torch.optim.Optimizer]
    options: dict[str, float] = field(default_factory=dict)


PAIRS = {
    member.name.removeprefix("X").lower(): Pair(
        {"base": member.base_name, "x": member.name},
        # Where torch has no such optimizer, the X class without prediction is the base.
        member.like if member.is_base else partial(member.cls, prediction_steps=0),
        member.cls,
        member.defaults,
    )
    for member in FAMILY
}


@dataclass(frozen=True)
class Data:
    """Examples by their first dimension; `facts` go to the results file."""

    train_inputs: Tensor
    train_targets: Tensor
    validation_inputs: Tensor
    validation_targets: Tensor
    classes: int
    facts: dict[str, int | str]


@dataclass(frozen=True)
class Task:
    """A data set, a model for it and how both optimizers of a pair train it.

    `lr` is that of {0.001, 0.003, 0.01, ...} with which the *base* had the lowest mean final validation loss on the
    seeds 100, 101 and 102, at the default number of steps: the X classes were not looked at.
    """

    title: str
    load: Callable[[], Data]
    model: Callable[[int], nn.Module]
    steps: int
    batch_size: int
    lr: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One training run, by names only, so that it can be sent to another process."""

    task: str
    pair: str
    variant: Variant
    seed: int
    steps: int
    prediction_steps: float
    device: str


@dataclass
class Curves:
    """What a run measured. `train_loss` is the mean since the last evaluation, for an X class at theta_hat."""

    hyperparameters: dict[str, Any]
    steps: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_accuracy: list[float] = field(default_factory=list)
    seconds: float = 0.0


def digits_data() -> Data:
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    # Pixels are 0 to 16.
    train_inputs, validation_inputs = (torch.tensor(part / 16).float().view(-1, 1, 8, 8) for part in split[:2])
    train_targets, validation_targets = (torch.tensor(part).long() for part in split[2:])
    return Data(
        train_inputs,
        train_targets,
        validation_inputs,
        validation_targets,
        classes=10,
        facts={"train_images": len(train_inputs), "validation_images": len(validation_inputs)},
    )


def digits_model(classes: int) -> nn.Module:
    """A strided convolution in place of pooling, whose gradient is not deterministic on a GPU."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, classes),
    )


def text_data() -> Data:
    """Characters of Python's help texts; the last tenth is held out.

    Topics include each other's text, so that each paragraph is kept once: else much of the held-out text would have
    been trained on.
    """
    paragraphs = dict.fromkeys(paragraph.strip("\n") for topic in topics.values() for paragraph in topic.split("\n\n"))
    text = "\n\n".join(paragraphs)
    characters = sorted(set(text))
    index = {character: position for position, character in enumerate(characters)}
    ids = torch.tensor([index[character] for character in text])
    train_length = len(ids) * 9 // 10
    train = ids[:train_length].unfold(0, CONTEXT + 1, 1)
    validation = ids[train_length:].unfold(0, CONTEXT + 1, CONTEXT)
    validation = validation[torch.linspace(0, len(validation) - 1, VALIDATION_WINDOWS).long()]
    return Data(
        train_inputs=train[:, :-1],
        train_targets=train[:, 1:],
        validation_inputs=validation[:, :-1],
        validation_targets=validation[:, 1:],
        classes=len(characters),
        facts={
            "train_characters": train_length,
            "validation_characters": VALIDATION_WINDOWS * CONTEXT,
            # The text differs between releases of Python, and so do the losses.
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
        },
    )


class CharacterModel(nn.Module):
    """Logits of the next character at every position."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, 32)
        self.gru = nn.GRU(32, 128, batch_first=True)
        self.head = nn.Linear(128, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.gru(self.embedding(inputs))
        logits: Tensor = self.head(hidden)
        return logits


def _lr(task: str) -> dict[str, float]:
    return {pair: member.lr[task] for pair, member in zip(PAIRS, FAMILY, strict=True)}


TASKS = {
    "digits": Task(
        title="CNN on scikit-learn's handwritten digits",
        load=digits_data,
        model=digits_model,
        steps=400,
        batch_size=64,
        lr=_lr("digits"),
    ),
    "text": Task(
        title="character GRU on CPython's help texts",
        load=text_data,
        model=CharacterModel,
        steps=400,
        batch_size=32,
        lr=_lr("text"),
    ),
}


def start_worker() -> None:
    """Prepare a process for runs whose results depend neither on the number of cores nor on each other."""
    # Ctrl-C reaches every process: a worker ends without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)
    # cuBLAS is deterministic only with a workspace of fixed size; read when the GPU is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def train(run: Run) -> Curves:
    """Train once. Initial weights and batches depend on the seed only: both optimizers of a pair get the same."""
    started = time.perf_counter()
    task, data = TASKS[run.task], _data_on(run.task, run.device)
    torch.manual_seed(run.seed)
    model = task.model(data.classes).to(run.device)
    optimizer = _optimizer(run, model)
    batches = _batches(len(data.train_inputs), task.batch_size, run.seed)
    curves = Curves(hyperparameters=dict(optimizer.defaults))
    evaluation_steps = {round(run.steps * count / EVALUATIONS) for count in range(1, EVALUATIONS + 1)}
    losses = []
    for step in range(1, run.steps + 1):
        batch = next(batches).to(run.device)
        optimizer.zero_grad()
        loss = _loss(model(data.train_inputs[batch]), data.train_targets[batch])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if step in evaluation_steps:
            curves.steps.append(step)
            curves.train_loss.append(torch.stack(losses).mean().item())
            validation_loss, validation_accuracy = _validate(model, optimizer, data)
            curves.validation_loss.append(validation_loss)
            curves.validation_accuracy.append(validation_accuracy)
            losses.clear()
    curves.seconds = time.perf_counter() - started
    return curves


@cache
def _data_on(task: str, device: str) -> Data:
    """The task's data, loaded once in a process."""
    data = TASKS[task].load()
    return dataclasses.replace(
        data,
        train_inputs=data.train_inputs.to(device),
        train_targets=data.train_targets.to(device),
        validation_inputs=data.validation_inputs.to(device),
        validation_targets=data.validation_targets.to(device),
    )


def _optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    pair = PAIRS[run.pair]
    options = pair.options | {"lr": TASKS[run.task].lr[run.pair]}
    if run.variant == "base":
        return pair.base(model.parameters(), **options)
    return pair.x(model.parameters(), prediction_steps=run.prediction_steps, **options)


def _batches(examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices of the batches, epoch after epoch; the incomplete last batch of each is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from order[: examples - examples % batch_size].split(batch_size)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, over images or over characters."""
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@torch.no_grad()
def _validate(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> tuple[float, float]:
    """Loss and accuracy on the validation set, at the true weights."""
    with optimizer.true_weights() if isinstance(optimizer, XGradOptimizer) else nullcontext():
        model.eval()
        logits = model(data.validation_inputs)
        model.train()
    loss = _loss(logits, data.validation_targets)
    accuracy = (logits.argmax(-1) == data.validation_targets).float().mean()
    return loss.item(), accuracy.item()
