"""Samplers draw for a trial whose process was killed what they had drawn before."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.trial import Trial

from deltaops.search.journal import Journal
from deltaops.search.samplers import GENERATION, make_sampler


def opened(path: Path, sampler: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(Journal(path)), study_name="one", load_if_exists=True,
        sampler=make_sampler(sampler, 0),
    )  # fmt: skip


def draw(trial: Trial) -> tuple[float, str]:
    return trial.suggest_float("x", 0.0, 1.0), trial.suggest_categorical("y", ["a", "b", "c"])


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
def test_what_was_drawn_before_a_kill_is_drawn_again(tmp_path: Path, sampler: str) -> None:
    path = tmp_path / "journal.log"
    path.touch()
    study = opened(path, sampler)
    for _ in range(GENERATION):
        trial = study.ask()
        x, y = draw(trial)
        study.tell(trial, (x - 0.4) ** 2 + (y == "b"))
    before = len(path.read_bytes().splitlines())
    trial = study.ask()
    drawn = draw(trial)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) - before > 2, "more than the trial and its parameters"
    for kept in range(before + 1, len(lines)):
        path.write_bytes(b"".join(lines[:kept]))
        assert draw(Trial(opened(path, sampler), trial._trial_id)) == drawn, kept - before
