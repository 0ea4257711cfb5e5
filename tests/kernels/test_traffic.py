"""What the kernels move and compute, counted from their launches, is no more than is committed.

tests/kernels/interpreted.py holds the counts themselves to the interpreter's.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from deltaops.backends.triton import core, record
from deltaops.backends.triton import traffic as entries
from deltaops.cli import app
from deltaops.errors import ConfigError
from deltaops.measure import traffic, traffic_calls
from deltaops.measure.traffic_floor import Counted
from deltaops.measure.traffic_linears import Linear
from deltaops.measure.traffic_rows import Adapter, Rotary

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "benchmarks" / "traffic.json"
AGAIN = "If it is meant: deltaops traffic --out benchmarks/traffic.json"

# writes what other kernels only use, for their tests
UNCOUNTED = {"_dropout_mask_kernel"}

LAYER = Linear(8192, 4096, 4096, 16)


def test_no_call_moves_or_computes_more_than_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "now.json"
    result = CliRunner().invoke(app, ["traffic", "--out", str(path)])
    assert result.exit_code == 0, result.output
    now, committed = (json.loads(p.read_text(encoding="utf-8")) for p in (path, COMMITTED))
    assert traffic.regressions(now, committed) == [], AGAIN
    assert now == committed, f"less than is committed: keep it so. {AGAIN}"


@pytest.mark.parametrize(
    ("kernel", "what"), [("gemm", "bytes_asked"), ("project", "bytes_once"), ("grad_up", "bytes")]
)
def test_a_regression_is_seen(kernel: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = core.kernels("configs")
    before = traffic.totals([LAYER], ["sm_90"])
    right = getattr(configs, kernel)

    def worse(*args: object, **more: object) -> object:
        good = right(*args, **more)
        if kernel == "project":  # pieces of K leave partial sums
            monkeypatch.setattr(configs, "PROGRAMS", 8 * configs.PROGRAMS)
            return good
        return type(good)(**{**vars(good), "cols": good.cols // 2})

    monkeypatch.setattr(configs, kernel, worse)
    lines = traffic.regressions(traffic.totals([LAYER], ["sm_90"]), before)
    assert any(what in line for line in lines), lines


def test_every_kernel_has_an_entry() -> None:
    kernels = {
        node.name
        for path in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    }
    assert kernels - UNCOUNTED == set(entries.ENTRIES)


def test_every_kernel_is_in_a_call_whose_bytes_are_committed() -> None:
    counted = {
        f"_{name}_kernel"
        for call in traffic_calls.CALLS
        for plan in traffic.plans_of(call)
        for one in traffic.count(call, "sm_90", plan)
        for name, _ in one.kernels
    }
    assert set(entries.ENTRIES) - counted == set()


def test_a_tensor_in_another_shape_moves_nothing() -> None:
    # the result of a rotation is made with as_strided_
    for one in traffic.count(Rotary(1, 2, 8, 16), "sm_90"):
        assert [name for name, _ in one.kernels] == ["rotary"]
        assert one.total.once == one.floor.bytes


def test_a_kernel_without_an_entry_is_refused() -> None:
    with pytest.raises(ConfigError, match="the traffic of _new_kernel is not modelled"):
        entries.traffic(record.Launch("_new_kernel", (1,), {}, {}))


@pytest.mark.parametrize("call", traffic_calls.CALLS, ids=str)
def test_nothing_goes_below_the_floor(call: Counted) -> None:
    for one in traffic.count(call, "sm_90"):
        assert one.total.once >= one.floor.bytes
        assert one.total.operations >= one.floor.operations
        assert one.total.asked >= one.total.once


@pytest.mark.parametrize(("k", "reads"), [(1024, 1), (4096, 2)])
def test_rows_that_l2_cannot_hold_are_read_twice(k: int, reads: int) -> None:
    m, r = 8192, 64
    forward, backward = traffic.count(Adapter(m, k, r), "sm_90")
    found = dict(forward.kernels)["bottleneck"].once
    assert found == 2 * ((reads + 1) * m * k + 2 * r * k + k + r) + 4 * m * r
    # dy, dx; h, dh and S in float32
    found = dict(backward.kernels)["bottleneck_grad"].once
    assert found == 2 * ((reads + 1) * m * k + 2 * r * k) + 12 * m * r


@pytest.mark.parametrize("plan", ["fused", "split", "torch"])
def test_the_plan_that_is_asked_for_is_counted(plan: str) -> None:
    for one in traffic.count(LAYER, "sm_90", plan):
        names = {name for name, _ in one.kernels}
        assert ("torch.addmm_" in names) == (plan != "fused")
        assert bool(names & {"forward", "grad_input"}) == (plan != "torch")


def test_the_command_shows_kernels_beside_the_floor() -> None:
    arguments = ["traffic", "--shape", "64x48x32", "--rank", "4", "--plan", "split"]
    shown = CliRunner().invoke(app, arguments).output
    for wanted in ("delta_linear 64×48×32 r=4", "forward", "grad_down", "torch.addmm_", "floor"):
        assert wanted in shown, shown
    assert "not measured" in shown
    assert "deltaops traffic --gpu gfx942" in CliRunner().invoke(app, ["traffic", "--help"]).output
    for other in ("magic", "cuda"):
        refused = CliRunner().invoke(app, ["traffic", "--plan", other]).exception
        assert isinstance(refused, ConfigError)


def test_a_plan_that_cannot_run_a_direction_is_said_to() -> None:
    arguments = ["traffic", "--shape", "64x48x32", "--dropout", "0.1", "--plan", "torch"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "backward: the plan 'torch' cannot run it" in result.output
    assert [one.direction for one in traffic.count(
        Linear(64, 48, 32, 4, 0.1), "sm_90", "torch"
    )] == ["forward"]  # fmt: skip


@pytest.mark.parametrize("options", [[], ["--plan", "torch"]], ids=str)
def test_the_usual_calls_are_shown(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["traffic", *options])
    assert result.exit_code == 0, result.exception
    shown = " ".join(result.output.split())
    assert all(str(call).split()[0] in shown for call in traffic_calls.CALLS)
    assert ("the plan 'torch' cannot run it" in shown) == bool(options)
    assert "counted for sm_90, not measured" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json", "--gpu", "sm_80"], "whatever --gpu says"),
        (["--out", "x.json", "--shape", "64x48x32", "--plan", "split"], "--shape and --plan"),
        (["--out", "x.json", "--json"], "whatever --json says"),
        (["--rank", "8"], "--rank is of the layer that --shape names"),
        (["--dropout", "0.5"], "--dropout is of the layer that --shape names"),
        (["--shape", "64x48"], "--shape takes MxNxK"),
    ],
)
def test_options_without_effect_are_refused(arguments: list[str], message: str) -> None:
    refused = CliRunner().invoke(app, ["traffic", *arguments]).exception
    assert isinstance(refused, ConfigError)
    assert message in str(refused)


def test_an_unknown_gpu_is_named() -> None:
    with pytest.raises(ConfigError, match="must be one of sm_80"):
        traffic.count(LAYER, "sm_1")
