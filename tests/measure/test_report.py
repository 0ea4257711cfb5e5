"""The report, the losses and the JSON: all of it follows from the results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from deltaops.errors import ConfigError
from deltaops.files import write_json
from deltaops.measure import store
from deltaops.measure.cell import EAGER, FROZEN, OURS, OWN_FROZEN, PEFT, PREPACKED, Results
from deltaops.measure.interleave import Timing
from deltaops.measure.lost import lost
from deltaops.measure.picture import bar_figure, draw_layers, draw_methods
from deltaops.measure.report import markdown

from .results import cell, results

RUN = results(
    cell("lora", {OURS: 2.0, PEFT: 4.0, PREPACKED: 1.0, FROZEN: 1.0, OWN_FROZEN: 1.5}),
    cell("bitfit", {OURS: 1.0}, absent={"eager torch": "too slow here"}),
    cell("step", {OURS: 1.0, PEFT: 2.0}, what="BERT", shape=None, tokens=64, note="2 of 8"),
)


def test_losses_are_listed_largest_first() -> None:
    lines = lost(RUN)
    assert [line.split(": ")[1] for line in lines] == [
        "oneDNN prepacked is 2.00× as fast",
        "our frozen layer takes 1.50× of torch's",
    ]


def test_holding_more_than_a_peer_is_a_loss() -> None:
    (line,) = lost(results(cell("lora", {OURS: 1.0}, saved={OURS: 30, PEFT: 20})))
    assert "PEFT holds 20 bytes, ours 30" in line


def test_who_loses_nowhere_is_told_so() -> None:
    winner = results(cell("lora", {OURS: 1.0, PEFT: 2.0}))
    assert lost(winner) == []
    assert "Nowhere in this run." in markdown(winner)


def test_the_report_has_goals_losses_pictures_and_reasons() -> None:
    text = markdown(RUN, ["a.png"])
    assert "![a.png](a.png)" in text
    assert "oneDNN prepacked is 2.00× as fast" in text
    assert "too slow here" in text
    assert "2 of 8" in text
    assert "| LoRA layer against PEFT eager | f32 | 2.00× | 2.00× | ≥ 2.2× | missed |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)


def test_results_come_back_from_their_json(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    write_json(path, store.as_json(RUN))
    again = store.read(path)
    assert again == RUN
    assert markdown(again) == markdown(RUN)


def test_another_json_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"steps": []}')
    with pytest.raises(ConfigError, match="no JSON of `deltaops bench`"):
        store.read(path)


def test_pictures_are_drawn_of_what_was_measured(tmp_path: Path) -> None:
    drawn = store.pictures(RUN, "m")
    assert list(drawn) == ["m-loras.png", "m-steps.png"]
    draw_layers(tmp_path / "p.png", drawn["m-loras.png"], "made up")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_methods_have_a_table_and_a_picture(tmp_path: Path) -> None:
    each = {name: Timing.of([s, s, s]) for name, s in ((OURS, 0.01), (EAGER, 0.02))}
    found = results(
        *(
            replace(cell("method", {OURS: 1.0}, what=name, model=model, shape=None), timings=each)
            for model in ("BERT", "Llama")
            for name in ("LoRA", "Prefix")
        )
    )
    text = markdown(found)
    assert "| LoRA on BERT | f32 | 0 | 10 (10–10), 3 | 20 (20–20), 3 |" in text
    assert "| Prefix on Llama f32 | deltaops | eager torch | 2.00 (2.00–2.00), 3 |" in text
    drawn = store.pictures(found, "m")
    draw_methods(tmp_path / "p.png", drawn["m-method-steps.png"], "made up")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_machines_have_file_names_of_their_own() -> None:
    facts = {"processor": "AMD EPYC 9B45", "threads": 2, "isa": "avx512"}
    assert store.slug(facts) == "amd-epyc-9b45-2-threads-avx512"
    assert store.slug({**facts, "threads": 4}) != store.slug(facts)


def test_an_empty_run_has_a_report() -> None:
    assert "not part of this run" in markdown(Results(RUN.machine, {}, []))


def test_an_axis_holds_its_bars() -> None:
    for ax in bar_figure(RUN.cells, "made up", "milliseconds").axes[: len(RUN.cells)]:
        bars = [patch.get_width() for patch in ax.patches]
        assert 0.5 * ax.get_xlim()[1] < max(bars) < ax.get_xlim()[1]
