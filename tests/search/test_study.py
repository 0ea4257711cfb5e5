"""A study: bits by the seed, resumption, broken trials, fronts, and folders of other studies."""

from __future__ import annotations

import dataclasses
import json
import random
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import deltaops
from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import MARK
from deltaops.search import Settings, Study, Watch, engine, resume
from deltaops.search.pack import NotByRows
from deltaops.search.space import read_space
from deltaops.search.trainer import NotFinite

from .conftest import LORA, told

Search = Callable[..., Any]


def weights(out: Path) -> bytes:
    return (out / "best" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2"])
def test_the_seed_decides_every_bit(search: Search, tmp_path: Path, sampler: str) -> None:
    settings = {"sampler": sampler, "trials": 12, "steps": 1, "rungs": 1, "pruner": "hyperband"}
    runs = [search(tmp_path / name, **settings) for name in ("one", "two")]
    assert told(runs[0]) == told(runs[1])
    assert len({json.dumps(t.params) for t in runs[0].study.trials()}) > 6
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_a_stopped_study_ends_as_one_that_ran_through(search: Search, tmp_path: Path) -> None:
    straight = search(tmp_path / "straight", trials=4, pruner="halving")
    steps = 0
    limit = random.randrange(1, 20)

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps > limit

    out = tmp_path / "stopped"
    stopped = search(out, trials=4, pruner="halving", watch=Watch(should_stop=stop))
    assert not stopped.finished, limit
    ended = search(out, trials=4, pruner="halving")
    assert ended.finished
    assert told(ended) == told(straight), limit
    assert weights(out) == weights(tmp_path / "straight")


def test_best_is_ready_and_makes_itself_again(search: Search, tmp_path: Path, encoder: str) -> None:
    found = search(tmp_path / "out")
    best = tmp_path / "out" / "best"
    assert json.loads((best / "trial.json").read_text())["trial"] == found.best.number
    space = yaml.safe_load((best / "space.yaml").read_text())
    search(tmp_path / "again", space, trials=1)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    found.study.settings = dataclasses.replace(found.study.settings, data="my texts.csv")
    words = shlex.split(found.study.command(best / "space.yaml"))
    assert words[:2] == ["deltaops", "search"]
    assert words[words.index("--data") + 1] == "my texts.csv"
    assert (best / "reproduce.txt").read_text().split()[: len(words[:2])] == words[:2]
    model = transformers.AutoModel.from_pretrained(encoder)
    assert deltaops.load(model, best).sites
    kept = {path.name for path in (tmp_path / "out" / "trials").iterdir()}
    assert kept == {f"{trial.number:04d}" for trial in found.front}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotFinite("the loss of step 2 is nan"), "not finite: the loss of step 2"),
        (MemoryError("8 GB"), "out of memory: 8 GB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), "out of memory: Default"),
        (KeyError("x"), "KeyError: 'x'"),
    ],
)
def test_a_broken_trial_is_recorded_and_the_search_goes_on(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    train, calls = engine.train_alone, []

    def breaks(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return train(*args)

    monkeypatch.setattr(engine, "train_alone", breaks)
    found = search(tmp_path, trials=3, steps=2)
    states = [trial.state.name for trial in found.study.trials()]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert found.study.trials()[1].user_attrs["reason"].startswith(reason)


def test_a_loss_that_is_no_number_is_a_broken_trial(search: Search, tmp_path: Path) -> None:
    space = {"deltas": {"lora": {"r": 2, "lr": [1e-3, 1e36]}}}
    found = search(tmp_path, space, trials=6, pruner="none")
    broken = [t for t in found.study.trials() if t.state.name == "FAIL"]
    assert 0 < len(broken) < 6
    assert all(t.user_attrs["reason"].startswith("not finite") for t in broken)


def test_what_no_pack_can_have_is_trained_alone_and_says_so(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = {"deltas": {"lora": {"target_modules": ["all-linear", ["query"]],
                                 "exclude_modules": [None, ["query"]], "lr": 1e-3}}}  # fmt: skip
    found = search(tmp_path / "out", space, trials=6, steps=2, pack=3)
    told_of = {t.state.name: t.user_attrs for t in found.study.trials()}
    assert told_of["FAIL"]["reason"].startswith("TargetError")  # both at once leave nothing
    assert "alone" not in told_of["COMPLETE"]

    def refuses(*args: Any) -> Any:
        raise NotByRows("[1, 9]")

    monkeypatch.setattr(engine, "train_pack", refuses)
    found = search(tmp_path / "other", trials=2, steps=2, pack=2)
    assert [t.state.name for t in found.study.trials()] == ["COMPLETE", "COMPLETE"]
    assert all("[1, 9]" in t.user_attrs["alone"] for t in found.study.trials())


def test_a_pack_is_of_the_same_trials_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "journal.log").touch()
    study = Study(tmp_path, Settings("m", "d", pack=4, sampler="random"), read_space(LORA))

    def claimed() -> list[int]:
        return [trial.number for trial in study.claim("dead", 6, 4)]

    assert claimed() == [0, 1, 2, 3]
    for number in (0, 1):
        study.optuna.tell(number, 0.5)
    assert claimed() == [2, 3]  # 4 and 5 are drawn once these are known
    for number in (2, 3):
        study.optuna.tell(number, 0.5)
    assert claimed() == [4, 5]
    lines = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if b'"op_code":4' in line)
    (tmp_path / "journal.log").write_bytes(b"".join(lines[: cut + 2]))
    study = Study(tmp_path, study.settings, study.space)
    assert claimed() == [0, 1, 2, 3]


def test_the_front_has_what_nothing_beats(search: Search, tmp_path: Path) -> None:
    found = search(tmp_path, trials=6, objectives=("loss", "parameters", "memory"))
    values = [tuple(trial.values) for trial in found.study.complete()]
    beaten = {
        v for v in values
        if any(all(a <= b for a, b in zip(o, v, strict=True)) and o != v for o in values)
    }  # fmt: skip
    assert {tuple(trial.values) for trial in found.front} == set(values) - beaten
    ranks = [t.params["lora/r"] for t in found.study.complete()]
    assert [v[1] for v in values] == [r * values[0][1] / ranks[0] for r in ranks]
    assert found.best.values[0] == min(v[0] for v in values)


def test_starts_come_first(search: Search, tmp_path: Path) -> None:
    start = "lora:r=4,alpha=4; lr=0.002, batch_size=8"
    found = search(tmp_path, trials=2, starts=(start,))
    assert found.study.trials()[0].params == {
        "lora/r": 4, "lora/alpha": 1, "lora/lr": 0.002, "batch_size": 8,
    }  # fmt: skip
    assert len(found.study.trials()) == 2


def test_a_search_begins_with_what_is_suggested(search: Search, tmp_path: Path) -> None:
    space = {"deltas": {"lora": {"r": [2, 4], "alpha": [4, 8], "lr": 1e-3}}}
    found = search(tmp_path / "out", space, trials=1, steps=2, starts=("suggest",))
    (first,) = found.study.trials()
    assert (first.params["lora/r"], first.params["lora/alpha"]) == (4, 8)  # for few examples
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    assert facts["starts"] == ["lora:r=4,alpha=8"]
    with pytest.raises(ConfigError, match="nothing of it is in the space"):
        search(tmp_path / "none", {"deltas": {"lora": {"r": 3, "lr": 1e-3}}}, starts=("suggest",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"deltas": {"bitfit": {"lr": 1e-3}}}}, "a study of another space"),
        ({"steps": 5}, "a study of steps=2 and not 5"),
        ({"seed": 1}, "seed=0 and not 1"),
    ],
)
def test_a_folder_of_another_study_is_refused(
    search: Search, tmp_path: Path, changes: Any, message: str
) -> None:
    search(tmp_path, trials=1, steps=2)
    before = (tmp_path / "journal.log").read_bytes()
    with pytest.raises(ConfigError, match=message):
        search(tmp_path, **{"trials": 1, "steps": 2} | changes)
    assert (tmp_path / "journal.log").read_bytes() == before


def test_another_model_or_data_file_is_refused(
    search: Search, tmp_path: Path, encoder: str, data: str
) -> None:
    search(tmp_path / "out", trials=1, steps=2)
    facts = json.loads((tmp_path / "out" / "study.json").read_text())
    changed = transformers.AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        next(changed.parameters()).add_(0.1)
    shutil.copytree(encoder, tmp_path / "model")
    changed.save_pretrained(tmp_path / "model")
    settings = facts["settings"] | {"model": str(tmp_path / "model")}
    (tmp_path / "out" / "study.json").write_text(json.dumps(facts | {"settings": settings}))
    with pytest.raises(ConfigError, match="another model"):
        resume(tmp_path / "out")
    with pytest.raises(ConfigError, match="another model"):
        engine.score_best(tmp_path / "out", data)
    other = tmp_path / "other.csv"
    other.write_text(Path(data).read_text() + "when is my card,good\n")
    facts["settings"]["data"] = str(other)
    (tmp_path / "out" / "study.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="another data"):
        resume(tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objectives": ("acuracy",)}, r"did you mean accuracy\?"),
        ({"objectives": ("parameters",)}, "first must be"),
        ({"objectives": ("loss", "memory"), "pack": 2}, "--pack"),
        ({"objectives": ("loss", "memory"), "pruner": "halving"}, "--pruner halving"),
        ({"sampler": "tep"}, "did you mean tpe"),
        ({"trials": 0}, "--trials must be 1"),
        ({"rungs": 9}, "--rungs must be at most"),
        ({"starts": ("lora:r=3",)}, "not in the space"),
    ],
)
def test_bad_settings_are_refused(
    search: Search, tmp_path: Path, changes: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search(tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "trials").exists()


def test_a_folder_that_lost_something_is_told(search: Search, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        search(tmp_path / "file")
    out = tmp_path / "out"
    out.mkdir()
    (out / f"{MARK}half.json").touch()  # of one that was killed at its very start
    search(out, trials=1, steps=2)
    (out / "journal.log").unlink()
    with pytest.raises(CheckpointError, match=r"journal\.log is missing"):
        resume(out)
    assert not (out / "journal.log").exists()


def test_a_foreign_folder_is_refused(search: Search, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        search(tmp_path)
    with pytest.raises(CheckpointError, match="has no study"):
        resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_frozen_model_has_its_bits_back(search: Search, tmp_path: Path) -> None:
    from deltaops.tuning.workshop import Workshop

    shops: list[Workshop] = []
    made = Workshop.__init__

    def noted(self: Workshop, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        shops.append(self)
        self.before = {k: v.clone() for k, v in self.model.state_dict().items()}  # type: ignore[attr-defined]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workshop, "__init__", noted)
        search(tmp_path, {"deltas": LORA["deltas"] | {"bitfit": {"lr": 1e-2}}}, pack=2)
    state = shops[0].model.state_dict()
    assert state.keys() == shops[0].before.keys()  # type: ignore[attr-defined]
    assert all(torch.equal(v, shops[0].before[k]) for k, v in state.items())  # type: ignore[attr-defined]
