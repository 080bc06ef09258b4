"""Does training at predicted weights converge better? Each base optimizer against its X class, on two tasks.

    python benchmarks/convergence.py                           some 5 minutes on two cores
    python benchmarks/convergence.py --seeds 10 --scale 5      ten seeds, five times as many steps
    python benchmarks/convergence.py --tasks digits --optimizers sgdm --prediction-steps 0.9

A small CNN learns scikit-learn's handwritten digits, a character GRU the English help texts of CPython. Both
optimizers of a pair get the same initial weights, batches and hyperparameters; the learning rate is constant and the
one that suits the base best. torch has no AdaBelief and no AdaM3: their base is the X class with prediction_steps=0.
Validation losses are those of the true weights. Standard errors are over seeds; the split into training and validation
data is fixed, and they do not cover its choice.

Every run has one thread and is deterministic: on one machine the same arguments give the same losses.
"""

import argparse
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import get_args

import convergence_report as report
import torch
from convergence_training import PAIRS, TASKS, Curves, Run, Variant, start_worker, train
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

MAX_DEFAULT_JOBS = 4
"""A process holds some 500 MB: more of them only where asked for."""


def at_least(minimum: int) -> Callable[[str], int]:
    """The type of an argparse option that is an integer with a lower bound."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}, got {text!r}")
        return value

    return parse


def seed_count(text: str) -> int:
    try:
        return at_least(2)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}: one seed has no standard error") from None


def non_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number >= 0, got {text!r}")
    return value


def positive(text: str) -> float:
    value = non_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text!r}")
    return value


def usable_device(text: str) -> str:
    try:
        torch.zeros(1, device=text).item()
    # torch raises AssertionError for a GPU that it was built without, and RuntimeError or its kin for the rest.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"can't use {text!r}: {str(error).splitlines()[0]}") from None
    return text


def writable_folder(text: str) -> Path:
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't make the folder: {error}") from None
    return folder


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help="of: %(choices)s; default all")
    add("--optimizers", nargs="+", choices=PAIRS, default=PAIRS, metavar="PAIR", help="of: %(choices)s; default all")
    add("--seeds", type=seed_count, default=5, metavar="N", help="paired seeds, from 0; default %(default)s")
    add("--scale", type=positive, default=1.0, help="factor on the steps of every run; default %(default)s")
    add("--prediction-steps", type=non_negative, default=1.0, metavar="S", help="of the X classes; default %(default)s")
    add("--device", type=usable_device, default="cpu", help="cpu, cuda, cuda:1, mps ...; default %(default)s")
    add("--jobs", type=at_least(1), metavar="N", help=f"runs at a time; default the cores, up to {MAX_DEFAULT_JOBS}")
    add("--out", type=writable_folder, default="demo-results", metavar="FOLDER", help="default %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.jobs is None:
        arguments.jobs = min(torch.get_num_threads(), MAX_DEFAULT_JOBS) if arguments.device == "cpu" else 1
    return arguments


def plan(arguments: argparse.Namespace, task: str) -> list[Run]:
    """Every run of a task, in the order of the report."""
    steps = max(1, round(TASKS[task].steps * arguments.scale))
    return [
        Run(task, pair, variant, seed, steps, arguments.prediction_steps, arguments.device)
        for pair in dict.fromkeys(arguments.optimizers)
        for variant in get_args(Variant)
        for seed in range(arguments.seeds)
    ]


def train_all(runs: list[Run], executor: ProcessPoolExecutor, progress: Progress) -> dict[Run, Curves]:
    bar = progress.add_task(runs[0].task, total=len(runs))
    futures = {executor.submit(train, run): run for run in runs}
    finished = {}
    for future in as_completed(futures):
        finished[futures[future]] = future.result()
        progress.advance(bar)
    return {run: finished[run] for run in runs}


def run_tasks(arguments: argparse.Namespace, console: Console) -> report.Results:
    """Train everything; show each task's table and write its figure as soon as it is done."""
    results: report.Results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    # Spawned, not forked: a process that has used torch's threads or a GPU can't be forked safely.
    executor = ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn"), start_worker)
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            for task in dict.fromkeys(arguments.tasks):
                results |= train_all(plan(arguments, task), executor, progress)
                report.print_task(console, results, task)
                report.save_figure(arguments.out / f"{task}.png", results, task)
    finally:
        executor.shutdown(cancel_futures=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    started, created = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    console = Console()
    console.print(
        f"{arguments.seeds} paired seeds on {arguments.device}, {arguments.jobs} runs at a time, "
        f"prediction_steps {arguments.prediction_steps:g}"
    )
    try:
        results = run_tasks(arguments, console)
    except KeyboardInterrupt:
        sys.exit("interrupted: results.json was not written")
    header = {
        "created": created,
        "wall_time_s": round(time.perf_counter() - started, 1),
        "argv": list(argv),
        "device": arguments.device,
        "jobs": arguments.jobs,
        "threads_per_job": 1,
        "seeds": list(range(arguments.seeds)),
        "prediction_steps": arguments.prediction_steps,
    }
    report.save_json(arguments.out / "results.json", header, results)
    console.print(f"{header['wall_time_s']:.0f} s; figures and every curve are in {arguments.out}/")


if __name__ == "__main__":
    main()
