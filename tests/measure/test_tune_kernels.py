"""tune-kernels without a GPU: its gate, its turns and its table, with a made-up backend and clock.

tests/kernels/interpreted.py runs it with the Triton kernels themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from deltaops.backends.triton import TritonBackend, planner, produce, tables
from deltaops.cli import app
from deltaops.errors import ConfigError, DataError, DeviceError
from deltaops.measure import gpu, tune_kernels
from deltaops.reference import delta_linear as reference
from deltaops.reference import norm_bias

TINY = planner.setting_of(torch.float32, (torch.float32,), 24, 32, 48, (4,), False)


class Backend:
    """The reference, which takes note of the plans that it is called with."""

    name = "noting"

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.last = ""

    def forward(self, *args: Any) -> Any:
        self.last = planner.choose(TINY, "forward", "cpu").plan
        y, s = reference.forward(*args)
        return y * self.factor, s

    def backward(self, *args: Any) -> Any:
        self.last = planner.choose(TINY, "backward", "cpu").plan
        return reference.backward(*args)


def measure(run: Backend, times: dict[str, float], **changes: Any) -> tune_kernels.Measured:
    def clock(call: gpu.Call) -> float:
        run.last = "frozen"
        call()
        return times.get(run.last, 1.0)

    settings: dict[str, Any] = {
        "device": "cpu", "rounds": 4, "capture": lambda call: call, "cache_bytes": 0,
        "clock": clock,
    }  # fmt: skip
    return tune_kernels.measure(TINY, run, **settings | changes)


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


@pytest.mark.parametrize("refused", ["torch", "frozen"])
def test_what_cannot_be_captured_is_left_out(refused: str) -> None:
    run = Backend()

    def capture(call: gpu.Call) -> gpu.Call:
        run.last = "frozen"
        call()
        if run.last == refused:
            raise RuntimeError("not under capture")
        return call

    found = measure(run, {}, capture=capture)
    for direction in tables.DIRECTIONS:
        kept = {"fused", "split"} if refused == "torch" else set()
        assert set(found.entry.seconds.get(direction, ())) == kept
        said = f"{direction}, {refused}: left out, not captured as a graph: not under capture"
        assert said in found.notes


class Producing(Backend):
    """One that makes S where x is made."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.more = factor

    def prepare(self, *layer: Any) -> Any:
        return self

    def norm_bias_forward(self, x: Tensor, gamma: Tensor, *settings: Any) -> Any:
        self.last = "norm"
        return norm_bias.forward(x, gamma, *settings)

    def norm_and_s(self, x: Tensor, gamma: Tensor, eps: float, readers: Any) -> Any:
        y, stats = norm_bias.forward(x, gamma, None, eps, "rms")
        return y, stats, [tune_kernels.SCALING * y @ readers[0].operands[0].t() * self.more]

    def forward_given(self, x: Tensor, weight: Tensor, bias: Any, operands: Any, s: Tensor) -> Any:
        self.last = f"produced by {planner.choose(TINY, 'forward', 'cpu').plan}"
        return x @ weight.t() + s @ operands[1].t()


def test_s_that_is_made_before_costs_what_it_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(produce, "takes", lambda call, readers: True)
    times = {"fused": 4.0, "split": 2.0, "torch": 6.0, "norm": 3.0, "produced by split": 4.0}
    found = measure(Producing(), times).entry
    assert found.seconds["forward"] == {"fused": 2.0, "split": 1.0, "torch": 3.0, "produced": 0.5}
    assert "produced" not in found.seconds["backward"]
    assert found.best("forward", tables.PLANS) == "produced"
    with pytest.raises(DataError, match="forward by the plan 'produced' is wrong"):
        measure(Producing(1.01), times)
    times["norm"] = 4.0
    found_none = measure(Producing(), times)
    assert "produced" not in found_none.entry.seconds["forward"]
    assert found_none.notes == ("forward, produced: left out, the norm alone took as long as both",)


def test_too_little_memory_for_a_graph_is_no_plan_that_cannot_be_captured() -> None:
    def capture(call: gpu.Call) -> gpu.Call:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        measure(Backend(), {}, capture=capture)


def test_a_direction_that_drifts_is_left_out() -> None:
    calls: list[gpu.Call] = []
    rounds = iter(range(1000))

    def capture(call: gpu.Call) -> gpu.Call:
        calls.append(call)
        return call

    def clock(call: gpu.Call) -> float:
        return 2.0 ** next(rounds) if call is calls[0] else 1.0  # the frozen layer, forward

    found = measure(Backend(), {}, capture=capture, clock=clock)
    assert found.entry.seconds == {"backward": dict.fromkeys(tables.PLANS[:3], 0.5)}
    assert found.frozen == {"backward": 0.5}
    assert [note.split(" drifted")[0] for note in found.notes] == [
        "forward: left out, the frozen layer"
    ]


def test_what_was_measured_is_kept_when_the_run_stops(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    wanted = tune_kernels.settings(
        (1, 2, 2, 3, 4), ((4, 5),), (1,), torch.float32, torch.float32, False
    )
    assert [setting.m for setting in wanted] == [1, 2, 3, 4]

    def measure_one(setting: tables.Setting) -> tune_kernels.Measured:
        if setting.m == 1:
            raise torch.OutOfMemoryError
        if setting.m == 2:
            raise RuntimeError("a kernel was ill")
        if setting.m == 4:
            raise KeyboardInterrupt
        return tune_kernels.Measured(tables.Entry(setting, {"forward": {"fused": 1.0}}), {}, ())

    done: list[tune_kernels.Measured] = []
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.measure_all(
            wanted,
            measure_one,
            lambda entry: tables.add(path, "a GPU", [entry], {"date": "x"}),
            done.append,
        )
    assert [(one.notes, one.failed) for one in done] == [
        (("left out: too little memory",), False),
        (("failed: RuntimeError: a kernel was ill",), True),
        ((), False),
    ]
    assert [e.setting.m for e in tables.read(path, "a GPU").entries] == [3]


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command where a GPU seems to be, with ``errors`` for its settings, one after the other;
    None where it is measured."""
    monkeypatch.setenv("DELTAOPS_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(TritonBackend, "unavailable", lambda self: None)

    def run(errors: list[BaseException | None], *arguments: str) -> Result:
        left = iter(errors)

        def measured(setting: tables.Setting, *_: Any, **__: Any) -> tune_kernels.Measured:
            error = next(left)
            if error is not None:
                raise error
            timed = {"forward": {"fused": 1.0}}
            return tune_kernels.Measured(tables.Entry(setting, timed), {"forward": 1.0}, ())

        monkeypatch.setattr(tune_kernels, "measure", measured)
        tokens = ",".join(str(m) for m in range(1, len(errors) + 1))
        options = ["--tokens", tokens, "--layers", "4x5", "--ranks", "1", *arguments]
        return CliRunner().invoke(app, ["tune-kernels", *options])

    return run


def test_a_layer_that_fails_is_named_and_the_others_are_kept(tune: Callable[..., Result]) -> None:
    result = tune([None, RuntimeError("a kernel was ill"), None])
    assert result.exit_code == 1
    assert "failed: RuntimeError: a kernel was ill" in " ".join(result.output.split())
    kept = tables.read(tables.own("a GPU"), "a GPU").entries
    assert [e.setting.m for e in kept] == [1, 3]
    facts = kept[0].measured["forward"]
    assert facts["float32_matmul_precision"] == torch.get_float32_matmul_precision()


def test_a_fresh_table_replaces_the_old_one_once_there_is_something(
    tune: Callable[..., Result],
) -> None:
    assert tune([None, None, None]).exit_code == 0
    result = tune([torch.OutOfMemoryError()], "--fresh")
    assert result.exit_code == 1
    assert "nothing was measured, nothing written" in result.output
    path = tables.own("a GPU")
    assert len(tables.read(path, "a GPU").entries) == 3
    assert tune([None, None], "--fresh").exit_code == 0
    assert [e.setting.m for e in tables.read(path, "a GPU").entries] == [1, 2]


def test_interpreted_kernels_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = CliRunner().invoke(app, ["tune-kernels"])
    assert isinstance(result.exception, ConfigError)
    assert "Unset it" in str(result.exception)


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
