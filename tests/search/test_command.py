"""The command, from a search to an adapter and a report that needs nothing beside it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import typer.testing

from deltaops.cli import app
from deltaops.errors import CheckpointError, ConfigError


def call(*words: object) -> str:
    found = typer.testing.CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def test_from_a_search_to_an_adapter(tmp_path: Path, encoder: str, data: str) -> None:
    out = tmp_path / "study"
    settings = (
        "--steps",
        3,
        "--rungs",
        2,
        "--seq-len",
        16,
        "--pruner",
        "none",
        "--pack",
        2,
        "--objective",
        "loss",
    )
    said = call("search", "--model", encoder, "--data", data, "--trials", 5, "--out", out,
                "--space", "small", *settings)  # fmt: skip
    assert "5 trials (5 complete)" in said
    assert "best: trial" in said
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures >= {"history.png", "front.png", "layers.png", "importance.png"}
    html = (out / "report.html").read_text()
    coded = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert {base64.b64decode(one) for one in coded} == {p.read_bytes() for p in out.glob("*.png")}
    assert not re.search(r'(src|href)="(?!data:)', html), "the report needs other files"
    assert "7 trials" in call("search", "resume", out, "--trials", 7)
    assert "best: trial" in call("search", "show", out)
    assert "accuracy" in call("search", "test", out, "--data", data)
    assert len(json.loads((out / "trials.json").read_text())["trials"]) == 7
    call("search", "export", out, "--out", tmp_path / "adapter")
    assert (
        (tmp_path / "adapter" / "reproduce.txt").read_text().startswith("deltaops search --model")
    )
    with pytest.raises(ConfigError, match="exists"):
        call("search", "export", out, "--out", tmp_path / "adapter")
    with pytest.raises(ConfigError, match="not on the front"):
        call("search", "export", out, "--trial", 99, "--out", tmp_path / "other")


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--model is missing"):
        call("search", "--data", "x.csv")
    with pytest.raises(CheckpointError, match="has no study"):
        call("search", "show", tmp_path)


@pytest.mark.parametrize("command", ["resume", "show", "export", "test"])
def test_help_has_an_example(command: str) -> None:
    assert f"deltaops search {command}" in call("search", command, "--help")
