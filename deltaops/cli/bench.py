"""``deltaops bench``: this machine, interleaved with the peers, after a correctness gate."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def bench(
    out: Path | None = typer.Option(None, help="Folder for the JSON and the picture."),
    quick: bool = typer.Option(False, "--quick", help="Two layer shapes, three rounds, no BERT."),
    only: str | None = typer.Option(None, help="layers or steps; both by default."),
    dropout: float = typer.Option(0.0, min=0.0, max=1.0, help="LoRA dropout of all peers."),
) -> None:
    """Measure layers and whole training steps on this machine.

    Every peer is timed in turns in one run, after its numbers were held to the reference.

    Example:  deltaops bench --quick

    Example:  deltaops bench --out benchmarks/results --dropout 0.1
    """
    from deltaops.errors import ConfigError
    from deltaops.measure import machine
    from deltaops.measure.layers import DTYPES, QUICK_SHAPES, SHAPES, measure_layer
    from deltaops.measure.steps import WORKLOADS, measure_steps

    if only not in (None, "layers", "steps"):
        raise ConfigError(f"--only must be layers or steps, got {only!r}.")
    console = Console()
    facts = machine.describe()
    console.print(f"{facts['processor']}, {facts['threads']} threads, core {facts['isa']}")
    rounds = 3 if quick else 15
    shapes = QUICK_SHAPES if quick else SHAPES
    workloads = ["llama"] if quick else list(WORKLOADS)
    layers, steps = [], []
    with Progress(console=console, transient=True) as progress:
        if only != "steps":
            task = progress.add_task("layers", total=len(shapes) * len(DTYPES))
            for dtype in DTYPES:
                for shape in shapes:
                    layers.append(measure_layer(shape, dtype, dropout, rounds))
                    progress.advance(task)
        if only != "layers":
            task = progress.add_task("steps", total=len(workloads) * (rounds + 1))
            for name in workloads:
                steps.append(
                    measure_steps(
                        WORKLOADS[name](),
                        dropout=dropout,
                        rounds=rounds,
                        on_round=lambda: progress.advance(task),
                    )
                )
    if layers:
        console.print(_layer_table(layers))
    for result in steps:
        console.print(step_table(result))
    _say_where_eager_wins(console, layers, steps)
    if out is not None:
        _write(console, out, facts, layers, steps, dropout)


def _layer_table(results: list[Any]) -> Table:
    from deltaops.measure.layers import FROZEN_EAGER, FROZEN_OURS, FUSED, PEFT

    table = Table(title="LoRA r=16 layer, forward + backward", title_justify="left", box=None)
    for column in ("M×N×K", "dtype", "fused, ms", "fused/frozen ours", "fused/frozen eager",
                   "PEFT/fused"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("M×N×K", "dtype") else "right")
    for r in results:
        ratios = [(FUSED, FROZEN_OURS), (FUSED, FROZEN_EAGER), (PEFT, FUSED)]
        table.add_row(
            "×".join(map(str, r.shape)),
            r.dtype,
            f"{1e3 * r.timings[FUSED].median:.2f}",
            *(_ratio(r.ratio(*pair)) for pair in ratios),
        )
    return table


def step_table(result: Any) -> Table:
    """Milliseconds a step of each peer, and its speed-up over PEFT."""
    title = f"{result.workload}, training step, LoRA r=16"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("peer")
    for column in ("ms", "quartiles", "tokens/s", "over PEFT"):
        table.add_column(column, justify="right")
    for name, t in result.timings.items():
        table.add_row(
            name,
            f"{1e3 * t.median:.0f}",
            f"{1e3 * t.low:.0f}–{1e3 * t.high:.0f}",
            f"{result.tokens / t.median:,.0f}",
            _ratio(result.speedup(name)),
        )
    return table


def _ratio(value: float | None) -> str:
    return "PEFT is not installed" if value is None else f"{value:.2f}"


def _say_where_eager_wins(console: Console, layers: list[Any], steps: list[Any]) -> None:
    from deltaops.measure.layers import FROZEN_EAGER, FROZEN_OURS, FUSED, PEFT
    from deltaops.measure.steps import ATTACHED

    lost = [
        f"{'×'.join(map(str, r.shape))} {r.dtype}: {what}"
        for r in layers
        for above, below, what in (
            (PEFT, FUSED, "PEFT's layer is faster"),
            (FROZEN_EAGER, FROZEN_OURS, "torch's frozen layer is faster than ours"),
        )
        if (r.ratio(above, below) or 1.0) < 1.0
    ]
    lost += [
        f"{r.workload}: PEFT's step is faster" for r in steps if (r.speedup(ATTACHED) or 1.0) < 1.0
    ]
    console.print("Eager wins nowhere here." if not lost else "[yellow]Eager wins here:[/]")
    for line in lost:
        console.print(f"  {line}", highlight=False)


def _write(
    console: Console,
    out: Path,
    facts: dict[str, Any],
    layers: list[Any],
    steps: list[Any],
    dropout: float,
) -> None:
    from deltaops.measure.picture import draw_steps
    from deltaops.tuning.files import write_atomically, write_json

    slug = re.sub(r"[^a-z0-9]+", "-", f"{facts['processor']} {facts['isa']}".lower()).strip("-")
    name = f"{slug}-p{dropout:g}" if dropout else slug
    path = out / f"{name}.json"
    write_json(
        path,
        {
            "machine": facts,
            "layers": [r.as_json() for r in layers],
            "steps": [r.as_json() for r in steps],
        },
    )
    console.print(f"wrote {path}")
    if steps:
        picture = out / f"{name}.png"
        subtitle = f"{facts['processor']}, {facts['threads']} threads, {facts['date']}"
        write_atomically(picture, lambda part: draw_steps(part, steps, subtitle))
        console.print(f"wrote {picture}")
