"""One tuning run: read, attach, train, and keep ``out`` loadable and resumable throughout.

out/adapter_config.json, adapter_model.safetensors   the adapter, in PEFT's format
out/deltaops.json, deltaops.safetensors              instead, where PEFT has none for it
out/training_state.safetensors                       what --resume needs
out/metrics.json, loss.png                           the result, when all steps are done
out/controller.jsonl, monitor.csv                    what a controller did and saw, as it did
out/monitor.png, places.png                          pictures of that, when the run ends
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import publishing, remove_leftovers, write_atomically, write_json
from deltaops.surgery import Handle, attach

from .curve import draw_curve
from .loop import Point, Schedule, evaluate, make_optimizer, train
from .read import Columns, read_examples
from .spec import parse_delta
from .state import FILE, names_in_model, read_facts, restore_state, trained, write_state
from .steered import NO_ACTIONS, Steered
from .tokens import Order, TokenSet, check_known, label_texts, load_tokenizer, pack_text

TASKS = ("causal-lm", "classification")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the bits of the result. A resumed run must have the same."""

    model: str
    data: str
    task: str = "causal-lm"
    delta: str = "lora:r=16,alpha=32"
    steps: int = 200
    batch_size: int = 8
    lr: float = 1e-3
    seq_len: int = 128
    seed: int = 0
    text_column: str = "text"
    label_column: str = "label"
    eval_fraction: float = 0.1
    controller: str | None = None
    evaluate_every: int | None = None

    def check(self) -> None:
        """Raises: ConfigError for a value out of range."""
        if self.task not in TASKS:
            raise ConfigError(f"--task must be one of {', '.join(TASKS)}, got {self.task!r}.")
        for name in ("steps", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more.")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction must be in [0, 1), got {self.eval_fraction}.")
        if not 0 < self.lr < float("inf"):
            raise ConfigError(f"--lr must be a positive number, got {self.lr}.")
        if self.evaluate_every is not None and self.evaluate_every < 1:
            raise ConfigError("--evaluate-every must be 1 or more.")
        if self.evaluate_every is not None and self.controller is None:
            raise ConfigError(
                "--evaluate-every is for a controller, which goes by what it finds. Pass "
                "--controller as well."
            )


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished`` is False where it was stopped after ``step``."""

    finished: bool
    step: int
    before: dict[str, float] | None
    after: dict[str, float] | None
    history: list[Point]
    off: tuple[str, ...] = ()
    """Parts of the delta that a controller left off; the file has them, and loads them on."""
    actions: int = 0
    """Of a controller, but for what it left alone."""


def run(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    save_every: int = 100,
    on_ready: Callable[[Handle, int], object] = lambda handle, start: None,
    on_step: Callable[[Point], object] = lambda point: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Tune a delta as ``settings`` say and leave it in ``out``.

    Args:
        resume: go on where the run in ``out`` stopped, with the same bits.
        save_every: steps between checkpoints; one is also written when the run ends or is stopped.
        on_ready: called with the handle and the first step once all inputs have been checked.
        should_stop: asked before each step.
    Raises: ConfigError, DataError, TargetError, CheckpointError; before the first step wherever the
        inputs are at fault.
    """
    settings.check()
    steered = None if settings.controller is None else Steered(settings.controller, out)
    start_facts = _check_out(settings, out, resume)
    data, labels = _read(settings)
    fit, held = data.split(settings.eval_fraction, settings.seed)
    torch.manual_seed(settings.seed)
    model = _load_model(settings, labels, data.pad)
    handle = attach(model, _delta(settings, model))
    names = names_in_model(handle)
    optimizer = make_optimizer(handle.parameter_groups(settings.lr), settings.lr)
    order = Order(len(fit), settings.batch_size, settings.seed)
    history: list[Point] = []
    start = 0
    if start_facts is not None:
        if start_facts["data"] != data.fingerprint():
            raise CheckpointError(
                f"{out}: the data is not what the run was started on. Resume with the same file."
            )
        history = [Point(*row) for row in start_facts["history"]]
        start, before = start_facts["step"], start_facts["before"]
    else:
        before = None if held is None else evaluate(model, held, settings.batch_size)
        torch.manual_seed(settings.seed)
    if steered is not None:
        steered.begin(settings, handle, optimizer, held, start_facts)
    if start_facts is not None:
        restore_state(out / FILE, trained(handle, names), optimizer)
    on_ready(handle, start)

    def save() -> None:
        facts = {
            "settings": dataclasses.asdict(settings),
            "step": len(history),
            "history": [dataclasses.astuple(p) for p in history],
            "before": before,
            "data": data.fingerprint(),
        }
        decided = {} if steered is None else steered.controller.state_dict()
        if decided:
            facts["controller"] = decided["facts"]
        with publishing(out, FILE) as scratch:
            handle.save(scratch)
            tensors = decided.get("tensors")
            write_state(scratch / FILE, trained(handle, names), optimizer, facts, tensors)
            if labels is not None:
                write_json(scratch / "labels.json", labels)

    def after_step(point: Point) -> None:
        history.append(point)
        if point.step % save_every == 0 and point.step < settings.steps:
            save()
        on_step(point)

    if steered is not None and start_facts is None:
        save()  # its log lies in ``out`` already, which a run that is killed now must go on from
    schedule = Schedule(settings.steps, settings.lr)
    finished = train(
        model, fit, order, optimizer, schedule,
        start=start, on_step=after_step, should_stop=should_stop,
        steer=None if steered is None else steered.controller,
    )  # fmt: skip
    save()
    if steered is not None:
        steered.end()
    if not finished:
        return Outcome(False, len(history), before, None, history)
    after = None if held is None else evaluate(model, held, settings.batch_size)
    write_json(
        out / "metrics.json",
        {
            "settings": dataclasses.asdict(settings),
            "trainable_parameters": sum(p.numel() for p in handle.parameters()),
            "held_out_before": before,
            "held_out_after": after,
            "final_training_loss": history[-1].loss,
            "steps": len(history),
        },
    )
    write_atomically(
        out / "loss.png",
        lambda part: draw_curve(part, history, Path(settings.model).name, before, after),
    )
    off = tuple(part for part in handle.parts if part not in handle.enabled)
    actions = sum(event["kind"] not in NO_ACTIONS for event in handle.history)
    return Outcome(True, len(history), before, after, history, off, actions)


def _check_out(settings: Settings, out: Path, resume: bool) -> dict[str, Any] | None:
    """The facts of the run to resume, or None for a new one."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file, expected a folder. Choose another place.")
    remove_leftovers(out)
    state = out / FILE
    if resume:
        if not state.is_file():
            raise CheckpointError(f"{out}: no run to resume. Start one without --resume.")
        facts = read_facts(state)
        asked = dataclasses.asdict(settings)
        odd = [name for name in asked if facts["settings"].get(name) != asked[name]]
        if odd:
            was = ", ".join(f"{name}={facts['settings'].get(name)!r}" for name in odd)
            raise ConfigError(
                f"{out} was started with {was}. Resume with the same settings, or start anew in "
                "another --out."
            )
        return facts
    if out.is_dir() and any(out.iterdir()):
        hint = "Pass --resume to go on with it" if state.is_file() else "It is not a run of ours"
        raise ConfigError(f"--out {out} is not empty. {hint}, or choose another folder.")
    return None


def _read(settings: Settings) -> tuple[TokenSet, list[str] | None]:
    label = settings.label_column if settings.task == "classification" else None
    examples = read_examples(settings.data, Columns(settings.text_column, label))
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {settings.model} cannot be loaded: {error}. Give a folder with a model and "
            "its tokenizer, or a hub id."
        ) from error
    tokenizer = load_tokenizer(settings.model, config)
    if label is None:
        data, labels = pack_text(examples, tokenizer, settings.seq_len), None
    else:
        data, labels = label_texts(examples, tokenizer, settings.seq_len)
    check_known(data.ids, tokenizer, settings.model)
    _check_ids(data, config, settings.model)
    return data, labels


def _check_ids(data: TokenSet, config: Any, model: str) -> None:
    """Raises: ConfigError where a token is none of the model's."""
    entries = getattr(config.get_text_config(), "vocab_size", None)
    highest = max(int(ids.max()) for ids in data.ids)
    if entries is not None and highest >= entries:
        raise ConfigError(
            f"--model {model}: its tokenizer makes the token {highest}, and the model knows those "
            f"below {entries}. Save the model's own tokenizer beside it."
        )


def _load_model(settings: Settings, labels: list[str] | None, pad: int) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    try:
        if labels is None:
            return AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
        return AutoModelForSequenceClassification.from_pretrained(
            settings.model,
            dtype=torch.float32,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            pad_token_id=pad,
        )
    # RuntimeError: weights of another shape than its configuration says
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--model {settings.model} cannot be loaded: {error}") from error


def _delta(settings: Settings, model: Any) -> Any:
    """The delta; a classifier's new head is trained and saved with it."""
    if settings.task != "classification":
        return parse_delta(settings.delta)
    head = [
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    ]
    return parse_delta(settings.delta, modules_to_save=head)
