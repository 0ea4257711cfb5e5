"""What few numbers recover of full prompts or adapters on real tasks, as Qin et al. report it.

Tasks are split into seen ones, to whose prompts a decoder is fitted, and unseen ones; each seen
one's texts into halves. For each q, numbers are tuned by that decoder on

    same data     the half that the decoder was fitted to
    other data    of the same task, the other half
    unseen        of the tasks that the decoder was not fitted to, one half

and told beside a full prompt (or adapters) on the same texts and beside the model alone; on unseen
tasks also beside a random projection from as many numbers, which says what fitting was good for.
Source: Qin et al. 2021 (arXiv 2110.07867), §4.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltaops.errors import ConfigError, DataError
from deltaops.tuning.intrinsic import Full, Known, fit, train_full, tune, without_prompt
from deltaops.tuning.read import SUFFIXES, Example
from deltaops.tuning.recovered import Recovered, Scores
from deltaops.tuning.spec import parse_delta
from deltaops.tuning.wholes import Whole, whole_of
from deltaops.tuning.workshop import Task, Workshop, check_rate, check_task_names

SAME, OTHER, UNSEEN = "same data", "other data", "unseen"
KINDS = (SAME, OTHER, UNSEEN)


@dataclass(frozen=True)
class Plan:
    """What is measured."""

    dimensions: tuple[int, ...]
    """q."""
    of: str
    """Full deltas, as in ``--of``."""
    fit_steps: int
    fit_lr: float
    intrinsic_lr: float

    def check(self) -> None:
        """Raises: ConfigError for a value out of range."""
        if not self.dimensions or min(self.dimensions) < 1:
            raise ConfigError(
                f"--intrinsic-dim takes numbers ≥ 1 such as 5,16,64, got {self.dimensions}."
            )
        self.whole()
        check_rate("--fit-lr", self.fit_lr)
        check_rate("--intrinsic-lr", self.intrinsic_lr)

    def whole(self) -> Whole:
        """What a task has in full. Raises: ConfigError."""
        return whole_of(parse_delta(self.of))


def steps_of(plan: Plan, steps: int, tasks: int, unseen: int) -> int:
    """How many training steps :func:`measure` takes, of ``steps`` for each prompt."""
    every = 2 * (tasks - unseen) + unseen
    return steps * every + len(plan.dimensions) * (plan.fit_steps + steps * (every + unseen))


@dataclass(frozen=True)
class Line:
    """One task's accuracies."""

    task: str
    kind: str
    labels: int
    trained_on: int
    """Texts."""
    judged_by: int
    """Texts."""
    start: Scores
    """Of the model alone."""
    full: Scores
    """Of a full prompt, or full adapters."""
    tuned: dict[str, Scores]
    """q → of as many numbers by a fitted decoder."""
    random: dict[str, Scores]
    """The same by a random projection, of an unseen task."""

    def recovered(self, q: int) -> Recovered:
        """By a fitted decoder."""
        return self._row(self.tuned[str(q)])

    def by_chance(self, q: int) -> Recovered:
        """By a random projection."""
        return self._row(self.random[str(q)])

    def _row(self, scores: Scores) -> Recovered:
        return Recovered(self.task, "", self.kind != UNSEEN, self.start, scores, self.full)


@dataclass(frozen=True)
class _Work:
    """A task, and what it is for."""

    task: Task
    kind: str
    start: Scores
    full: Full


def task_files(folder: Path) -> dict[str, str]:
    """Task → its file, of all in a folder but hidden ones.

    Raises: DataError where there is none; ConfigError for a name that no task can have.
    """
    found = (path for path in folder.glob("*") if not path.name.startswith("."))
    files = sorted(path for path in found if SUFFIXES.get(path.suffix.lower()) in _LABELLED)
    if not files:
        raise DataError(
            f"--tasks {folder} must be a folder of CSV or JSONL files, a task each, and has none. "
            "Make them with `deltaops intrinsic split`."
        )
    check_task_names("--tasks", [str(path) for path in files])
    return {path.stem: str(path) for path in files}


_LABELLED = ("csv", "jsonl")


def measure(
    workshop: Workshop,
    files: Mapping[str, str],
    unseen: Sequence[str],
    plan: Plan,
) -> Iterator[tuple[Plan, tuple[Line, ...]]]:
    """Train everything there is to train, and judge it on what is held out.

    Args:
        workshop: with the model.
        files: of :func:`task_files`.
        unseen: tasks that no decoder is fitted to.
        plan: what is measured.
    Yields: after each q, what has been measured, and the lines so far.
    Raises: ConfigError, DataError; Stopped.
    """
    plan.check()
    _check_names(files, unseen)
    texts = {name: workshop.examples(name, source) for name, source in files.items()}
    cut = {name: halves(examples) for name, examples in texts.items()}
    for name in texts:
        if name not in unseen:
            _check_labels(name, *cut[name])
    parts = [
        (kind, workshop.task(name, halves_of[part]))
        for kind, part in ((SAME, 0), (OTHER, 1), (UNSEEN, 0))
        for name, halves_of in cut.items()
        if (name in unseen) == (kind == UNSEEN)
    ]  # all of them, before hours of training
    work = [_begin(workshop, kind, task, plan.whole()) for kind, task in parts]
    tuned: dict[tuple[str, str], dict[str, Scores]] = {(w.task.name, w.kind): {} for w in work}
    random: dict[tuple[str, str], dict[str, Scores]] = {key: {} for key in tuned}
    for count, q in enumerate(plan.dimensions, 1):
        found = _by_decoder(workshop, work, plan, q)
        for w in work:
            key = w.task.name, w.kind
            tuned[key][str(q)] = found[key]
            if w.kind == UNSEEN:
                random[key][str(q)] = _by_chance(workshop, w.task, plan, q)
        lines = tuple(
            Line(
                w.task.name, w.kind, w.task.labels, len(w.task.fit), len(w.task.held), w.start,
                w.full.scores, dict(tuned[w.task.name, w.kind]), dict(random[w.task.name, w.kind]),
            )
            for w in work
        )  # fmt: skip
        yield replace(plan, dimensions=plan.dimensions[:count]), lines


def halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Every second text of each label, and the others."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    seen: dict[str | None, int] = {}
    for example in examples:
        number = seen[example.label] = seen.get(example.label, -1) + 1
        parts[number % 2].append(example)
    return parts


def _check_labels(name: str, first: Sequence[Example], second: Sequence[Example]) -> None:
    """Raises: DataError for a label that is not in both halves of a task."""
    missing = {e.label for e in first} - {e.label for e in second}  # the first has every label
    if missing:
        raise DataError(
            f"task {name!r}: the label {min(map(str, missing))!r} has one text, and a task's texts "
            "are cut into halves that both need it. Give more texts of it, or leave it out."
        )


def _begin(workshop: Workshop, kind: str, task: Task, whole: Whole) -> _Work:
    start = without_prompt(workshop, task)
    full = train_full(workshop, task, whole, f"{task.name}, {kind}")
    return _Work(task, kind, start, full)


def _by_decoder(
    workshop: Workshop, work: Sequence[_Work], plan: Plan, q: int
) -> dict[tuple[str, str], Scores]:
    """Task and kind → scores of q numbers, by a decoder that is thrown away afterwards."""
    seen = [w for w in work if w.kind == SAME]
    found: dict[tuple[str, str], Scores] = {}
    with tempfile.TemporaryDirectory() as scratch:
        decoder = Path(scratch) / "decoder"
        fit(
            workshop, [w.task for w in seen], decoder, model=workshop.name, intrinsic_dim=q,
            whole=plan.whole(), fit_steps=plan.fit_steps, fit_lr=plan.fit_lr,
            full=[w.full for w in seen],
        )  # fmt: skip
        for kind in KINDS:
            these = [w for w in work if w.kind == kind]
            known = {w.task.name: Known(w.start, w.full.scores) for w in these}
            rows = tune(
                workshop, [w.task for w in these], decoder, Path(scratch) / kind, compare=False,
                lr=plan.intrinsic_lr, known=known,
            )  # fmt: skip
            found |= {(row.task, kind): row.tuned for row in rows}
    return found


def _by_chance(workshop: Workshop, task: Task, plan: Plan, q: int) -> Scores:
    """Of q numbers by a random projection."""
    delta = plan.whole().intrinsic(q=q)
    handle, scores = workshop.tune(delta, task, f"{task.name}, random, q = {q}", plan.intrinsic_lr)
    handle.revert()
    return scores


def _check_names(files: Mapping[str, str], unseen: Sequence[str]) -> None:
    strange = [name for name in unseen if name not in files]
    if strange or not unseen:
        raise ConfigError(
            f"--unseen must name some of {', '.join(files)}, got {strange[0] if strange else ''!r}."
        )
    if len(files) - len(unseen) < 2:
        raise ConfigError("--unseen must leave two tasks or more for the decoder to be fitted to.")
