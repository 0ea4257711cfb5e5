"""Ranks while training: the scores, the budget at each step, what is found, and going on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import deltaops
from deltaops import BitFit, LoRA
from deltaops.errors import ConfigError
from deltaops.strategy import Importance
from deltaops.strategy.budget.competition import choose
from deltaops.strategy.budget.schedule import Schedule
from deltaops.strategy.parts import Run
from deltaops.surgery.components import sized_places, trained
from deltaops.testing.architectures import batch, build

from .planted import PLANTED, K, N, attached, count, resumed, start, train

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

UNIT = K + N
STEPS = 60


def made(**settings: object) -> Importance:
    defaults = {"every": 5, "warmup": 10, "settle": 10}
    return Importance(6 * UNIT, **(defaults | settings))


def test_scores_are_the_smoothed_products_of_each_element() -> None:
    handle = attached(3)
    run, part = start(handle, STEPS), made(smallest=1)
    part.begin(run)
    path = PLANTED[0]
    means = {}
    spreads = {}
    random = torch.Generator().manual_seed(1)
    for _ in range(3):
        for suffix in ("lora_A", "lora_B"):
            p = handle.state()[f"{path}.{suffix}.weight"]
            p.grad = torch.randn(p.shape, generator=random)
            now = (p.detach() * p.grad).abs().double()
            means[suffix] = 0.85 * means.get(suffix, 0 * now) + 0.15 * now
            off = (now - means[suffix]).abs()
            spreads[suffix] = 0.85 * spreads.get(suffix, 0 * now) + 0.15 * off
        part.after_backward(run)
    a, b = (means[suffix] * spreads[suffix] for suffix in ("lora_A", "lora_B"))
    found = part._scores.of(path, sized_places(handle, None, "test")[path])
    assert torch.allclose(found, a.mean(1) + b.mean(0), rtol=1e-5)


def test_gradients_that_are_not_finite_are_told_once_and_left_out() -> None:
    handle = attached(3)
    run, part = start(handle, STEPS), made(smallest=1)
    part.begin(run)
    parameters = list(handle.parameters())
    told = []
    for value in (1.0, torch.inf, torch.nan, 1.0, torch.nan):
        for p in parameters:
            p.grad = torch.ones_like(p)
        parameters[-1].grad[0, 0] = value
        before = {key: t.clone() for key, t in part.tensors().items()}
        told.append([action.kind for action in part.after_backward(run)])
        same = before and all(torch.equal(t, before[key]) for key, t in part.tensors().items())
        assert bool(same) is (value != 1.0)
    assert told == [[], ["left alone"], [], [], ["left alone"]]


def test_something_stays_and_one_place_alone_can_grow() -> None:
    places = dict(list(sized_places(attached(3), None, "test").items())[:2])
    scores = {path: [0.1] * 3 for path in places}
    settings = {"smallest": 0, "largest": 9, "share": 0.1}
    found = choose(places, scores, {}, UNIT, grow=False, **settings)
    assert sum(map(len, found.kept.values())) == 1
    alone = dict([next(iter(places.items()))])
    found = choose(alone, scores, {}, 5 * UNIT, grow=True, **settings)
    assert sum(found.new.values()) == 2


def test_a_second_run_begins_anew() -> None:
    part = made(smallest=1, every=2, warmup=1, settle=2)
    first = train(start(attached(4), 12), part, 12)
    assert first
    assert train(start(attached(4), 12), part, 12) == first


def test_the_schedule_is_a_cube_between_two_flats() -> None:
    schedule = Schedule(1000, 200, 100, 10, 20)
    assert [schedule.budget(t) for t in (0, 10)] == [1000, 1000]
    assert schedule.budget(45) == 200 + 800 // 8
    assert [schedule.budget(t) for t in (80, 100)] == [200, 200]


def test_the_budget_is_kept_and_finds_where_it_matters() -> None:
    handle = attached(4)
    run = start(handle, STEPS)
    part = made(smallest=0)
    schedule = Schedule(count(handle), 6 * UNIT, STEPS, 10, 10)
    told = []
    for until in range(1, STEPS + 1):
        told += train(run, part, until)
        last = min(until, 50) // 5 * 5
        assert count(handle) <= schedule.budget(last if last > 10 else 0)
    assert count(handle) <= 6 * UNIT
    assert set(PLANTED) <= set(handle.sites)
    ranks = {p: place.rank for p, place in sized_places(handle, None, "test").items()}
    assert ranks[PLANTED[0]] >= 3
    others = [ranks[path] for path in ranks if path not in PLANTED]
    assert sum(others) <= 1
    kinds = {action.kind for _, action in told}
    assert kinds == {"prune", "grow"}
    grown = [action for _, action in told if action.kind == "grow"]
    assert PLANTED[0] in {action.place for action in grown}
    assert all("score" in action.reason and str(step) in action.reason for step, action in told)
    assert {id(p) for p in run.optimizer.param_groups[0]["params"]} == set(
        map(id, handle.parameters())
    )
    assert all(state["exp_avg"].shape == p.shape for p, state in run.optimizer.state.items())


def test_a_budget_that_stays_moves_between_places() -> None:
    handle = attached(2)
    before = count(handle)
    run = start(handle, STEPS)
    train(run, Importance(before, every=5, settle=10, explore=0.2), STEPS)
    ranks = {p: place.rank for p, place in sized_places(handle, None, "test").items()}
    assert count(handle) <= before
    assert max(ranks, key=lambda path: ranks[path]) == PLANTED[0]
    assert ranks[PLANTED[0]] > 2 > min(ranks.values())


@pytest.mark.parametrize(("family", "head"), [("gpt2", "LMHeadModel"), ("llama", "ForCausalLM")])
def test_a_part_of_a_combination_in_a_language_model(
    family: str, head: str, tmp_path: Path
) -> None:
    whole = build(family, head=head)
    handle = deltaops.attach(whole, LoRA(r=4, lr_ratio=4, dropout=0.1) + BitFit())
    optimizer = torch.optim.AdamW(handle.parameter_groups(1e-3))
    run = Run(whole, handle, optimizer, torch.Generator().manual_seed(5), 0, 12)
    whole_size = trained(sized_places(handle, "lora", "test").values())
    part = Importance(whole_size // 2, part="lora", every=3, settle=3, trial=1)
    part.begin(run)
    ids = batch(family)["input_ids"]
    sizes = [whole_size]
    while run.step < 12:
        optimizer.zero_grad()
        whole.train()(input_ids=ids, labels=ids).loss.backward()
        part.after_backward(run)
        optimizer.step()
        run.step += 1
        told = list(part.after_step(run))
        sizes.append(trained(sized_places(handle, "lora", "test").values()))
        assert told or run.step not in (3, 6)
        assert not told or run.step in (3, 6, 9)
        assert {action.delta for action in told} <= {"lora"}
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[9] <= whole_size // 2
    by_suffix = {
        k: g["lr"]
        for g in optimizer.param_groups
        for p in g["params"]
        for k, q in handle.state().items()
        if p is q
    }
    assert len(by_suffix) == len(handle.state())
    assert {lr for k, lr in by_suffix.items() if "lora_B" in k} == {4e-3}
    expected = whole.eval()(input_ids=ids).logits
    handle.save(tmp_path)
    loaded = deltaops.load(build(family, head=head), tmp_path)
    assert torch.equal(loaded.model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("killed", [25, 51])
def test_a_resumed_run_decides_the_same(killed: int, tmp_path: Path) -> None:
    run, part = start(attached(4), STEPS), made(smallest=1)
    train(run, part, killed)
    fresh = made(smallest=1)
    second = resumed(run, part, fresh, tmp_path)
    rest, again = train(run, part, STEPS), train(second, fresh, STEPS)
    assert rest == again
    for key, tensor in run.handle.state().items():
        assert torch.equal(tensor, second.handle.state()[key]), key
    assert part.state() == fresh.state()


def test_what_cannot_be_kept_to_is_refused_before_the_first_step() -> None:
    handle = attached(4)
    run = start(handle, STEPS)
    held = list(handle.parameters())
    for part, message in (
        (Importance(6 * UNIT - 1), "6 places at rank 1, which take 168 .*and is 167"),
        (Importance(6 * UNIT, start=100), "must hold the 672 parameters that are attached"),
        (Importance(700, start=690), "no lower than the 700"),
        (Importance(300, warmup=30, settle=30), "must be below the 60 steps"),
        (Importance(300, part="mine"), "part must name"),
        (Importance(900, smallest=5), "no rank may begin below smallest=5"),
    ):
        with pytest.raises(ConfigError, match=message):
            part.begin(run)
    run.steps = None
    with pytest.raises(ConfigError, match="number of steps of the run"):
        Importance(300).begin(run)
    with pytest.raises(ConfigError, match="begin"):
        Importance(300).after_step(run)
    for wrong in ({"every": 0}, {"explore": 1.0}, {"beta1": -0.1}, {"largest": 1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
            Importance(300, smallest=2, **wrong)
    assert all(a is b for a, b in zip(held, handle.parameters(), strict=True))
    assert handle.delta == LoRA(r=4, alpha=4)
