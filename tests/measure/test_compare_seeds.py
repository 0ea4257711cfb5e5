"""The table over seeds, few texts, budgets, combinations and what steers; on a tiny encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deltaops.errors import ConfigError
from deltaops.measure.compare import budget, contenders, learn, store
from deltaops.measure.compare import run as table_run
from deltaops.measure.compare.build import describe, groups, set_up
from deltaops.measure.compare.contenders import Contender, chosen
from deltaops.measure.compare.lines import HEADS, Learned, Record, Settings
from deltaops.measure.compare.reader import NAMED, TRAINED, Material, few
from deltaops.measure.compare.report import table_markdown
from deltaops.measure.compare.run import Wish, fill, work
from deltaops.measure.compare.store import Comparison, begin, read_table
from deltaops.methods import Combined
from deltaops.surgery import Handle
from deltaops.testing.architectures import build
from deltaops.tuning.tokens import TokenSet

from .results import MACHINE

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = replace(
    Settings("tiny", "train.csv", None, steps=2, batch_size=4, seq_len=8), **HEADS[NAMED]
)


def texts(count: int) -> TokenSet:
    """Three classes in turns."""
    random = torch.Generator().manual_seed(count)
    classes = torch.arange(count) % 3
    ids = [torch.randint(9, 60, (3 + i % 5,), generator=random) for i in range(count)]
    return TokenSet(ids, classes, 0)


@pytest.fixture(scope="module")
def material() -> Material:
    names = torch.nn.functional.normalize(torch.eye(3, 128), dim=-1)
    encoder = build("bert", hidden_size=128)
    return Material(encoder, 128, 3, texts(40), texts(21), names, ("a", "b", "c"))


def wish(methods: str, *seeds: int, again: bool = False) -> Wish:
    return Wish(tuple(chosen(methods)), seeds, (), True, None, again)


# -------------------------------------------------------------------------------- combinations


def test_methods_are_lines_of_the_table_and_deltas_as_they_are_written() -> None:
    found = chosen("prefix,lora:r=4,alpha=8+bitfit,lora:r=2,MAM")
    assert [c.name for c in found] == ["prefix", "lora:r=4,alpha=8+bitfit", "lora:r=2", "MAM"]
    both = found[1]
    known = contenders.contenders(NAMED)
    rates = {name: both.rate * pace for name, pace in both.paces}
    assert rates == pytest.approx({"lora": known["lora"].rate, "bitfit": known["bitfit"].rate})
    assert both.why.startswith("each part's own: lora ")
    assert found[2].rate == known["lora"].rate
    assert chosen("lora:use_dora=true")[0].why == f"each part's own: dora {known['dora'].rate:g}"
    with pytest.raises(ConfigError, match=r"got 'lora:rank=4'.*no option 'rank'"):
        chosen("bitfit,lora:rank=4")


@pytest.mark.parametrize("head", [NAMED, TRAINED])
def test_the_parts_of_a_combination_have_their_own_rates(head: str, material: Material) -> None:
    (both,) = chosen("lora:r=4+bitfit", head)
    names = material.names if head == NAMED else None
    model, handle = set_up(both, replace(material, names=names), 0)
    assert handle is not None
    pace = {id(p): g["pace"] for g in groups(model, handle, both, 0.25) for p in g["params"]}
    for key, tensor in handle.state().items():
        part = key.partition("/")[0]
        if part in dict(both.paces):
            assert pace.pop(id(tensor)) == pytest.approx(both.rate * dict(both.paces)[part])
    assert list(pace.values()) == [0.25] * (0 if head == NAMED else 2)


# ------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("name", list(contenders.contenders(NAMED)))
def test_a_budget_is_met_as_near_as_sizes_allow(name: str, material: Material) -> None:
    line = contenders.contenders(NAMED)[name]
    found = budget.sized(line, material.encoder, 4000)
    trained = describe(found, material, 0).trained
    if name in ("full", "head", "bitfit", "ia3", "lntuning"):
        assert found.delta() == line.delta()
        return
    assert trained == budget.count(found.delta() or Combined([]), material.encoder)
    assert abs(trained - 4000) < 2100, "one size up or down is worth less"
    assert found.title != line.title


def test_the_parts_of_a_combination_share_a_budget(material: Material) -> None:
    (line,) = chosen("lora:r=16,alpha=32+adapter+bitfit")
    whole = budget.sized(line, material.encoder, 20_000)
    assert whole.title == line.title
    found = whole.delta()
    assert isinstance(found, Combined)
    lora, adapter, bitfit = (budget.count(d, material.encoder) for d in found.by_name.values())
    assert bitfit == budget.count(line.delta().by_name["bitfit"], material.encoder)  # type: ignore[union-attr]  # a combination
    assert abs(lora + adapter + bitfit - 20_000) < 700
    assert abs(lora - adapter) < 1500
    assert found.by_name["lora"].scaling == 2.0  # type: ignore[attr-defined]  # LoRA has it


def test_gates_are_within_the_budget(material: Material) -> None:
    (line,) = chosen("UniPELT")
    found = budget.sized(line, material.encoder, 8_000).delta()
    assert isinstance(found, Combined)
    assert abs(budget.count(found, material.encoder) - 8_000) < 700


def test_a_delta_as_it_was_written_is_told_with_the_size_it_got(material: Material) -> None:
    (line,) = chosen("lora:r=2,alpha=4")
    found = budget.sized(line, material.encoder, 20_000)
    assert found.title == f"lora:r=2,alpha=4 → r = {found.delta().r}"  # type: ignore[union-attr]  # a LoRA


# ------------------------------------------------------------------------------------ few texts


def test_few_texts_of_each_label_are_drawn_by_the_seed() -> None:
    data = texts(40)
    fit, others = few(data, 3, 4, 0)
    for part in (fit, others):
        assert part.classes is not None
        assert part.classes.bincount().tolist() == [4, 4, 4]
    assert fit.fingerprint() == few(data, 3, 4, 0)[0].fingerprint()
    assert fit.fingerprint() != few(data, 3, 4, 1)[0].fingerprint()
    seen = {tuple(ids.tolist()) for ids in fit.ids}
    assert not seen & {tuple(ids.tolist()) for ids in others.ids}
    with pytest.raises(ConfigError, match=r"--few-shot 13: label 1 .* has 13 training"):
        few(data, 3, 13, 0)


# ---------------------------------------------------------------------------------------- seeds


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is trained from now on."""
    found: list[tuple[str, int]] = []
    right = learn.learn

    def once(contender: Contender, material: Material, settings: Settings, seed: int,
             *more: object) -> Learned:  # fmt: skip
        found.append((contender.name, seed))
        return right(contender, material, settings, seed, *more)  # type: ignore[arg-type]  # as given

    monkeypatch.setattr(table_run, "learn", once)
    return found


def test_a_run_that_is_killed_goes_on_and_seeds_are_added(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "draw_table", lambda path, **given: path.write_bytes(b"drawn"))
    path = tmp_path / "m-methods.json"
    trained = counted(monkeypatch)
    told: list[str] = []

    def kill(what: str, done: int) -> None:
        told.append(what)
        if what == "BitFit, seed 1":
            raise KeyboardInterrupt

    asked = wish("head,lntuning,bitfit", 0, 1)
    with pytest.raises(KeyboardInterrupt):
        fill(begin(path, SETTINGS, MACHINE), asked, material, path, told=kill)
    pairs = [("head", 0), ("bitfit", 0)]
    assert trained == pairs
    del trained[:]
    steps: list[int] = []
    table, stopped = fill(
        begin(path, SETTINGS, MACHINE), asked, material, path, tick=lambda: steps.append(1)
    )
    assert trained == [("bitfit", 1), ("lntuning", 0), ("lntuning", 1)]
    assert not stopped
    whole = work(asked, SETTINGS, len(material.test))
    before = 6 + SETTINGS.steps + 6  # the start's test, a run and its test
    assert len(steps) == whole - before
    assert read_table(path) == table
    del trained[:]
    fill(table, wish("bitfit", 0, 1, 2), material, path)
    assert trained == [("bitfit", 2)]
    del trained[:]
    changed = replace(asked.contenders[1], rate=0.5)
    table, _ = fill(table, replace(asked, contenders=(changed,)), material, path)
    assert trained == [("bitfit", 0), ("bitfit", 1)]
    (line,) = (r for r in table.records if r.name == "bitfit")
    assert list(line.runs) == [0, 1], "another rate's seed is of no mean with these"


def test_a_rate_is_looked_for_by_the_first_seed(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = replace(wish("bitfit", 3, 4), rates=(1e-30, 1e-2))
    table, _ = fill(Comparison(SETTINGS, MACHINE, ()), asked, material, None)
    first, second = table.records[0].runs.values()
    assert list(first.tried) == ["1e-30", "0.01"]
    assert (second.tried, second.rate) == ({}, first.rate)
    trained = counted(monkeypatch)
    fill(table, asked, material, None)
    assert trained == []


def test_a_seed_that_diverges_stops_the_line(material: Material) -> None:
    line = replace(chosen("bitfit")[0], rate=1e30)
    asked = replace(wish("bitfit", 0, 1), contenders=(line,))
    table, stopped = fill(Comparison(SETTINGS, MACHINE, ()), asked, material, None)
    assert "the loss of step" in stopped["BitFit (accuracy)"]
    assert table.records[0].failed.keys() == {"accuracy"}


def test_means_and_deviations_are_told() -> None:
    def run(accuracy: float, tried: dict[str, float | None] | None = None) -> Learned:
        return Learned(accuracy, 1.0, 0.5, 3080, 1e-3, "made up", 1.0, tried or {})

    lora = Record("lora", "LORA", "S()", 5, 0, 100, {0: run(0.8), 1: run(0.82), 2: run(0.84)})
    bitfit = replace(lora, name="bitfit", title="BITFIT", runs={0: run(0.9)})
    start = replace(lora, name="head", title="HEAD", runs={0: replace(run(0.6), rate=0.0)})
    found = lora.learned
    assert found is not None
    assert (found.accuracy, found.spread) == pytest.approx((0.82, 0.02))
    lines = [start, lora, bitfit]
    text = table_markdown(replace(SETTINGS, few_shot=5, parameters=9), MACHINE, lines, "p.png")
    assert "| LORA | S() | 5 | 5.00 % | 82.0 ± 2.0 | +22.0 |" in text
    assert "texts (5 a label, drawn by the seed) of at most" in text
    assert "sized to train 9 parameters" in text
    assert "Seeds 0, 1, 2 (a line that has not all of them says so)" in text
    assert "BITFIT: seed 0 alone." in text
    assert "HEAD: seed" not in text
    late = replace(lora, runs=lora.runs | {2: run(0.84, tried={"0.001": 0.5})}).learned
    assert late is not None
    assert late.tried == {"0.001": 0.5}, "whichever seed tried them"
    again = Record.of_json(json.loads(json.dumps(lora.as_json())))
    assert again == lora


# --------------------------------------------------------------------------------------- steer


class Counting:
    """A controller that freezes all but one parameter after its first evaluation."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls: list[str] = []
        self.failed: dict[str, str] = {}

    def begin(self, handle: Handle, optimizer: object, *, steps: int | None = None) -> None:
        self.handle = handle
        self.calls.append(f"begin of {steps}")

    def after_backward(self, loss: float) -> None:
        assert any(p.grad is not None for p in self.handle.parameters())
        self.calls.append("backward")

    def after_step(self) -> None:
        self.calls.append("step")

    def after_evaluation(self, metrics: Mapping[str, float]) -> None:
        assert metrics.keys() == {"loss", "accuracy"}
        self.calls.append("evaluation")
        for p in list(self.handle.parameters())[1:]:
            p.requires_grad_(False)

    def close(self) -> None:
        self.calls.append("close")


class Failed(Counting):
    """One with a part that raised."""

    def close(self) -> None:
        self.failed = {"head": "why"}


def test_a_controller_is_one_more_line(material: Material) -> None:
    made: list[Counting] = []

    def make(seed: int) -> Counting:
        made.append(Counting(seed))
        return made[-1]

    line = replace(chosen("bitfit")[0], name="controller", title="Controller", steer=make)
    asked = replace(wish("bitfit", 0, 1), contenders=(line,))
    settings = replace(SETTINGS, steps=2, few_shot=2)
    table, stopped = fill(Comparison(settings, MACHINE, ()), asked, material, None)
    assert not stopped
    assert [one.seed for one in made] == [0, 1]
    each = ["backward", "step", "evaluation"]
    assert made[0].calls == ["begin of 2", *each, *each, "close"]
    (record,) = table.records
    assert record.learned is not None
    text = table_markdown(settings, MACHINE, table.records, "p.png")
    assert f"Controller: {record.learned.trained:,} parameters train at the end." in text


def test_a_controller_stands_behind_an_at(material: Material) -> None:
    spec = "lora:r=2,alpha=4@importance:parameters=3000,every=2,settle=1"
    (line,) = chosen(f"{spec},warmup=1")
    assert (line.name, line.spec) == (f"{spec},warmup=1", "lora:r=2,alpha=4")
    assert budget.sized(line, material.encoder, 10) is line
    found = learn.learn(line, material, replace(SETTINGS, steps=5), 0)
    assert found.trained is not None
    assert found.trained <= 3000 < describe(line, material, 0).trained

    with pytest.raises(ConfigError, match="head failed, so the line is not its"):
        learn.learn(replace(line, steer=lambda seed: Failed(seed)), material, SETTINGS, 0)
    for odd, told in (("full@monitor", "steers a delta"), ("lora@importence", "importance")):
        with pytest.raises(ConfigError, match=told):
            chosen(odd)
