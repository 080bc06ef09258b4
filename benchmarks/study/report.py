"""Tables and plots of the study, rendered from its data alone: `make results` puts them into README.md and docs/.

    python benchmarks/study/report.py            render, and write what has changed
    python benchmarks/study/report.py --check    say whether README.md and docs/results.md are what the data give

A test does the same as --check.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))

import numpy as np
from analysis import (
    AHEAD,
    Difference,
    ahead,
    comparisons,
    difference,
    final,
    largest_stable,
    mean_curve,
    over_tasks,
    primary,
    robustness,
    speed,
    tasks_of,
)
from arms import ARMS, BASE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from runs import EVALUATIONS
from scipy.stats import sem
from study import DATA, LOW_PRECISION, OF_FAMILY, PRIMARY, SHORT, Study, Unit, full, read
from tabulate import tabulate
from tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PLOTS = ROOT / "docs" / "results"

NONE = "-"


def percent(value: float) -> str:
    """With its sign; from tenfold on as a factor."""
    return f"{value:+.1f}" if value < 900 else f"x{1 + value / 100:,.0f}"


def cell(one: Difference | None) -> str:
    """Bold where Holm's correction leaves it significant, a star where the uncorrected interval excludes 0."""
    if one is None:
        return NONE
    text = f"{percent(one.mean)} [{percent(one.low)}, {percent(one.high)}]"
    text = f"**{text}**" if one.is_significant else text + "*" * one.excludes_zero
    return text + (f" ({one.n_diverged[0]}/{one.n_diverged[1]} diverged)" if any(one.n_diverged) else "")


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return tabulate(list(lines), header, tablefmt="github", disable_numparse=True)


def pooled_lines(tasks: Sequence[str], columns: Sequence[Callable[[str], Difference | None]]) -> Iterable[list[str]]:
    """Means over the short tasks: those of the pilot, the new ones, both."""
    of_kind = {kind: [task for task in tasks if TASKS[task].kind == kind] for kind in ("pilot", "new")}
    short = of_kind["pilot"] + of_kind["new"]
    for title, chosen in (("pilot's tasks", of_kind["pilot"]), ("new tasks", of_kind["new"]), ("both", short)):
        if not chosen:
            continue
        line = [f"mean, {title}"]
        for column in columns:
            found = [column(task) for task in chosen]
            mean = None if None in found else over_tasks(found)
            line.append(NONE if mean is None else f"{percent(mean[0])} [{percent(mean[1])}, {percent(mean[2])}]")
        yield line


def short_tasks(study: Study) -> list[str]:
    return [task for task in tasks_of(study) if TASKS[task].kind in ("pilot", "new")]


def middle_of(differences: Sequence[Difference]) -> float:
    """Median of the tasks' means."""
    return float(np.median([one.mean for one in differences]))


def name_of(task: str) -> str:
    return TASKS[task].title + (f", {TASKS[task].steps} steps" if TASKS[task].kind == "long" else "")


def primary_table(study: Study) -> str:
    found = primary(study)
    keys = [(arm, against) for arm, against, _ in comparisons()]
    columns = [lambda task, key=key: found.get((task, *key)) for key in keys]
    header = ["task", *(f"{arm} / {against}" for arm, against in keys)]
    lines = [[name_of(task), *(cell(column(task)) for column in columns)] for task in tasks_of(study)]
    return table(header, [*lines, *pooled_lines(tasks_of(study), columns)])


def summary_table(study: Study) -> str:
    """The primary comparisons in a line each: how many short tasks go which way, their median, and the long ones."""
    found = primary(study)
    lines = []
    for arm, against, is_swap in comparisons():
        short = [one for one in found.values() if (one.arm, one.against) == (arm, against) and one.task in SHORT]
        lines.append(
            [
                f"{arm} / {against}" + ", same lr" * is_swap,
                str(sum(one.high < 0 for one in short)),
                str(sum(one.low > 0 for one in short)),
                str(len(short)),
                percent(middle_of(short)) if len(short) == len(short_tasks(study)) else NONE,
                *(cell(found.get((task, arm, against))) for task in tasks_of(study) if TASKS[task].kind == "long"),
            ]
        )
    long = [name_of(task) for task in tasks_of(study) if TASKS[task].kind == "long"]
    return table(["", "better on", "worse on", "of short tasks", "median", *long], lines)


def inferiority_table(study: Study) -> str:
    found = primary(study)
    keys = [(arm, against) for arm, against, is_swap in comparisons() if is_swap]
    lines = [
        [name_of(task), *(getattr(found.get((task, *key)), "verdict", NONE) for key in keys)]
        for task in tasks_of(study)
    ]
    return table(["task", *(f"{arm} / {against}" for arm, against in keys)], lines)


def arms_table(study: Study, arms: Sequence[str], tasks: Sequence[str] = SHORT, schedule: str = "cosine") -> str:
    """Each arm against its family's base, both at their best learning rates. Arms without any result are left out."""
    lines = []
    for arm in arms:
        against = BASE[ARMS[arm].family]
        found = [None if arm == against else difference(study, Unit(task, arm, schedule), against) for task in tasks]
        if any(found):
            short = [NONE if one is None else percent(one.mean) + "*" * one.excludes_zero for one in found]
            lines.append([arm, *short, NONE if None in found else percent(middle_of(found))])
    return table(["arm", *(name_of(task) for task in tasks), "median"], lines)


def precision_table(study: Study) -> str:
    """Mean losses with their standard errors over the seeds, each arm at its best learning rate."""
    columns = {
        "float32": ("transformer", ("adamw", "xadamw s=1")),
        "bfloat16, float32 master": ("transformer-bf16", LOW_PRECISION),
        "bfloat16": ("transformer-bf16", ("adamw", "xadamw s=1")),
    }
    lines = []
    for index, name in enumerate(("AdamW", "XAdamW s=1")):
        results = [final(study, Unit(task, arms[index], "cosine")) for task, arms in columns.values()]
        losses = [None if found is None else [one.loss for one in found] for found in results]
        lines.append([name, *(NONE if one is None else f"{np.mean(one):.4f} ± {sem(one):.4f}" for one in losses)])
    return table(["loss", *columns], lines)


def speed_table(study: Study) -> str:
    arms = [arm for arm in PRIMARY if arm not in BASE.values()]
    found = [[speed(study, Unit(task, arm, "cosine")) for arm in arms] for task in tasks_of(study)]
    lines = [
        [name_of(task), *(NONE if one is None else "never" if one == float("inf") else f"{one:.2f}" for one in line)]
        for task, line in zip(tasks_of(study), found, strict=True)
    ]
    return table(["task", *arms], lines)


def stability_table(study: Study) -> str:
    """Largest learning rate without a divergence over that of the base, both of the grids that were run."""
    arms = [arm for arm in (*PRIMARY, "xadamw s=2", "xsgdm s=2") if arm not in BASE.values()]
    lines = []
    for task in SHORT:
        line = [name_of(task)]
        for arm in arms:
            ours = largest_stable(study, Unit(task, arm, "cosine"))
            theirs = largest_stable(study, Unit(task, BASE[ARMS[arm].family], "cosine"))
            line.append(NONE if ours is None or theirs is None else f"{ours / theirs:g}")
        lines.append(line)
    return table(["task", *arms], lines)


def robustness_table(study: Study) -> str:
    """Loss over the best one, in %, at a quarter, a half, twice and four times the best lr; mean over the tasks."""
    factors = (0.25, 0.5, 2.0, 4.0)
    lines = []
    for arm in PRIMARY:
        found = [robustness(study, Unit(task, arm, "cosine")) for task in SHORT]
        cells = []
        for factor in factors:
            known = [one[factor] for one in found if one is not None and factor in one]
            cells.append(f"{np.mean(known):+.0f} ({len(known)})" if known else NONE)
        lines.append([arm, *cells])
    return table(["arm", *(f"{factor:g} x best lr" for factor in factors)], lines)


def ahead_table(study: Study) -> str:
    """theta_hat's loss above theta's, in %, under a cosine and at a constant learning rate."""
    arms = ("xadamw s=1", AHEAD, "xsgdm s=1")
    header = ["task", *(f"{arm}, {schedule}" for arm in arms for schedule in ("cosine", "constant"))]
    lines = []
    for task in SHORT:
        found = [ahead(study, Unit(task, arm, schedule)) for arm in arms for schedule in ("cosine", "constant")]
        lines.append([name_of(task), *(NONE if one is None else f"{one:+.1f}" for one in found)])
    return table(header, lines)


def progress_table(study: Study) -> str:
    lines = []
    for question, wanted in study.questions.items():
        done, total = study.count(question)
        results = [final(study, unit) for unit in wanted]
        n_diverged = sum(result.diverged for found in results if found for result in found)
        lines.append([question, f"{done}", f"{total}", f"{n_diverged}"])
    return table(["question", "runs done", "of", "diverged at the best lr"], lines)


def wide(family: str) -> list[str]:
    return [arm for arm in OF_FAMILY[family] if arm not in LOW_PRECISION]


TABLES: dict[str, Callable[[Study], str]] = {
    "summary": summary_table,
    "primary": primary_table,
    "inferiority": inferiority_table,
    "adamw": lambda study: arms_table(study, wide("adamw")),
    "sgdm": lambda study: arms_table(study, wide("sgdm")),
    "pairs": lambda study: arms_table(study, ("xadam s=1", "xadabelief s=1", "xadam3 s=1")),
    "any": lambda study: arms_table(study, ("xgrad(muon) s=1", "xgrad(lion) s=1")),
    "constant": lambda study: arms_table(study, PRIMARY, SHORT, "constant"),
    "batch": lambda study: arms_table(study, PRIMARY, ("gru-8", "gru", "gru-128")),
    "precision": precision_table,
    "speed": speed_table,
    "stability": stability_table,
    "robustness": robustness_table,
    "ahead": ahead_table,
    "progress": progress_table,
}


# -- plots -------------------------------------------------------------------------------------------------------------


def forest(study: Study) -> Figure:
    """The primary differences with their intervals."""
    found = list(primary(study).values())
    figure = Figure((10, 4.5), layout="constrained")
    axes = figure.subplots(1, len(comparisons()), sharey=True)
    tasks = tasks_of(study)[::-1]
    for axis, comparison in zip(axes, comparisons(), strict=True):
        for one in found:
            if (one.arm, one.against) == comparison[:2]:
                color = "C0" if one.high < 0 else "C3" if one.low > 0 else "0.5"
                at = tasks.index(one.task)
                axis.plot([one.low, one.high], [at, at], color=color)
                axis.plot([one.mean], [at], "o", color=color, fillstyle="full" if one.is_significant else "none")
        axis.axvline(0, color="0.7", linewidth=1)
        axis.set_title(f"{comparison[0]}\nagainst {comparison[1]}", fontsize=9)
        axis.set_xscale("symlog", linthresh=10)
        axis.set_xlabel("loss, % (95 %)")
    axes[0].set_yticks(range(len(tasks)), [name_of(task) for task in tasks])
    return figure


def panels(tasks: Sequence[str], draw: Callable[[Axes, Unit, str], None]) -> Figure:
    """One for each task; `draw(axis, unit, color)` draws a primary arm, if it has results."""
    figure = Figure((11, 3 * -(-len(tasks) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(tasks) // 3), 3, squeeze=False).flatten()
    for axis, task in zip(axes, tasks, strict=False):
        axis.set_title(name_of(task), fontsize=9)
        for index, arm in enumerate(PRIMARY):
            draw(axis, Unit(task, arm, "cosine"), f"C{index}")
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    return figure


def curves(study: Study) -> Figure:
    """Mean validation loss at theta with the standard error, of the primary arms at their best learning rates."""

    def draw(axis: Axes, unit: Unit, color: str) -> None:
        axis.set_yscale("log")
        results = final(study, unit)
        if results is not None:
            mean = mean_curve(results)
            kept = [one.curve for one in results if not one.diverged]
            error = sem(kept) if len(kept) > 1 else 0 * mean
            steps = TASKS[unit.task].steps * np.arange(1, EVALUATIONS + 1) / EVALUATIONS
            axis.plot(steps, mean, color=color, linewidth=1, label=unit.arm)
            axis.fill_between(steps, mean - error, mean + error, color=color, alpha=0.2)

    return panels(tasks_of(study), draw)


def robustness_plot(study: Study) -> Figure:
    """Loss of the tuning runs over the best one, by factor of the best learning rate."""

    def draw(axis: Axes, unit: Unit, color: str) -> None:
        axis.set_xscale("log", base=2)
        axis.set_yscale("symlog", linthresh=10)
        axis.set_xlabel("learning rate / best")
        axis.set_ylabel("loss above best, %")
        found = robustness(study, unit)
        if found is not None:
            axis.plot(found.keys(), found.values(), "o-", color=color, markersize=3, linewidth=1, label=unit.arm)

    return panels(short_tasks(study), draw)


FIGURES: dict[str, Callable[[Study], Figure]] = {"forest": forest, "curves": curves, "robustness": robustness_plot}


# -- pages -------------------------------------------------------------------------------------------------------------

MARK = re.compile(r"(<!-- study: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str, study: Study) -> str:
    """The page with each table between its marks made anew."""
    return MARK.sub(lambda match: f"{match[1]}\n{TABLES[match['name']](study)}\n\n{match[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page is stale")
    arguments = parser.parse_args()
    study = full(read(DATA / "runs.csv"))
    stale = [page for page in PAGES if rendered(page.read_text(), study) != page.read_text()]
    if arguments.check:
        sys.exit(f"run `make results`: {', '.join(page.name for page in stale)}" if stale else 0)
    for page in stale:
        page.write_text(rendered(page.read_text(), study))
    PLOTS.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        draw(study).savefig(PLOTS / f"{name}.png", dpi=110, metadata={"Software": None})
    print(f"written: {', '.join(page.name for page in stale) or 'no page'}, {PLOTS.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
