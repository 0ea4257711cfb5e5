"""Methods compared on a tiny encoder: trained alike, gated before timing, merged into files."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from deltaops.errors import ConfigError
from deltaops.measure import pair
from deltaops.measure.cell import EAGER, OURS, Cell
from deltaops.measure.compare import contenders, learn, papers, reader
from deltaops.measure.compare.build import describe, set_up
from deltaops.measure.compare.clock import FULL_TUNING, take_time
from deltaops.measure.compare.contenders import FULL, HEAD
from deltaops.measure.compare.lines import HEADS, Learned, Record, Settings
from deltaops.measure.compare.point_labels import label_points
from deltaops.measure.compare.reader import Material
from deltaops.measure.compare.report import table_markdown
from deltaops.measure.compare.store import Comparison, begin, file_of, read_table, write_table
from deltaops.methods import METHODS
from deltaops.surgery import Handle
from deltaops.testing.architectures import build
from deltaops.tuning.loop import evaluate
from deltaops.tuning.tokens import TokenSet

from .results import MACHINE, cell

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings("tiny", "train.csv", None, steps=6, batch_size=4, seq_len=8)
NAMED = replace(SETTINGS, **HEADS[reader.NAMED])
ALL = contenders.contenders(reader.TRAINED)
UNDER_NAMES = contenders.contenders(reader.NAMED)


def texts(count: int) -> TokenSet:
    """Three classes, told by a token each."""
    random = torch.Generator().manual_seed(count)
    classes = torch.arange(count) % 3
    ids = [torch.randint(9, 60, (3 + i % 5,), generator=random) for i in range(count)]
    return TokenSet(
        [torch.cat([t, c[None] + 3]) for t, c in zip(ids, classes, strict=True)], classes, 0
    )


@pytest.fixture(scope="module")
def material() -> Material:
    """As wide as the methods' own bottlenecks need."""
    encoder = build("bert", hidden_size=128)
    return Material(encoder, 128, 3, texts(40), texts(21))


@pytest.fixture(scope="module")
def named(material: Material) -> Material:
    """The same, under names that are made up."""
    names = torch.nn.functional.normalize(
        torch.randn(3, 128, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    return replace(material, names=names, labels=("a", "b", "c"))


def test_every_method_takes_part_and_none_twice() -> None:
    kinds = {line.spec.partition(":")[0] for line in ALL.values()} - {""}
    assert kinds == set(METHODS)
    assert {FULL, HEAD} <= set(ALL)


def test_names_choose_and_strange_ones_are_refused() -> None:
    assert [c.name for c in contenders.chosen("bitfit,full")] == ["full", "bitfit"]
    with pytest.raises(ConfigError, match="knows full, head, lora"):
        contenders.chosen("lora,nothing")


@pytest.mark.parametrize("name", ALL)
def test_ours_and_eager_agree_and_are_timed(name: str, material: Material) -> None:
    cell, state = take_time(ALL[name], material, SETTINGS, 0, rounds=1)
    assert FULL_TUNING in cell.timings
    assert all((peer in cell.timings) != (peer in cell.absent) for peer in (OURS,))
    assert set(state) == set(cell.saved) == set(cell.timings)
    if name in (FULL, HEAD):
        return
    assert state[OURS] < state[FULL_TUNING]
    assert state[OURS] == state[EAGER]


@pytest.mark.parametrize("name", [FULL, "lora"])
def test_under_names_ours_and_eager_agree_too(name: str, named: Material) -> None:
    cell, _ = take_time(UNDER_NAMES[name], named, NAMED, 0, rounds=1)
    assert set(cell.timings) == ({FULL_TUNING} if name == FULL else {OURS, EAGER, FULL_TUNING})


def test_under_names_nothing_but_the_method_trains(named: Material) -> None:
    line = describe(UNDER_NAMES["lora"], named, 0)
    assert (line.head, line.trained) == (0, describe(ALL["lora"], named, 0).trained)
    assert describe(UNDER_NAMES[FULL], named, 0).trained == line.total
    model, _, _ = learn.trained(UNDER_NAMES[FULL], named, (named.train, None), NAMED, 0)
    assert torch.equal(model.names, named.names)  # type: ignore[arg-type]  # a named head has them
    start = describe(UNDER_NAMES[HEAD], named, 0)
    assert (start.trained, start.head) == (0, 0)


def test_under_names_the_start_is_the_seeds(named: Material) -> None:
    starts = []
    for seed in (0, 0, 1):
        _, handle = set_up(UNDER_NAMES["lora"], named, seed)
        assert handle is not None
        starts.append(next(handle.parameters()).detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_the_start_is_tested_and_not_trained(named: Material) -> None:
    ticks: list[int] = []
    found = learn.learn(UNDER_NAMES[HEAD], named, NAMED, 0, (1e-2,), lambda: ticks.append(1))
    untouched = evaluate(named.reader(0), named.test, 4)
    assert untouched is not None
    assert (found.accuracy, found.loss) == (untouched["accuracy"], untouched["loss"])
    assert (found.rate, found.training_loss, found.tried) == (0.0, None, {})
    texts = len(named.test)
    assert len(ticks) == learn.work(UNDER_NAMES[HEAD], NAMED, texts, 1)
    learned = learn.learn(UNDER_NAMES["lora"], named, replace(NAMED, steps=12), 0)
    assert learned.loss < found.loss


def test_without_an_eager_form_ours_is_held_to_the_reference(
    material: Material, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "missing", lambda delta: "none here")
    cell, _ = take_time(ALL["dora"], material, SETTINGS, 0, rounds=1)
    assert cell.absent == {EAGER: "none here"}
    right = pair._reference_twin

    def wrong(base: nn.Module, handle: Handle, dtype: torch.dtype) -> object:
        twin, trained = right(base, handle, dtype)
        with torch.no_grad():
            next(iter(trained.values())).add_(0.1)
        return twin, trained

    monkeypatch.setattr(pair, "_reference_twin", wrong)
    with pytest.raises(AssertionError, match="nothing was timed"):
        take_time(ALL["dora"], material, SETTINGS, 0, rounds=1)


def test_a_wrong_delta_is_stopped(material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    right = pair.away_from_start

    def wrong(handle: Handle, dtype: torch.dtype) -> None:
        right(handle, dtype)
        handle.parameters = lambda: iter(  # type: ignore[method-assign]  # the last ones first
            list(type(handle).parameters(handle))[::-1]
        )

    monkeypatch.setattr(pair, "away_from_start", wrong)
    with pytest.raises(AssertionError, match="nothing was timed"):
        take_time(ALL["lora"], material, SETTINGS, 0, rounds=1)


@pytest.mark.parametrize("name", [FULL, HEAD, "lora"])
def test_the_same_seed_gives_the_same_bits(name: str, material: Material) -> None:
    first, second = (learn.learn(ALL[name], material, SETTINGS, 0) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
    other = learn.learn(ALL[name], material, SETTINGS, 1)
    assert other.training_loss != first.training_loss


def test_what_trains_is_what_the_line_says(material: Material) -> None:
    before = {k: v.clone() for k, v in material.encoder.state_dict().items()}
    head = describe(ALL[HEAD], material, 0)
    full = describe(ALL[FULL], material, 0)
    assert head.trained == 0
    assert full.trained == full.total == sum(p.numel() for p in material.encoder.parameters())
    assert describe(ALL["lora"], material, 0).trained < full.trained
    learn.learn(ALL[FULL], material, SETTINGS, 0)
    assert all(torch.equal(v, before[k]) for k, v in material.encoder.state_dict().items())


def test_rates_are_judged_on_training_texts_and_work_is_counted(material: Material) -> None:
    ticks: list[int] = []
    rates = (1e-30, 1e-2)
    found = learn.learn(ALL["lora"], material, SETTINGS, 0, rates, lambda: ticks.append(1))
    assert list(found.tried) == ["1e-30", "0.01"]
    judged = [found.tried[f"{rate:g}"] or 0.0 for rate in rates]
    assert found.rate == rates[judged.index(max(judged))]
    texts = len(material.test)
    assert len(ticks) == learn.work(ALL["lora"], SETTINGS, texts, len(rates))


# ------------------------------------------------------------------------------------- the files


def run(accuracy: float, **fields: object) -> Learned:
    made = Learned(accuracy, 1.0, 1.0, 3080, 1e-3, "made up", 1.0, {})
    return replace(made, **fields)  # type: ignore[arg-type]  # fields by name


def record(name: str, accuracy: float, **fields: object) -> Record:
    runs = {0: run(accuracy)}
    return replace(Record(name, name.upper(), "S()", 5, 2, 100, runs), **fields)  # type: ignore[arg-type]  # fields by name


def test_lines_are_merged_and_halves_kept(tmp_path: Path, material: Material) -> None:
    path = tmp_path / "m-methods.json"
    table = begin(path, SETTINGS, MACHINE).with_record(record("lora", 0.5), MACHINE)
    write_table(path, table)
    cell, state = take_time(ALL["lora"], material, SETTINGS, 0, rounds=3)
    timed = record("lora", 0.5, runs={}, timed=cell, state=state)
    again = begin(path, SETTINGS, MACHINE).with_record(timed, MACHINE)
    again = again.with_record(record("full", 0.75), MACHINE)
    write_table(path, again)
    assert [r.name for r in again.records] == ["full", "lora"]
    lora = again.records[1]
    assert (lora.learned, lora.timed) == (record("lora", 0.5).learned, cell)
    titles = {"full": "full tuning", "lora": "LoRA, r = 16"}  # old lines get the present ones
    now = tuple(replace(r, title=titles[r.name]) for r in again.records)
    assert read_table(path) == replace(again, records=now)
    text = path.with_suffix(".md").read_text()
    assert "| FULL | S() | 5 | 5.00 % | 75.0 ± 0.8 | – | – | 1.000 |" in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    moved = timed.updated(record("lora", 0.5, settings="other"))
    assert moved.learned is None  # of other settings: no half of this line


def test_a_stopped_half_is_kept_apart_and_cleared() -> None:
    timed = cell("method", {FULL_TUNING: 1.0})
    run = {"command": "deltaops compare", "date": "2026-11-25T10", "versions": "torch 2"}
    made = {"accuracy": run, "time": run}
    both = record("lora", 0.5, timed=timed, state={FULL_TUNING: 8}, made=made)
    line = replace(both, runs={}, timed=None, state=None, made={})
    stopped = replace(line, failed={"accuracy": "not finite"}).updated(both)
    assert (stopped.learned, stopped.timed, stopped.state) == (None, timed, both.state)
    assert (stopped.failed, stopped.made) == ({"accuracy": "not finite"}, {"time": run})
    assert stopped.updated(None) == Record.of_json(stopped.as_json())
    again = replace(line, runs=both.runs, made={"accuracy": run}).updated(stopped)
    assert again == both
    off = replace(line, failed={"time": "off by 2"}).updated(stopped)
    assert (off.timed, off.state, off.made) == (None, None, {})
    assert off.failed == {"accuracy": "not finite", "time": "off by 2"}


def test_lines_of_before_are_read() -> None:
    old = record("lora", 0.5).as_json()
    old["learned"] = old.pop("runs")[0]
    assert Record.of_json({**old, "failed": ""}) == record("lora", 0.5)
    assert Record.of_json({**old, "failed": "off by 2"}).failed == {"time": "off by 2"}
    assert list(Record.of_json(old, seed=3).runs) == [3]


def test_other_settings_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "m-methods.json"
    write_table(path, Comparison(SETTINGS, MACHINE, (record("lora", 0.5),)))
    with pytest.raises(ConfigError, match="was made with steps=6"):
        begin(path, replace(SETTINGS, steps=7), MACHINE)
    with pytest.raises(ConfigError, match="was made with head='trained'"):
        begin(path, NAMED, MACHINE)
    sized = replace(NAMED, few_shot=5, parameters=300)
    files = [file_of(tmp_path, MACHINE, one).name for one in (NAMED, SETTINGS, sized)]
    assert files == [
        "some-cpu-2-threads-avx2-methods.json",
        "some-cpu-2-threads-avx2-methods-trained-head.json",
        "some-cpu-2-threads-avx2-methods-5-shot-300-parameters.json",
    ]
    now = {**MACHINE, "command": "deltaops compare --methods dora"}
    assert begin(path, SETTINGS, now).machine == now  # whose command is that of the next lines
    path.write_text("{}")
    with pytest.raises(ConfigError, match="no table of `deltaops compare`"):
        begin(path, SETTINGS, MACHINE)


def test_the_papers_order_is_told_only_where_it_shows() -> None:
    values = {"houlsby": 9, "bitfit": 8, "prompt": 7, "lora": 6, "ia3": 5.5}
    ding = papers.Figures("D", "d", values, tie=0.6)
    lines = [record("houlsby", 0.86), record("bitfit", 0.865), record("prompt", 0.6)]
    found = papers.orders(ding, [*lines, record("lora", 0.7), record("dora", 0.1)], 32)
    assert found[papers.SAME] == [
        "HOULSBY before PROMPT (+26.0 points here, +2.0 there)",
        "HOULSBY before LORA (+16.0 points here, +3.0 there)",
        "BITFIT before PROMPT (+26.5 points here, +1.0 there)",
        "BITFIT before LORA (+16.5 points here, +2.0 there)",
    ]
    assert found[papers.OPEN] == ["HOULSBY before BITFIT (-0.5 points here, +1.0 there)"]
    assert found[papers.OTHER] == [
        "PROMPT before LORA (-10.0 points here, +1.0 there; loss of the last batch of 32 texts: "
        "1.00 and 1.00 nats)"
    ]
    tied = papers.orders(ding, [record("lora", 0.7), record("ia3", 0.1)], 32)[papers.TIED]
    assert tied == ["LORA before IA3 (+60.0 points here, +0.5 there)"]


def test_gains_are_over_the_start_and_what_does_not_learn_is_named() -> None:
    lines = [record("full", 0.9, trained=100), record("head", 0.6, head=0), record("lora", 0.84)]
    lines += [record("prompt", 0.61), record("bitfit", 0.5)]
    text = table_markdown(NAMED, MACHINE, lines, "p.png")
    assert "| LORA | S() | 5 | 5.00 % | 84.0 ± 0.7 | +24.0 | 80 % | 1.000 |" in text
    assert "Not told apart from the start (60.0 ± 0.9 %): PROMPT." in text
    assert "Below the start (60.0 ± 0.9 %): BITFIT." in text
    assert "cosines times 20.0" in text
    assert "of the head" not in text
    assert "Not trained yet: DoRA, r = 16; Adapter (Houlsby);" in text
    assert "- Not timed yet: full tuning; LoRA, r = 16; DoRA, r = 16;" in text
    weak = [record("full", 0.601), *lines[1:3]]
    assert "84.0 ± 0.7 | +24.0 | – | 1.000 |" in table_markdown(NAMED, MACHINE, weak, "p.png")
    fine = table_markdown(NAMED, MACHINE, lines[:3], "p.png")
    assert "Every method here is told apart from the start (60.0 ± 0.9 %), and above it." in fine


def test_labels_of_a_picture_keep_clear_of_each_other() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6))
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.set_xlim(0, 10)
    ax.set_ylim(0, 10)
    figure.draw_without_rendering()
    points = [(5 + 0.1 * i, 5 + 0.05 * (i % 3)) for i in range(12)]
    titles = [f"a method's name {i}" for i in range(12)]
    boxes = label_points(ax, points, titles)
    assert len(boxes) == 12
    for i, a in enumerate(boxes):
        assert all(a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1] for b in boxes[:i])
        assert not any(
            a[0] <= x <= a[2] and a[1] <= y <= a[3] for x, y in ax.transData.transform(points)
        )


def test_a_stopped_line_is_told(tmp_path: Path) -> None:
    lines = [record("lora", 0.5, failed={"time": "off by 2"})]
    lines.append(record("dora", 0.5, runs={}, failed={"accuracy": "not finite"}))
    text = table_markdown(SETTINGS, MACHINE, lines, "p.png")
    assert "- LORA: stopped: off by 2" in text
    assert "DORA: stopped: not finite" in text
    assert "| DORA | S() | 5 | 5.00 % | stopped |" in text


def test_rates_that_were_tried_are_told_from_guesses() -> None:
    lines = [record("lora", 0.5), record("bitfit", 0.5)]
    assert "No rate was tried: all are" in table_markdown(SETTINGS, MACHINE, lines, "p.png")
    tried = {"0.001": 0.5, "0.01": 0.25, "0.1": None}
    lines[0] = record("lora", 0.5, runs={0: run(0.5, tried=tried)})
    text = table_markdown(SETTINGS, MACHINE, lines, "p.png")
    assert "Rates were tried only for: LORA. The others' are guesses, and their order" in text
    assert (
        "| LORA | 0.001: 50.0 (best, at the edge of those tried), 0.01: 25.0, 0.1: not finite |"
        in text
    )
    assert learn.best_rate({"0.1": None}) is None


def test_lines_of_a_slow_moment_and_of_several_runs_are_told(tmp_path: Path) -> None:
    def timed(full: float) -> Cell:
        return replace(cell("method", {FULL_TUNING: full}), saved={FULL_TUNING: 8})

    made = {"time": {"command": "deltaops compare", "date": "2026-11-25T10", "versions": "torch 2"}}
    lines = [record(n, 0.5, timed=timed(1.0), made=made) for n in ("lora", "dora", "houlsby")]
    lines.append(record("bitfit", 0.5, timed=timed(2.0)))
    text = table_markdown(SETTINGS, MACHINE, lines, "p.png")
    assert "- BITFIT: the machine was slower then (full tuning took 2.00 times" in text
    assert "LORA: the machine" not in text
    runs = "- `deltaops compare` on 2026-11-25, torch 2: LORA (time), DORA (time), HOULSBY (time)"
    assert runs in text
    assert "did not keep their command with the line: LORA (accuracy), DORA (accuracy)" in text


def test_a_rate_that_diverges_is_not_chosen(material: Material) -> None:
    found = learn.learn(ALL["lora"], material, replace(SETTINGS, steps=9), 0, (1e-3, 1e30))
    assert found.tried["1e+30"] is None
    assert found.rate == 1e-3


def test_other_texts_or_weights_have_another_hash(material: Material) -> None:
    assert material.texts() == replace(material).texts()
    assert material.texts() != replace(material, test=material.train).texts()
    other = copy.deepcopy(material.encoder)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert material.weights() != replace(material, encoder=other).weights()
