"""The page and the picture of a run on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltaops.measure import gpu, gpu_report

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LAYER, GROUP, PREFIX = gpu_report.OPS


def case(op: str, ours: float, **more: Any) -> dict[str, Any]:
    """Of a frozen layer that takes one second."""
    medians = {gpu.FROZEN: 1.0, gpu.OURS: ours, **more.pop("others", {})}
    seconds = {n: {"median": m, "low": m, "high": m} for n, m in medians.items()}
    return {"seconds": seconds, "left_out": {}, "plan": "y cuda: fastest", "op": op, **more}


def layer(ours: float, m: int = 8192, **more: Any) -> dict[str, Any]:
    return case(LAYER, ours, **{"shape": [m, 4096, 4096], "rank": 16, "dropout": 0.0, **more})


def test_a_goal_is_as_its_worst_case() -> None:
    goal = next(g for g in gpu_report.GOALS if g.what.startswith("decoding, 4096², r=16"))
    values = goal.values([layer(1.05, m=1), layer(1.2, m=16), layer(3.0, m=8192)])
    assert values == {"1×4096×4096 r=16": 1.05, "16×4096×4096 r=16": 1.2}
    assert [goal.met(value) for value in values.values()] == [True, False]
    least = next(g for g in gpu_report.GOALS if not g.most)
    assert [least.met(ratio) for ratio in (1.28, 1.27)] == [True, False]


def test_a_prefix_is_granted_its_share_of_the_products() -> None:
    """Each of 511 causal queries sees 256 keys on average, and 64 of the prefix."""
    goal = next(g for g in gpu_report.GOALS if g.what.startswith("prefix attention"))
    one = case(PREFIX, 1.3, shape=[2, 8, 8, 511, 128], prefix=64)
    assert list(goal.values([one]).values()) == [pytest.approx(1.3 - 64 / 256)]


def test_the_page_says_what_is_met_missed_and_not_measured(tmp_path: Path) -> None:
    left = {**layer(1.0), "seconds": {}, "left_out": {"case": "it drifted"}}
    content = {
        "machine": {
            "gpu": "A GPU", "date": "2026-11-26T14:00:00", "versions": {"torch": "2"},
            "ceilings": {"operations_per_second": 7e14, "copy_bytes_per_second": 4e12},
        },
        LAYER: [layer(1.05, others={gpu.PEFT: 1.2}), left], GROUP: [], PREFIX: [],
        "not_reached": ["1×2×3 r=4"],
    }  # fmt: skip
    source = tmp_path / "gpu-a.json"
    source.write_text(json.dumps(content), encoding="utf-8")
    assert gpu_report.main([str(source)]) == 0
    page = source.with_suffix(".md").read_text(encoding="utf-8")
    assert "| LoRA r=16, 8192 × 4096² | ≤ 1.07 | 1.050 | met |" in page
    assert "| PEFT, eager, over ours | ≥ 1.28 | 1.143 | missed at 8192×4096×4096 r=16. |" in page
    assert "| decoding, 4096², r=16 | ≤ 1.1 | — | not measured |" in page
    assert "- 8192×4096×4096 r=16: it drifted" in page
    assert "before 1×2×3 r=4" in page
    assert source.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("source", sorted(RESULTS.glob("gpu-nvidia-*.json")), ids=lambda p: p.name)
def test_the_committed_pages_are_of_their_runs(source: Path) -> None:
    content = json.loads(source.read_text(encoding="utf-8"))
    page = source.with_suffix(".md").read_text(encoding="utf-8")
    assert page == gpu_report.markdown(content, source.with_suffix(".png").name)
