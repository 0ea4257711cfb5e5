"""Where one task after another is learnt: a frozen model, and the training of deltas on it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from deltaops.errors import ConfigError, DataError
from deltaops.methods.base import Delta
from deltaops.methods.decoder import digest
from deltaops.surgery import Handle, attach

from .answering import load_answering
from .groups import NAME
from .loop import Point, Schedule, make_optimizer, train
from .read import Columns, Example, read_examples
from .recovered import FILE, Scores
from .tokens import Order, TokenSet, check_known

LARGEST_RATE = 1e37
"""Of learning: AdamW's first step is ten times as long, and has to be a float32."""

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
    """Examples to learn from, and others to be judged by."""

    name: str
    """The file's, without its ending."""
    fit: TokenSet
    held: TokenSet
    fingerprint: str
    """Of its tokens."""
    texts: str
    """Fingerprint of its examples, before they are cut into tokens."""
    reader: nn.Module
    """What has a loss for its batches."""
    labels: int


class Stopped(Exception):
    """Training was stopped from outside before its end."""


class Workshop:
    """A frozen model, its tokenizer, and the training of one delta after another on it."""

    def __init__(
        self,
        model: str,
        settings: Settings,
        on_step: OnStep = lambda what, step, loss: None,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        answers: str | None = None,
    ) -> None:
        """Load ``model``, a folder or a hub id; ``answers`` as for :func:`load_answering`.

        Raises: ConfigError.
        """
        settings.check()
        self.settings = settings
        self.on_step = on_step
        self.should_stop = should_stop
        self.name = model
        self.answering = load_answering(model, answers)
        self.model = self.answering.model
        self.tokenizer = self.answering.tokenizer
        self.fingerprint = digest(self.model.state_dict())

    def tasks(self, sources: Sequence[str]) -> list[Task]:
        """Read the file of each task. Raises: DataError, ConfigError for a bad name."""
        check_task_names("--data", sources)
        named = [(Path(source).stem, source) for source in sources]
        return [self.task(name, self.examples(name, source)) for name, source in named]

    def examples(self, name: str, source: str) -> list[Example]:
        """Those in the file of the task ``name``. Raises: DataError."""
        columns = Columns(self.settings.text_column, self.settings.label_column)
        try:
            return read_examples(source, columns)
        except DataError as error:
            raise DataError(f"task {name!r}: {error}") from error

    def task(self, name: str, examples: Sequence[Example]) -> Task:
        """A task of these examples. Raises: DataError, ConfigError."""
        settings = self.settings
        try:
            data = self.answering.texts(examples, settings.seq_len)
            check_known(data.ids, self.tokenizer, self.name)
            reader = self.answering.reader(data)
        except DataError as error:
            raise DataError(f"task {name!r}: {error}") from error
        fit, held = data.split(settings.eval_fraction, settings.seed)
        assert held is not None  # the fraction is above 0
        texts, labels = _fingerprint(examples), len({e.label for e in examples})
        return Task(name, fit, held, data.fingerprint(), texts, reader, labels)

    def tune(
        self, delta: Delta, task: Task, what: str, lr: float | None = None
    ) -> tuple[Handle, Scores]:
        """Train ``delta`` on ``task``; it stays attached.

        Args:
            delta: for the model.
            task: of this workshop.
            what: it is called in progress and errors.
            lr: peak learning rate, the settings' where it is None.
        Raises: Stopped; ConfigError for a loss that is no longer finite.
        """
        settings, rate = self.settings, self.settings.lr if lr is None else lr
        torch.manual_seed(settings.seed)
        # every delta has the same start, so that what differs is the task
        handle = attach(self.model, delta, generator=torch.Generator().manual_seed(settings.seed))

        def told(point: Point) -> None:
            self.on_step(what, point.step, point.loss)

        try:
            optimizer = make_optimizer(handle.parameter_groups(rate), rate)
            order = Order(len(task.fit), settings.batch_size, settings.seed)
            finished = train(
                task.reader, task.fit, order, optimizer, Schedule(settings.steps, rate),
                on_step=told, should_stop=self.should_stop,
            )  # fmt: skip
            if not finished:
                raise Stopped
            return handle, self.score(task, what, "--lr")
        except BaseException:  # also KeyboardInterrupt: the model is used again
            handle.revert()
            raise

    def score(self, task: Task, what: str, option: str) -> Scores:
        """Of the model as it is now, on what is held out of ``task``.

        Args:
            task: of this workshop.
            what: was trained, for the error.
            option: which would have to be smaller, for the error.
        Raises: ConfigError where the loss is no number.
        """
        scores = self.answering.score(task.reader, task.held, self.settings.batch_size)
        if not math.isfinite(scores["loss"]):
            raise ConfigError(
                f"the loss of {what} on what is held out is {scores['loss']}; nothing of it was "
                f"written. Try a smaller {option}."
            )
        return scores


def check_task_names(option: str, sources: Sequence[str]) -> None:
    """Raises: ConfigError for a file whose task's folder could not be called after it."""
    names = [Path(source).stem for source in sources]
    for name, source in zip(names, sources, strict=True):
        if NAME.fullmatch(name) is None or name == FILE:
            raise ConfigError(
                f"{option} {source}: the task would be called {name!r}, and its folder too. "
                "Rename the file to begin with a letter or digit, such as task.csv."
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"{option}: two files are called {twice[0]!r}, and tasks are told apart by that. "
            "Rename one of them."
        )


def check_rate(name: str, value: float) -> None:
    """Raises: ConfigError for what is no learning rate."""
    if not 0 < value < LARGEST_RATE:
        raise ConfigError(f"{name} must be a positive number below {LARGEST_RATE:g}, got {value}.")


def _fingerprint(examples: Sequence[Example]) -> str:
    rows = json.dumps([(example.text, example.label) for example in examples])
    return hashlib.sha256(rows.encode()).hexdigest()
