"""A workshop for a command: its steps are bars, and Ctrl-C stops it between two of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .quiet import quiet_transformers

if TYPE_CHECKING:
    from deltaops.tuning.workshop import Settings, Workshop

INTERRUPTED = 130

OnStep = Callable[[str, int, float], object]
"""Called with what is trained, the step (from 1) and its loss."""
Bars = Callable[[Progress], OnStep]


@contextmanager
def workshop(
    model: str,
    answers: str | None,
    settings: Settings,
    console: Console,
    bars: Bars,
) -> Iterator[Workshop]:
    """A workshop that says how its model answers.

    Args:
        model: a folder or hub id.
        answers: as for :class:`deltaops.tuning.workshop.Workshop`.
        settings: of the training of prompts.
        console: to draw on.
        bars: makes what is called with each step out of what it draws on.
    """
    from deltaops.tuning.workshop import Stopped, Workshop

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
            made = Workshop(model, settings, bars(progress), lambda: stopped, answers=answers)
            console.print(_ANSWERS[made.answering.answers], highlight=False)
            yield made
    except Stopped:
        console.print("stopped; what was under way was not written. Start it again.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_ANSWERS = {
    "written": "answers are written by the model (--answers written)",
    "named": "answers are the label whose name the encoder puts nearest (--answers named)",
}


def bar_each(totals: dict[str, int], otherwise: int) -> Bars:
    """A bar for each thing that is trained, with its loss.

    Args:
        totals: the steps of what has other ones than ``otherwise``.
        otherwise: the steps of the rest.
    """

    def begin(progress: Progress) -> OnStep:
        bars: dict[str, Any] = {}

        def step(what: str, number: int, loss: float) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=totals.get(what, otherwise))
            progress.update(bars[what], completed=number, description=f"{what}  loss {loss:.3f}")

        return step

    return begin


def one_bar(total: int) -> Bars:
    """One bar for all steps, which says what is trained."""

    def begin(progress: Progress) -> OnStep:
        bar = progress.add_task("reading", total=total)

        def step(what: str, number: int, loss: float) -> None:
            progress.update(bar, advance=1, description=f"{what}  loss {loss:.3f}")

        return step

    return begin
