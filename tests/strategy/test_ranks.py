"""Ranks that change while a run is steered: resumed, undone and rolled back to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from deltaops.errors import ConfigError
from deltaops.strategy import Controller, Importance, Monitor, Policy, Run, When, at, grow, prune

from .conftest import STEPS, Loop, Watcher, bits, same

Make = Callable[..., Controller]


def ranks(loop: Loop) -> list[int]:
    shapes = {key: p.shape for key, p in loop.handle.named_parameters()}
    return [shapes[f"lora/{place}.lora_A.weight"][0] for place in ("one", "two")]


def test_a_run_whose_ranks_change_resumes_to_the_same_bits(steered: Make) -> None:
    def make() -> Controller:
        return steered(Monitor(2), Importance(60, part="lora", every=2, settle=2, warmup=3))

    straight = Loop(make()).begin()
    saved, seen = [], set()
    for step in range(STEPS):
        saved.append(straight.saved())
        straight.train(step + 1)
        seen.add(tuple(ranks(straight)))
    assert len(seen) > 1
    wanted = bits(straight.handle, straight.optimizer)
    for one in saved[1::3]:
        again = Loop(make()).resume(copy.deepcopy(one)).train()
        assert same(bits(again.handle, again.optimizer), wanted), one["step"]
        assert again.handle.history == straight.handle.history
        assert again.handle.delta == straight.handle.delta


def test_grow_and_prune_change_ranks(steered: Make) -> None:
    rules = (
        When(at(2), grow("lora", 2)),
        When(at(3), prune("lora", 3, places=["two"])),
        When(at(4), prune("lora", 9)),
    )
    loop = Loop(steered(Policy(*rules))).begin().train(2)
    assert ranks(loop) == [5, 3]  # "two" has three outputs, and no use for more
    assert ranks(loop.train(3)) == [5, 1]
    assert ranks(loop.train(4)) == [1, 1]
    told = [(e["kind"], e["place"], e["detail"]) for e in loop.handle.history]
    assert told == [
        ("grow", "one", {"from": 3, "to": 5}),
        ("prune", "two", {"from": 3, "to": 1}),
        ("prune", "one", {"from": 5, "to": 1}),
    ]
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.handle.parameters()}
    loop.train()


@pytest.mark.parametrize("resumed", [False, True])
def test_ranks_are_rolled_back_to_the_bit(resumed: bool) -> None:
    kept: dict[str, Any] = {}

    def watch(run: Run) -> list[Any]:
        if run.step == 5:
            kept.update(bits(run.handle, run.optimizer))
        return []

    def make() -> Controller:
        harm = When(at(5), [prune("lora", 2), grow("lora", 1)], watch=1)

        def worse(model: Any) -> dict[str, float]:
            """From evaluation to evaluation, whatever is done."""
            assert controller.run is not None
            return {"loss": float(controller.run.step)}

        controller = Controller([Watcher(watch), Policy(harm)], evaluate=worse, evaluate_every=2)
        return controller

    loop = Loop(make()).begin().train(5)
    delta = loop.handle.delta
    if resumed:
        loop = Loop(make()).resume(copy.deepcopy(loop.saved()))
        assert loop.handle.delta == delta
    before = ranks(loop)
    loop.train(6)
    assert loop.handle.history[-1]["kind"] == "roll back"
    assert ranks(loop) == [3, 3]
    assert before != [3, 3]
    assert same(bits(loop.handle, loop.optimizer), kept)
    loop.train()


def test_what_has_no_rank_is_refused_at_the_start(steered: Make) -> None:
    with pytest.raises(ConfigError, match="must have a rank that can change"):
        Loop(steered(Policy(When(at(1), grow("bitfit"))))).begin()
    for wrong in (lambda: grow("lora", 0), lambda: prune("lora", 1, places=[])):
        with pytest.raises(ConfigError):
            wrong()
