"""``deltaops tune``: train a delta on a file, with progress, to a folder that can be resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .quiet import quiet_transformers

INTERRUPTED = 130


def tune(
    model: str = typer.Option(..., help="A model's folder, or a hub id."),
    data: str = typer.Option(..., help="A JSONL, CSV or text file, or a name of `datasets`."),
    out: Path = typer.Option(..., help="Folder for the adapter, metrics.json and loss.png."),
    task: str = typer.Option("causal-lm", help="causal-lm or classification."),
    delta: str = typer.Option(
        "lora:r=16,alpha=32",
        help="The delta and its options; several by +; or MAM, UniPELT or all, which are several.",
    ),
    steps: int = typer.Option(200, help="Training steps."),
    batch_size: int = typer.Option(8, help="Examples a step."),
    lr: float = typer.Option(1e-3, help="Peak learning rate."),
    seq_len: int = typer.Option(128, help="Tokens of a block or example."),
    seed: int = typer.Option(0, help="Decides start values, order and dropout."),
    text_column: str = typer.Option("text", help="Field of the text in JSONL and CSV."),
    label_column: str = typer.Option("label", help="Field of the label, for classification."),
    eval_fraction: float = typer.Option(0.1, help="Part of the data that is held out."),
    controller: str | None = typer.Option(
        None, help="What watches and steers the run, such as monitor:every=5; several by +."
    ),
    evaluate_every: int | None = typer.Option(
        None, min=1, help="Steps between the controller's evaluations; a tenth of all without."
    ),
    save_every: int = typer.Option(100, min=1, help="Steps between checkpoints."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out."),
) -> None:
    """Train a delta on a file. Ctrl-C leaves a loadable adapter that --resume goes on from.

    Example:  deltaops tune --model path/to/gpt2 --data notes.txt --out notes-adapter

    Example:  deltaops tune --model path/to/bert --data intents.csv --task classification
              --label-column category --delta lora:r=8,alpha=16 --out intents

    Example:  deltaops tune --model path/to/gpt2 --data notes.txt --delta adapter:style=pfeiffer
              --out notes-adapter

    Example:  deltaops tune --model path/to/gpt2 --data notes.txt --delta lora:r=8+bitfit
              --out notes-adapter

    Example:  deltaops tune --model path/to/gpt2 --data notes.txt --lr 0.01 --out notes-adapter
              --delta prefix:num_virtual_tokens=20,reparameterised=true

    Example:  deltaops tune --model path/to/gpt2 --data notes.txt --delta lora:r=8+bitfit
              --controller monitor:every=5+disable-useless:start=50 --out notes-adapter
    """
    from deltaops.methods.base import MODEL
    from deltaops.surgery import Handle
    from deltaops.tuning.loop import Point
    from deltaops.tuning.run import Settings, run

    quiet_transformers()
    console = Console()
    settings = Settings(
        model, data, task, delta, steps, batch_size, lr, seq_len, seed, text_column, label_column,
        eval_fraction, controller, evaluate_every,
    )  # fmt: skip
    stopped = False

    def stop(_signal: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True  # the step under way is finished first: a checkpoint lies between steps

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), console=console,
        ) as progress:  # fmt: skip
            bar = progress.add_task("reading", total=steps)

            def ready(handle: Handle, start: int) -> None:
                trained = sum(p.numel() for p in handle.parameters())
                places = {site.path for site in handle.places if site.place != MODEL}
                progress.console.print(f"{len(places)} layers, {trained:,} trainable parameters")
                progress.update(bar, completed=start, description="training")

            def step(point: Point) -> None:
                note = f"loss {point.loss:.3f}  {point.tokens_per_second:,.0f} tokens/s"
                progress.update(bar, completed=point.step, description=note)

            outcome = run(
                settings, out, resume=resume, save_every=save_every, on_ready=ready, on_step=step,
                should_stop=lambda: stopped,
            )  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not outcome.finished:
        console.print(
            f"stopped after step {outcome.step}; {out} holds a loadable adapter. "
            "Go on with the same command and --resume.",
            highlight=False,
        )
        raise typer.Exit(INTERRUPTED)
    if outcome.before is not None and outcome.after is not None:
        for name, value in outcome.after.items():
            console.print(f"held-out {name}: {outcome.before[name]:.4f} → {value:.4f}")
    console.print(f"adapter, metrics.json and loss.png are in {out}", highlight=False)
    if controller is not None:
        told = f"the controller did {outcome.actions} things: controller.jsonl, monitor.csv, .png"
        console.print(told, highlight=False)
    console.print(f'load it:  deltaops.load(model, "{out}")', highlight=False, markup=False)
    if outcome.off:
        off = ", ".join(f'"{part}"' for part in outcome.off)
        told = f"the file has {off}, which the controller left off:  handle.disable({off})"
        console.print(told, highlight=False, markup=False)
