"""On and off by place: the shift, the gradient through it, the choice, and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltaops import LoRA
from deltaops.errors import ConfigError
from deltaops.strategy import ShiftedSigmoid
from deltaops.strategy.budget.shift import shifted, through_shift

from .planted import PLANTED, K, N, attached, batches, count, loss, resumed, start, train

UNIT = K + N
STEPS = 60


def made(**settings: object) -> ShiftedSigmoid:
    defaults = {"until": 40}
    return ShiftedSigmoid(8 * UNIT + 3, batches(3, seed=9), loss, **(defaults | settings))


@pytest.mark.parametrize("budget", [0.5, 170.0, 340.9])
@pytest.mark.parametrize("spread", [0.1, 5.0, 400.0])
def test_the_expected_number_is_the_budget(budget: float, spread: float) -> None:
    random = torch.Generator().manual_seed(0)
    alpha = torch.randn(9, generator=random, dtype=torch.float64) * spread
    sizes = torch.tensor([1.0, 40, 40, 60, 60, 60, 20, 20, 40], dtype=torch.float64)
    p = shifted(alpha, sizes, budget, 0.7)
    assert float((sizes * p).sum()) == pytest.approx(budget, rel=1e-9)
    assert torch.equal(p.argsort(stable=True), alpha.argsort(stable=True)) or spread > 100


def test_the_gradient_through_the_shift_is_that_of_differences() -> None:
    random = torch.Generator().manual_seed(0)
    alpha, weight = (torch.randn(5, generator=random, dtype=torch.float64) for _ in range(2))
    sizes = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)

    def value(alpha: torch.Tensor) -> float:
        p = shifted(alpha, sizes, 6.0, 0.7)
        return float((weight * torch.logit(p)).sum())

    found = through_shift(weight, shifted(alpha, sizes, 6.0, 0.7), sizes, 0.7)
    for i in range(5):
        nudge = torch.zeros(5, dtype=torch.float64)
        nudge[i] = 1e-5
        slope = (value(alpha + nudge) - value(alpha - nudge)) / 2e-5
        assert float(found[i]) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("draws", [True, False])
def test_the_search_ends_with_the_planted_places_on(draws: bool) -> None:
    handle = attached(4)
    run, part = start(handle, STEPS), made(draws=draws)
    told = train(run, part, 39)
    p = part.probabilities(run)
    assert sum(p.values()) * 4 * UNIT == pytest.approx(8 * UNIT + 3)
    told += train(run, part, STEPS)
    assert handle.sites == PLANTED
    assert count(handle) == 8 * UNIT
    assert handle.delta.r == 4
    assert {handle.delta.scaling_at(path) for path in handle.sites} == {1.0}
    on = {action.place for _, action in told if action.kind == "enable"}
    off = [action for _, action in told if action.kind == "disable"]
    assert on == set(PLANTED)
    assert len(off) == 4
    assert all("p = " in action.reason and "40" in action.reason for action in off)
    assert {id(p) for p in run.optimizer.param_groups[0]["params"]} == set(
        map(id, handle.parameters())
    )
    assert run.loss is not None
    assert run.loss < 0.5 * loss(attached(4).model, batches(1)[0]).item()


@pytest.mark.parametrize("killed", [3, 10])
def test_a_resumed_run_decides_the_same(killed: int, tmp_path: Path) -> None:
    run, part = start(attached(4), 12), made(every=2, until=8)
    train(run, part, killed)
    fresh = made(every=2, until=8)
    second = resumed(run, part, fresh, tmp_path)
    assert train(run, part, 12) == train(second, fresh, 12)
    for key, tensor in run.handle.state().items():
        assert torch.equal(tensor, second.handle.state()[key]), key


def test_a_second_run_begins_anew() -> None:
    part = made(until=4)
    first = train(start(attached(4), 6), part, 6)
    assert train(start(attached(4), 6), part, 6) == first


def test_what_cannot_be_kept_to_is_refused_before_the_first_step() -> None:
    handle = attached(4)
    run = start(handle, STEPS)
    for budget, message in (
        (24 * UNIT, "nothing to choose"),
        (4 * UNIT - 1, "must hold one place at the rank"),
    ):
        with pytest.raises(ConfigError, match=message):
            ShiftedSigmoid(budget, batches(1), loss, until=40).begin(run)
    with pytest.raises(ConfigError, match="until must leave steps"):
        made(until=60).begin(run)
    with pytest.raises(ConfigError, match="at least one batch"):
        ShiftedSigmoid(300, [], loss, until=3)
    with pytest.raises(ConfigError, match="without use_dora"):
        made().begin(start(attached(4, use_dora=True), STEPS))
    with pytest.raises(ConfigError, match="begin"):
        made().after_step(run)
    assert handle.delta == LoRA(r=4, alpha=4)
