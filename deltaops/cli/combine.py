"""``deltaops combine``: the weighted sum of LoRA adapters as one, also of a lower rank."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console


def combine(
    adapters: list[Path] = typer.Argument(..., help="Folders of LoRA adapters of one base model."),
    out: Path = typer.Option(..., help="Folder for the sum, in PEFT's format."),
    weight: list[float] = typer.Option([], help="Of each adapter, in their order; 1 without."),
    rank: int = typer.Option(0, min=0, help="At most this rank, by singular values; 0 keeps all."),
) -> None:
    """Write the weighted sum of LoRA adapters: ranks are concatenated, or lowered to --rank.

    Example:  deltaops combine one two --weight 0.7 --weight 0.3 --out both

    Example:  deltaops combine large --rank 8 --out small
    """
    from deltaops.surgery import sum_adapters

    found = sum_adapters(adapters, out, weights=weight or None, rank=rank or None)
    console = Console()
    console.print(str(found), highlight=False, markup=False)
    console.print(f"wrote {out}", highlight=False, markup=False)
