"""What the runs say, computed from the data alone: the endpoints of protocol.md."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from arms import ARMS, BASE
from runs import EVALUATIONS, Result, Run
from scipy import stats
from statsmodels.stats.multitest import multipletests
from study import Study, Unit

MARGIN = 2.0
"""Of non-inferiority, in % of the base's loss."""

AHEAD = "xadamw .8 s=.5"


@dataclass(frozen=True)
class Difference:
    """An arm's loss relative to its comparator's, in %, with a 95 % interval; below 0 is better.

    Attributes:
        p: of a two-sided t test.
        is_significant: by Holm's correction over the primary family; None outside of it.
        n_diverged: runs of the arm, and of its comparator.
    """

    task: str
    arm: str
    against: str
    mean: float
    low: float
    high: float
    p: float
    n_diverged: tuple[int, int]
    is_significant: bool | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """Of non-inferiority."""
        if self.high < MARGIN:
            return "better" if self.high < 0 else "no worse"
        return "worse" if self.low > 0 else "open"


def in_percent(log_ratio: float) -> float:
    return float(100 * np.expm1(log_ratio))


def interval(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, both ends of Student's 95 % interval, and p of a mean of 0."""
    tested = stats.ttest_1samp(values, 0.0)
    low, high = tested.confidence_interval(0.95)
    return float(np.mean(values)), float(low), float(high), float(tested.pvalue)


def final(study: Study, unit: Unit, lr: float | None = None) -> list[Result] | None:
    """The runs with fresh seeds at this learning rate or the arm's best, by seed; None until all are there."""
    lr = study.tuned(unit)[0] if lr is None else lr
    runs = [] if lr is None else [Run(unit.task, unit.arm, unit.schedule, lr, seed) for seed in study.final_seeds]
    return [study.rows[run] for run in runs] if runs and all(run in study.rows for run in runs) else None


def difference(study: Study, unit: Unit, against: str, is_swap: bool = False) -> Difference | None:
    """Paired by seed, each at its best learning rate; for a swap the arm, too, has its comparator's."""
    other = Unit(unit.task, against, unit.schedule)
    lr = study.tuned(other)[0] if is_swap else None
    ours, theirs = final(study, unit, lr), final(study, other)
    if ours is None or theirs is None or (is_swap and lr is None):
        return None
    ratios = [np.log(our.loss / their.loss) for our, their in zip(ours, theirs, strict=True)]
    mean, low, high, p = interval(ratios)
    counts = sum(result.diverged for result in ours), sum(result.diverged for result in theirs)
    return Difference(unit.task, unit.arm, against, *map(in_percent, (mean, low, high)), p, counts)


def comparisons() -> list[tuple[str, str, bool]]:
    """The primary ones: an arm, its comparator, and whether it has that one's learning rate, as who swaps it in."""
    swaps = [(arm, BASE[ARMS[arm].family], True) for arm in ("xadamw s=1", "xsgdm s=1")]
    return swaps + [(AHEAD, other, False) for other in ("adamw", "adamw .8", "nadamw")]


def tasks_of(study: Study) -> list[str]:
    """Those that the primary questions are asked about."""
    primary = [units for question, units in study.questions.items() if question in ("primary", "long", "quick")]
    return list(dict.fromkeys(unit.task for units in primary for unit in units))


def primary(study: Study) -> dict[tuple[str, str, str], Difference]:
    """Questions (a) and (b) by task, arm and comparator, as far as they are complete, with Holm's verdicts.

    The correction counts all tests of the protocol; one that is still to come has p = 1 until then.
    """
    wanted = [(task, *comparison) for task in tasks_of(study) for comparison in comparisons()]
    found = {
        (task, arm, against): difference(study, Unit(task, arm, "cosine"), against, is_swap)
        for task, arm, against, is_swap in wanted
    }
    rejected, *_ = multipletests([1.0 if one is None else one.p for one in found.values()], 0.05, "holm")
    return {
        key: replace(one, is_significant=bool(is_rejected))
        for (key, one), is_rejected in zip(found.items(), rejected, strict=True)
        if one is not None
    }


def over_tasks(differences: Sequence[Difference]) -> tuple[float, float, float, int] | None:
    """Mean and interval over tasks of their mean differences, in %, and how many tasks these are; None of one task."""
    means = [np.log1p(one.mean / 100) for one in differences]
    if len(means) < 2:
        return None
    mean, low, high, _ = interval(means)
    return in_percent(mean), in_percent(low), in_percent(high), len(means)


def mean_curve(results: Sequence[Result]) -> np.ndarray:
    """Of the runs that did not diverge; NaN where all did."""
    kept = [result.curve for result in results if not result.diverged]
    return np.mean(kept, 0) if kept else np.full(EVALUATIONS, np.nan)


def speed(study: Study, unit: Unit) -> float | None:
    """The share of the steps until the arm's mean loss is that of its base at 75 % of them; inf if it never is."""
    base = Unit(unit.task, BASE[ARMS[unit.arm].family], unit.schedule)
    ours, theirs = final(study, unit), final(study, base)
    if ours is None or theirs is None:
        return None
    curve, target = mean_curve(ours), mean_curve(theirs)[round(0.75 * EVALUATIONS) - 1]
    reached = np.flatnonzero(curve <= target)
    if not reached.size:
        return float("inf")
    at = reached[0]
    if at == 0:
        return 1 / EVALUATIONS
    before, after = curve[at - 1], curve[at]
    return float((at + (before - target) / (before - after)) / EVALUATIONS)


def by_lr(study: Study, unit: Unit) -> dict[float, tuple[float, int]]:
    """Over the grid as far as it was run: mean loss of the tuning runs, and how many diverged."""
    found: dict[float, tuple[float, int]] = {}
    for lr in sorted({run.lr for run in study.rows if Unit(run.task, run.arm, run.schedule) == unit}):
        results = [study.rows.get(Run(unit.task, unit.arm, unit.schedule, lr, seed)) for seed in study.tuning_seeds]
        kept = [result for result in results if result is not None]
        if len(kept) == len(study.tuning_seeds):
            found[lr] = float(np.mean([result.loss for result in kept])), sum(result.diverged for result in kept)
    return found


def largest_stable(study: Study, unit: Unit) -> float | None:
    """The largest learning rate at which no tuning run diverged."""
    stable = [lr for lr, (_, n_diverged) in by_lr(study, unit).items() if n_diverged == 0]
    return max(stable, default=None)


def robustness(study: Study, unit: Unit) -> dict[float, float] | None:
    """Loss relative to the best by factor of the best learning rate, from 0.25 to 4, where it was run."""
    best, losses = study.tuned(unit)[0], by_lr(study, unit)
    if best is None:
        return None
    ratios = {round(lr / best, 6): in_percent(np.log(loss / losses[best][0])) for lr, (loss, _) in losses.items()}
    return {factor: ratio for factor, ratio in ratios.items() if 0.25 <= factor <= 4}


def ahead(study: Study, unit: Unit) -> float | None:
    """How much theta_hat's loss is above theta's at the end, in %."""
    results = final(study, unit)
    return None if results is None else in_percent(np.mean([np.log(one.loss_ahead / one.loss) for one in results]))
