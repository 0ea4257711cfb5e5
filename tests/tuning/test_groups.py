"""Tasks out of one labelled file, by groups of its labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaops.cli import app
from deltaops.errors import ConfigError, DataError
from deltaops.tuning.groups import grouped, read_groups
from deltaops.tuning.read import Columns, read_examples

ROWS = ['"one, with a comma",a', '"two\r\nlines\r",b', "three,c", "four,d", "five,a", "six,x"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "all.csv"
    path.write_bytes(("words,intent\n" + "\n".join(ROWS) + "\n").encode())
    return path


def test_each_task_has_the_texts_of_its_labels(data: Path, tmp_path: Path) -> None:
    groups = tmp_path / "groups.json"
    groups.write_text(json.dumps({"first": ["a", "b"], "second": ["d", "c"]}))
    arguments = [
        "intrinsic", "split", "--data", data, "--data", data, "--groups", groups, "--out",
        tmp_path / "tasks", "--text-column", "words", "--label-column", "intent",
    ]  # fmt: skip
    found = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    assert "2 texts have labels that are in no group" in found.output
    first = read_examples(str(tmp_path / "tasks" / "first.csv"), Columns("text", "label"))
    texts = [("one, with a comma", "a"), ("two\r\nlines\r", "b"), ("five", "a")]
    assert [(example.text, example.label) for example in first] == texts * 2
    second = read_examples(str(tmp_path / "tasks" / "second.csv"), Columns("text", "label"))
    assert [example.text for example in second] == ["three", "four"] * 2
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_a_split_leaves_its_input_alone(tmp_path: Path) -> None:
    groups, data = tmp_path / "groups.json", tmp_path / "cards.csv"
    groups.write_text('{"cards": ["a", "b"]}')
    data.write_text("text,label\none,a\ntwo,b\nthree,c\n")
    before = data.read_bytes()
    arguments = ["--data", str(data), "--groups", str(groups), "--out", str(tmp_path)]
    with pytest.raises(ConfigError, match="must be a new or an empty folder"):
        CliRunner().invoke(app, ["intrinsic", "split", *arguments], catch_exceptions=False)
    assert data.read_bytes() == before


def test_what_json_can_write_and_nobody_reads_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": "x"}\n{"text": "b \\ud83d", "label": "y"}\n')
    with pytest.raises(DataError, match="line 2: 'text' has half of a surrogate pair"):
        read_examples(str(path), Columns("text", "label"))
    path.write_text('{"text": ' + "1" * 5000 + "}\n")
    with pytest.raises(DataError, match=r"line 1: not usable JSON \(Exceeds the limit"):
        read_examples(str(path), Columns("text", "label"))


def test_the_groups_of_banking77_have_each_intent_once() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "banking77-tasks.json"
    groups = read_groups(path)  # a label that stands there twice is refused
    assert sum(map(len, groups.values())) == 77


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("{", "cannot be read"),
        ('["a"]', "must be an object of lists"),
        ('{"one": ["a"]}', "two labels or more"),
        ('{"one": ["a", 3]}', "must be an object of lists"),
        ('{"../one": ["a", "b"]}', "a task cannot be called '../one'"),
        ('{"one": ["a", "b"], "two": ["c", "a"]}', "'a' stands there twice"),
        ("{}", "must be an object of lists"),
        ('{"one": ["a", "b"], "one": ["c", "d"]}', "cannot be read: 'one' stands there twice"),
        ('{"one": ["a", "b"], "One": ["c", "d"]}', "one file where case does not count"),
    ],
)
def test_bad_groups_are_refused(groups: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "groups.json"
    path.write_text(groups)
    with pytest.raises(ConfigError, match=message):
        read_groups(path)


def test_a_label_that_no_text_has_is_told(data: Path) -> None:
    examples = read_examples(str(data), Columns("words", "intent"))
    with pytest.raises(DataError, match="group 'one': no text has the label 'z'"):
        grouped(examples, {"one": ("a", "z")})
