"""``deltaops tune-kernels``: measures this machine's GPU, so that the Triton backend can choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def tune_kernels(
    tokens: str | None = typer.Option(
        None, help="Rows of x: 1,16,128,512,2048,8192 by default. Decoding has one a sequence."
    ),
    layers: str | None = typer.Option(
        None, help="Outputs and inputs of layers: 4096x4096,14336x4096,4096x14336 by default."
    ),
    ranks: str = typer.Option("16,64", help="Of the branch."),
    dtype: str = typer.Option("bf16", help="Of the model: bf16, f16 or f32."),
    adapter: str | None = typer.Option(None, help="Of the adapters; that of the model by default."),
    dropout: bool = typer.Option(False, "--dropout", help="With dropout, as in training."),
    rounds: int = typer.Option(20, min=4, help="How often each plan is timed."),
    out: Path | None = typer.Option(
        None, help="Folder for the table; the cache directory by default, where it is used."
    ),
    fresh: bool = typer.Option(
        False, "--fresh", help="Forget what the table has; else it is added to."
    ),
) -> None:
    """Measure this machine's GPU and keep the result: how each layer's products go fastest.

    The Triton backend has several ways for a layer: one fused kernel, a kernel and the library's
    product, the library's products alone, on Hopper and later a persistent kernel, and where nvcc
    built them a hand-written one for Hopper and one for sm_80 and later. Each is held to float64
    first; then they are timed in turns, as CUDA graphs.
    A call takes what was fastest for the most similar layer, in every process that starts from then
    on. Without a table it follows a rule, and `deltaops.explain` says so. What is measured is kept
    after each layer: Ctrl-C loses one. A layer that fails is named, and the exit code is 1.

    Example:  deltaops tune-kernels

    Example:  deltaops tune-kernels --layers 2560x2560,9728x2560,2560x9728 --ranks 8 --dropout

    Example:  deltaops tune-kernels --tokens 1,4 --dtype f16 --adapter f32
    """
    import torch

    from deltaops.backends.triton import TritonBackend, core, planner, tables
    from deltaops.errors import ConfigError, DeviceError
    from deltaops.files import check_folder
    from deltaops.measure import machine
    from deltaops.measure import tune_kernels as tuner

    for name, value in (("--dtype", dtype), ("--adapter", adapter)):
        if value is not None and value not in tuner.DTYPES:
            raise ConfigError(f"{name} must be {', '.join(tuner.DTYPES)}, got {value!r}.")
    numbers = tuner.TOKENS if tokens is None else _numbers("--tokens", tokens)
    shapes = tuner.LAYERS if layers is None else tuple(map(_layer, layers.split(",")))
    kind, narrow = tuner.DTYPES[dtype], tuner.DTYPES[adapter or dtype]
    wanted = tuner.settings(
        numbers, shapes, _numbers("--ranks", ranks), kind, torch.promote_types(kind, narrow),
        dropout,
    )  # fmt: skip
    if core.interpreting():
        raise ConfigError(
            "tune-kernels times compiled kernels, and TRITON_INTERPRET=1 is set. Unset it."
        )
    runner = TritonBackend()
    reason = runner.unavailable()
    if reason is not None or not torch.cuda.is_available():
        raise DeviceError(
            f"tune-kernels: there is no GPU to measure: {reason or 'torch finds none'}. "
            "For this machine's processor there is nothing to tune; deltaops doctor says what runs."
        )
    gpu = torch.cuda.get_device_name()
    try:
        path = tables.own(gpu) if out is None else out / tables.file_name(gpu)
    except RuntimeError as error:
        raise ConfigError(
            f"tune-kernels: there is no cache directory for the table: {error}. "
            "Name one by the environment variable DELTAOPS_CACHE, or by --out."
        ) from error
    check_folder(path.parent)
    facts = {
        **machine.describe(),
        "rounds": rounds,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }
    if not fresh:
        tables.check(path, gpu)
    forget = fresh
    console = Console()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("starting", total=len(wanted))

        def measure_one(setting: Any) -> Any:
            progress.update(bar, description=escape(str(setting)))
            return tuner.measure(setting, runner, rounds=rounds)

        def keep(entry: Any) -> None:
            nonlocal forget
            tables.add(path, gpu, [entry], facts, fresh=forget)
            forget = False

        done = tuner.measure_all(wanted, measure_one, keep, lambda one: progress.advance(bar))
    planner.forget()
    console.print(table(done, gpu))
    for one in done:
        for note in one.notes:
            console.print(f"{one.entry.setting}: {note}", highlight=False, markup=False)
    kept = any(one.entry.seconds for one in done)
    console.print(f"wrote {path}" if kept else "nothing was measured, nothing written",
                  highlight=False)  # fmt: skip
    if not kept or any(one.failed for one in done):
        raise typer.Exit(1)


def table(done: list[Any], gpu: str) -> Table:
    """Microseconds of each plan, the fastest marked, beside the frozen layer."""
    from deltaops.backends.triton.tables import PLANS

    shown = Table(title=f"{escape(gpu)}, µs", title_justify="left", box=None)
    shown.add_column("M×N×K")
    shown.add_column("")
    for column in ("frozen", *PLANS):
        shown.add_column(column, justify="right")
    for one in done:
        for direction, timed in one.entry.seconds.items():
            best = min(timed, key=timed.get)
            cells = ["–" if plan not in timed else f"{1e6 * timed[plan]:.1f}" for plan in PLANS]
            marked = [
                f"[bold green]{cell}[/]" if plan == best else cell
                for plan, cell in zip(PLANS, cells, strict=True)
            ]
            frozen = f"{1e6 * one.frozen[direction]:.1f}"
            shown.add_row(escape(str(one.entry.setting)), direction, frozen, *marked)
    return shown


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from deltaops.errors import ConfigError

    parts = text.split(",")
    if not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"{name} takes numbers such as 16,64, got {text!r}.")
    return tuple(map(int, parts))


def _layer(text: str) -> tuple[int, int]:
    from deltaops.errors import ConfigError

    parts = text.replace("×", "x").split("x")
    if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise ConfigError(f"--layers takes NxK such as 4096x4096, got {text!r}.")
    return int(parts[0]), int(parts[1])
