"""The batch that mixes adapters: behind a gate, beside one adapter, and held to its goal."""

from __future__ import annotations

import pytest
import torch

from deltaops.measure import mixed
from deltaops.measure.cell import MIXED, MIXED_ROWS, OURS, ROUTED
from deltaops.measure.goals import evaluate

from .results import cell, results


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_mixed_batches_are_timed_beside_one_adapter(dtype: str) -> None:
    found = mixed.measure_mixed((19, 24, 16), dtype, rounds=1)
    assert list(found.timings) == [OURS, ROUTED, MIXED, MIXED_ROWS]
    assert (found.group, found.what, found.dtype) == ("mixed", "19×24×16", dtype)


def test_wrong_numbers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mixed.delta_linear

    def mistaken(x: torch.Tensor, *rest: object) -> torch.Tensor:
        *most, adapter = rest
        return right(x, *most, None if adapter is None else adapter.roll(1))

    monkeypatch.setattr(mixed, "delta_linear", mistaken)
    with pytest.raises(AssertionError, match="8 adapters by sample 19×24×16 f32 result 0"):
        mixed.measure_mixed((19, 24, 16), "f32", rounds=1)


@pytest.mark.parametrize(("seconds", "met"), [(1.1, True), (1.2, False)])
def test_the_goal_is_held_on_the_worst_shape(seconds: float, met: bool) -> None:
    found = results(
        cell("mixed", {OURS: 1.0, MIXED: 1.0, MIXED_ROWS: 9.0}, what="easy"),
        cell("mixed", {OURS: 1.0, MIXED: seconds, MIXED_ROWS: 9.0}, what="hard"),
    )
    (one,) = [o for o in evaluate(found) if (o.goal, o.dtype) == ("mixed", "f32")]
    assert (one.met, one.where, one.worst) == (met, "hard f32", pytest.approx(seconds))
