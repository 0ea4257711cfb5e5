"""tune-kernels without a GPU: its gate, its turns and its table, with a made-up backend and clock.

tests/kernels/interpreted.py runs it with the Triton kernels themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deltaops.backends.triton import planner, tables
from deltaops.cli import app
from deltaops.errors import ConfigError, DataError, DeviceError
from deltaops.measure import gpu, tune_kernels
from deltaops.reference import delta_linear as reference

TINY = planner.setting_of(torch.float32, (torch.float32,), 24, 32, 48, (4,), False)


class Backend:
    """The reference, which takes note of the plans that it is called with."""

    name = "noting"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.last = ""

    def forward(self, *args: Any) -> Any:
        self.last = planner.choose(TINY, "cpu").forward
        y, s = reference.forward(*args)
        return y * self.factor, s

    def backward(self, *args: Any) -> Any:
        self.last = planner.choose(TINY, "cpu").backward
        return reference.backward(*args)


def measure(run: Backend, times: dict[str, float], **changes: Any) -> tune_kernels.Measured:
    def clock(call: gpu.Call) -> float:
        run.last = "frozen"
        call()
        return times.get(run.last, 1.0)

    settings = {"device": "cpu", "rounds": 4, "capture": lambda call: call, "cache_bytes": 0}
    return tune_kernels.measure(TINY, run, clock=clock, **settings | changes)  # type: ignore[arg-type]


def test_each_plan_is_timed_a_copy() -> None:
    times = {"fused": 4.0, "split": 2.0, "torch": 6.0}
    found = measure(Backend(), times)
    assert found.entry.setting == TINY
    for direction in tables.DIRECTIONS:
        assert found.entry.seconds[direction] == {"fused": 2.0, "split": 1.0, "torch": 3.0}
    assert found.frozen == {"forward": 0.5, "backward": 0.5}
    assert found.entry.best("forward", tables.PLANS) == "split"
    assert found.notes == ()


def test_wrong_numbers_are_not_timed() -> None:
    with pytest.raises(DataError, match=r"24×32×48 r=4 float32: forward by the plan 'fused' is"):
        measure(Backend(1.01), {})


def test_what_cannot_be_captured_is_timed_and_noted() -> None:
    def refuse(call: gpu.Call) -> gpu.Call:
        raise RuntimeError("not under capture")

    found = measure(Backend(), {}, capture=refuse)
    assert found.entry.seconds["forward"].keys() == set(tables.PLANS)
    assert "forward, fused: not captured as a graph: not under capture" in found.notes


def test_what_was_measured_is_kept_when_the_run_stops(tmp_path: Path) -> None:
    path, empty = tmp_path / "t.json", tables.Table("a GPU", {}, ())
    wanted = tune_kernels.settings((1, 2, 3), ((4, 5),), (1,), torch.float32, torch.float32, False)

    def measure_one(setting: tables.Setting) -> tune_kernels.Measured:
        if setting.m == 1:
            raise torch.OutOfMemoryError
        if setting.m == 3:
            raise KeyboardInterrupt
        return tune_kernels.Measured(tables.Entry(setting, {"forward": {"fused": 1.0}}), {}, ())

    done: list[tune_kernels.Measured] = []
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.measure_all(
            wanted,
            measure_one,
            lambda entries: tables.write(path, empty.with_entries(entries, {})),
            done.append,
        )
    assert [one.notes for one in done] == [("left out: too little memory",), ()]
    assert [e.setting.m for e in tables.read(path, "a GPU").entries] == [2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune-kernels", "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, DeviceError)
    assert "there is no GPU to measure" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_help_has_an_example() -> None:
    assert (
        "deltaops tune-kernels --layers" in CliRunner().invoke(app, ["tune-kernels", "-h"]).output
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "f64"], "--dtype must be f32, f16, bf16"),
        (["--tokens", "1,x"], "--tokens takes numbers"),
        (["--layers", "4096"], "--layers takes NxK"),
        (["--ranks", "0"], "--ranks takes numbers"),
    ],
)
def test_arguments_are_checked_first(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune-kernels", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)
