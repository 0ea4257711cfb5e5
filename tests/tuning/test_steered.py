"""A run that a controller steers: its files, that it resumes alike, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaops.errors import ConfigError
from deltaops.strategy import read_log, read_rows
from deltaops.strategy.monitor import CLOCKS
from deltaops.tuning.run import Outcome, Settings, run

STEERED = "monitor:every=2+disable-useless:start=1"


def settings(base: Path, data: Path, **changes: object) -> Settings:
    values: dict[str, object] = {
        "steps": 4, "batch_size": 4, "seq_len": 16, "lr": 0.01, "controller": STEERED,
        "evaluate_every": 1, "delta": "lora:r=4,dropout=0.1+bitfit",
    }  # fmt: skip
    return Settings(str(base), str(data), **{**values, **changes})  # type: ignore[arg-type]  # of each field


def interrupted(wanted: Settings, out: Path, after: int) -> Outcome:
    done: list[object] = []
    return run(wanted, out, on_step=done.append, should_stop=lambda: len(done) >= after)


def test_a_steered_run_resumes_with_the_same_bits(base: Path, text: Path, tmp_path: Path) -> None:
    wanted = settings(base, text)
    straight = run(wanted, tmp_path / "straight")
    assert straight.actions > 0
    interrupted(wanted, tmp_path / "resumed", after=2)
    assert run(wanted, tmp_path / "resumed", resume=True).off == straight.off
    for name in ("deltaops.safetensors", "controller.jsonl"):
        one, other = ((tmp_path / out / name).read_bytes() for out in ("straight", "resumed"))
        assert one == other, name
    tables = [read_rows(tmp_path / out / "monitor.csv") for out in ("straight", "resumed")]
    seen = [sorted(row for row in rows if row.quantity not in CLOCKS) for rows in tables]
    assert seen[0] == seen[1]
    assert {row.quantity for row in seen[0]} >= {"loss", "eval_loss", "gradient_norm"}
    assert read_log(tmp_path / "straight" / "controller.jsonl")[1]["part"] == "disable-useless"
    for name in ("monitor.png", "places.png"):
        assert (tmp_path / "straight" / name).read_bytes().startswith(b"\x89PNG")


def test_a_monitor_changes_no_bit(base: Path, text: Path, tmp_path: Path) -> None:
    run(settings(base, text, controller="monitor"), tmp_path / "watched")
    run(settings(base, text, controller=None, evaluate_every=None), tmp_path / "alone")
    files = [tmp_path / out / "deltaops.safetensors" for out in ("watched", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (tmp_path / "alone" / "controller.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"controller": "disable-uselss"}, "did you mean disable-useless"),
        ({"controller": None}, "--evaluate-every is for a controller"),
        ({"evaluate_every": 0}, "--evaluate-every must be 1"),
        ({"controller": "switch-on-plateau:first=lora,then=adapter"}, "no part of the handle"),
    ],
)
def test_bad_settings_are_refused_and_leave_nothing(
    base: Path, text: Path, tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run(settings(base, text, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
