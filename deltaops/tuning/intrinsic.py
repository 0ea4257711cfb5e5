"""Intrinsic prompt tuning over several tasks.

    fit     a full prompt for each task; then a decoder to all of them, by the tasks' losses and the
            prompts' reconstruction (multi-task subspace finding)
    tune    the q numbers of a task, by a fitted decoder (intrinsic subspace tuning)

What counts is the part of a full prompt's accuracy that the q numbers recover, on tasks that the
decoder was fitted to and on others.
Source: Qin et al. 2021 (arXiv 2110.07867), §3.2 and §4.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaops.errors import CheckpointError, ConfigError, DataError
from deltaops.files import publishing
from deltaops.methods import IntrinsicPrompt, Prompt
from deltaops.methods.base import Delta
from deltaops.methods.decoder import FACTS, Sizes, digest, read_facts, write_decoder
from deltaops.modules import exchange_prompt
from deltaops.surgery import Handle, attach

from .answers import AnswerSet, answer_texts, score
from .autoencoder import AutoEncoder, CodedPrompt
from .loop import CLIP, Point, Schedule, make_optimizer, to_device, train
from .read import Columns, Example, read_examples
from .recovered import (
    FILE,
    Recovered,
    Scores,
    read_recovered,
    refuse_used,
    write_recovered,
)
from .tokens import Order, check_known, load_tokenizer

RECONSTRUCTION = 200.0
"""Weight of the mean squared error beside a task's loss; the paper's."""

LARGEST_RATE = 1e37
"""Of learning: AdamW's first step is ten times as long, and has to be a float32."""
NAME = re.compile(r"\w[\w .:@+-]*")
"""Of a task: its folder's too."""

OnStep = Callable[[str, int, float], object]
"""Called with what is trained, the step (from 1) and its loss."""


@dataclass(frozen=True)
class Settings:
    """What the training of a prompt, full or of q numbers, depends on."""

    steps: int = 200
    batch_size: int = 8
    lr: float = 0.02
    seq_len: int = 128
    seed: int = 0
    text_column: str = "text"
    label_column: str = "label"
    eval_fraction: float = 0.2

    def check(self) -> None:
        """Raises: ConfigError for a value out of range."""
        for name in ("steps", "batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more.")
        if not 0 < self.eval_fraction < 1:
            raise ConfigError(
                f"--eval-fraction must be in (0, 1), got {self.eval_fraction}: what is recovered "
                "is measured on what is held out."
            )
        check_rate("--lr", self.lr)


@dataclass(frozen=True)
class Task:
    """A file's examples."""

    name: str
    """The file's, without its ending."""
    fit: AnswerSet
    held: AnswerSet
    fingerprint: str
    """Of its tokens."""
    texts: str
    """Fingerprint of its examples, before they are cut into tokens."""


class Stopped(Exception):
    """Training was stopped from outside before its end."""


class Workshop:
    """A frozen model, its tokenizer, and the training of one prompt after another on it."""

    def __init__(
        self,
        model: str,
        settings: Settings,
        on_step: OnStep = lambda what, step, loss: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Load ``model``, a folder or a hub id. Raises: ConfigError."""
        settings.check()
        self.settings = settings
        self.on_step = on_step
        self.should_stop = should_stop
        self.name = model
        self.model, self.tokenizer = _load(model)
        self.fingerprint = digest(self.model.state_dict())

    def tasks(self, sources: Sequence[str]) -> list[Task]:
        """Read the file of each task. Raises: DataError, ConfigError for a bad name."""
        names = [Path(source).stem for source in sources]
        for name, source in zip(names, sources, strict=True):
            if NAME.fullmatch(name) is None or name == FILE:
                raise ConfigError(
                    f"--data {source}: the task would be called {name!r}, and its folder too. "
                    "Rename the file to begin with a letter or digit, such as task.csv."
                )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"--data: two files are called {twice[0]!r}, and tasks are told apart by that. "
                "Rename one of them."
            )
        return [self._task(name, source) for name, source in zip(names, sources, strict=True)]

    def tune(self, delta: Delta, task: Task, what: str) -> tuple[Handle, Scores]:
        """Train ``delta`` on ``task``; it stays attached. Raises: Stopped."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        # every prompt has the same start, so that what differs is the task
        handle = attach(self.model, delta, generator=torch.Generator().manual_seed(settings.seed))
        optimizer = make_optimizer(handle.parameter_groups(settings.lr), settings.lr)
        order = Order(len(task.fit), settings.batch_size, settings.seed)

        def told(point: Point) -> None:
            self.on_step(what, point.step, point.loss)

        try:
            finished = train(
                self.model, task.fit, order, optimizer, Schedule(settings.steps, settings.lr),
                on_step=told, should_stop=self.should_stop,
            )  # fmt: skip
            if not finished:
                raise Stopped
            return handle, _finite(score(self.model, task.held, settings.batch_size), what, "--lr")
        except BaseException:  # also KeyboardInterrupt: the model is used again
            handle.revert()
            raise

    def _task(self, name: str, source: str) -> Task:
        settings = self.settings
        columns = Columns(settings.text_column, settings.label_column)
        apart = bool(self.model.config.is_encoder_decoder)
        try:
            examples = read_examples(source, columns)
            data = answer_texts(examples, self.tokenizer, settings.seq_len, apart=apart)
        except DataError as error:
            raise DataError(f"task {name!r}: {error}") from error
        check_known(data.ids, self.tokenizer, self.name)
        fit, held = data.split(settings.eval_fraction, settings.seed)
        assert isinstance(fit, AnswerSet)
        assert isinstance(held, AnswerSet)  # never None: the fraction is above 0
        return Task(name, fit, held, data.fingerprint(), _fingerprint(examples))


def fit(
    workshop: Workshop,
    tasks: Sequence[Task],
    out: Path,
    *,
    model: str,
    intrinsic_dim: int,
    num_virtual_tokens: int,
    fit_steps: int,
    fit_lr: float = 1e-3,
) -> list[tuple[str, Scores, Scores]]:
    """Train a prompt for each task and fit a decoder to them, into the folder ``out``.

    Args:
        workshop: with the model.
        tasks: two or more.
        out: for the decoder, and the prompts in ``out/prompts/TASK``, in PEFT's format.
        model: what the workshop's model was loaded from, for the file.
        intrinsic_dim: q.
        num_virtual_tokens: P.
        fit_steps: of the auto-encoder, the tasks in turns.
        fit_lr: its peak learning rate.
    Returns: name of each task, the scores of its full prompt, and of that encoded and decoded.
    Raises: ConfigError, also for a loss that is no longer finite; TargetError; Stopped. Nothing is
        written then.
    """
    if len(tasks) < 2:
        raise ConfigError(
            f"--data: a decoder is fitted to two tasks or more, got {len(tasks)}. Name more files."
        )
    if fit_steps < 1:
        raise ConfigError("--fit-steps must be 1 or more.")
    check_rate("--fit-lr", fit_lr)
    refuse_used(out)
    delta = Prompt(num_virtual_tokens=num_virtual_tokens)
    settings = IntrinsicPrompt(intrinsic_dim=intrinsic_dim, num_virtual_tokens=num_virtual_tokens)
    prompts: list[Tensor] = []
    full: list[Scores] = []
    for task in tasks:
        handle, scores = workshop.tune(delta, task, task.name)
        prompts.append(next(handle.parameters()).detach().float().clone())
        full.append(scores)
        handle.revert()
    stacked = torch.stack(prompts)
    width = stacked.shape[2]
    sizes = Sizes(settings.dimension, num_virtual_tokens, width, width)
    coder, decoded = _fit_coder(workshop, tasks, stacked, sizes, delta, fit_steps, fit_lr)
    rows = list(zip((task.name for task in tasks), full, decoded, strict=True))
    facts = {
        "base_model": model,
        "model": workshop.fingerprint,
        "settings": dataclasses.asdict(workshop.settings),
        "fit_steps": fit_steps,
        "fit_lr": fit_lr,
        "tasks": [
            {
                "name": t.name, "texts": t.texts, "data": t.fingerprint, "full": scores,
                "decoded": again,
            }
            for t, (_, scores, again) in zip(tasks, rows, strict=True)
        ],
    }  # fmt: skip
    with publishing(out, FACTS) as scratch:  # the prompts and their decoder, or neither
        for task, prompt in zip(tasks, prompts, strict=True):
            _save_prompt(workshop, delta, prompt, scratch / "prompts" / task.name)
        write_decoder(scratch, sizes, coder.tensors(stacked), facts)
    return rows


def tune(
    workshop: Workshop, tasks: Sequence[Task], decoder: Path, out: Path, *, compare: bool
) -> list[Recovered]:
    """Tune the q numbers of each task by the decoder in a folder; adapters go to ``out/TASK``.

    Args:
        workshop: with the model that the decoder was fitted on.
        tasks: seen by the decoder or not.
        decoder: folder of :func:`fit`.
        out: for the adapters and metrics.json.
        compare: train a full prompt as well, where the decoder's file has no scores of one that was
            trained on the same data in the same way.
    Raises: ConfigError, CheckpointError, TargetError; Stopped, and called again with the same it
        goes on after the tasks that are done.
    """
    facts = read_facts(decoder)
    delta = IntrinsicPrompt(decoder=str(decoder))
    seen = {known["texts"] for known in facts["tasks"]}
    head = {
        "decoder_digest": facts["digest"],
        "model": workshop.fingerprint,
        "settings": dataclasses.asdict(workshop.settings),
        "compare": compare,
    }
    before = {(row.task, row.texts): row for row in read_recovered(out, head)}
    head["decoder"] = str(decoder)  # which may have moved in between
    found = list(before.values())
    write_recovered(out, head, found)  # the folder is known by it
    for task in tasks:
        if (task.name, task.texts) in before:
            continue
        handle, scores = workshop.tune(delta, task, task.name)
        handle.save(out / task.name)
        handle.revert()
        full = _known(facts, task, workshop)
        if full is None and compare:
            what = f"{task.name}, a full prompt"
            handle, full = workshop.tune(Prompt(delta.length), task, what)
            handle.revert()
        found = [row for row in found if row.task != task.name]
        found.append(Recovered(task.name, task.texts, task.texts in seen, scores, full))
        write_recovered(out, head, found)
    return found


def base_model(decoder: Path) -> str:
    """What the decoder in a folder was fitted on. Raises: CheckpointError."""
    found = read_facts(decoder).get("base_model")
    if not isinstance(found, str):
        raise CheckpointError(f"{decoder / FACTS} names no base_model. Pass --model.")
    return found


def check_rate(name: str, value: float) -> None:
    """Raises: ConfigError for what is no learning rate."""
    if not 0 < value < LARGEST_RATE:
        raise ConfigError(f"{name} must be a positive number below {LARGEST_RATE:g}, got {value}.")


# ------------------------------------------------------------------------------------- details


def _fit_coder(
    workshop: Workshop,
    tasks: Sequence[Task],
    prompts: Tensor,
    sizes: Sizes,
    delta: Prompt,
    steps: int,
    lr: float,
) -> tuple[AutoEncoder, list[Scores]]:
    """The auto-encoder of ``prompts [N, P, d]``, and how well each task does with its own."""
    settings, model = workshop.settings, workshop.model
    torch.manual_seed(settings.seed)
    handle = attach(model, delta)
    try:
        coder = AutoEncoder(sizes).to(prompts.device)
        coded = CodedPrompt(prompts, coder)
        exchange_prompt(model.get_submodule(handle.sites[0]), coded)
        optimizer = make_optimizer([{"params": list(coder.parameters())}], lr)
        schedule = Schedule(steps, lr)
        orders = [Order(len(t.fit), settings.batch_size, settings.seed) for t in tasks]
        model.train()
        for step in range(steps):
            if workshop.should_stop():
                raise Stopped
            turn, coded.task = divmod(step, len(tasks))
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            rows = orders[coded.task].rows(turn)
            batch = to_device(tasks[coded.task].fit.batch(rows), prompts.device)
            loss = model(**batch).loss
            assert coded.error is not None  # the pass before set it
            whole = loss + RECONSTRUCTION * coded.error
            if not math.isfinite(float(whole.detach())):
                raise ConfigError(
                    f"the decoder's loss of step {step + 1} is {float(whole.detach())}; nothing "
                    "was written. Try a smaller --fit-lr."
                )
            whole.backward()
            torch.nn.utils.clip_grad_norm_(coder.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            workshop.on_step("decoder", step + 1, float(loss.detach()))
        scores = []
        for number, task in enumerate(tasks):
            coded.task = number
            again = score(model, task.held, settings.batch_size)
            scores.append(_finite(again, f"{task.name}, decoded again,", "--fit-lr"))
        return coder, scores
    finally:
        handle.revert()


def _save_prompt(workshop: Workshop, delta: Prompt, prompt: Tensor, folder: Path) -> None:
    """An adapter of ``prompt [P, d]``."""
    handle = attach(workshop.model, delta)
    try:
        with torch.no_grad():
            next(handle.parameters()).copy_(prompt)
        handle.save(folder)
    finally:
        handle.revert()


def _finite(scores: Scores, what: str, option: str) -> Scores:
    """``scores``. Raises: ConfigError where the loss is no number."""
    if not math.isfinite(scores["loss"]):
        raise ConfigError(
            f"the loss of {what} on what is held out is {scores['loss']}; nothing of it was "
            f"written. Try a smaller {option}."
        )
    return scores


def _fingerprint(examples: Sequence[Example]) -> str:
    rows = json.dumps([(example.text, example.label) for example in examples])
    return hashlib.sha256(rows.encode()).hexdigest()


def _known(facts: Mapping[str, Any], task: Task, workshop: Workshop) -> Scores | None:
    """The scores of a full prompt of the same model on the same data, trained in the same way."""
    if facts.get("settings") != dataclasses.asdict(workshop.settings):
        return None
    if facts.get("model") != workshop.fingerprint:
        return None
    for known in facts["tasks"]:
        if known["data"] == task.fingerprint:
            found: Scores = known["full"]
            return found
    return None


def _load(model: str) -> tuple[Any, Any]:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
    )

    try:
        config = AutoConfig.from_pretrained(model)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        loaded = kind.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {model} cannot be loaded: {error}. Give a folder with a language model or an "
            "encoder–decoder and its tokenizer, or a hub id."
        ) from error
    return loaded, load_tokenizer(model, loaded.config)
