"""The study's runs: which there are, in which order, and running those that are missing.

    python benchmarks/study/study.py                     all that is missing, on all cores
    python benchmarks/study/study.py --minutes 30        as much as half an hour allows; the next call goes on
    python benchmarks/study/study.py --questions primary long

protocol.md says why. A run that is finished stands in data/runs.csv at once, so a call that is interrupted loses only
the runs that it was in. Every run has one thread and is deterministic on one machine.
"""

import argparse
import csv
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from arms import ARMS, BASE
from measuring import cpu_name
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from runs import Result, Run, Schedule, as_row, train
from tasks import CIFAR10, TASKS

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the middle of a task's grid of learning rates."""

MAX_EXTENSIONS = 2
"""How often the grid grows by a factor of 2 where the best learning rate is its last or first one."""

SHORT = tuple(name for name, task in TASKS.items() if task.kind in ("pilot", "new") and name != "cifar10")
PRIMARY = (
    "adamw",
    "xadamw s=1",
    "xadamw .8 s=.5",
    "adamw .8",
    "nadamw",
    "sgdm",
    "xsgdm s=1",
)
OF_FAMILY = {family: tuple(name for name, arm in ARMS.items() if arm.family == family) for family in BASE}
LOW_PRECISION = ("adamw bf16 master", "xadamw s=1 bf16 master")


@dataclass(frozen=True)
class Unit:
    """An arm on a task under a schedule: its learning rate is tuned, then it runs with fresh seeds."""

    task: str
    arm: str
    schedule: Schedule


def units(tasks: Collection[str], arms: Collection[str], schedule: Schedule = "cosine") -> list[Unit]:
    """Every arm on every task, but for Muon where there is no matrix."""
    return [
        Unit(task, arm, schedule)
        for task in tasks
        for arm in arms
        if ARMS[arm].family != "muon" or task not in ("quadratic", "valley")
    ]


QUESTIONS = {
    "primary": units(SHORT, PRIMARY),
    "long": units(("transformer-2000", "gru-2000"), PRIMARY),
    "pairs": units(SHORT, (*OF_FAMILY["adam"], *OF_FAMILY["adabelief"], *OF_FAMILY["adam3"])),
    "wide": units(
        SHORT,
        [arm for arm in (*OF_FAMILY["adamw"], *OF_FAMILY["sgdm"]) if arm not in (*PRIMARY, *LOW_PRECISION)],
    ),
    "constant": units(SHORT, [arm for arm in PRIMARY if arm != "adamw .8"], "constant"),
    "batch": units(("gru-8", "gru-128"), PRIMARY),
    "precision": units(("transformer-bf16",), ("adamw", "xadamw s=1", *LOW_PRECISION)),
    "any": units(SHORT, (*OF_FAMILY["muon"], *OF_FAMILY["lion"])),
}
"""In the order in which they are run."""
if CIFAR10:
    QUESTIONS["cifar10"] = units(("cifar10",), PRIMARY)

Rows = dict[Run, Result]


def grid(unit: Unit) -> list[float]:
    middle = TASKS[unit.task].lr[ARMS[unit.arm].family]
    return [middle * factor for factor in FACTORS]


@dataclass
class Study:
    """Which runs there are to be, and those that there are.

    Attributes:
        questions: in the order in which they are run.
        rows: what has been run.
    """

    questions: dict[str, list[Unit]]
    tuning_seeds: tuple[int, ...]
    final_seeds: tuple[int, ...]
    rows: Rows = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(unit.task for question in self.questions.values() for unit in question))

    def tuned(self, unit: Unit) -> tuple[float | None, list[Run]]:
        """The best learning rate of a unit, or the runs that are missing to know it."""
        lrs = grid(unit)
        for extension in range(MAX_EXTENSIONS + 1):
            runs = {lr: [Run(unit.task, unit.arm, unit.schedule, lr, seed) for seed in self.tuning_seeds] for lr in lrs}
            missing = [run for lr in lrs for run in runs[lr] if run not in self.rows]
            if missing:
                return None, missing
            best = min(lrs, key=lambda lr: sum(self.rows[run].loss for run in runs[lr]))
            if extension == MAX_EXTENSIONS or best not in (lrs[0], lrs[-1]):
                return best, []
            lrs = [lrs[0] / 2, *lrs] if best == lrs[0] else [*lrs, lrs[-1] * 2]
        raise AssertionError("the last extension returns")

    def finals(self, unit: Unit) -> list[Run]:
        """The runs with fresh seeds: at the arm's own best learning rate, and of the X arms at their base's."""
        arms = [unit.arm, BASE[ARMS[unit.arm].family]] if unit.arm.startswith("x") else [unit.arm]
        lrs = [self.tuned(Unit(unit.task, arm, unit.schedule))[0] for arm in arms]
        known = dict.fromkeys(lr for lr in lrs if lr is not None)
        return [Run(unit.task, unit.arm, unit.schedule, lr, seed) for lr in known for seed in self.final_seeds]

    def missing(self, questions: Collection[str]) -> Iterator[Run]:
        """What is still to be run, as far as the learning rates are known, in order."""
        for question in questions:
            for unit in self.questions[question]:
                best, runs = self.tuned(unit)
                yield from runs
                if best is not None:
                    yield from (run for run in self.finals(unit) if run not in self.rows)

    def count(self, question: str) -> tuple[int, int]:
        """Runs that are done, and how many there will be as far as one can tell before learning rates are known."""
        n_tuning = len(FACTORS) * len(self.tuning_seeds)
        done = total = 0
        for unit in self.questions[question]:
            best, runs = self.tuned(unit)
            wanted = [] if best is None else self.finals(unit)
            total += n_tuning + (len(wanted) or len(self.final_seeds))
            done += max(0, n_tuning - len(runs)) + sum(run in self.rows for run in wanted)
        return done, total


def full(rows: Rows) -> Study:
    """The study of protocol.md."""
    return Study(QUESTIONS, (1000, 1001), tuple(range(12)), rows)


def quick(rows: Rows) -> Study:
    """A look at three tasks in a few minutes: one seed to tune, five to compare."""
    return Study({"quick": units(("gru", "tabular", "digits"), PRIMARY)}, (1000,), tuple(range(5)), rows)


# -- the file ----------------------------------------------------------------------------------------------------------

DATA = Path(__file__).resolve().parent / "data"
COLUMNS = [one.name for one in (*fields(Run), *fields(Result))] + ["session"]


def read(path: Path) -> Rows:
    """What has been run. A line that an interruption cut is left out."""
    if not path.exists():
        return {}
    rows: Rows = {}
    whole, _, _ = path.read_text().rpartition("\n")
    for row in csv.DictReader(whole.splitlines()):
        run = Run(row["task"], row["arm"], row["schedule"], float(row["lr"]), int(row["seed"]))
        curve = [float(value) for value in row["curve"].split()]
        numbers = (float(row[name]) for name in ("initial_loss", "loss", "loss_ahead"))
        rows[run] = Result(*numbers, row["diverged"] == "True", curve, float(row["seconds"]))
    return rows


def provenance() -> dict[str, str]:
    """What a call ran with."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(describe, capture_output=True, text=True, cwd=DATA.parent).stdout.strip()
    return {
        "session": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


class Log:
    """The files that rows are added to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.session = provenance()
        self._runs = folder / "runs.csv"
        _drop_cut_line(self._runs)
        _add(folder / "sessions.csv", list(self.session), self.session)

    def add(self, run: Run, result: Result) -> None:
        _add(self._runs, COLUMNS, as_row(run, result) | {"session": self.session["session"]})


def _add(path: Path, columns: list[str], row: dict[str, Any]) -> None:
    is_new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _drop_cut_line(path: Path) -> None:
    """What an interruption has left of a line at the end."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


# -- running -----------------------------------------------------------------------------------------------------------


def start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def run_missing(study: Study, questions: Collection[str], folder: Path, jobs: int, minutes: float | None) -> bool:
    """Run what is missing; whether all is there at the end."""
    log, started = Log(folder), time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("runs"))
    # Spawned, not forked: a process that has used torch's threads can't be forked safely.
    executor = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start_worker)
    running: dict[Future[Result], Run] = {}
    try:
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            bars = {question: progress.add_task(question, total=None) for question in questions}
            while True:
                is_over = minutes is not None and time.monotonic() - started > 60 * minutes
                for run in () if is_over else study.missing(questions):
                    if len(running) == jobs:
                        break
                    if run not in running.values():
                        running[executor.submit(train, run)] = run
                if not running:
                    return not is_over
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    study.rows[run] = future.result()
                    log.add(run, study.rows[run])
                for question, bar in bars.items():
                    done, total = study.count(question)
                    progress.update(bar, completed=done, total=total)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def positive(kind: type) -> Callable[[str], Any]:
    """The type of an argument that is a number above 0."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise ValueError
        return value

    parse.__name__ = f"number above 0 ({kind.__name__})"  # argparse shows it
    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS), metavar="QUESTION")
    parser.add_argument("--jobs", type=positive(int), default=os.cpu_count(), help="at a time; default %(default)s")
    parser.add_argument("--minutes", type=positive(float), help="start no run after that")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the files; default %(default)s")
    arguments = parser.parse_args()
    study = full(read(arguments.data / "runs.csv"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the workers end, too
    try:
        is_complete = run_missing(study, arguments.questions, arguments.data, arguments.jobs, arguments.minutes)
    except KeyboardInterrupt:
        sys.exit("interrupted: the next call goes on from here")
    print("all runs are there" if is_complete else "time is over: the next call goes on from here")


if __name__ == "__main__":
    main()
