"""Successive halving and Hyperband: who goes on."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from deltaops.search.pruners import Halving, make_pruner

optuna.logging.set_verbosity(optuna.logging.WARNING)


def judged(pruner: Any, curves: list[dict[int, float]], direction: str) -> list[bool]:
    """Whether each is pruned by its last evaluation, those before it being known."""
    study = optuna.create_study(direction=direction)
    verdicts = []
    for curve in curves:
        trial = study.ask()
        for step, value in curve.items():
            trial.report(value, step)
        verdicts.append(pruner.prune(study, study.trials[-1]))
        study.tell(trial, 0.0)
    return verdicts


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1.0), ("maximize", -1.0)])
def test_the_better_half_goes_on(direction: str, sign: float) -> None:
    losses = [{1: sign * v} for v in (5.0, 6.0, 4.0, 4.5, 9.0, 1.0)]
    assert judged(make_pruner("halving", 4), losses, direction) == [
        False, True, False, False, True, False,
    ]  # fmt: skip


def test_levels_are_powers_of_two_and_the_end_is_none() -> None:
    best = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}
    for last, verdict in ((1, True), (2, True), (3, False), (4, False)):
        worse = {step: 1.0 for step in range(1, last + 1)}
        assert judged(make_pruner("halving", 4), [best, worse], "minimize")[1] is verdict


def test_brackets_judge_later_and_have_fewer_trials() -> None:
    pruner = Halving(rungs=4, brackets=3)
    assert [pruner.bracket(n) for n in range(8)] == [0, 1, 0, 2, 0, 1, 0, 2]
    best = {1: 0.0, 2: 0.0}
    worse = {1: 1.0}
    assert judged(pruner, [best, best, worse, worse, worse, worse], "minimize") == [
        False, False, True, False, True, False,
    ]  # fmt: skip


def test_a_trial_that_is_resumed_is_judged_by_those_before_it() -> None:
    study = optuna.create_study()
    first, second = study.ask(), study.ask()
    first.report(2.0, 1)
    second.report(1.0, 1)
    pruner = make_pruner("halving", 4)
    assert [pruner.prune(study, trial) for trial in study.trials] == [False, False]
    third = study.ask()
    third.report(3.0, 1)
    assert pruner.prune(study, study.trials[-1])


def test_none_prunes_nothing() -> None:
    assert judged(make_pruner("none", 4), [{1: 0.0}, {1: 9.0}], "minimize") == [False, False]
