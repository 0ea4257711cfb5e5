"""``deltaops bench``: this machine, interleaved with the peers, after a correctness gate."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .quiet import quiet_transformers


def bench(
    out: Path | None = typer.Option(
        None,
        help="Folder for the JSON, the report and the pictures, named after the machine and, with "
        "--only, --models or --quick, the part of a run. Until the end, what is measured so "
        "far lies there as NAME.unfinished.json, for --report.",
    ),
    quick: bool = typer.Option(False, "--quick", help="Two layer shapes, one model, no compiler."),
    only: str | None = typer.Option(
        None,
        help="layers, steps, methods, stacks (two methods at once; not part of the whole), or "
        "goals (everything, and only the goals printed).",
    ),
    dtype: str | None = typer.Option(None, help="f32 or bf16; both by default."),
    shapes: str | None = typer.Option(None, help="Layer shapes: 512x768x768,128x768x768."),
    models: str | None = typer.Option(
        None, help="Of the steps: bert,llama,gpt2,vit; of methods and stacks: bert,llama,bert-base."
    ),
    methods: str | None = typer.Option(None, help="Such as prefix,bitfit; all by default."),
    dropout: float | None = typer.Option(
        None, min=0.0, max=0.99, help="Only this dropout; 0 and 0.1 by default."
    ),
    compiled: bool | None = typer.Option(
        None, "--compiled/--no-compiled", help="Peers under torch.compile; not with --quick."
    ),
    minutes: float | None = typer.Option(None, min=0.1, help="How long to measure: 20."),
    report: Path | None = typer.Option(
        None, help="Measure nothing: goals, report and pictures of this JSON again."
    ),
) -> None:
    """Measure layers, training steps and methods on this machine, and hold them to the goals.

    Every peer is timed in turns in one run, after its numbers were held to the reference.

    Example:  deltaops bench --quick

    Example:  deltaops bench --out benchmarks/results

    Example:  deltaops bench --only layers --dtype f32 --shapes 512x768x768

    Example:  deltaops bench --only methods --methods prefix,prompt --minutes 1
    """
    from deltaops.files import check_folder
    from deltaops.measure import store
    from deltaops.measure.runner import run

    console = Console()
    if report is not None:
        results = store.read(report)
        _show(console, results, quick=False)
        _write(console, out or report.parent, results, report.stem, fresh=False)
        return
    if out is not None:
        check_folder(out)
    # transformers warns of its own attribute when PEFT reads it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    settings = _settings(quick, only, dtype, shapes, models, methods, dropout, compiled, minutes)
    quiet_transformers()
    part = _part(quick, only, models)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("starting", total=None)
        results = run(
            settings,
            lambda name, done, total: progress.update(
                bar, description=escape(name), completed=done, total=total
            ),
            lambda so_far: None if out is None else _keep(out, so_far, part),
        )
    _show(console, results, quick, goals_only=only == "goals")
    if out is not None:
        _write(console, out, results, store.slug(results.machine) + part)
        _unfinished(out, results, part).unlink(missing_ok=True)
    if results.failed:
        raise typer.Exit(1)


def _part(quick: bool, only: str | None, models: str | None) -> str:
    """Ends the names of a run's files: those of a whole run stay beside those of a part, and so
    does the table of ``deltaops compare``, which ends in "-methods"."""
    of_models = "" if models is None else "-" + models.replace(",", "-")
    if quick:
        return f"-quick{of_models}"
    if only in (None, "goals"):
        return of_models
    return f"-stacks{of_models}" if only == "stacks" else f"-only-{only}{of_models}"


def _settings(
    quick: bool,
    only: str | None,
    dtype: str | None,
    shapes: str | None,
    models: str | None,
    methods: str | None,
    dropout: float | None,
    compiled: bool | None,
    minutes: float | None,
) -> Any:
    from dataclasses import replace

    from deltaops.errors import ConfigError
    from deltaops.measure.cases import DTYPES
    from deltaops.measure.compare.contenders import chosen
    from deltaops.measure.runner import Settings

    if only not in (None, "layers", "steps", "methods", "stacks", "goals"):
        raise ConfigError(f"--only must be layers, steps, methods, stacks or goals, got {only!r}.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be {' or '.join(DTYPES)}, got {dtype!r}.")
    settings = Settings.quick() if quick else Settings()
    everything = only in (None, "goals")
    changes: dict[str, Any] = {
        "layers": everything or only == "layers", "steps": everything or only == "steps",
    }  # fmt: skip
    named = tuple(c.name for c in chosen(methods) if c.spec)
    if methods is not None and only in ("layers", "steps", "stacks"):
        raise ConfigError(f"--methods has no part in --only {only}. Leave one of them out.")
    if dropout is not None and only in ("methods", "stacks"):
        raise ConfigError(f"--dropout has no part in --only {only}. Leave one of them out.")
    changes["stacks"] = only == "stacks"
    if only in ("layers", "steps", "stacks"):
        changes["methods"] = ()
    elif methods is not None or only == "methods":
        changes["methods"] = named
        if not named:
            raise ConfigError(f"--methods must name one with a delta to time, got {methods!r}.")
    if dtype is not None:
        changes["dtypes"] = (dtype,)
    if shapes is not None:
        given = tuple(_shape(s) for s in shapes.split(","))
        changes |= {"shapes": given, "small": (), "mixed": given}
    if models is not None:
        changes |= _models(models.split(","), changes)
    if dropout is not None:
        changes["dropouts"] = (dropout,)
    if compiled is not None:
        changes["compiled"] = compiled
    if minutes is not None:
        changes["minutes"] = minutes
    return replace(settings, **changes)


def _models(names: list[str], changes: dict[str, Any]) -> dict[str, Any]:
    """What is stepped, and what methods and stacks are timed on."""
    from deltaops.errors import ConfigError
    from deltaops.measure.workloads import READERS, WORKLOADS

    known = list(dict.fromkeys((*WORKLOADS, *READERS)))
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--models knows {', '.join(known)}, got {name!r}. Take one of those."
            )
    if changes["stacks"] and len(names) > 1:
        raise ConfigError(
            f"--models {','.join(names)}: stacks are of one model a run. Take one of those."
        )
    steps, readers = ([n for n in names if n in those] for those in (WORKLOADS, READERS))
    needs_readers = changes.get("methods") or changes["stacks"]
    for wanted, found, what, those in (
        (changes["steps"], steps, "whole steps are of", WORKLOADS),
        (needs_readers, readers, "methods are timed on", READERS),
    ):
        if wanted and not found:
            raise ConfigError(
                f"--models {','.join(names)}: {what} {', '.join(those)}. Take one of those."
            )
    return {"workloads": tuple(steps), "readers": tuple(readers)}


def _shape(text: str, option: str = "--shapes") -> tuple[int, int, int]:
    from deltaops.errors import ConfigError

    parts = text.replace("×", "x").split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"{option} takes MxNxK such as 512x768x768, got {text!r}.")
    m, n, k = map(int, parts)
    return m, n, k


def _show(console: Console, results: Any, quick: bool, goals_only: bool = False) -> None:
    from deltaops.measure.goals import NO_PART, evaluate
    from deltaops.measure.lost import lost

    facts = results.machine
    console.print(
        f"{facts['processor']}, {facts['threads']} threads, core {facts['isa']}", highlight=False
    )
    if not goals_only:
        layers = results.cells_of("lora")
        if layers:
            console.print(layer_table(layers))
        for cell in results.cells_of("step"):
            console.print(step_table(cell))
        if results.cells_of("method"):
            console.print(method_table(results.cells_of("method")))
    if not quick:
        outcomes = [o for o in evaluate(results) if o.where != NO_PART]
        console.print(goal_table(outcomes))
        _say_why(console, outcomes)
    lines = lost(results)
    if any(cell.group != "stack" for cell in results.cells):  # a stack has no peers
        console.print("We lose nowhere here." if not lines else "[yellow]We lose here:[/]")
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False)
    for what, why in results.left_out.items():
        console.print(f"not measured: {what}: {why}", highlight=False, markup=False)
    for what, why in results.failed.items():
        line = f"error: {what}: {why}"
        console.print(line, style="bold red", highlight=False, markup=False)


def layer_table(results: list[Any]) -> Table:
    """Ratios of the LoRA layers."""
    from deltaops.measure.cell import FROZEN, OURS, OWN_FROZEN, PEFT, PREPACKED

    table = Table(title="LoRA r=16 layer, forward + backward", title_justify="left", box=None)
    columns = {
        "fused/frozen ours": (OURS, OWN_FROZEN),
        "fused/frozen eager": (OURS, FROZEN),
        "PEFT/fused": (PEFT, OURS),
        "oneDNN/fused": (PREPACKED, OURS),
    }
    for column in ("M×N×K", "dtype", "dropout"):
        table.add_column(column)
    for column in ("fused, ms", *columns):
        table.add_column(column, justify="right")
    for r in results:
        if OURS in r.timings:
            table.add_row(
                r.what,
                r.dtype,
                f"{r.dropout:g}",
                f"{1e3 * r.timings[OURS].median:.2f}",
                *(_ratio(r.ratio(*pair)) for pair in columns.values()),
            )
    return table


def step_table(result: Any) -> Table:
    """Milliseconds a step of each peer, its speed-up over PEFT, and what it holds."""
    dropout = f", dropout {result.dropout:g}" if result.dropout else ""
    title = f"{result.what} {result.dtype}{dropout}, training step, LoRA r=16"
    table = Table(title=title, title_justify="left", box=None, caption=result.note or None)
    table.add_column("peer")
    for column in ("ms", "quartiles", "rounds", "tokens/s", "over PEFT", "activations"):
        table.add_column(column, justify="right")
    for name, t in result.timings.items():
        held = result.saved.get(name)
        table.add_row(
            name,
            f"{1e3 * t.median:.0f}",
            f"{1e3 * t.low:.0f}–{1e3 * t.high:.0f}",
            f"{t.rounds}",
            f"{result.tokens / t.median:,.0f}",
            _ratio(result.speedup(name)),
            "–" if held is None else f"{held / 2**20:.0f} MiB",
        )
    return table


def method_table(results: list[Any]) -> Table:
    """Milliseconds a step of each method, ours and eager torch's."""
    from deltaops.measure.cell import EAGER, OURS

    table = Table(title="methods, training step", title_justify="left", box=None)
    for column in ("method", "on", "dtype"):
        table.add_column(column)
    for column in ("ours, ms", "eager, ms", "rounds", "eager/ours"):
        table.add_column(column, justify="right")
    for r in results:
        if OURS in r.timings:
            table.add_row(
                r.what, r.model, r.dtype,
                *(f"{1e3 * r.timings[p].median:.1f}" if p in r.timings else "–"
                  for p in (OURS, EAGER)),
                f"{r.timings[OURS].rounds}", _ratio(r.ratio(EAGER, OURS)),
            )  # fmt: skip
    return table


def goal_table(outcomes: list[Any]) -> Table:
    """Every goal: the worst cell's value, the threshold and the verdict."""
    from deltaops.measure.report import quantity, verdict

    table = Table(title="goals, each by its worst cell", title_justify="left", box=None)
    table.add_column("goal")
    table.add_column("dtype", no_wrap=True)
    for column in ("worst", "median", "goal is"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    colours = {"met": "green", "missed": "red", "not measured": "yellow", "incomplete": "yellow"}
    for o in outcomes:
        said = verdict(o)
        table.add_row(
            o.text,
            o.dtype,
            quantity(o.worst, o.unit),
            quantity(o.median, o.unit),
            f"{o.sense} {o.limit:g}{o.unit}",
            f"[{colours[said]}]{said}[/]",
        )
    return table


def _say_why(console: Console, outcomes: list[Any]) -> None:
    """The cause of each miss and of each empty cell: too long for a column."""
    from deltaops.measure.report import verdict

    for o in outcomes:
        if not o.met:
            line = f"{verdict(o)}: {o.text}, {o.dtype}: {'; '.join([o.where, *o.causes])}"
            console.print(line, highlight=False, markup=False)


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _unfinished(out: Path, results: Any, part: str) -> Path:
    """Where the results of a run lie until it is done: what a killed one leaves for --report."""
    from deltaops.measure import store

    return out / f"{store.slug(results.machine)}{part}.unfinished.json"


def _keep(out: Path, results: Any, part: str) -> None:
    from deltaops.files import write_json
    from deltaops.measure import store

    write_json(_unfinished(out, results, part), store.as_json(results))


def _write(console: Console, out: Path, results: Any, name: str, *, fresh: bool = True) -> None:
    """A run, or, where it is not fresh, the report and pictures alone of the JSON ``name``."""
    from deltaops.files import write_atomically, write_json
    from deltaops.measure import store
    from deltaops.measure.picture import draw_layers, draw_methods, draw_stacks, draw_steps
    from deltaops.measure.report import markdown

    facts = results.machine
    subtitle = f"{facts['processor']}, {facts['threads']} threads, {facts['isa']}, {facts['date']}"
    if fresh:
        write_json(out / f"{name}.json", store.as_json(results))
        console.print(f"wrote {out / name}.json", highlight=False)
    drawn = store.pictures(results, name)
    for file, cells in drawn.items():
        draws = {"step": draw_steps, "method": draw_methods, "stack": draw_stacks}
        draw = draws.get(cells[0].group, draw_layers)
        write_atomically(out / file, partial(draw, results=cells, subtitle=subtitle))
        console.print(f"wrote {out / file}", highlight=False)
    text = markdown(results, list(drawn))
    write_atomically(out / f"{name}.md", lambda part: part.write_text(text, encoding="utf-8"))
    console.print(f"wrote {out / name}.md", highlight=False)
