"""Intrinsic tuning over several tasks, of prompts or of adapters.

    fit     a full prompt for each task; then a decoder to all of them, by the tasks' losses and the
            prompts' reconstruction (multi-task subspace finding)
    tune    the q numbers of a task, by a fitted decoder (intrinsic subspace tuning)

What counts is the part of a full prompt's accuracy that the q numbers recover, on tasks that the
decoder was fitted to and on others. Adapters take a prompt's place where the decoder is of them.
Source: Qin et al. 2021 (arXiv 2110.07867), §3.2 and §4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import publishing
from deltaops.methods.decoder import FACTS, read_facts, write_decoder

from .autoencoder import AutoEncoder
from .loop import CLIP, Schedule, make_optimizer, to_device
from .recovered import Recovered, Scores, read_recovered, refuse_used, write_recovered
from .tokens import Order
from .wholes import Whole, whole_in
from .workshop import Stopped, Task, Workshop, check_rate

RECONSTRUCTION = 200.0
"""Weight of the mean squared error beside a task's loss; the paper's."""


class Full(NamedTuple):
    """A full prompt, or full adapters, that were trained on a task."""

    vector: Tensor
    """``[n]``"""
    scores: Scores


class Known(NamedTuple):
    """What a task's numbers are told beside."""

    start: Scores
    """Of the model alone."""
    full: Scores
    """Of a full prompt."""


def without_prompt(workshop: Workshop, task: Task) -> Scores:
    """The scores of the model alone. Raises: ConfigError where the loss is no number."""
    return workshop.score(task, f"{task.name} without a prompt", "--seq-len")


def train_full(workshop: Workshop, task: Task, whole: Whole, what: str = "") -> Full:
    """Train one; ``what`` it is called. Raises: as :meth:`Workshop.tune`."""
    handle, scores = workshop.tune(whole.delta, task, what or task.name)
    try:
        return Full(whole.vector(handle), scores)
    finally:
        handle.revert()


def fit(
    workshop: Workshop,
    tasks: Sequence[Task],
    out: Path,
    *,
    model: str,
    whole: Whole,
    intrinsic_dim: int,
    fit_steps: int,
    fit_lr: float = 1e-3,
    full: Sequence[Full] | None = None,
) -> list[tuple[str, Scores, Scores]]:
    """Train a prompt (or adapters) for each task and fit a decoder to them, into ``out``.

    Args:
        workshop: with the model.
        tasks: two or more.
        out: for the decoder, and what each task has in full in ``out/full/TASK``.
        model: what the workshop's model was loaded from, for the file.
        whole: what a task has in full.
        intrinsic_dim: q.
        fit_steps: of the auto-encoder, the tasks in turns.
        fit_lr: its peak learning rate.
        full: of each task, in the same order; None trains them.
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
    whole.intrinsic(q=intrinsic_dim)  # raises where q is none
    if full is None:
        full = [train_full(workshop, task, whole) for task in tasks]
    vectors = torch.stack([one.vector for one in full])
    with whole.bound(workshop.model, vectors[0]) as handle:
        sizes, about = whole.sizes(handle, intrinsic_dim), whole.facts(handle)
    torch.manual_seed(workshop.settings.seed)
    coder = AutoEncoder(sizes).to(vectors.device)
    decoded = _fit_coder(workshop, tasks, whole, vectors, coder, fit_steps, fit_lr)
    rows = [(t.name, one.scores, d) for t, one, d in zip(tasks, full, decoded, strict=True)]
    facts = {
        **about,
        "base_model": model,
        "model": workshop.fingerprint,
        "answers": workshop.answering.answers,
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
        for task, vector in zip(tasks, vectors, strict=True):
            with whole.bound(workshop.model, vector) as handle:
                handle.save(scratch / "full" / task.name)
        write_decoder(scratch, sizes, coder.tensors(vectors), facts)
    return rows


def tune(
    workshop: Workshop,
    tasks: Sequence[Task],
    decoder: Path,
    out: Path,
    *,
    compare: bool,
    lr: float | None = None,
    known: Mapping[str, Known] | None = None,
) -> list[Recovered]:
    """Tune the q numbers of each task by the decoder in a folder; they go to ``out/TASK``.

    Args:
        workshop: with the model that the decoder was fitted on.
        tasks: seen by the decoder or not.
        decoder: folder of :func:`fit`.
        out: for the numbers and metrics.json.
        compare: train a full prompt (or adapters) as well, where the decoder's file has no scores
            of one that was trained on the same data in the same way.
        lr: peak learning rate of the numbers; None for that of the settings.
        known: of tasks by name, where it is known beforehand.
    Raises: ConfigError, CheckpointError, TargetError; Stopped, and called again with the same it
        goes on after the tasks that are done.
    """
    if lr is not None:
        check_rate("--intrinsic-lr", lr)
    facts = read_facts(decoder)
    if facts.get("model") != workshop.fingerprint:
        raise ConfigError(
            f"--model {workshop.name} must be the model that the decoder in {decoder} was fitted "
            f"on ({facts.get('base_model')}, answers {facts.get('answers')}), and has other "
            "weights. Leave --model and --answers out, name that one, or fit a decoder on this one."
        )
    whole = whole_in(facts)
    delta = whole.intrinsic(decoder=decoder)
    seen = {known["texts"] for known in facts["tasks"]}
    head = {
        "decoder_digest": facts["digest"],
        "model": workshop.fingerprint,
        "answers": workshop.answering.answers,
        "settings": dataclasses.asdict(workshop.settings),
        "intrinsic_lr": lr,
        "compare": compare,
    }
    before = {(row.task, row.texts): row for row in read_recovered(out, head)}
    head["decoder"] = str(decoder)  # which may have moved in between
    found = list(before.values())
    write_recovered(out, head, found)  # the folder is known by it
    for task in tasks:
        if (task.name, task.texts) in before:
            continue
        found_before = (known or {}).get(task.name)
        if found_before is None:
            start, full = without_prompt(workshop, task), _known(facts, task, workshop)
        else:
            start, full = found_before
        handle, scores = workshop.tune(delta, task, task.name, lr)
        try:
            handle.save(out / task.name)
        finally:
            handle.revert()
        if full is None and compare:
            full = train_full(workshop, task, whole, f"{task.name}, {whole.title}").scores
        found = [row for row in found if row.task != task.name]
        found.append(Recovered(task.name, task.texts, task.texts in seen, start, scores, full))
        write_recovered(out, head, found)
    return found


def base_model(decoder: Path) -> str:
    """What the decoder in a folder was fitted on. Raises: CheckpointError."""
    found = read_facts(decoder).get("base_model")
    if not isinstance(found, str):
        raise CheckpointError(f"{decoder / FACTS} names no base_model. Pass --model.")
    return found


def whole_of_decoder(decoder: Path) -> Whole:
    """What the decoder in a folder makes. Raises: CheckpointError."""
    return whole_in(read_facts(decoder))


def answers_of(decoder: Path) -> str | None:
    """How the model answered that the decoder in a folder was fitted on; None where it says not."""
    found = read_facts(decoder).get("answers")
    return found if isinstance(found, str) else None


# ------------------------------------------------------------------------------------- details


def _fit_coder(
    workshop: Workshop,
    tasks: Sequence[Task],
    whole: Whole,
    vectors: Tensor,
    coder: AutoEncoder,
    steps: int,
    lr: float,
) -> list[Scores]:
    """Train ``coder`` on ``vectors [N, n]``; returns how well each task does with its own."""
    settings = workshop.settings
    with whole.coded(workshop.model, vectors, coder) as coded:
        optimizer = make_optimizer([{"params": list(coder.parameters())}], lr)
        schedule = Schedule(steps, lr)
        orders = [Order(len(t.fit), settings.batch_size, settings.seed) for t in tasks]
        for step in range(steps):
            if workshop.should_stop():
                raise Stopped
            turn, coded.task = divmod(step, len(tasks))
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            rows = orders[coded.task].rows(turn)
            task = tasks[coded.task]
            loss = task.reader.train()(**to_device(task.fit.batch(rows), vectors.device)).loss
            assert coded.error is not None  # the pass before set it
            both = loss + RECONSTRUCTION * coded.error
            if not math.isfinite(float(both.detach())):
                raise ConfigError(
                    f"the decoder's loss of step {step + 1} is {float(both.detach())}; nothing "
                    "was written. Try a smaller --fit-lr."
                )
            both.backward()
            torch.nn.utils.clip_grad_norm_(coder.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            workshop.on_step("decoder", step + 1, float(loss.detach()))
        scores = []
        for number, task in enumerate(tasks):
            coded.task = number
            scores.append(workshop.score(task, f"{task.name}, decoded again,", "--fit-lr"))
        return scores


def _known(facts: Mapping[str, Any], task: Task, workshop: Workshop) -> Scores | None:
    """The scores of a full prompt on the same data, trained in the same way."""
    if facts.get("settings") != dataclasses.asdict(workshop.settings):
        return None
    for known in facts["tasks"]:
        if known["data"] == task.fingerprint:
            found: Scores = known["full"]
            return found
    return None
