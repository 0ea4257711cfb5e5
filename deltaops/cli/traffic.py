"""``deltaops traffic``: what the Triton kernels move and compute, counted, beside the floor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table


def traffic(
    gpu: str | None = typer.Option(
        None, help="Whose tiles: sm_80, sm_89, sm_90, sm_100 or gfx942; sm_90 by default."
    ),
    shape: str | None = typer.Option(None, help="One layer, MxNxK, instead of the usual calls."),
    rank: int | None = typer.Option(None, min=1, help="With --shape; 16 by default."),
    dropout: float | None = typer.Option(
        None, min=0.0, max=1.0, help="With --shape; none by default."
    ),
    plan: str | None = typer.Option(
        None,
        help="Of the GEMMs: fused, split, torch or persistent. The one that would be chosen by "
        "default.",
    ),
    as_json: bool = typer.Option(
        False, "--json", help="Print the totals of all usual calls that are committed, as JSON."
    ),
    out: Path | None = typer.Option(None, help="Write that JSON to this file."),
) -> None:
    """Count bytes and operations of the Triton kernels, from their launches; no GPU is needed.

    "once": each element that a launch touches, once: what memory moves at
    least. "asked": what its programs load and store; how much of it caches
    serve, no count tells. The floor reads and writes every argument and result
    of the call once. These are counts: nothing here is a time.

    Example:  deltaops traffic

    Example:  deltaops traffic --gpu gfx942 --shape 8192x4096x4096
              --rank 64 --plan fused

    Example:  deltaops traffic --out benchmarks/traffic.json
    """
    from deltaops.errors import ConfigError
    from deltaops.files import write_json
    from deltaops.measure import traffic as model
    from deltaops.measure.traffic_calls import CALLS
    from deltaops.measure.traffic_linears import Linear

    from .bench import _shape

    given = {"--gpu": gpu, "--shape": shape, "--rank": rank, "--dropout": dropout, "--plan": plan}
    if as_json or out is not None:
        others = [name for name, value in given.items() if value is not None]
        if as_json and out is not None:
            others.append("--json")
        if others:
            raise ConfigError(
                f"{'--out' if out is not None else '--json'} gives the totals that are committed, "
                f"whatever {' and '.join(others)} says. Leave out the one or the other."
            )
        found = model.totals(CALLS, model.COMMITTED)
        if out is None:
            typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        else:
            write_json(out, found)
            Console().print(f"wrote {out}", highlight=False)
        return
    if plan is not None and plan not in model.COUNTED:
        raise ConfigError(f"--plan must be {', '.join(model.COUNTED)}, got {plan!r}.")
    calls: tuple[Any, ...] = CALLS
    if shape is not None:
        calls = (Linear(*_shape(shape, "--shape"), rank or 16, dropout or 0.0),)
    elif rank is not None or dropout is not None:
        name = "--dropout" if rank is None else "--rank"
        raise ConfigError(f"{name} is of the layer that --shape names. Add --shape MxNxK.")
    console = Console()
    for call in calls:
        wanted = plan if isinstance(call, Linear) else None
        counts = model.count(call, gpu or "sm_90", wanted)
        console.print(_table(str(call), counts) if counts else str(call), highlight=False)
        for direction in model.impossible(call, gpu or "sm_90", wanted):
            console.print(f"  {direction}: the plan {plan!r} cannot run it", highlight=False)
    console.print(f"counted for {gpu or 'sm_90'}, not measured", highlight=False)


def _table(call: str, counts: list[Any]) -> Table:
    table = Table(title=call, title_justify="left", box=None)
    table.add_column("", min_width=22)
    for column in ("launches", "MB once", "MB asked", "GFLOP", "MB/floor", "GFLOP/floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in counts:
        total, floor = one.total, one.floor
        table.add_row(
            f"[bold]{one.direction}[/]",
            *_numbers(total),
            f"{total.once / floor.bytes:.2f}",
            f"{total.operations / floor.operations:.3f}" if floor.operations else "–",
        )
        for name, found in one.kernels:
            table.add_row(f"  {name}", *_numbers(found), style="dim")
        table.add_row("  floor", "", _mega(floor.bytes), "", f"{floor.operations / 1e9:.1f}")
    return table


def _numbers(t: Any) -> tuple[str, ...]:
    return (f"{t.launches}", _mega(t.once), _mega(t.asked), f"{t.operations / 1e9:.1f}")


def _mega(value: int) -> str:
    return f"{value / 1e6:.1f}"
