"""``deltaops doctor``: what is built, what runs here, and why not the rest."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from deltaops.backends import cpu
from deltaops.backends.triton import cuda
from deltaops.dispatch import backends
from deltaops.errors import BuildError
from deltaops.measure.machine import processor, versions


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of tables."),
) -> None:
    """Say what is built, what runs here, and why not the rest.

    Exit code 0 where the native core works, 1 where it does not.

    Example:  deltaops doctor --json
    """
    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)
    raise typer.Exit(0 if found["core"]["ready"] else 1)


def examine() -> dict[str, Any]:
    """All findings, as JSON."""
    return {
        "processor": processor(),
        "versions": versions(),
        "core": _core(),
        "backends": backends(),
        "cuda_module": cuda.state(),
    }


def _core() -> dict[str, Any]:
    try:
        core = cpu.native()
        if isinstance(core, str):
            return {"ready": False, "reason": core}
        isas = [{"name": name, "runs_here": bool(runs)} for name, runs in core.isas()]
        return {"ready": True, "isa": core.isa(), "isas": isas}
    except BuildError as error:  # of another build
        return {"ready": False, "reason": str(error)}


def _show(found: dict[str, Any]) -> None:
    console = Console()
    console.print(f"[bold]{found['processor']}[/]")
    console.print("  ".join(f"{name} {version}" for name, version in found["versions"].items()))
    core = found["core"]
    table = Table("part", "state", box=None, pad_edge=False, header_style="bold")
    if core["ready"]:
        table.add_row("native core", f"[green]ready[/], running as [bold]{core['isa']}[/]")
        for isa in core["isas"]:
            state = "runs here" if isa["runs_here"] else "[dim]this processor lacks it[/]"
            table.add_row(f"  {isa['name']}", state)
    else:
        table.add_row("native core", f"[red]not ready[/]: {core['reason']}")
    for name, state in found["backends"].items():
        colour = "green" if state == "ready" else "yellow"
        table.add_row(f"backend {name}", f"[{colour}]{state}[/]")
    table.add_row("CUDA module", found["cuda_module"])
    console.print(table)
