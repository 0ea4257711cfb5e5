"""``deltaops demo``: the main job on real text, with nothing to download."""

from __future__ import annotations

import shutil
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .quiet import quiet_transformers


def demo(
    base_steps: int = typer.Option(300, min=1, help="Steps of the base model's own training."),
    tune_steps: int = typer.Option(150, min=1, help="Steps of the delta's training."),
    rounds: int = typer.Option(5, min=0, help="Timing rounds of the comparison; 0 skips it."),
    fresh: bool = typer.Option(False, "--fresh", help="Train the base model again."),
) -> None:
    """Train a small language model, tune a LoRA to other text, and time it against its peers.

    English help texts and the standard library's sources come with Python: no network, no
    download. About three minutes on two cores; the base model is kept in the cache directory.

    Example:  deltaops demo

    Example:  deltaops demo --fresh --tune-steps 300
    """
    from deltaops.files import cache_dir, write_atomically
    from deltaops.tuning import small_model
    from deltaops.tuning.corpus import python_sources
    from deltaops.tuning.run import Settings, run

    quiet_transformers()
    console = Console()
    folder = cache_dir() / "demo"
    base = folder / f"gpt2-{base_steps}-steps"
    if fresh and base.exists():
        shutil.rmtree(base)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console,
    ) as progress:  # fmt: skip
        if not base.exists():
            console.print("[bold]1  a base model[/]  a small GPT-2 on the English of Python's help")
            bar = progress.add_task("training", total=base_steps)
            small_model.build(
                base,
                base_steps,
                lambda p: progress.update(
                    bar, completed=p.step, description=f"loss {p.loss:.2f} nats"
                ),
            )
        else:
            console.print(f"[bold]1  a base model[/]  kept from an earlier run: {base}")
        console.print("[bold]2  a delta[/]  LoRA r=16, tuned to the standard library's sources")
        source = folder / "python.txt"
        write_atomically(source, lambda part: part.write_text(python_sources(), encoding="utf-8"))
        out = folder / "adapter"
        if out.exists():
            shutil.rmtree(out)
        bar = progress.add_task("tuning", total=tune_steps)
        outcome = run(
            Settings(str(base), str(source), steps=tune_steps, batch_size=16, lr=5e-3),
            out,
            on_step=lambda p: progress.update(
                bar, completed=p.step, description=f"loss {p.loss:.2f} nats"
            ),
        )
    if outcome.before is not None and outcome.after is not None:
        console.print(
            f"   held-out loss  [bold]{outcome.before['loss']:.3f}[/] nats before, "
            f"[bold green]{outcome.after['loss']:.3f}[/] after"
        )
    console.print(f"   adapter {out}, curve {out / 'loss.png'}", highlight=False)
    if rounds:
        _compare(console, folder, rounds)
    console.print(
        "\nNext:  deltaops bench, or your own text:\n"
        f"  deltaops tune --model {base} --data notes.txt --out my-adapter",
        highlight=False,
        markup=False,
    )


def _compare(console: Console, folder: Path, rounds: int) -> None:
    from deltaops.files import write_atomically
    from deltaops.measure import machine
    from deltaops.measure.picture import draw_steps
    from deltaops.measure.steps import ACCELERATED, ATTACHED, PEFT, bert, measure_steps

    from .bench import step_table

    console.print("[bold]3  the time of a step[/]  peers in turns, after their numbers agreed")
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("timing", total=rounds + 1)
        result = measure_steps(
            bert(), dropout=0.0, rounds=rounds, on_round=lambda: progress.advance(bar)
        )
    console.print(step_table(result))
    if PEFT not in result.timings:
        console.print("   PEFT is not installed: pip install peft to see it beside the others")
    for name in (ATTACHED, ACCELERATED):
        faster = result.speedup(name)
        if faster is not None and faster < 1:
            console.print(f"   [yellow]PEFT's eager step is faster than {name!r} here[/]")
    picture = folder / "steps.png"
    subtitle = f"{machine.processor()}, {result.tokens} tokens a step"
    write_atomically(picture, lambda part: draw_steps(part, [result], subtitle))
    console.print(f"   picture {picture}", highlight=False)
