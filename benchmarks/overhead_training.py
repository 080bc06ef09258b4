"""The table of overhead.py for whole training steps: forward, backward and optimizer, beside torch.optim's.

What a step of the optimizer costs more or less is a part of what training costs. Three character transformers of the
study, from tens of thousands to millions of weights; each optimizer trains a model of its own on the same batch.
"""

import functools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Report, interleave

sys.path.append(str(Path(__file__).resolve().parent / "study"))  # the models

from models import CONTEXT, CharacterTransformer, cross_entropy

from xgrad_optim import XSGDM, XAdamW

N_CHARACTERS = 100
SIZES = {"small": (32, 2), "medium": (128, 4), "large": (384, 6)}
"""Width and blocks."""

PAIRS: dict[str, dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "AdamW": {
        "default": torch.optim.AdamW,
        "fused": functools.partial(torch.optim.AdamW, fused=True),
        "XAdamW": XAdamW,
    },
    "SGD": {
        "default": functools.partial(torch.optim.SGD, momentum=0.9),
        "fused": functools.partial(torch.optim.SGD, momentum=0.9, fused=True),
        "XSGDM": XSGDM,
    },
}


class Training:
    """A model, its optimizer, and one step of training."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], width: int, n_blocks: int, batch_size: int) -> None:
        torch.manual_seed(0)
        self.model = CharacterTransformer(N_CHARACTERS, width, n_blocks)
        self.tokens = torch.randint(N_CHARACTERS, (batch_size, CONTEXT + 1))
        self.optimizer = make(self.model.parameters(), lr=1e-4)

    def step(self) -> None:
        self.optimizer.zero_grad()
        cross_entropy(self.model(self.tokens[:, :-1]), self.tokens[:, 1:]).backward()
        self.optimizer.step()

    def swap(self) -> None:
        """To theta and back, as a validation in mid-training needs it."""
        self.optimizer.eval()
        self.optimizer.train()


def measure_training(
    report: Report, rounds: int, sizes: dict[str, tuple[int, int]] = SIZES, batch_size: int = 16
) -> None:
    """Medians of whole steps, and of the two swaps around a validation."""
    rows: list[list[object]] = []
    for size, (width, n_blocks) in sizes.items():
        for pair, makers in PAIRS.items():
            trainings = {name: Training(make, width, n_blocks, batch_size) for name, make in makers.items()}
            ours = list(makers)[-1]
            calls = {name: training.step for name, training in trainings.items()} | {"swaps": trainings[ours].swap}
            seconds = interleave(calls, rounds)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            n_weights = sum(param.numel() for param in trainings[ours].model.parameters())
            for name in makers:
                ratios = [medians[name] / medians[peer] for peer in ("default", "fused")]
                swaps = medians["swaps"] / medians[name] if name == ours else None
                shown = name if name == ours else f"{pair} {name}"
                rows.append([size, n_weights, shown, medians[name] * 1e3, *ratios, swaps])
    columns = ["model", "weights", "optimizer", "ms", "to default", "to fused", "two swaps to a step"]
    report.table(f"whole training steps, {batch_size} texts of {CONTEXT} characters", columns, rows)
