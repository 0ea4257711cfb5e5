"""A start recommendation: which deltas and sizes for these texts and this model, why, at what cost.

    found = suggest(model, Task(texts, tokenizer, labels)); print(found); found.best.spec

The model is read, and run on a few tokens with each candidate; it is as it was after that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltaops.errors import ConfigError, DeltaopsError
from deltaops.methods import Combined, Delta
from deltaops.surgery.handle import handle_of
from deltaops.surgery.plan import plan

from .cost import Cost, Rates, Shape, predict, rates_of, trained_by, work_of
from .features import ModelFeatures, Task, TaskFeatures, features_of, features_of_model
from .suggest_rules import Idea, Reason, by_size, ideas


@dataclass(frozen=True)
class Candidate:
    """One that fits."""

    spec: str
    """As ``deltaops tune --delta`` takes it."""
    delta: Delta | Combined
    score: float
    """In percent of the best that the sources know; only for the order."""
    reasons: tuple[Reason, ...]
    cost: Cost


@dataclass(frozen=True)
class Suggestion:
    """What was looked at and what came of it; ``candidates`` begin with the best."""

    task: TaskFeatures
    model: ModelFeatures
    shape: Shape
    rates: Rates
    candidates: tuple[Candidate, ...]
    refused: tuple[tuple[str, str], ...]
    """Spec → why not."""

    @property
    def best(self) -> Candidate:
        """The first."""
        return self.candidates[0]

    def as_json(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "task": dataclasses.asdict(self.task),
            "model": dataclasses.asdict(self.model),
            "step": dataclasses.asdict(self.shape),
            "rates": dataclasses.asdict(self.rates),
            "candidates": [
                {
                    "spec": c.spec,
                    "score": round(c.score, 2),
                    "reasons": [dataclasses.asdict(r) for r in c.reasons],
                    "predicted": dataclasses.asdict(c.cost),
                }
                for c in self.candidates
            ],
            "refused": [{"spec": spec, "why": why} for spec, why in self.refused],
        }

    def __str__(self) -> str:
        """The candidates in order, each with its reasons."""
        lines = []
        for place, c in enumerate(self.candidates, start=1):
            lines.append(f"{place}. {c.spec}  ({c.cost.trained:,} trained, score {c.score:.1f})")
            lines += [f"   {r.points:+.1f}  {r.text} [{r.source}]" for r in c.reasons]
        return "\n".join(lines + [f"not: {spec}: {why}" for spec, why in self.refused])


def suggest(
    model: nn.Module,
    data: Task,
    *,
    modules_to_save: Sequence[str] = (),
    batch_size: int = 8,
    max_trained: int | None = None,
    count: int = 5,
    on_candidate: Callable[[int, int], object] = lambda done, total: None,
) -> Suggestion:
    """Deltas for ``data`` on ``model``, the best first.

    Args:
        model: of transformers, without a delta, with the head that it is tuned with.
        data: the texts.
        modules_to_save: trained whole beside each delta, such as a new head.
        batch_size: samples of a step, for which costs are predicted.
        max_trained: parameters that may be trained, modules trained whole included.
        count: how many to return.
        on_candidate: called with how many are done, and of how many.
    Raises: DataError; ConfigError where the model has a delta, or nothing is left; TargetError
        where the model is no transformer.
    """
    if handle_of(model) is not None:
        raise ConfigError("suggest: the model has a delta already. Revert it, or load a fresh one.")
    task, known = features_of(data), features_of_model(model)
    if not known.blocks:
        raise ConfigError(
            f"suggest: {known.kind} has no blocks with an attention, where deltas go. Give a "
            "transformer."
        )
    refused: list[tuple[str, str]] = []
    fit: list[tuple[Idea, Delta | Combined]] = []
    for idea in ideas(task, known):
        try:
            delta = idea.delta(modules_to_save)
            wish = plan(model, delta)
            trained, _ = trained_by(wish)
        except DeltaopsError as error:
            refused.append((idea.spec, " ".join(str(error).split())))
            continue
        if max_trained is not None and trained > max_trained:
            refused.append((idea.spec, f"trains {trained:,} parameters, over {max_trained:,}"))
            continue
        extra = by_size(trained, task, known)
        reasons = idea.reasons if extra is None else (*idea.reasons, extra)
        fit.append((dataclasses.replace(idea, reasons=reasons), delta))
    if not fit:
        why = "\n".join(f"  {spec}: {reason}" for spec, reason in refused)
        raise ConfigError(f"suggest: no delta is left for {known.kind}:\n{why}\nAllow more.")
    fit.sort(key=lambda pair: -pair[0].score)  # those of one score stay in the rules' order
    chosen = fit[:count]
    ids = some_ids(data)
    # a language model's texts are packed into blocks, as `deltaops tune` has them
    tokens = data.seq_len if data.labels is None else task.long_tokens
    shape = Shape(batch_size, max(2, tokens))
    work = work_of(model, ids, task.labels, shape.tokens)
    rates = rates_of(model, shape)
    candidates = []
    for done, (idea, delta) in enumerate(chosen):
        on_candidate(done, len(chosen))
        cost = predict(model, plan(model, delta), ids, shape, task.labels, work, rates)
        candidates.append(Candidate(idea.spec, delta, idea.score, idea.reasons, cost))
    on_candidate(len(chosen), len(chosen))
    return Suggestion(task, known, shape, rates, tuple(candidates), tuple(refused))


def some_ids(data: Task) -> torch.Tensor:
    """Some tokens of the texts, in a row."""
    rows = data.tokenizer(list(data.texts[:64]), truncation=True, max_length=data.seq_len)
    return torch.tensor([i for row in rows["input_ids"] for i in row], dtype=torch.int64)
