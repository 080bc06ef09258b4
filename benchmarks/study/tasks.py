"""The study's tasks: data that ships with a dependency or is generated, a model, and its loss.

A seed decides about all that is random in a run: the initial weights, the batches, and where the data are generated or
split by chance, these as well. Runs with one seed differ in the optimizer alone.
"""

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.nn.functional as F
from models import CONTEXT, VAE, CharacterGRU, CharacterTransformer, cross_entropy
from scipy.ndimage import gaussian_filter1d
from sklearn.datasets import load_digits, make_friedman1
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Problem:
    """One task with one seed.

    Attributes:
        model: with its initial weights.
    """

    model: nn.Module

    def training_loss(self) -> Tensor:
        """Of the next batch."""
        raise NotImplementedError

    def validation_loss(self) -> float:
        raise NotImplementedError


class Supervised(Problem):
    """Inputs, targets and a loss; batches are epochs in a random order, without each one's incomplete last batch."""

    def __init__(
        self,
        model: nn.Module,
        train: tuple[Tensor, Tensor],
        validation: tuple[Tensor, Tensor],
        loss: Callable[[Tensor, Tensor], Tensor],
        batch_size: int,
        seed: int,
    ) -> None:
        self.model, self.train, self.validation, self.loss = model, train, validation, loss
        self.batches = _batches(len(train[0]), batch_size, seed)

    def training_loss(self) -> Tensor:
        batch = next(self.batches)
        inputs, targets = self.train
        return self.loss(self.model(inputs[batch]), targets[batch])

    def validation_loss(self) -> float:
        inputs, targets = self.validation
        return self.loss(self.model(inputs), targets).item()


def _batches(n_examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n_examples, generator=generator)
        yield from order[: n_examples - n_examples % batch_size].split(batch_size)


# -- characters ------------------------------------------------------------------------------------------------------


@cache
def text() -> tuple[Tensor, Tensor, int]:
    """CPython's help texts, as numbers: windows to train on, windows of the last tenth, the count of characters.

    Topics include each other's text, so each paragraph is kept once: else one would validate on what was trained on.
    """
    paragraphs = dict.fromkeys(paragraph.strip("\n") for topic in topics.values() for paragraph in topic.split("\n\n"))
    joined = "\n\n".join(paragraphs)
    characters = sorted(set(joined))
    index = {character: number for number, character in enumerate(characters)}
    ids = torch.tensor([index[character] for character in joined])
    n_train = len(ids) * 9 // 10
    held_out = ids[n_train:].unfold(0, CONTEXT + 1, CONTEXT)
    held_out = held_out[torch.linspace(0, len(held_out) - 1, 128).long()]
    return ids[:n_train].unfold(0, CONTEXT + 1, 1), held_out, len(characters)


def characters(model: Callable[[int], nn.Module], batch_size: int, dtype: torch.dtype, seed: int) -> Problem:
    train, held_out, n_characters = text()
    made = model(n_characters).to(dtype)
    return Supervised(
        made, (train[:, :-1], train[:, 1:]), (held_out[:, :-1], held_out[:, 1:]), cross_entropy, batch_size, seed
    )


# -- small images ----------------------------------------------------------------------------------------------------


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's handwritten digits, 8x8 pixels of 0 to 1; a fifth of each class is held out."""
    images, labels = load_digits(return_X_y=True)
    train_x, held_x, train_y, held_y = train_test_split(
        images / 16, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return (
        (torch.tensor(train_x).float(), torch.tensor(train_y).long()),
        (torch.tensor(held_x).float(), torch.tensor(held_y).long()),
    )


def digits_cnn(seed: int) -> Problem:
    train, held_out = digits(seed)
    model = nn.Sequential(
        nn.Unflatten(-1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )
    return Supervised(model, train, held_out, cross_entropy, 64, seed)


def noisy_mlp(seed: int) -> Problem:
    """Three in ten of the training labels are drawn anew; the held-out ones are right."""
    (inputs, labels), held_out = digits(seed)
    generator = torch.Generator().manual_seed(seed)
    is_noisy = torch.rand(len(labels), generator=generator) < 0.3
    noisy = torch.where(is_noisy, torch.randint(10, labels.shape, generator=generator), labels)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    return Supervised(model, (inputs, noisy), held_out, cross_entropy, 64, seed)


class Generative(Supervised):
    """The noise of the training batches is drawn with each, that of the held-out images once."""

    def __init__(self, train: Tensor, validation: Tensor, batch_size: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed + 1)
        held_out = self._with_noise(validation)
        super().__init__(VAE(), (train, train), (held_out, held_out), lambda bound, _: bound.mean(), batch_size, seed)

    def _with_noise(self, images: Tensor) -> Tensor:
        return torch.cat([images, torch.randn(len(images), 8, generator=self.generator)], 1)

    def training_loss(self) -> Tensor:
        return self.model(self._with_noise(self.train[0][next(self.batches)])).mean()


def vae(seed: int) -> Problem:
    (train, _), (held_out, _) = digits(seed)
    return Generative(train, held_out, 64, seed)


TEMPLATES = np.array(
    [
        [5, 6, 6.5, 6.75, 7, 7, 7, 7, 6.75, 6.5, 6, 5],
        [5, 3, 3, 3.4, 3.8, 4.2, 4.6, 5, 5.4, 5.8, 5, 5],
        [5, 6, 6.5, 6.5, 6, 5.25, 4.75, 4, 3.5, 3.5, 4, 5],
        [5, 6, 6.5, 6.5, 6, 5, 5, 6, 6.5, 6.5, 6, 5],
        [5, 4.4, 3.8, 3.2, 2.6, 2.6, 5, 5, 5, 5, 5, 5],
        [5, 3, 3, 3, 3, 5, 6, 6.5, 6.5, 6, 4.5, 5],
        [5, 4, 3.5, 3.25, 3, 3, 3, 3, 3.25, 3.5, 4, 5],
        [5, 7, 7, 6.6, 6.2, 5.8, 5.4, 5, 4.6, 4.2, 5, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 4, 3.5, 3.5, 4, 5],
        [5, 4, 3.5, 3.5, 4, 5, 5, 5, 5, 4.7, 4.3, 5],
    ]
)
"""The digits of MNIST-1D (arXiv 2011.14439), as signals of twelve points."""


def mnist1d_signals(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Templates that are padded, scaled, shifted, sheared and covered by smooth and by white noise, at 40 points."""
    labels = rng.integers(10, size=n)
    signals = np.empty((n, 40))
    for i, label in enumerate(labels):
        n_padding = rng.integers(36, 61)
        signal = np.concatenate([(TEMPLATES[label] - 5) / 2, np.zeros(n_padding)])
        signal = signal * (1 + 0.4 * (rng.random() - 0.5))
        signal = np.roll(signal, rng.integers(0, 49))
        signal = signal + gaussian_filter1d(0.25 * rng.standard_normal(signal.size), 2)
        signal = np.interp(np.linspace(0, signal.size - 1, 40), np.arange(signal.size), signal)
        signals[i] = signal + np.linspace(-0.5, 0.5, 40) * 0.75 * (rng.random() - 0.5) + 0.02 * rng.standard_normal(40)
    return signals, labels


@cache
def _mnist1d(seed: int) -> tuple[Tensor, Tensor]:
    signals, labels = mnist1d_signals(3000, np.random.default_rng(seed))
    return torch.tensor(signals).float(), torch.tensor(labels)


def mnist1d(seed: int) -> Problem:
    signals, labels = _mnist1d(seed)
    model = nn.Sequential(
        nn.Unflatten(-1, (1, 40)),
        nn.Conv1d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(160, 10),
    )
    return Supervised(model, (signals[:2000], labels[:2000]), (signals[2000:], labels[2000:]), cross_entropy, 64, seed)


CIFAR10 = os.environ.get("CIFAR10", "")
"""The folder cifar-10-batches-py of who has it."""


@cache
def _cifar10() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def load(*names: str) -> tuple[Tensor, Tensor]:
        parts = [pickle.loads((Path(CIFAR10) / name).read_bytes(), encoding="bytes") for name in names]
        images = np.concatenate([part[b"data"] for part in parts]).reshape(-1, 3, 32, 32)
        return torch.tensor(images).float() / 255, torch.tensor(np.concatenate([part[b"labels"] for part in parts]))

    test = load("test_batch")
    return load(*(f"data_batch_{i}" for i in range(1, 6))), (test[0][:2000], test[1][:2000])


def cifar10(seed: int) -> Problem:
    layers = []
    for n_in, n_out in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(n_in, n_out, 3, stride=2, padding=1), nn.GroupNorm(8, n_out), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))
    return Supervised(model, *_cifar10(), cross_entropy, 64, seed)


# -- a table, and two problems whose optimum is known -----------------------------------------------------------------


def tabular(seed: int) -> Problem:
    """Friedman's first function (make_friedman1) of five of ten columns, with noise; judged by the function itself."""
    inputs, noisy = make_friedman1(1024, noise=1.0, random_state=seed)
    held_x, held_y = make_friedman1(1024, noise=0.0, random_state=seed + 10_000)
    scaled = [torch.tensor((values - 14.4) / 4.9).float()[:, None] for values in (noisy, held_y)]
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    train = torch.tensor(inputs).float() * 2 - 1, scaled[0]
    held_out = torch.tensor(held_x).float() * 2 - 1, scaled[1]
    return Supervised(model, train, held_out, F.mse_loss, 32, seed)


class Weights(nn.Module):
    """A vector to be moved."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(start)


class NoisyQuadratic(Problem):
    """0.5 * sum(h * x^2) with curvatures from 0.001 to 1, and gradient noise whose covariance is h."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.curvature = torch.logspace(-3, 0, 100)
        self.model = Weights(torch.randn(100, generator=self.generator))

    def training_loss(self) -> Tensor:
        x: Tensor = self.model.weights
        noise = 0.1 * self.curvature.sqrt() * torch.randn(100, generator=self.generator)
        return 0.5 * (self.curvature * x.square()).sum() + (noise * x).sum()

    def validation_loss(self) -> float:
        return 0.5 * (self.curvature * self.model.weights.square()).sum().item()


class CurvedValley(Problem):
    """Rosenbrock's function of 20 variables, whose least value is 0, from a random point near the origin."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = Weights(0.5 * torch.randn(20, generator=generator))

    def training_loss(self) -> Tensor:
        x: Tensor = self.model.weights
        return (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()

    def validation_loss(self) -> float:
        return self.training_loss().item()


# -- the table of tasks ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task of the study.

    Attributes:
        title: for tables and plots.
        make: `(seed) -> Problem`, with torch's generator seeded for the initial weights.
        steps: of a run.
        lr: the middle of the grid for each family of arms.
        kind: "pilot" for tasks that the pilot had looked at, "new", "long", "batch", "precision".
    """

    title: str
    make: Callable[[int], Problem]
    steps: int
    lr: dict[str, float]
    kind: str = "pilot"


def _grid(adamw: float, sgdm: float) -> dict[str, float]:
    """Muon's updates have a size of their own, Lion's are signs: a fraction of Adam's lr."""
    same = dict.fromkeys(("adamw", "adam", "adabelief"), adamw)
    return {**same, "adam3": adamw / 2, "sgdm": sgdm, "muon": 0.02, "lion": adamw / 4}


def _text(model: Callable[[int], nn.Module], batch_size: int = 32, dtype: torch.dtype = torch.float32):
    return partial(characters, model, batch_size, dtype)


TASKS = {
    "transformer": Task("char transformer", _text(CharacterTransformer, 16), 400, _grid(0.02, 0.3)),
    "gru": Task("char GRU", _text(CharacterGRU), 400, _grid(0.02, 1.0)),
    "tabular": Task("tabular regression", tabular, 600, _grid(0.01, 0.05)),
    "noisy-mlp": Task("MLP, label noise", noisy_mlp, 600, _grid(0.004, 0.06)),
    "digits": Task("digits CNN", digits_cnn, 400, _grid(0.008, 0.1)),
    "mnist1d": Task("MNIST-1D CNN", mnist1d, 400, _grid(0.03, 0.2), "new"),
    "vae": Task("VAE on digits", vae, 500, _grid(0.015, 0.01), "new"),
    "quadratic": Task("noisy quadratic", NoisyQuadratic, 500, _grid(0.03, 0.3), "new"),
    "valley": Task("curved valley", CurvedValley, 1000, _grid(0.1, 0.001), "new"),
    "transformer-2000": Task("char transformer", _text(CharacterTransformer, 16), 2000, _grid(0.01, 0.3), "long"),
    "gru-2000": Task("char GRU", _text(CharacterGRU), 2000, _grid(0.01, 1.0), "long"),
    "gru-8": Task("char GRU, batches of 8", _text(CharacterGRU, 8), 400, _grid(0.01, 0.5), "batch"),
    "gru-128": Task("char GRU, batches of 128", _text(CharacterGRU, 128), 400, _grid(0.02, 1.0), "batch"),
    "transformer-bf16": Task(
        "char transformer, bfloat16",
        _text(CharacterTransformer, 16, torch.bfloat16),
        400,
        _grid(0.02, 0.3),
        "precision",
    ),
}
if CIFAR10:
    TASKS["cifar10"] = Task("CIFAR-10 CNN", cifar10, 1500, _grid(0.003, 0.05), "new")
