"""What few numbers recover: measured on a tiny encoder, and told from made-up scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaops.cli import app
from deltaops.errors import ConfigError, DataError
from deltaops.measure.recovery import (
    OTHER,
    SAME,
    UNSEEN,
    Line,
    Plan,
    halves,
    measure,
    steps_of,
    task_files,
)
from deltaops.measure.recovery_report import Recovery, read_recovery, recovery_markdown, summary
from deltaops.testing.architectures import build
from deltaops.tuning.read import Example
from deltaops.tuning.workshop import Settings, Workshop

from .results import MACHINE

pytestmark = pytest.mark.usefixtures("one_thread")

PLAN = Plan((2, 3), "prompt:num_virtual_tokens=3", 4, 1e-3, 0.05)
LABELS = {"one": "good bad", "two": "old new", "three": "late lost"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    build("bert").save_pretrained(folder)  # type: ignore[operator]  # transformers'
    words = ["[PAD]", "[UNK]", "my", "card", "is", *" ".join(LABELS.values()).split()]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]").save_pretrained(folder)
    return folder


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, labels in LABELS.items():
        rows = [f"my card is {word},{word}\n" for word in labels.split()] * 10
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    return folder


def test_the_command_measures_every_kind_of_text(
    encoder: Path, tasks: Path, tmp_path: Path
) -> None:
    arguments = [
        "intrinsic", "recovery", "--tasks", tasks, "--unseen", "two", "--model", encoder, "--steps",
        2, "--fit-steps", 3, "--batch-size", 4, "--of", "prompt:num_virtual_tokens=3", "--out",
        tmp_path / "out", "--intrinsic-dim", "2,3",
    ]  # fmt: skip
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    (file,) = (tmp_path / "out").glob("*-intrinsic-prompt.json")
    assert {p.suffix for p in file.parent.iterdir()} == {".json", ".md", ".png"}
    value = json.loads(file.read_text())
    kinds = [(line["task"], line["kind"]) for line in value["lines"]]
    seen = ["one", "three"]
    assert kinds == [(n, SAME) for n in seen] + [(n, OTHER) for n in seen] + [("two", UNSEEN)]
    assert {(line["trained_on"], line["judged_by"]) for line in value["lines"]} == {(6, 4)}
    for line in value["lines"]:
        assert set(line["tuned"]) == {"2", "3"}
        assert set(line["random"]) == ({"2", "3"} if line["kind"] == UNSEEN else set())
    text = file.with_suffix(".md").read_text()
    file.with_suffix(".md").unlink()
    again = CliRunner().invoke(app, ["intrinsic", "report", str(file)], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert file.with_suffix(".md").read_text() == text
    assert json.loads(file.read_text()) == value
    assert [(m["kind"], m["q"]) for m in value["means"]][:3] == [(SAME, 2), (SAME, 3), (OTHER, 2)]
    renamed = file.rename(tmp_path / "mine.json")
    CliRunner().invoke(app, ["intrinsic", "report", str(renamed)], catch_exceptions=False)
    assert {p.name for p in tmp_path.iterdir()} >= {"mine.json", "mine.md", "mine.png"}
    assert not file.exists()  # nothing is called after the machine again
    renamed.rename(file)
    changed = [*arguments, "--seed", 1, "--unseen", "one"]
    with pytest.raises(ConfigError, match="measured with another --tasks and --unseen and --seed"):
        CliRunner().invoke(app, list(map(str, changed)), catch_exceptions=False)
    assert json.loads(file.read_text()) == value
    for key in ("machine", "plan", "lines"):
        broken = json.loads(file.read_text())
        if key == "lines":
            broken["lines"] = [line for line in broken["lines"] if line["kind"] != UNSEEN]
        else:
            broken[key].update({"machine": {"threads": None}, "plan": {"dimensions": [2, 64]}}[key])
        broken["machine"] = {k: v for k, v in broken["machine"].items() if v is not None}
        renamed.write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match="is none of `deltaops intrinsic recovery`"):
            read_recovery(renamed)


def test_as_many_steps_are_taken_as_the_bar_has(encoder: Path, tasks: Path) -> None:
    steps: list[int] = []
    settings = Settings(steps=2, batch_size=4, seq_len=8, eval_fraction=0.4)
    workshop = Workshop(str(encoder), settings, lambda what, step, loss: steps.append(step))
    done = [plan.dimensions for plan, _ in measure(workshop, task_files(tasks), ["two"], PLAN)]
    assert done == [(2,), (2, 3)]
    assert len(steps) == steps_of(PLAN, 2, 3, 1)


def test_halves_share_each_label_and_no_text() -> None:
    examples = [Example(str(i), "ab"[i % 3 == 0], i) for i in range(12)]
    first, second = halves(examples)
    assert {e.text for e in first} | {e.text for e in second} == {e.text for e in examples}
    for label, count in (("a", 4), ("b", 2)):
        assert [sum(e.label == label for e in half) for half in (first, second)] == [count, count]


def test_files_of_tasks_are_told_before_anything_is_read(tasks: Path) -> None:
    (tasks / ".deltaops-partial-x.csv").write_text("half a fi")
    (tasks / "two.csv").rename(tasks / "two.CSV")
    assert set(task_files(tasks)) == set(LABELS)
    (tasks / "one.jsonl").write_text("")
    with pytest.raises(ConfigError, match="two files are called 'one'"):
        task_files(tasks)
    (tasks / "one.jsonl").rename(tasks / "-x.jsonl")
    with pytest.raises(ConfigError, match="the task would be called '-x'"):
        task_files(tasks)


def test_a_label_with_one_text_is_told_before_training(encoder: Path, tasks: Path) -> None:
    with (tasks / "three.csv").open("a") as file:
        file.write("my card is old,lost_card\n")
    steps: list[int] = []
    settings = Settings(steps=1, batch_size=4, seq_len=8)
    workshop = Workshop(str(encoder), settings, lambda what, step, loss: steps.append(step))
    with pytest.raises(DataError, match="task 'three': the label 'lost_card' has one text"):
        next(measure(workshop, task_files(tasks), ["two"], PLAN))
    assert not steps


def test_means_are_the_papers_and_of_the_gain() -> None:
    def line(start: float, full: float, tuned: float, random: float) -> Line:
        scores = [{"accuracy": a, "loss": 1.0} for a in (start, full, tuned, random)]
        return Line("t", UNSEEN, 2, 8, 5, *scores[:2], {"5": scores[2]}, {"5": scores[3]})

    lines = line(0.5, 1.0, 0.75, 0.5), line(0.8, 0.8, 0.8, 0.7)
    plan = Plan((5,), "prompt", 4, 1e-3, 0.05)
    recovery = Recovery(MACHINE, "m", "named", "tasks", Settings(), plan, lines)
    found = summary(recovery, UNSEEN, 5)
    assert found["relative"] == pytest.approx((0.75 + 1.0) / 2)
    assert found["gain"] == pytest.approx(0.25 / 0.5)
    assert found["random_gain"] == pytest.approx(-0.1 / 0.5)
    assert (found["start"], found["full"]) == pytest.approx((0.65, 0.9))


def test_the_report_has_each_number_of_its_json() -> None:
    scores = [{"accuracy": a, "loss": 1.0} for a in (0.512, 0.934, 0.876, 0.645)]
    lines = tuple(
        Line("cash", kind, 2, 8, 5, *scores[:2], {"5": scores[2]},
             {"5": scores[3]} if kind == UNSEEN else {})
        for kind in (SAME, OTHER, UNSEEN)
    )  # fmt: skip
    plan = Plan((5,), "prompt", 4, 1e-3, 0.05)
    recovery = Recovery(MACHINE, "m", "named", "tasks", Settings(), plan, lines)
    text = recovery_markdown(recovery, "x.png")
    assert f"| {SAME} | 1 | 5 | 93.8 | 86.3 | 87.6 | 93.4 | 51.2 | – | – |" in text
    assert f"| {UNSEEN} | 1 | 5 | 93.8 | 86.3 | 87.6 | 93.4 | 51.2 | 64.5 | 31.5 |" in text
    assert "| cash | other data | 2 | 8 | 5 | 51.2 | 93.4 | 87.6 |" in text


def test_bad_plans_are_refused(encoder: Path, tasks: Path, tmp_path: Path) -> None:
    workshop = Workshop(str(encoder), Settings(steps=1, seq_len=8))
    files = task_files(tasks)
    for unseen, message in (
        (["four"], "--unseen must name some of one, three, two, got 'four'"),
        ([], "--unseen must name some of"),
        (["one", "two"], "must leave two tasks or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            next(measure(workshop, files, unseen, PLAN))
    with pytest.raises(ConfigError, match="--intrinsic-dim takes numbers"):
        Plan((0,), "prompt", 4, 1e-3, 0.05).check()
    with pytest.raises(ConfigError, match="is none of `deltaops intrinsic recovery`"):
        read_recovery(tmp_path / "none.json")
    with pytest.raises(DataError, match="must be a folder of CSV or JSONL files"):
        task_files(tmp_path)
