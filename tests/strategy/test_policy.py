"""Rules: when they act, what they do, and that what harmed is taken back to the bit."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest

import deltaops
from deltaops import Adapter, BitFit, LoRA
from deltaops.errors import ConfigError
from deltaops.strategy import (
    Controller,
    DisableUseless,
    FreezeDead,
    Monitor,
    Policy,
    Run,
    SwitchOnPlateau,
    WarmIn,
    When,
    above,
    all_of,
    at,
    below,
    dead,
    disable,
    enable,
    freeze,
    plateau,
    switch,
    thaw,
    weigh,
)
from deltaops.strategy.snapshot import Snapshot

from .conftest import STEPS, Loop, Watcher, bits, loss_of, same

Make = Callable[..., Controller]
G = "gradient_norm"


def run_with(**series: list[float]) -> Run:
    """A run whose table has these, a row a step."""
    loop = Loop(Controller([Monitor()])).begin()
    run = loop.controller.run
    assert run is not None
    for name, values in series.items():
        quantity, _, delta = name.partition("_of_")
        for step, value in enumerate(values, 1):
            run.table.add(step, quantity, value, delta=delta)
    run.step = max(map(len, series.values()), default=0)
    return run


@pytest.mark.parametrize(
    ("condition", "series", "holds"),
    [
        (at(3), {"loss": [1.0, 1.0, 1.0]}, True),
        (at(4), {"loss": [1.0, 1.0, 1.0]}, False),
        (plateau(2), {"loss": [2.0, 1.0, 1.0, 1.0]}, False),
        (plateau(2), {"loss": [2.0, 1.0, 1.0, 1.0, 1.0]}, True),
        (plateau(2), {"loss": [1.0, 1.0, 1.0]}, False),
        (plateau(1, "eval_loss", 0.0), {"eval_loss": [1.0, 1.1]}, True),
        (plateau(1, gain=0.2), {"loss": [-1.0, -1.1]}, True),
        (plateau(1, gain=0.05), {"loss": [-1.0, -1.1]}, False),
        (below("noise", 2.0, "lora", rows=2), {"noise_of_lora": [3.0, 1.0, 1.5]}, True),
        (below("noise", 2.0, "lora", rows=3), {"noise_of_lora": [3.0, 1.0, 1.5]}, False),
        (above("loss", 2.0), {"loss": [1.0, 3.0]}, True),
        (dead("lora", 0.1, 2), {G: [1.0, 2.0], f"{G}_of_lora": [0.01, 0.1]}, True),
        (dead("lora", 0.1, 2), {G: [1.0, 2.0], f"{G}_of_lora": [0.2, 0.1]}, False),
        (all_of(at(1), above("loss", 2.0)), {"loss": [3.0]}, True),
        (all_of(at(2), above("loss", 2.0)), {"loss": [3.0]}, False),
    ],
)  # fmt: skip
def test_conditions(condition: Any, series: dict[str, list[float]], holds: bool) -> None:
    reason = condition(run_with(**series))
    assert (reason is not None) == holds
    assert reason is None or any(character.isdigit() for character in reason)


def test_what_rules_do_is_what_the_handle_shows(steered: Make) -> None:
    loop = Loop(
        steered(
            Policy(
                When(at(1), [freeze("lora"), weigh("lora", 0.5)]),
                When(at(2), [thaw("lora"), disable("bitfit")]),
                When(at(3), switch("lora", "bitfit")),
                When(at(4), enable("lora")),
            )
        )
    ).begin()
    handle = loop.handle
    trained = {"lora": [], "bitfit": []}  # type: ignore[var-annotated]
    for key, parameter in handle.named_parameters():
        trained[key.partition("/")[0]].append(parameter)
    loop.train(1)
    assert not any(p.requires_grad for p in trained["lora"])
    assert handle.weights == {"lora": 0.5, "bitfit": 1.0}
    frozen = [p.detach().clone() for p in trained["lora"]]
    loop.train(2)
    assert all(bool((a == b).all()) for a, b in zip(frozen, trained["lora"], strict=True))
    assert all(p.requires_grad for p in trained["lora"])
    assert handle.enabled == ("lora",)
    assert loop.train(3).handle.enabled == ("bitfit",)
    assert loop.train(4).handle.enabled == ("lora", "bitfit")
    kinds = [event["kind"] for event in handle.history]
    assert kinds == ["freeze", "weigh", "thaw", "disable", "switch", "enable"]


@pytest.mark.parametrize("resumed", [False, True])
def test_harm_is_rolled_back_to_the_bit(steered: Make, resumed: bool) -> None:
    """Also by a process that has the snapshot from a file."""
    kept: dict[str, Any] = {}

    def watch(run: Run) -> list[Any]:
        """After the policy: the last state before the action is that of the step before."""
        if run.step == 5:
            kept.update(bits(run.handle, run.optimizer))
        return []

    def make() -> Controller:
        harm = When(at(5), [weigh("lora", -9.0), freeze("bitfit")], watch=2)
        return steered(Watcher(watch, "before"), Policy(harm))

    loop = Loop(make()).begin().train(7)
    if resumed:
        loop = Loop(make()).resume(copy.deepcopy(loop.saved()))
    moved = bits(loop.handle, loop.optimizer)
    assert not same(moved, kept)
    loop.train(8)
    assert same(bits(loop.handle, loop.optimizer), kept)
    *_, undone = loop.handle.history
    assert (undone["kind"], undone["step"], undone["detail"]["to_step"]) == ("roll back", 8, 5)
    assert len(undone["detail"]["since"]) == 2
    assert min(undone["detail"]["since"]) > undone["detail"]["before"]
    assert f"{undone['detail']['before']:.6g}" in undone["reason"]
    loop.train()
    assert loop.handle.history[-1] == undone


def test_a_change_of_shapes_is_rolled_back(steered: Make) -> None:
    """New parameters in the places of the old ones, as when ranks change."""
    import torch
    from torch import nn

    class Halve:
        def names(self) -> tuple[str, ...]:
            return ("lora",)

        def __call__(self, run: Run, reason: str) -> list[Any]:
            from deltaops.strategy import Action

            place: Any = run.model.get_submodule("one")
            a, b = place.lora_A["lora"].weight, place.lora_B["lora"].weight
            for old, new in ((a, a[:1]), (b, b[:, :1])):
                made = nn.Parameter(-9 * new.detach().clone())
                holder = place.lora_A["lora"] if old is a else place.lora_B["lora"]
                holder.weight = made
                for group in run.optimizer.param_groups:
                    held = [made if p is old else p for p in group["params"]]
                    group["params"][:] = held
                del run.optimizer.state[old]
            return [Action("prune", "lora", reason, place="one")]

    kept: dict[str, Any] = {}

    def watch(run: Run) -> list[Any]:
        if run.step == 5:
            kept.update(bits(run.handle, run.optimizer))
        return []

    policy = Policy(When(at(5), Halve(), watch=1, tolerance=0.0))
    loop = Loop(steered(Watcher(watch), policy)).begin().train(5)
    assert tuple(dict(loop.handle.named_parameters())["lora/one.lora_A.weight"].shape) == (1, 6)
    loop.train(6)
    assert [event["kind"] for event in loop.handle.history] == ["prune", "roll back"]
    assert same(bits(loop.handle, loop.optimizer), kept)
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in loop.handle.parameters()}
    assert {id(p) for p in loop.optimizer.state} == held
    before = torch.cat([p.flatten() for p in loop.handle.parameters()])
    loop.train()
    after = torch.cat([p.flatten() for p in loop.handle.parameters()])
    assert not torch.equal(before, after)


def test_what_does_no_harm_stays(steered: Make) -> None:
    rule = When(at(5), disable("bitfit"), watch=2, tolerance=10.0)
    loop = Loop(steered(Policy(rule, When(at(5), freeze("lora"))))).begin().train()
    kinds = [(event["step"], event["kind"]) for event in loop.handle.history]
    assert kinds[0] == (5, "disable")
    assert kinds[1] == (6, "left alone")  # it had to wait, and lora is all that trains
    assert loop.handle.enabled == ("lora",)


def test_a_watched_rule_waits_for_a_metric() -> None:
    policy = Policy(When(at(1), disable("bitfit"), watch=1))
    loop = Loop(Controller([policy])).begin().train(4)
    assert loop.handle.history == []
    loop.controller.after_evaluation({"eval_loss": 1.0})
    assert [event["kind"] for event in loop.handle.history] == ["disable"]


def test_a_metric_that_is_lost_is_worse_than_any() -> None:
    policy = Policy(When(at(1), disable("bitfit"), watch=2, metric="eval_loss", tolerance=100.0))
    loop = Loop(Controller([policy])).begin().train(1)
    for value in (1.0, math.nan):
        loop.controller.after_evaluation({"eval_loss": value})
    assert loop.handle.enabled == ("lora",)
    loop.controller.after_evaluation({"eval_loss": math.inf})
    assert loop.handle.enabled == ("lora", "bitfit")
    assert "not finite, not finite in the 2 evaluations" in loop.handle.history[-1]["reason"]


def test_a_rule_that_waited_in_vain_for_its_metric_is_told() -> None:
    policy = Policy(When(at(1), disable("bitfit"), watch=1, metric="f1"))
    loop = Loop(Controller([policy])).begin().train(1)
    loop.controller.after_evaluation({"eval_loss": 1.0})
    loop.controller.close()
    (event,) = loop.handle.history
    assert (event["kind"], event["moment"]) == ("left alone", "close")
    assert "no evaluation had the metric 'f1'" in event["reason"]


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([FreezeDead()], "dead: it goes by the table of a monitor"),
        ([SwitchOnPlateau("lora", "bitfit")], "plateau: it goes by the table of a monitor"),
        ([Monitor(), Policy(When(dead("lorra"), freeze("lora")))], "called 'lorra'"),
        (
            [Monitor(), Policy(When(all_of(at(1), below("loss", 1.0, "bit")), freeze("lora")))],
            "called 'bit'",
        ),
        ([Policy(When(at(1), weigh("bitfit", 0.5)))], "cannot be weighed"),
        ([Policy(When(at(1), weigh("lora", math.nan)))], "must be a finite number"),
    ],
)
def test_a_rule_that_never_could_act_is_refused_at_the_start(parts: list[Any], told: str) -> None:
    loop = Loop(Controller(parts))
    with pytest.raises(ConfigError, match=told):
        loop.begin()
    assert loop.handle.enabled == ("lora", "bitfit")


def test_what_is_switched_off_keeps_no_gradient(steered: Make) -> None:
    """In a loop that zeroes what is in the model, where a bias that is off is not."""
    loop = Loop(steered(Policy(When(at(1), disable("bitfit"))))).begin()
    loss_of(loop.handle.model, 0).backward()
    loop.optimizer.step()
    loop.controller.after_step()
    grads = {key: p.grad for key, p in loop.handle.named_parameters()}
    assert {key.split("/")[0] for key, grad in grads.items() if grad is not None} == {"lora"}


def test_more_can_be_better() -> None:
    policy = Policy(When(at(1), disable("bitfit"), watch=1, metric="accuracy", greater=True))
    loop = Loop(Controller([policy])).begin().train(1)
    loop.controller.after_evaluation({"eval_accuracy": 0.5})
    loop.controller.after_evaluation({"eval_loss": 9.0})
    assert loop.handle.enabled == ("lora",)
    loop.controller.after_evaluation({"eval_accuracy": 0.4})
    assert loop.handle.enabled == ("lora", "bitfit")


def test_other_parts_are_rolled_back_as_well(steered: Make) -> None:
    warm = WarmIn("lora", 8, levels=4)
    policy = Policy(When(at(3), disable("bitfit"), watch=1, greater=True, tolerance=0.0))
    loop = Loop(steered(Monitor(), policy, warm)).begin().train(3)
    run = loop.controller.run
    assert run is not None
    snapshot = Snapshot.take(run, but=["policy"])
    level = warm.state()
    loop.train(7)
    assert warm.state() != level
    snapshot.restore(run)
    assert warm.state() == level
    assert {"monitor", "policy"}.isdisjoint(snapshot.parts)


def test_dead_parts_are_frozen_and_never_all(steered: Make) -> None:
    delta = LoRA(r=3, alpha=1e-6, target_modules=["one", "two"]) + BitFit()
    loop = Loop(steered(Monitor(1), FreezeDead(rows=3)), delta).begin().train()
    assert [(e["step"], e["kind"], e["delta"]) for e in loop.handle.history] == [
        (3, "freeze", "lora")
    ]


def test_useless_parts_are_left_off(steered: Make) -> None:
    delta = LoRA(r=3, alpha=1e-9, target_modules=["one", "two"]) + BitFit()
    loop = Loop(steered(DisableUseless(start=4, tolerance=1e-6)), delta).begin().train()
    told = [(e["kind"], e["delta"]) for e in loop.handle.history]
    assert told == [("disable", "lora")]  # and bitfit, the last, is not tried
    # once learnt, each of them is missed at once
    useful = Loop(steered(DisableUseless(start=60), log="two.jsonl")).begin().train(66)
    assert useful.handle.enabled == ("lora", "bitfit")
    assert [e["kind"] for e in useful.handle.history] == ["disable", "roll back"] * 2


def test_a_method_is_switched_on_a_plateau(steered: Make) -> None:
    policy = SwitchOnPlateau("bitfit", "lora", 2, gain=0.5)
    loop = Loop(steered(Monitor(1), policy)).begin()
    assert loop.handle.enabled == ("bitfit",)
    loop.train()
    assert loop.handle.enabled == ("lora",)
    assert "on a plateau" in loop.handle.history[-1]["reason"]


def test_a_part_is_let_in_by_levels(steered: Make) -> None:
    loop = Loop(steered(WarmIn("lora", 6, start=2, levels=3))).begin()
    seen = []
    for step in range(1, STEPS):
        loop.train(step)
        seen.append(loop.handle.weights["lora"] if "lora" in loop.handle.enabled else 0.0)
    third = 1 / 3
    assert seen[:8] == [0.0, third, third, third, 2 / 3, 2 / 3, 2 / 3, 1.0]
    assert set(seen[8:]) == {1.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: When(at(1), "freeze"),
        lambda: When("always", freeze("lora")),
        lambda: When(at(1), []),
        lambda: When(at(1), freeze("lora"), watch=-1),
        lambda: When(at(1), freeze("lora"), tolerance=-0.1),
        lambda: Policy(),
        lambda: Policy(freeze("lora")),
        lambda: freeze(),
        lambda: plateau(0),
        lambda: plateau(2, gain=1.5),
        lambda: below("loss", 1.0, rows=0),
        lambda: FreezeDead(share=2.0),
        lambda: DisableUseless(watch=0),
        lambda: WarmIn("lora", 5, levels=0),
        lambda: dead("lora", rows=0),
        lambda: switch("lora", "lora"),
        lambda: all_of(),
    ],
)
def test_rules_that_mean_nothing_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError):
        make()


def test_what_cannot_be_weighed_is_refused_at_the_start() -> None:
    from .conftest import Net

    model = Net()
    handle = deltaops.attach(model, Adapter(target_modules=["one"], size=2))
    import torch

    controller = Controller([WarmIn("default", 4)])
    with pytest.raises(ConfigError, match="cannot be weighed"):
        controller.begin(handle, torch.optim.AdamW(handle.parameters()))
