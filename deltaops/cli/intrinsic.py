"""``deltaops intrinsic``: fit a decoder to the prompts of several tasks, and tune by it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .quiet import quiet_transformers

if TYPE_CHECKING:
    from deltaops.tuning.intrinsic import Settings, Workshop

INTERRUPTED = 130

intrinsic = typer.Typer(
    help="Learn tasks by a few numbers each, in the subspace that other tasks' prompts span.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

DATA = typer.Option(..., help="A task's JSONL or CSV file, with texts and answers; once for each.")
BATCH_SIZE = typer.Option(8, help="Examples a step.")
SEQ_LEN = typer.Option(128, help="Tokens of a text.")
SEED = typer.Option(0, help="Decides start values and order.")
TEXT_COLUMN = typer.Option("text", help="Field of the text.")
LABEL_COLUMN = typer.Option("label", help="Field of the answer that the model has to write.")
EVAL_FRACTION = typer.Option(0.2, help="Part of the data that is held out.")
LR = typer.Option(0.02, help="Peak learning rate of a prompt, full or of a few numbers.")


@intrinsic.command()
def fit(
    model: str = typer.Option(..., help="Folder or hub id of a language model."),
    data: list[str] = DATA,
    out: Path = typer.Option(..., help="Folder for the decoder and the tasks' full prompts."),
    num_virtual_tokens: int = typer.Option(20, min=1, help="Length of the prompts."),
    intrinsic_dim: int = typer.Option(5, min=1, help="Numbers that a task will have."),
    steps: int = typer.Option(200, help="Training steps of each full prompt."),
    fit_steps: int = typer.Option(1000, help="Training steps of the decoder, tasks in turns."),
    batch_size: int = BATCH_SIZE,
    lr: float = LR,
    fit_lr: float = typer.Option(1e-3, help="Peak learning rate of the decoder."),
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
    eval_fraction: float = EVAL_FRACTION,
) -> None:
    """Train a full prompt for each task, and fit a decoder to all of them.

    Example:  deltaops intrinsic fit --model path/to/gpt2 --data a.csv --data b.csv --data c.csv
              --intrinsic-dim 5 --out decoder
    """
    from deltaops.tuning.intrinsic import Settings
    from deltaops.tuning.intrinsic import fit as run

    settings = Settings(
        steps, batch_size, lr, seq_len, seed, text_column, label_column, eval_fraction
    )
    console = Console()
    with _workshop(model, settings, console, {"decoder": fit_steps}) as workshop:
        rows = run(
            workshop, workshop.tasks(data), out, model=model, intrinsic_dim=intrinsic_dim,
            num_virtual_tokens=num_virtual_tokens, fit_steps=fit_steps, fit_lr=fit_lr,
        )  # fmt: skip
    table = Table("task", "full prompt", "decoded again", title="held-out accuracy")
    for name, full, decoded in rows:
        table.add_row(name, *(f"{scores['accuracy']:.3f}" for scores in (full, decoded)))
    console.print(table)
    console.print(f"decoder and prompts are in {out}", highlight=False)
    console.print(
        f"next:  deltaops intrinsic tune --decoder {out} --data task.csv --out tuned",
        highlight=False,
        markup=False,
    )


@intrinsic.command()
def tune(
    decoder: Path = typer.Option(..., help="Folder of `deltaops intrinsic fit`."),
    data: list[str] = DATA,
    out: Path = typer.Option(..., help="Folder for an adapter of each task, and metrics.json."),
    model: str | None = typer.Option(None, help="By default the one the decoder was fitted on."),
    compare: bool = typer.Option(
        True, help="Train full prompts too, to say what part of their accuracy is recovered."
    ),
    steps: int = typer.Option(200, help="Training steps."),
    batch_size: int = BATCH_SIZE,
    lr: float = LR,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
    eval_fraction: float = EVAL_FRACTION,
) -> None:
    """Tune a task's few numbers by a fitted decoder, and tell what of a full prompt they recover.

    Example:  deltaops intrinsic tune --decoder decoder --data d.csv --data e.csv --out tuned

    Example:  deltaops intrinsic tune --decoder decoder --data d.csv --no-compare --out tuned
    """
    from deltaops.tuning.intrinsic import Settings, base_model
    from deltaops.tuning.intrinsic import tune as run
    from deltaops.tuning.recovered import mean_relative

    settings = Settings(
        steps, batch_size, lr, seq_len, seed, text_column, label_column, eval_fraction
    )
    console = Console()
    with _workshop(model or base_model(decoder), settings, console, {}) as workshop:
        rows = run(workshop, workshop.tasks(data), decoder, out, compare=compare)
    table = Table("task", "decoder has", "accuracy", "full prompt", "recovered")
    for row in rows:
        full = "not trained" if row.full is None else f"{row.full['accuracy']:.3f}"
        table.add_row(
            row.task, "seen it" if row.seen else "not seen it", f"{row.tuned['accuracy']:.3f}",
            full, _percent(row.relative),
        )  # fmt: skip
    console.print(table)
    for word, seen in (("seen", True), ("unseen", False)):
        relative = mean_relative(row for row in rows if row.seen is seen)
        if relative is not None:
            console.print(f"recovered of full prompt tuning on {word} tasks: {_percent(relative)}")
    console.print(f"adapters and metrics.json are in {out}", highlight=False)
    console.print(
        f'load one:  deltaops.load(model, "{out / rows[0].task}")', highlight=False, markup=False
    )


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


@contextmanager
def _workshop(
    model: str, settings: Settings, console: Console, totals: dict[str, int]
) -> Iterator[Workshop]:
    """A workshop whose steps are bars, and which Ctrl-C stops between two of them.

    Args:
        model: a folder or hub id.
        settings: of the training of prompts.
        console: to draw on.
        totals: the steps of what has other ones than ``settings`` say.
    """
    from deltaops.tuning.intrinsic import Stopped, Workshop

    quiet_transformers()
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    before: dict[int, Any] = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console,
        ) as progress:  # fmt: skip
            bars: dict[str, Any] = {}

            def step(what: str, number: int, loss: float) -> None:
                if what not in bars:
                    bars[what] = progress.add_task(what, total=totals.get(what, settings.steps))
                note = f"{what}  loss {loss:.3f}"
                progress.update(bars[what], completed=number, description=note)

            yield Workshop(model, settings, step, lambda: stopped)
    except Stopped:
        console.print("stopped; what was under way was not written. Start it again.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
