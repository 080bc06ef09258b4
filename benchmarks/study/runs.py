"""One run: a task, an arm, a learning rate, a schedule and a seed; and what it measures."""

import math
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from arms import ARMS, true_weights
from tasks import TASKS, Problem

Schedule = Literal["cosine", "constant"]

EVALUATIONS = 20
"""Validations of a run, evenly spaced; the last one is at the last step."""

WARM_UP = 0.05
"""The share of the steps in which the learning rate rises to its full size, in a line."""


@dataclass(frozen=True)
class Run:
    """By names and numbers only, so that it can be sent to another process and found again in a file."""

    task: str
    arm: str
    schedule: Schedule
    lr: float
    seed: int


@dataclass
class Result:
    """What a run measured.

    Attributes:
        initial_loss: on the validation data, before the first step.
        loss: at the end, at the true weights; the initial one where the run diverged.
        loss_ahead: the same at the weights that the model trained at.
        diverged: whether a loss was not finite, or the last one greater than the initial one.
        curve: validation losses at theta, evenly spaced.
        seconds: of the whole run.
    """

    initial_loss: float
    loss: float
    loss_ahead: float
    diverged: bool
    curve: list[float]
    seconds: float


def factor(run: Run, step: int, n_steps: int) -> float:
    """Of the learning rate in this step, counted from 0."""
    warm_up = max(1, round(WARM_UP * n_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    if run.schedule == "constant" or not ARMS[run.arm].is_scheduled:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (n_steps - warm_up)))


def train(run: Run, n_steps: int | None = None) -> Result:
    """Train once. All that is random depends on the task and the seed alone."""
    started = time.perf_counter()
    task = TASKS[run.task]
    n_steps = n_steps or task.steps
    torch.manual_seed(run.seed)
    problem = task.make(run.seed)
    optimizer = ARMS[run.arm].make(problem.model.parameters(), lr=run.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(run, step, n_steps))
    ends = {max(1, round(n_steps * count / EVALUATIONS)) for count in range(1, EVALUATIONS + 1)}
    initial = _validate(problem, nullcontext())
    curve: list[float] = []
    is_finite = True
    for step in range(1, n_steps + 1):
        optimizer.zero_grad()
        loss = problem.training_loss()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step in ends:
            curve.append(_validate(problem, true_weights(optimizer)))
            is_finite = math.isfinite(curve[-1]) and math.isfinite(loss.item())
            if not is_finite:
                break
    diverged = not is_finite or curve[-1] > initial
    last = initial if diverged else curve[-1]
    ahead = initial if diverged else _validate(problem, nullcontext())
    return Result(initial, last, ahead, diverged, curve, time.perf_counter() - started)


@torch.no_grad()
def _validate(problem: Problem, weights: AbstractContextManager[object]) -> float:
    with weights:
        return problem.validation_loss()


def as_row(run: Run, result: Result) -> dict[str, Any]:
    row = asdict(run) | asdict(result)
    row["curve"] = " ".join(f"{loss:.6g}" for loss in result.curve)
    return row
