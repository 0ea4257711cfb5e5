"""One tuning run: prepare, train, save so that nothing is lost, and say how it went.

The folder of a run holds the adapter (PEFT's two files), ``training_state.safetensors`` to go on
from, and, when it is done, ``metrics.json`` and ``loss.png``. The state arrives last at every save, so
the adapter beside it is at least as new.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import CheckpointError, DataError, TargetError
from . import state
from .curve import draw_curve
from .files import publishing, remove_leftovers, write_atomically, write_json
from .loop import Point, Schedule, evaluate, make_optimizer, train
from .model import (
    DTYPES,
    head_names,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    longest_input,
    pick_device,
)
from .read import Columns, read_examples
from .settings import Settings
from .spec import parse_delta
from .tokens import Order, TokenSet, label_texts, pack_text

METRICS, CURVE = "metrics.json", "loss.png"


class Watcher(Protocol):
    """Who is told how a run goes; the command line draws it."""

    def phase(self, text: str) -> None:
        """What happens now."""

    def started(self, run: Run) -> None:
        """Training is about to begin."""

    def stepped(self, point: Point) -> None:
        """A step is done."""


class Stopped(Exception):
    """The run ended early because it was asked to; its folder can be resumed."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass
class Run:
    """A prepared run: model with its delta attached, data, and how far it has come."""

    settings: Settings
    out: Path
    model: Any
    handle: Any
    labels: list[str] | None
    data: TokenSet
    held_out: TokenSet | None
    order: Order
    schedule: Schedule
    optimizer: torch.optim.Optimizer
    fingerprint: str
    step: int = 0
    seconds: float = 0.0
    history: list[Point] | None = None
    before: dict[str, float] | None = None

    def save(self) -> None:
        """Write adapter and state to ``out``. Raises: CheckpointError; ``out`` stays usable."""
        facts = {
            "settings": self.settings.to_json(),
            "fingerprint": self.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "history": [asdict(p) for p in self.history or []],
        }
        with publishing(self.out, last=state.FILE) as scratch:
            self.handle.save(scratch)
            state.write_state(
                scratch / state.FILE, state.trainable(self.model), self.optimizer, facts
            )


def check_out(out: Path, resume: bool) -> None:
    """Raises: CheckpointError where ``out`` is not a place to start, or not one to resume."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"--out {out} is a file, expected a folder or a new name.")
    remove_leftovers(out)
    holds = sorted(f.name for f in out.iterdir()) if out.is_dir() else []
    if state.FILE in holds:
        if not resume:
            raise CheckpointError(
                f"--out {out} holds a run already. Add --resume to go on with it, or name another "
                "folder."
            )
    elif resume:
        raise CheckpointError(
            f"--out {out} holds no run to resume (no {state.FILE}). Check the path, or leave out "
            "--resume to start one."
        )
    elif holds:
        raise CheckpointError(
            f"--out {out} holds something else ({', '.join(holds[:4])}). Name a new or empty folder."
        )


def prepare(settings: Settings, out: Path, *, resume: bool, watcher: Watcher) -> Run:
    """Read the data, load the model, attach the delta; with ``resume`` also what was trained.

    Raises: DataError, ConfigError, TargetError, CheckpointError; nothing is written.
    """
    check_out(out, resume)
    classify = settings.task == "classification"
    watcher.phase("reading the data")
    columns = Columns(settings.text_column, settings.label_column if classify else None)
    examples = read_examples(settings.data, columns)
    watcher.phase("loading the tokenizer")
    tokenizer = load_tokenizer(settings.model)
    labels: list[str] | None = None
    if classify:
        tokens, labels = label_texts(examples, tokenizer, settings.seq_len)
    else:
        tokens = pack_text(examples, tokenizer, settings.seq_len)
    data, held_out = tokens.split(settings.eval_fraction, settings.seed)
    watcher.phase("loading the model")
    torch.manual_seed(settings.seed)  # a new head and the delta's start values
    dtype = DTYPES[settings.dtype]
    if labels is None:
        model = load_causal_lm(settings.model, dtype)
    else:
        model = load_classifier(settings.model, labels, tokens.pad, dtype)
    _check_length(settings, model)
    model.to(pick_device(settings.device))
    handle = _attach(model, settings)
    batch_size = min(settings.batch_size, len(data))
    order = Order(len(data), batch_size, settings.seed)
    steps = settings.steps or max(1, round(settings.epochs * order.steps_per_epoch))
    optimizer = make_optimizer(state.trainable(model), settings.lr)
    run = Run(
        settings,
        out,
        model,
        handle,
        labels,
        data,
        held_out,
        order,
        Schedule(steps, settings.lr),
        optimizer,
        tokens.fingerprint(),
        history=[],
    )
    if resume:
        _restore(run)
    return run


def perform(run: Run, watcher: Watcher, should_stop: Callable[[], bool]) -> dict[str, Any]:
    """Train to the end and write everything.

    Returns: what ``metrics.json`` holds.
    Raises: Stopped after a whole step, with the folder saved; ConfigError for a loss that is no
        longer finite; CheckpointError where the disk refuses.
    """
    assert run.history is not None
    history = run.history
    batch = run.settings.batch_size
    began = time.perf_counter() - run.seconds
    if run.step == 0:
        run.save()  # from here on there is something to resume, and a full disk shows early
    if run.held_out is not None and run.before is None and run.step == 0:
        watcher.phase("held-out loss before")
        run.before = evaluate(run.model, run.held_out, batch, should_stop)
    watcher.started(run)

    def on_step(point: Point) -> None:
        history.append(point)
        run.step = point.step
        run.seconds = time.perf_counter() - began
        watcher.stepped(point)
        if point.step % run.settings.save_every == 0 and point.step < run.schedule.steps:
            run.save()

    done = train(
        run.model,
        run.data,
        run.order,
        run.optimizer,
        run.schedule,
        start=run.step,
        on_step=on_step,
        should_stop=should_stop,
    )
    run.save()
    if not done:
        raise Stopped(run.step)
    after = None
    if run.held_out is not None:
        watcher.phase("held-out loss after")
        after = evaluate(run.model, run.held_out, batch, should_stop)
        if after is None:
            raise Stopped(run.step)
    metrics = _metrics(run, after)
    title = f"{run.settings.delta} on {Path(run.settings.data).name}"
    write_atomically(
        run.out / CURVE, lambda part: draw_curve(part, history, title, run.before, after)
    )
    write_json(run.out / METRICS, metrics)
    return metrics


def _metrics(run: Run, after: dict[str, float] | None) -> dict[str, Any]:
    import transformers

    import deltaops

    trained = state.trainable(run.model).values()
    return {
        "settings": run.settings.to_json(),
        "labels": run.labels,
        "parameters": {
            "trained": sum(p.numel() for p in trained),
            "all": sum(p.numel() for p in run.model.parameters()),
        },
        "examples": {"train": len(run.data), "held_out": len(run.held_out or ())},
        "before": run.before,
        "after": after,
        "steps": run.step,
        "seconds": round(run.seconds, 3),
        "history": [asdict(p) for p in run.history or []],
        "versions": {
            "deltaops": deltaops.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _check_length(settings: Settings, model: Any) -> None:
    limit = longest_input(model)
    if limit is not None and settings.seq_len > limit:
        raise DataError(
            f"--seq-len {settings.seq_len} is more than the {limit} positions of {settings.model}. "
            f"Use --seq-len {limit} or less."
        )


def _attach(model: Any, settings: Settings) -> Any:
    import deltaops

    if settings.task != "classification":
        return deltaops.attach(model, parse_delta(settings.delta, task_type="CAUSAL_LM"))
    heads = head_names(model)
    if not heads:
        raise TargetError(
            f"{type(model).__name__} has no head beside its base model, so there is nothing to "
            "classify with. Use --task causal-lm."
        )
    delta = parse_delta(settings.delta, task_type="SEQ_CLS", modules_to_save=heads)
    return deltaops.attach(model, delta)


def _restore(run: Run) -> None:
    path = run.out / state.FILE
    facts = state.read_facts(path)
    if facts.get("fingerprint") != run.fingerprint:
        raise DataError(
            f"--resume: {run.settings.data}, or the tokenizer, is not what {run.out} was started "
            "with: its tokens differ. Put it back, or start again in another --out."
        )
    try:
        run.step = int(facts["step"])
        run.seconds = float(facts["seconds"])
        run.before = facts["before"]
        run.history = [Point(**p) for p in facts["history"]]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its facts are incomplete ({error!r}).") from error
    state.restore_state(path, state.trainable(run.model), run.optimizer)
