"""A study that several processes have open: what one writes, none deletes, mixes or misnames."""

from __future__ import annotations

import fcntl
import json
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import Trial

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import MARK
from deltaops.search import Settings, Study, engine, resume
from deltaops.search.journal import Journal
from deltaops.search.space import read_space
from deltaops.search.study import best_number
from deltaops.search.trainer import Result

from .conftest import LORA

SETTINGS = Settings("m", "d", objectives=("loss",), sampler="random", pruner="none")


@pytest.fixture
def study(tmp_path: Path) -> Callable[[], Study]:
    """The same one, opened anew by each call."""
    (tmp_path / "journal.log").touch()
    return lambda: Study(tmp_path, SETTINGS, read_space(LORA))


def begin(study: Study) -> Trial:
    (trial,) = study.claim("worker", 99, 1)[-1:]
    study.candidate(trial)
    return trial


def end(study: Study, trial: Trial, loss: float) -> None:
    result = Result({"loss": loss, "accuracy": 0.0}, False, 1, 0.0, 0, {})
    study.finish(trial, result, lambda folder: (folder / "adapter").write_text(f"{trial.number}"))


def test_a_trial_that_ends_while_another_process_settles_keeps_its_adapter(
    study: Callable[[], Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = study(), study()
    end(one, begin(one), 0.5)
    late = begin(other)
    ending = threading.Thread(target=end, args=(other, late, 0.1))
    front = one.front

    def slowly() -> Any:
        found = front()
        ending.start()
        ending.join(0.3)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(one, "front", slowly)
        one.settle()
    ending.join()
    assert (one.adapter(late.number) / "trial.json").is_file()
    assert best_number(one.folder) == late.number


def test_a_copy_is_of_the_best_where_one_was_killed_before_it_settled(
    study: Callable[[], Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = study()
    end(opened, begin(opened), 0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Study, "_settle", lambda self: None)
        end(opened, begin(opened), 0.1)
    assert best_number(opened.folder) == 0
    (tmp_path / f"{MARK}half").touch()
    (tmp_path / "trials" / f"{MARK}half").mkdir()
    opened = study()
    opened.copy(1, tmp_path / "copy")
    assert (tmp_path / "copy" / "adapter").read_text() == "1"
    assert (tmp_path / "copy" / "reproduce.txt").is_file()
    assert not [*tmp_path.glob(f"**/{MARK}*")]
    with pytest.raises(CheckpointError, match="adapter of trial 0 is missing"):
        opened.copy(0, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_score_is_of_the_trial_that_was_loaded(
    search: Callable[..., Any], tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(tmp_path, trials=1, steps=2)
    best, load = tmp_path / "best", engine.load

    def replaced(*args: Any) -> Any:
        handle = load(*args)
        facts = json.loads((best / "trial.json").read_text())
        (best / "trial.json").write_text(json.dumps(facts | {"trial": 7}))
        return handle

    with monkeypatch.context() as patch:
        patch.setattr(engine, "load", replaced)
        with pytest.raises(CheckpointError, match="trial 7 became the best while trial 0"):
            engine.score_best(tmp_path, data)
    assert not (best / "test.json").exists()
    engine.score_best(tmp_path, data)
    assert json.loads((best / "test.json").read_text())["trial"] == 0


def test_the_journal_is_read_behind_who_writes(tmp_path: Path) -> None:
    made = Journal(tmp_path / "journal.log")
    made.append_logs([{"a": 1}])
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.extend(made.read_logs(0)))
    with made.path.open("rb+") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        reader.start()
        reader.join(0.1)
        assert not found, "a line that the writer may take back"
    reader.join()
    assert found == [{"a": 1}]


def test_a_resumption_that_nobody_said_a_number_for_is_refused(
    search: Callable[..., Any], tmp_path: Path
) -> None:
    search(tmp_path, trials=1, steps=2)
    lines = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.log").write_bytes(lines[0])  # killed as soon as it was created
    with pytest.raises(ConfigError, match=r"Pass --trials\."):
        resume(tmp_path)
    assert len(resume(tmp_path, trials=1).study.trials()) == 1


def test_what_a_broken_pack_had_in_memory_is_free_for_its_trials(
    search: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = engine.train_pack
    held: list[weakref.ref[torch.Tensor]] = []
    left: list[torch.Tensor | None] = []

    def breaks(shop: Any, task: Any, candidates: Any, *rest: Any) -> Any:
        if len(candidates) > 1:
            logits = torch.zeros(8)
            held.append(weakref.ref(logits))
            raise torch.OutOfMemoryError("8 GB")
        left.extend(ref() for ref in held)
        return train(shop, task, candidates, *rest)

    monkeypatch.setattr(engine, "train_pack", breaks)
    found = search(tmp_path, trials=2, steps=2, pack=2)
    assert [trial.state.name for trial in found.study.trials()] == ["COMPLETE"] * 2
    assert left == [None, None]
