"""Two methods at once beside each alone, on tiny models; no timing is asserted."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from torch import nn

from deltaops.measure import stacks, store
from deltaops.measure.cell import FIRST, SECOND, STACK, Cell, Results
from deltaops.measure.compare.contenders import contenders
from deltaops.measure.compare.reader import Reader
from deltaops.measure.goals import evaluate
from deltaops.measure.interleave import Timing
from deltaops.measure.picture import draw_stacks
from deltaops.measure.report import markdown
from deltaops.measure.runner import Settings, plan
from deltaops.measure.workloads import Workload
from deltaops.methods import METHODS
from deltaops.testing.architectures import build

ALL = contenders()


def reader() -> nn.Module:
    return Reader(build("bert", hidden_size=128), 128, 20)


TINY = Workload("bert", reader, 60, 3, 8, classes=20)


def test_every_two_methods_are_planned() -> None:
    kinds = [{line.spec.partition(":")[0] for line in pair} for pair in stacks.pairs()]
    assert sorted(map(sorted, kinds)) == sorted(sorted(two) for two in combinations(METHODS, 2))
    chosen = Settings(layers=False, steps=False, methods=(), stacks=True, dtypes=("f32",))
    assert len([part for part in plan(chosen) if part.name.startswith("stack ")]) == len(kinds)


def test_a_stack_and_its_parts_are_timed_and_a_slow_one_has_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stacks, "LIMIT", 0.0)
    cell = stacks.measure_stack(ALL["lora"], ALL["bitfit"], TINY, "f32", rounds=1)
    assert set(cell.timings) == {STACK, FIRST, SECOND}
    assert cell.label == "LoRA, r = 16 + BitFit on bert, 3×8 f32"
    assert f"against the {stacks.dearest(cell)}'s" in cell.note
    assert cell.products[STACK] > cell.products[FIRST] > cell.products[SECOND] > 0


def test_a_wrong_gradient_of_the_stack_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = stacks.held_pair

    def wrong(base: nn.Module, handle: object, *rest: object) -> object:
        handle.model.encoder.register_forward_hook(  # type: ignore[attr-defined]
            lambda _m, _x, out: type(out)(last_hidden_state=1.01 * out.last_hidden_state)
        )
        return right(base, handle, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(stacks, "held_pair", wrong)
    with pytest.raises(AssertionError):
        stacks.measure_stack(ALL["lora"], ALL["bitfit"], TINY, "f32", rounds=1)


def test_the_goal_is_of_the_dearest_part() -> None:
    times = {name: Timing.of([t, t, t]) for name, t in ((STACK, 1.2), (FIRST, 1.0), (SECOND, 0.5))}
    cell = Cell("stack", "a + b", "f32", 0.0, times, model="m")
    (goal,) = [
        o for o in evaluate(Results({}, {}, [cell])) if (o.goal, o.dtype) == ("stack", "f32")
    ]
    assert goal.worst == pytest.approx(1.2)
    assert goal.met is False
    assert goal.causes[0] == "1 of 1 stacks are above"


def test_a_miss_is_told_beside_what_the_products_make(tmp_path: Path) -> None:
    def stack(what: str, seconds: float, flops: int) -> Cell:
        times = {STACK: seconds, FIRST: 1.0, SECOND: 0.5}
        return Cell(
            "stack", what, "f32", 0.0, {name: Timing.of([t] * 3) for name, t in times.items()},
            model="m", products={STACK: flops, FIRST: 100, SECOND: 90},
        )  # fmt: skip

    cells = [stack("a + b", 1.05, 104), stack("a + c", 1.18, 112), stack("a + d", 1.2, 100)]
    facts = {"processor": "p", "threads": 2, "isa": "i", "command": "c", "date": "d",
             "versions": {}, "deltaops": "0", "torch_cpu_capability": "AVX2"}  # fmt: skip
    run = Results(facts, {}, cells)
    (goal,) = [o for o in evaluate(run) if (o.goal, o.dtype) == ("stack", "f32")]
    assert goal.causes[:2] == [
        "2 of 3 stacks are above",
        "the products of 1 of them alone are, and none takes more than 1.20× of what its products "
        "make",
    ]
    text = markdown(run)
    assert text.index("| a + d on m f32 | first part | 1.200 | 1.000 | 1.200 |") < text.index(
        "| a + c on m f32 | first part | 1.180 | 1.120 | 1.054 |"
    )
    assert "goals are not part of this run" in text
    drawn = store.pictures(run, "m-stacks")
    draw_stacks(tmp_path / "p.png", drawn["m-stacks-by-products.png"], "made up")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
