"""The report of a measurement of recovery: every number in it comes from its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from deltaops.errors import ConfigError
from deltaops.files import write_atomically, write_json
from deltaops.methods.decoder import is_scores
from deltaops.tuning.recovered import Recovered, mean_relative, recovered_gain
from deltaops.tuning.workshop import Settings

from .recovery import KINDS, OTHER, SAME, UNSEEN, Line, Plan
from .recovery_picture import draw_recovery
from .report import markdown_table
from .store import slug

PAPER = (
    "The paper (Qin et al. 2021, arXiv 2110.07867) recovers 97 % of full prompts on seen tasks "
    "with other data and 83 % on unseen ones, by 250 numbers, a decoder fitted to 100 tasks of "
    "many kinds and an encoder–decoder that writes its answers. Where the model alone answers much "
    "of a task, a ratio flatters: read the part of the gain beside it."
)
MEANS = (
    "E_rel: the mean over tasks of accuracy by q numbers / accuracy in full. Part of the gain: "
    "what q numbers gain over the model alone / what is gained in full, summed over tasks. "
    "Accuracies are means over tasks, in %. In full, a task has no more steps than its numbers "
    "have, and the decoder had its own before: above 100 %, numbers are learnt faster, and nothing "
    "says that they could do more."
)
ANSWERS = {
    "named": "A text has the label whose name the frozen encoder puts nearest: no head trains.",
    "written": "The model writes the label after the text: no head trains.",
}
_MEANING = {
    SAME: "seen tasks, the texts that the decoder was fitted to",
    OTHER: "seen tasks, other texts than the decoder was fitted to",
    UNSEEN: "tasks that the decoder was not fitted to",
}


@dataclass(frozen=True)
class Recovery:
    """A measurement."""

    machine: dict[str, Any]
    model: str
    answers: str
    """ "written" or "named"."""
    texts: str
    """Name of the tasks' folder."""
    settings: Settings
    plan: Plan
    lines: tuple[Line, ...]

    def of(self, kind: str) -> list[Line]:
        """The lines of a kind."""
        return [line for line in self.lines if line.kind == kind]

    def as_json(self) -> dict[str, Any]:
        """Every field, and the means over tasks that follow from them."""
        return {**asdict(self), "means": [summary(self, kind, q) for kind, q in _every(self)]}


def read_recovery(path: Path) -> Recovery:
    """A measurement from its JSON. Raises: ConfigError."""
    try:
        if path.suffix != ".json":  # the report would be written over it
            raise ValueError("its name does not end in .json")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError("no object")
        value.pop("means")
        plan = value["plan"] | {"dimensions": tuple(value["plan"]["dimensions"])}
        made = {
            "settings": Settings(**value["settings"]),
            "plan": Plan(**plan),
            "lines": tuple(Line(**line) for line in value["lines"]),
        }
        found = Recovery(**(value | made))
        _check(found)
        recovery_markdown(found, "")  # whatever is missing, it is missing here
        return found
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        raise ConfigError(
            f"{path} is none of `deltaops intrinsic recovery` ({type(error).__name__}: {error}). "
            "Name its JSON."
        ) from error


def _check(found: Recovery) -> None:
    """Raises: ValueError, LookupError, TypeError for lines or scores that are missing."""
    slug(found.machine)
    found.plan.check()
    for kind in KINDS:
        if not found.of(kind):
            raise ValueError(f"it has no lines of {kind!r}")
    for line in found.lines:
        by_q = [line.tuned] if line.kind != UNSEEN else [line.tuned, line.random]
        scores = [some[str(q)] for some in by_q for q in found.plan.dimensions]
        if not all(map(is_scores, (line.start, line.full, *scores))):
            raise ValueError(f"the scores of {line.task!r} are none")


def refuse_another(
    path: Path, coming: Recovery, seen: Iterable[str], unseen: Iterable[str]
) -> None:
    """Raises: ConfigError where ``path`` holds another measurement than the ``coming`` one.

    Args:
        path: a JSON, which may be missing.
        coming: without its lines.
        seen: the tasks that it will fit decoders to.
        unseen: the others.
    """
    if not path.exists():
        return
    old = read_recovery(path)
    pairs: dict[str, tuple[Any, Any]] = {
        "model": (old.model, coming.model),
        "answers": (old.answers, coming.answers),
        "tasks": (
            (old.texts, {line.task for line in old.of(SAME)}), (coming.texts, set(seen)),
        ),
        "unseen": ({line.task for line in old.of(UNSEEN)}, set(unseen)),
    }  # fmt: skip
    for before, after in ((old.settings, coming.settings), (old.plan, coming.plan)):
        pairs |= {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in fields(before)}
    before, after = pairs.pop("dimensions")
    odd = [
        f"--{name.replace('_', '-')}" for name, (old_one, new) in pairs.items() if old_one != new
    ]
    if not set(before) <= set(after):  # there are fewer where it was stopped
        odd.append("--intrinsic-dim")
    if odd:
        raise ConfigError(
            f"--out {path.parent}: {path.name} is there already, measured with another "
            f"{' and '.join(odd)}. Choose another folder, or move it away."
        )


def summary(recovery: Recovery, kind: str, q: int) -> dict[str, Any]:
    """What the paper reports of a kind of task, and the part of the gain."""
    lines = recovery.of(kind)
    rows = [line.recovered(q) for line in lines]
    chance = [line.by_chance(q) for line in lines if line.random]
    return {
        "kind": kind, "q": q, "tasks": len(lines), "texts": sum(line.judged_by for line in lines),
        "start": fmean(line.start["accuracy"] for line in lines),
        "full": fmean(line.full["accuracy"] for line in lines),
        "tuned": _accuracy(rows), "relative": mean_relative(rows), "gain": recovered_gain(rows),
        "random": _accuracy(chance) if chance else None,
        "random_gain": recovered_gain(chance) if chance else None,
    }  # fmt: skip


def recovery_file(machine: dict[str, Any], plan: Plan) -> str:
    """What the JSON of a measurement is called."""
    return f"{slug(machine)}-intrinsic-{plan.whole().of}.json"


def write_recovery(path: Path, recovery: Recovery) -> None:
    """The JSON at ``path``, and report and picture beside it, each whole or as it was.

    Raises: CheckpointError.
    """
    whole = recovery.plan.whole()
    write_json(path, recovery.as_json())
    picture = path.with_suffix(".png")
    means = {kind: [summary(recovery, kind, q) for q in recovery.plan.dimensions] for kind in KINDS}
    title = f"{recovery.model} on {recovery.texts}, {whole.delta!r}"
    drawn = partial(draw_recovery, means=means, full=whole.title, subtitle=title)
    write_atomically(picture, drawn)
    text = recovery_markdown(recovery, picture.name)
    write_atomically(path.with_suffix(".md"), lambda part: part.write_text(text, encoding="utf-8"))


def recovery_markdown(recovery: Recovery, picture: str) -> str:
    """The report; ``picture`` is a file name beside it."""
    m, whole = recovery.machine, recovery.plan.whole()
    lines = [
        f"# Intrinsic {whole.of} tuning: {recovery.model} on {recovery.texts}",
        "",
        f"Generated by `{m['command']}` on {m['date']} in {m.get('minutes', '?')} minutes; nothing "
        f"here is typed by hand. {m['processor']}, {m['threads']} threads, core {m['isa']}, "
        f"deltaops {m['deltaops']}, torch {m['versions']['torch']}.",
        "",
        _how(recovery),
        "",
        f"![{picture}]({picture})",
        "",
        "## What q numbers recover",
        "",
        MEANS,
        "",
        *markdown_table(
            ("texts", "tasks", "q", "E_rel", "part of the gain", "by q numbers", whole.title,
             "model alone", "q by a random projection", "its part of the gain"),
            [_mean_row(summary(recovery, kind, q)) for kind, q in _every(recovery)],
        ),
        "",
        *[f"- {kind}: {meaning}" for kind, meaning in _MEANING.items()],
        "",
        "## Beside the paper",
        "",
        PAPER,
        "",
        "## Every task",
        "",
        "Accuracy on the texts that were held out, %.",
        "",
        *markdown_table(
            ("task", "texts", "labels", "trained on", "judged by", "model alone", whole.title,
             *(f"q = {q}" for q in recovery.plan.dimensions)),
            [_task_row(line, recovery.plan.dimensions) for line in recovery.lines],
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _how(recovery: Recovery) -> str:
    s, plan = recovery.settings, recovery.plan
    whole = plan.whole()
    return (
        f"{ANSWERS[recovery.answers]} In full, a task has {whole.delta!r}; that and the numbers: "
        f"{s.steps} steps of {s.batch_size} texts, peak learning rate {s.lr:g} for {whole.title} "
        f"and {plan.intrinsic_lr:g} for numbers. Decoders: {plan.fit_steps} steps, the "
        f"{len(recovery.of(SAME))} seen tasks in turns, peak {plan.fit_lr:g}. {s.eval_fraction:.0%}"
        f" of each task's texts are held out, at random (seed {s.seed}). One seed."
    )


def _every(recovery: Recovery) -> list[tuple[str, int]]:
    return [(kind, q) for kind in KINDS for q in recovery.plan.dimensions]


def _accuracy(rows: Iterable[Recovered]) -> float:
    return fmean(row.tuned["accuracy"] for row in rows)


def _mean_row(s: dict[str, Any]) -> tuple[str, ...]:
    return (
        s["kind"], str(s["tasks"]), str(s["q"]), _percent(s["relative"]), _percent(s["gain"]),
        *(_percent(s[name]) for name in ("tuned", "full", "start", "random", "random_gain")),
    )  # fmt: skip


def _task_row(line: Line, dimensions: Sequence[int]) -> tuple[str, ...]:
    scores = [line.start, line.full, *(line.tuned[str(q)] for q in dimensions)]
    return (
        line.task, line.kind, str(line.labels), str(line.trained_on), str(line.judged_by),
        *(_percent(found["accuracy"]) for found in scores),
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
