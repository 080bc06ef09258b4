"""What convergence.py reports: statistics over paired seeds, tables, figures and the results file."""

import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import scipy
import scipy.stats
import sklearn
import torch
from convergence_training import PAIRS, TASKS, Curves, Run, Variant
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from rich.console import Console
from rich.table import Table

import xgrad_optim

Results = dict[Run, Curves]

VARIANTS: tuple[Variant, ...] = ("base", "x")
COLORS = {"base": "C0", "x": "C1"}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error; not a number where a run diverged."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        return cls(float(numpy.mean(values)), float(scipy.stats.sem(values)))

    def text(self, digits: int, sign: str = "", factor: float = 1) -> str:
        return f"{factor * self.mean:{sign}.{digits}f} ± {factor * self.standard_error:.{digits}f}"


@dataclass(frozen=True)
class StepsToTarget:
    """By seed, the first evaluated step at which the loss is no higher than the base's last one; None if none is."""

    by_seed: list[int | None]
    run_length: int

    def text(self) -> str:
        reached = [float(step) for step in self.by_seed if step is not None]
        if len(reached) == len(self.by_seed):
            return Estimate.of(reached).text(0)
        count = f"{len(reached)}/{len(self.by_seed)}"
        if not reached:
            return f"not reached ({count})"
        # A seed that did not get there needs more than the whole run, so that the mean has a lower bound only.
        bound = numpy.mean([self.run_length if step is None else step for step in self.by_seed])
        return f"> {bound:.0f} ({count} reached)"


@dataclass(frozen=True)
class Summary:
    """A pair on a task at the end of its runs. Differences are X - base, seed by seed."""

    loss: dict[Variant, Estimate]
    accuracy: dict[Variant, Estimate]
    loss_difference: Estimate
    accuracy_difference: Estimate
    seeds_with_lower_loss: int
    steps_to_base_loss: dict[Variant, StepsToTarget]

    @property
    def verdict(self) -> str:
        difference = self.loss_difference
        if not math.isfinite(difference.mean):
            return "diverged"
        if abs(difference.mean) <= 2 * difference.standard_error:
            return "within two standard errors of the base's"
        return "lower than the base's" if difference.mean < 0 else "higher than the base's"


def tasks_of(results: Results) -> list[str]:
    return list(dict.fromkeys(run.task for run in results))


def pairs_of(results: Results, task: str) -> list[str]:
    return list(dict.fromkeys(run.pair for run in results if run.task == task))


def seeds_of(results: Results) -> list[int]:
    return sorted({run.seed for run in results})


def curves_of(results: Results, task: str, pair: str) -> dict[Variant, list[Curves]]:
    """The curves of a pair on a task, in the order of the seeds."""
    chosen = sorted((run for run in results if (run.task, run.pair) == (task, pair)), key=lambda run: run.seed)
    return {variant: [results[run] for run in chosen if run.variant == variant] for variant in VARIANTS}


def summarize(results: Results, task: str, pair: str) -> Summary:
    curves = curves_of(results, task, pair)
    loss = {variant: [run.validation_loss[-1] for run in curves[variant]] for variant in VARIANTS}
    accuracy = {variant: [run.validation_accuracy[-1] for run in curves[variant]] for variant in VARIANTS}
    loss_differences = _differences(loss)
    return Summary(
        loss={variant: Estimate.of(loss[variant]) for variant in VARIANTS},
        accuracy={variant: Estimate.of(accuracy[variant]) for variant in VARIANTS},
        loss_difference=Estimate.of(loss_differences),
        accuracy_difference=Estimate.of(_differences(accuracy)),
        seeds_with_lower_loss=sum(difference < 0 for difference in loss_differences),
        steps_to_base_loss={variant: _steps_to(loss["base"], curves[variant]) for variant in VARIANTS},
    )


def _differences(values: dict[Variant, list[float]]) -> list[float]:
    return [x - base for base, x in zip(values["base"], values["x"], strict=True)]


def _steps_to(targets: list[float], curves: list[Curves]) -> StepsToTarget:
    by_seed = [
        next((step for step, loss in zip(run.steps, run.validation_loss, strict=True) if loss <= target), None)
        for target, run in zip(targets, curves, strict=True)
    ]
    return StepsToTarget(by_seed, curves[0].steps[-1])


# -- the terminal ------------------------------------------------------------------------------------------------


def print_task(console: Console, results: Results, task: str) -> None:
    """A pair's base, X class and paired difference in three rows; below them, who won and who lost."""
    summaries = {pair: summarize(results, task, pair) for pair in pairs_of(results, task)}
    first = next(run for run in results if run.task == task)
    table = Table(title=f"{TASKS[task].title}, {first.steps} steps: mean ± standard error")
    table.add_column("optimizer")
    for heading in ("lr", "validation loss", "accuracy, %", "steps to base's loss"):
        table.add_column(heading, justify="right")
    for pair, summary in summaries.items():
        for variant in VARIANTS:
            table.add_row(
                PAIRS[pair].names[variant],
                f"{TASKS[task].lr[pair]:g}",
                summary.loss[variant].text(4),
                summary.accuracy[variant].text(2, factor=100),
                summary.steps_to_base_loss[variant].text(),
            )
        differences = summary.loss_difference.text(4, "+"), summary.accuracy_difference.text(2, "+", factor=100)
        table.add_row("X - base", "", *differences, style="bold", end_section=True)
    console.print(table)
    console.print("Final validation loss:")
    for pair, summary in summaries.items():
        seeds = f"lower with {summary.seeds_with_lower_loss} of {len(seeds_of(results))} seeds"
        console.print(f"  {PAIRS[pair].names['x']}: {summary.verdict} ({seeds})")


# -- the figure --------------------------------------------------------------------------------------------------


class _PlainLogFormatter(LogFormatter):
    """The labels that LogFormatter chooses, without exponents."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def save_figure(path: Path, results: Results, task: str) -> None:
    """Validation losses, a panel for each pair, and the paired differences of all pairs in one more."""
    pairs = pairs_of(results, task)
    columns = min(3, len(pairs) + 1)
    rows = math.ceil((len(pairs) + 1) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, pair in zip(panels, pairs, strict=False):
        _draw_pair(panel, results, task, pair)
    _draw_differences(panels[len(pairs)], results, task)
    for panel in panels[len(pairs) + 1 :]:
        panel.set_axis_off()
    seeds = len(seeds_of(results))
    figure.suptitle(f"{TASKS[task].title}: mean and standard error over {seeds} paired seeds")
    with _replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _draw_pair(panel: Axes, results: Results, task: str, pair: str) -> None:
    for variant, curves in curves_of(results, task, pair).items():
        losses = numpy.array([run.validation_loss for run in curves])
        _draw_band(panel, curves[0].steps, losses, PAIRS[pair].names[variant], COLORS[variant])
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter(_PlainLogFormatter())
    # Labels between powers of ten where an axis has fewer than two of these; more of them, the narrower it is.
    panel.yaxis.set_minor_formatter(_PlainLogFormatter(minor_thresholds=(2, 0.5)))
    panel.set_title(f"{' and '.join(PAIRS[pair].names.values())}, lr {TASKS[task].lr[pair]:g}")
    panel.set_ylabel("validation loss (log scale)")
    _finish(panel)


def _draw_differences(panel: Axes, results: Results, task: str) -> None:
    """The last three quarters of the runs: before, losses fall so fast that nothing later would be seen beside them."""
    for number, pair in enumerate(pairs_of(results, task)):
        curves = curves_of(results, task, pair)
        base, x = (numpy.array([run.validation_loss for run in curves[variant]]) for variant in VARIANTS)
        steps = curves["x"][0].steps
        late = slice(len(steps) // 4, None)
        # Not the colours of base and X in the other panels.
        color = f"C{len(COLORS) + number}"
        _draw_band(panel, steps[late], (x - base)[:, late], PAIRS[pair].names["x"], color)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_title("X - base, by pairs; below 0, X is better")
    panel.set_ylabel("difference of validation loss")
    _finish(panel)
    panel.set_xlabel("step (the first quarter is left out)")


def _draw_band(panel: Axes, steps: list[int], values: numpy.ndarray, label: str, color: str) -> None:
    mean, error = values.mean(axis=0), scipy.stats.sem(values, axis=0)
    panel.plot(steps, mean, label=label, color=color)
    panel.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)


def _finish(panel: Axes) -> None:
    panel.set_xlabel("step")
    panel.grid(which="both", alpha=0.25)
    panel.legend(fontsize="small")


# -- the results file --------------------------------------------------------------------------------------------


def save_json(path: Path, header: dict[str, Any], results: Results) -> None:
    """Everything that was measured, and what it takes to measure it again."""
    document = {**header, **_environment(), "tasks": {task: _task_entry(results, task) for task in tasks_of(results)}}
    with _replacing(path) as temporary:
        temporary.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def _task_entry(results: Results, task: str) -> dict[str, Any]:
    definition = TASKS[task]
    data = definition.load()
    return {
        "title": definition.title,
        "batch_size": definition.batch_size,
        "data": data.facts,
        "model_parameters": sum(parameter.numel() for parameter in definition.model(data.classes).parameters()),
        "pairs": {pair: _pair_entry(results, task, pair) for pair in pairs_of(results, task)},
    }


def _pair_entry(results: Results, task: str, pair: str) -> dict[str, Any]:
    summary = summarize(results, task, pair)
    entry: dict[str, Any] = {"summary": {**dataclasses.asdict(summary), "verdict": summary.verdict}}
    for variant in VARIANTS:
        runs = [
            {"seed": run.seed, **dataclasses.asdict(curves)}
            for run, curves in results.items()
            if (run.task, run.pair, run.variant) == (task, pair, variant)
        ]
        entry[variant] = {"optimizer": PAIRS[pair].names[variant], "runs": runs}
    return entry


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null is where a run diverged."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _environment() -> dict[str, Any]:
    modules = (torch, numpy, scipy, sklearn, matplotlib, xgrad_optim)
    return {
        "versions": {"python": platform.python_version()} | {module.__name__: module.__version__ for module in modules},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "backends": xgrad_optim.available_backends(),
        "git": _git_state(),
    }


def _git_state() -> dict[str, str | bool] | None:
    """The commit of this file's checkout, and whether tracked files differ from it; None outside of a checkout."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit, changes = (
            subprocess.run((*git, *command), capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "is_dirty": bool(changes)}


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path, whose file takes the place of `path` once it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
