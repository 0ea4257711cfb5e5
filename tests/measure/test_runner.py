"""The plan and its budget; parts are made up, and no timing is asserted."""

from __future__ import annotations

from math import inf, nan
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaops.cli import app
from deltaops.cli.bench import _settings
from deltaops.errors import CheckpointError, ConfigError, DtypeError
from deltaops.files import write_json
from deltaops.measure import layers, runner, store
from deltaops.measure.cases import SHAPES
from deltaops.measure.cell import EAGER, OURS, PEFT
from deltaops.measure.report import markdown
from deltaops.measure.runner import Part, Settings

from .results import cell, results


def test_the_plan_covers_what_the_settings_name() -> None:
    names = [p.name for p in runner.plan(Settings(dtypes=("f32",), workloads=("bert",)))]
    assert sum(n.startswith("lora") for n in names) == len(SHAPES)
    assert [n for n in names if n.startswith("step")] == [
        "step BERT 384×6, 8×128 f32", "step BERT 384×6, 8×128 f32, dropout 0.1",
    ]  # fmt: skip
    assert "gemm 1×4096×4096 f32" in names
    assert all(n.startswith("step") for n in _names(Settings(layers=False, methods=())))


def _names(settings: Settings) -> list[str]:
    return [p.name for p in runner.plan(settings)]


def test_small_shapes_come_before_large_ones() -> None:
    lora = [n for n in _names(Settings(steps=False, dtypes=("bf16",))) if n.startswith("lora")]
    assert lora[0] == "lora 128×768×768 bf16"
    assert lora[-1] == "lora 2048×2048×2048 bf16"


def test_what_the_time_does_not_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def measure(seconds: float) -> list[object]:
        shares.append(seconds)
        return [cell("lora", {"deltaops": 1.0})]

    monkeypatch.setattr(
        runner, "plan", lambda _: iter([Part("lora a", 1, measure), Part("lora b", 3, measure)])
    )
    monkeypatch.setattr(runner, "peak", lambda dtype: "no probe")
    told: list[tuple[str, int, int]] = []
    found = runner.run(Settings(minutes=10), lambda *t: told.append(t))
    assert len(found.cells) == 2
    assert shares[0] <= 150 < 440 < shares[1]  # a quarter of ten minutes, then all that is left
    assert told == [("lora a", 0, 2), ("lora b", 1, 2), ("done", 2, 2)]
    spent = runner.run(Settings(minutes=0))
    assert spent.cells == []
    assert list(spent.left_out) == ["lora a", "lora b"]


def test_a_hopeless_peer_is_refused_with_its_reason() -> None:
    pace = layers.Pace()
    assert pace.refuses("PEFT", "bf16", 1e12) is None
    pace.learn("PEFT", "bf16", 1e9, 1.0)
    assert pace.refuses("PEFT", "bf16", 9e9) is None
    assert "about 100 s" in str(pace.refuses("PEFT", "bf16", 1e11))
    assert pace.refuses("PEFT", "f32", 1e11) is None


@pytest.mark.parametrize("error", [AssertionError, DtypeError, RuntimeError])
def test_a_gate_stops_its_part_and_the_run_tells(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(seconds: float) -> list[object]:
        raise error("y: relative error")

    good = Part("call", 1, lambda s: [cell("call", {"deltaops": 1.0})])
    monkeypatch.setattr(runner, "plan", lambda _: iter([Part("lora a", 1, wrong), good]))
    monkeypatch.setattr(runner, "peak", lambda dtype: "no probe")
    found = runner.run(Settings())
    assert found.failed == {"lora a": "y: relative error"}
    assert len(found.cells) == 1
    assert "Stopped by the gate" in markdown(found)


def test_times_that_are_no_numbers_are_named_and_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cells = [cell("lora", {OURS: 1.0, PEFT: s}, what=f"{s}") for s in (nan, inf, 0.0, 2.0)]
    part = Part("lora", 1, lambda seconds: cells)
    monkeypatch.setattr(runner, "plan", lambda _: iter([part]))
    monkeypatch.setattr(runner, "peak", lambda dtype: inf)
    run = CliRunner().invoke(app, ["bench", "--out", str(tmp_path)])
    assert run.exit_code == 1  # after all files are written
    (file,) = tmp_path.glob("*.json")
    found = store.read(file)
    assert [c.what for c in found.cells] == ["2.0"]
    assert list(found.failed) == ["lora nan f32", "lora inf f32", "lora 0.0 f32"]
    assert "PEFT: the median is nan s" in found.failed["lora nan f32"]
    assert "the probe gave inf GF/s" in str(found.peak["f32"])
    report = file.with_suffix(".md").read_text()
    assert all(why in report for why in found.failed.values())
    old = file.read_text().replace(": 2.0", ": NaN")  # as a program wrote it that minds no NaN
    file.write_text(old)
    assert len(store.read(file).failed) == 4


def test_methods_are_chosen_by_name() -> None:
    settings = _settings(False, "methods", None, None, "bert", "bitfit,full", None, None, 1)
    assert _names(settings) == [
        f"method BitFit on BERT 384×6, 8×64 {dtype}" for dtype in ("f32", "bf16")
    ]
    assert not any(n.startswith("method") for n in _names(Settings.quick()))
    with pytest.raises(ConfigError, match="--methods must name one with a delta"):
        _settings(False, None, None, None, None, "full", None, None, None)
    with pytest.raises(ConfigError, match="gpt2: methods are timed on bert, llama"):
        _settings(False, "methods", None, None, "gpt2", None, None, None, None)


def test_without_instructions_a_half_has_no_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.machine, "bf16_instructions", lambda: False)
    settings = Settings(layers=False, steps=False, dtypes=("bf16",), methods=("lora",))
    (part,) = runner.plan(settings)
    (found,) = part.run(1.0)
    assert found.timings == {}
    assert "no BF16 instructions" in found.absent[EAGER]


def test_what_was_measured_outlives_a_run_that_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(seconds: float) -> list[object]:
        raise KeyboardInterrupt

    good = Part("call", 1, lambda s: [cell("call", {"deltaops": 1.0})])
    monkeypatch.setattr(runner, "plan", lambda _: iter([good, Part("lora a", 1, killed)]))
    monkeypatch.setattr(runner, "peak", lambda dtype: "no probe")
    # click turns the interrupt into exit status 130
    assert CliRunner().invoke(app, ["bench", "--out", str(tmp_path)]).exit_code == 130
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".unfinished.json")
    found = store.read(left)
    assert [c.group for c in found.cells] == ["call"]
    assert found.left_out == {"lora a": "the run was stopped before"}
    monkeypatch.setattr(runner, "plan", lambda _: iter([good]))
    assert CliRunner().invoke(app, ["bench", "--out", str(tmp_path)]).exit_code == 0
    assert left not in list(tmp_path.iterdir())


def test_a_place_that_takes_no_files_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(settings: Settings) -> None:
        raise AssertionError("it measures")

    monkeypatch.setattr(runner, "plan", never)
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["bench", "--out", str(tmp_path / "file")])
    assert isinstance(result.exception, CheckpointError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--methods nothing", "--methods knows"),
        ("--only layers --methods nothing", "--methods knows"),
        ("--only steps --methods lora", "no part in --only steps"),
        ("--only methods --dropout 0.1", "--dropout has no part in --only methods"),
    ],
)
def test_words_that_have_no_part_in_a_run_are_refused(words: str, message: str) -> None:
    result = CliRunner().invoke(app, ["bench", *words.split()])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_a_report_is_called_as_its_json(tmp_path: Path) -> None:
    unfinished = tmp_path / "m.unfinished.json"
    write_json(unfinished, store.as_json(results(cell("call", {"deltaops": 1.0}))))
    (tmp_path / "m.md").write_text("whole")
    assert CliRunner().invoke(app, ["bench", "--report", str(unfinished)]).exit_code == 0
    assert (tmp_path / "m.unfinished.md").exists()
    assert (tmp_path / "m.md").read_text() == "whole"
