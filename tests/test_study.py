"""The study of benchmarks/study: its comparators, runs, resumption, statistics and pages."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "study"))

import analysis
import demo
import report
import study
from arms import ARMS, BASE
from comparators import QHM, EMANesterov, Lookahead, QHAdam
from runs import EVALUATIONS, Result, Run, train
from study import QUESTIONS, Study, Unit, grid
from tasks import TASKS, mnist1d_signals

GRADIENTS = [np.array([0.5, -1.0, 2.0]), np.array([-0.25, 0.5, 1.0]), np.array([1.0, 1.5, -0.5])]
START = np.array([1.0, -2.0, 0.5])


def follow(make, n_steps=3):
    """theta after each step on the gradients above, in float64."""
    param = torch.nn.Parameter(torch.tensor(START))
    optimizer, seen = make([param]), []
    for grad in GRADIENTS[:n_steps]:
        param.grad = torch.tensor(grad)
        optimizer.step()
        seen.append(param.detach().numpy().copy())
    return seen, optimizer


# -- comparators -----------------------------------------------------------------------------------------------------


def test_qhm_is_its_formula():
    theta, mean = START.copy(), np.zeros(3)
    for found, grad in zip(follow(lambda params: QHM(params, lr=0.1, beta=0.9, nu=0.7))[0], GRADIENTS, strict=True):
        mean = 0.9 * mean + 0.1 * grad
        theta = theta - 0.1 * (0.3 * grad + 0.7 * mean)
        np.testing.assert_allclose(found, theta, rtol=1e-14)


def test_qhadam_with_nu_1_is_adamw():
    ours, _ = follow(lambda params: QHAdam(params, lr=0.1, betas=(0.9, 0.99), nu=1.0))
    torchs, _ = follow(lambda params: torch.optim.AdamW(params, lr=0.1, betas=(0.9, 0.99)))
    np.testing.assert_allclose(ours, torchs, rtol=1e-12)


def test_qhadam_with_nu_0_has_the_gradient_for_a_numerator():
    found, _ = follow(lambda params: QHAdam(params, lr=0.1, nu=0.0, weight_decay=0.0), n_steps=1)
    np.testing.assert_allclose(found[0], START - 0.1 * np.sign(GRADIENTS[0]), rtol=1e-7)


def test_ema_nesterov_is_its_formula():
    seen, optimizer = follow(lambda params: EMANesterov(torch.optim.SGD(params, lr=0.1), gamma=0.9, ahead=0.3))
    theta, mean, held = START.copy(), np.zeros(3), START.copy()
    for found, grad in zip(seen, GRADIENTS, strict=True):
        after = held - 0.1 * grad
        mean = 0.9 * mean + 0.1 * (after - theta)
        theta, held = after, after + 0.3 * mean
        np.testing.assert_allclose(found, held, rtol=1e-14)
    with optimizer.true_weights():
        np.testing.assert_allclose(optimizer.params()[0].detach().numpy(), theta, rtol=1e-14)
    np.testing.assert_allclose(optimizer.params()[0].detach().numpy(), held, rtol=1e-14)


def test_lookahead_is_its_formula():
    seen, _ = follow(lambda params: Lookahead(torch.optim.SGD(params, lr=0.1), k=2, alpha=0.25))
    first = START - 0.1 * GRADIENTS[0]
    second = START + 0.25 * (first - 0.1 * GRADIENTS[1] - START)
    for found, expected in zip(seen, (first, second, second - 0.1 * GRADIENTS[2]), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-14)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_trains(arm):
    """And starts from the weights that its base starts from."""
    task = "vae" if ARMS[arm].family == "muon" else "quadratic"
    lr = grid(Unit(task, arm, "cosine"))[1]
    result = train(Run(task, arm, "cosine", lr, 5), 60)
    assert not result.diverged and result.loss < result.initial_loss
    assert len(result.curve) == EVALUATIONS and result.curve[-1] == result.loss
    base = train(Run(task, BASE[ARMS[arm].family], "cosine", lr, 5), 2)
    assert result.initial_loss == base.initial_loss


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_a_function_of_its_seed(task):
    lr = TASKS[task].lr["adamw"]
    once, again, other = (train(Run(task, "xadamw s=1", "cosine", lr, seed), 3) for seed in (7, 7, 8))
    assert once.curve == again.curve and once.initial_loss == again.initial_loss
    assert once.initial_loss != other.initial_loss


def test_a_run_that_diverges_counts_with_the_loss_that_it_began_with():
    result = train(Run("valley", "sgdm", "cosine", 10.0, 0), 40)
    assert result.diverged and result.loss == result.initial_loss == result.loss_ahead


def test_the_weights_that_are_judged_are_theta():
    """At a constant lr theta and theta_hat differ at the end."""
    result = train(Run("quadratic", "xsgdm s=1", "constant", 0.5, 0), 60)
    assert result.loss == result.curve[-1] != result.loss_ahead


def test_mnist1d_looks_as_published():
    signals, labels = mnist1d_signals(200, np.random.default_rng(0))
    assert signals.shape == (200, 40) and set(labels) == set(range(10))
    assert np.isfinite(signals).all() and 0.1 < signals.std() < 2


# -- which runs there are ----------------------------------------------------------------------------------------------


def made(losses, questions=None, **options):
    """A study in which `losses(run)` tells each run's loss, run to its end."""
    made = Study(questions or QUESTIONS, (1000, 1001), tuple(range(12)), **options)
    while runs := list(made.missing(made.questions)):
        for run in runs:
            loss = losses(run)
            made.rows[run] = Result(10.0, loss, loss, False, [loss * (2 - i / 20) for i in range(1, 21)], 0.1)
    return made


def best_at(lr_of):
    """Losses with their least at these learning rates, and some noise of the seed, which is the same for all arms."""

    def loss(run):
        noise = 0.05 * math.sin(17 * run.seed)
        return 1 + noise + 0.1 * math.log2(run.lr / lr_of(run)) ** 2

    return loss


def test_a_best_learning_rate_at_an_end_makes_the_grid_grow_twice_at_most():
    unit = Unit("digits", "adamw", "cosine")
    middle = grid(unit)[2]
    for factor, expected in ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (64, 16), (1 / 4, 1 / 4), (1 / 64, 1 / 16)):
        one = made(best_at(lambda run, factor=factor: middle * factor), {"one": [unit]})
        assert one.tuned(unit) == (middle * expected, [])


def test_an_x_arm_also_runs_at_its_bases_learning_rate():
    middle = TASKS["digits"].lr["adamw"]
    one = made(
        best_at(lambda run: middle * (2 if run.arm[0] == "x" else 1)),
        {"one": study.units(["digits"], ["adamw", "xadamw s=1"])},
    )
    finals = {run.lr for run in one.rows if run.arm == "xadamw s=1" and run.seed in one.final_seeds}
    assert finals == {middle, 2 * middle}
    assert {run.lr for run in one.rows if run.arm == "adamw" and run.seed in one.final_seeds} == {middle}


def test_fresh_seeds_are_fresh():
    full = study.full({})
    assert not {*full.tuning_seeds} & {*full.final_seeds}


def test_every_arm_is_asked_about():
    assert {unit.arm for units in QUESTIONS.values() for unit in units} == {*ARMS}


def test_an_interrupted_study_goes_on(tmp_path):
    """The same runs and rows as without an interruption, which cut the last line."""

    def run(folder):
        one = Study({"one": [Unit("quadratic", "xsgdm s=1", "cosine")]}, (1000,), (0, 1))
        one.rows.update(study.read(folder / "runs.csv"))
        assert study.run_missing(one, ["one"], folder, 1, None)
        return {run: (result.loss, result.curve) for run, result in study.read(folder / "runs.csv").items()}

    whole = run(tmp_path / "whole")
    text = (tmp_path / "whole" / "runs.csv").read_text()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "runs.csv").write_text(text[: len(text) * 2 // 3])
    assert run(tmp_path / "cut") == whole
    assert len(study.read(tmp_path / "cut" / "runs.csv")) == len(whole) == len(text.splitlines()) - 1


# -- statistics ------------------------------------------------------------------------------------------------------


def with_effects(effects, spread=0.01, seed=0):
    """A study whose arms differ from their base by these factors, each seed with a noise of its own."""
    rng = np.random.default_rng(seed)

    def losses(run):
        middle = TASKS[run.task].lr[ARMS[run.arm].family]
        lr_factor = 1 + 0.1 * math.log2(run.lr / middle) ** 2
        return lr_factor * effects.get(run.arm, 1.0) * math.exp(spread * rng.standard_normal())

    questions = {name: QUESTIONS[name] for name in ("primary", "long")}
    return made(losses, questions)


def test_an_effect_is_found():
    one = with_effects({"xadamw s=1": 0.95})
    found = analysis.primary(one)
    swaps = [one for one in found.values() if one.arm == "xadamw s=1"]
    assert len(found) == 55 and len(swaps) == 11
    assert all(one.is_significant and one.verdict == "better" for one in swaps)
    assert all(-6.5 < one.mean < -3.5 and one.low < -5 < one.high for one in swaps)
    mean, low, high, n = analysis.over_tasks(swaps)
    assert n == 11 and low < -5 < high and abs(mean + 5) < 0.5


def test_without_an_effect_next_to_nothing_is_found():
    """Of 20 studies Holm's correction leaves one with a finding, on average; uncorrected tests find one in twenty."""
    found = [[*analysis.primary(with_effects({}, seed=seed)).values()] for seed in range(20)]
    assert sum(any(one.is_significant for one in primary) for primary in found) <= 3
    assert 0.02 < np.mean([one.excludes_zero for primary in found for one in primary]) < 0.09


def test_a_verdict_has_a_margin():
    one = with_effects({"xadamw s=1": 1.03, "xsgdm s=1": 1.01}, spread=0.004)
    found = analysis.primary(one)
    assert found["digits", "xadamw s=1", "adamw"].verdict == "worse"
    assert found["digits", "xsgdm s=1", "sgdm"].verdict in ("no worse", "worse")
    assert found["digits", "xsgdm s=1", "sgdm"].high < analysis.MARGIN


def test_what_is_not_complete_is_not_shown():
    one = with_effects({})
    unit = Unit("digits", "nadamw", "cosine")
    del one.rows[next(run for run in one.finals(unit))]
    assert analysis.difference(one, Unit("digits", analysis.AHEAD, "cosine"), "nadamw") is None
    assert ("digits", analysis.AHEAD, "nadamw") not in analysis.primary(one)
    assert f"| {report.NONE} " in report.primary_table(one)


def test_how_fast_an_arm_is():
    one = with_effects({"adamw .8": 0.9, "nadamw": 2.0}, spread=0.0)
    # The base's curve falls by 1/20 in each twentieth, to 1.25 at 15 of 20; the arm's is 0.9 of it.
    assert analysis.speed(one, Unit("digits", "adamw .8", "cosine")) == pytest.approx((2 - 1.25 / 0.9), rel=1e-6)
    assert analysis.speed(one, Unit("digits", "nadamw", "cosine")) == math.inf


# -- pages -----------------------------------------------------------------------------------------------------------


def test_the_pages_are_what_the_data_give():
    one = study.full(study.read(study.DATA / "runs.csv"))
    assert one.rows, "the data are part of the repository"
    for page in report.PAGES:
        assert report.rendered(page.read_text(), one) == page.read_text(), f"run `make results` for {page.name}"
    marked = {match["name"] for page in report.PAGES for match in report.MARK.finditer(page.read_text())}
    assert marked == {*report.TABLES}


def test_every_row_tells_where_it_comes_from():
    sessions = (study.DATA / "sessions.csv").read_text().splitlines()
    known = {line.split(",")[0] for line in sessions[1:]}
    rows = (study.DATA / "runs.csv").read_text().splitlines()[1:]
    assert {row.rsplit(",", 1)[1] for row in rows} <= known
    assert not any("dirty" in line for line in sessions)


@pytest.mark.parametrize("is_complete", [True, False])
def test_everything_renders(is_complete, tmp_path):
    one = made(best_at(lambda run: TASKS[run.task].lr[ARMS[run.arm].family]))
    if not is_complete:
        one.rows = dict(list(one.rows.items())[:500])
    for draw in report.TABLES.values():
        assert len(draw(one).splitlines()) >= 2
    for name, draw in report.FIGURES.items():
        draw(one).savefig(tmp_path / f"{name}.png")


def test_the_demo_shows_what_it_has_run(tmp_path, monkeypatch, capsys):
    one = study.quick({})
    losses = best_at(lambda run: TASKS[run.task].lr[ARMS[run.arm].family])
    log = study.Log(tmp_path)
    while runs := list(one.missing(one.questions)):
        for run in runs:
            one.rows[run] = Result(10.0, losses(run), losses(run), False, [losses(run)] * EVALUATIONS, 0.1)
            log.add(run, one.rows[run])
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    demo.main()
    shown = capsys.readouterr().out
    assert "char GRU" in shown and "xadamw s=1 / adamw" in shown
    assert (tmp_path / "forest.png").exists() and len(one.missing.__self__.rows) == len(
        study.read(tmp_path / "runs.csv")
    )
