"""Train one candidate alone on a frozen model, and judge it on what is held out."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from deltaops.errors import ConfigError
from deltaops.methods import parts_of
from deltaops.methods.base import Site
from deltaops.surgery import Handle, attach
from deltaops.tuning.loop import Point, make_optimizer, to_device, train
from deltaops.tuning.tokens import Order
from deltaops.tuning.workshop import Stopped, Task, Workshop

from .candidate import Candidate, Part

MOMENTS = 3
"""Tensors beside each trained one: its gradient and AdamW's two moments."""

OnRung = Callable[[int, dict[str, float]], bool]
"""Called with an evaluation's number (from 1) and scores; whether the trial is worth going on."""


class NotFinite(Exception):
    """A loss that is no number any more."""


@dataclass(frozen=True)
class Result:
    """What a trial found. ``scores`` are of the last evaluation; a pruned one has those before."""

    scores: dict[str, float]
    pruned: bool
    parameters: int
    seconds: float | None
    """Of a step, the median; None in a pack."""
    memory: int | None
    """Bytes; None in a pack."""
    layers: dict[str, int]
    """Trained parameters by the index of the layer, "" for those outside of all."""

    def value(self, objective: str) -> float:
        """That of one of :data:`.settings.GOALS`."""
        if objective in self.scores:
            return self.scores[objective]
        found = getattr(self, objective)
        assert found is not None  # the settings refuse packs that are judged by it
        return float(found)


def rungs(steps: int, count: int) -> list[int]:
    """The steps after which a trial is judged, ``count`` of them, the last after all."""
    return [steps * (i + 1) // count for i in range(count)]


def train_alone(
    shop: Workshop, task: Task, candidate: Candidate, steps: int, count: int, on_rung: OnRung
) -> tuple[Result, Handle]:
    """Train ``candidate``; it stays attached.

    Data order, start values and dropout depend on the workshop's seed and the candidate alone.
    Raises: NotFinite, Stopped, and whatever the model raises; the model is then as it was.
    """
    seed = shop.settings.seed
    torch.manual_seed(seed)
    handle = attach(shop.model, candidate.delta, generator=torch.Generator().manual_seed(seed))
    try:
        optimizer = make_optimizer(groups(handle, candidate), 1.0)  # each step sets the rate
        order = Order(len(task.fit), candidate.batch_size, seed)
        schedule = candidate.rate_of(steps)
        memory = kept_bytes(task, order, handle)
        seconds: list[float] = []
        last = time.perf_counter()

        def told(point: Point) -> None:
            nonlocal last
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
            shop.on_step("trial", point.step, point.loss)

        start, scores, pruned = 0, {}, False
        for number, until in enumerate(rungs(steps, count), 1):
            part = Part.of(schedule, until)
            last = time.perf_counter()
            try:
                finished = train(
                    task.reader, task.fit, order, optimizer, part,
                    start=start, on_step=told, should_stop=shop.should_stop,
                )  # fmt: skip
            except ConfigError as error:  # the loop's word for a loss that is no number
                raise NotFinite(str(error).partition(";")[0]) from error
            if not finished:
                raise Stopped
            scores, start = judged(shop, task), until
            if not on_rung(number, scores) and until < steps:
                pruned = True
                break
        result = Result(
            scores, pruned, sum(p.numel() for p in handle.parameters()),
            statistics.median(seconds), memory, by_layer(handle),
        )  # fmt: skip
        return result, handle
    except BaseException:  # also KeyboardInterrupt: the model is used again
        handle.revert()
        raise


def judged(shop: Workshop, task: Task) -> dict[str, float]:
    """Scores on what is held out. Raises: NotFinite."""
    scores = shop.answering.score(task.reader, task.held.by_length(), EVALUATED)
    if not math.isfinite(scores["loss"]):
        raise NotFinite(f"the loss on what is held out is {scores['loss']}")
    return scores


EVALUATED = 32
"""Texts of a batch that is judged: the same for every candidate, or rounding would differ."""


def groups(handle: Handle, candidate: Candidate, named: str = "") -> list[dict[str, Any]]:
    """What trains, in groups for the optimizer; "pace" is a group's factor of the greatest rate,
    at which modules learn that are trained whole.

    Args:
        handle: of the candidate's delta.
        candidate: whose rates count.
        named: the part of ``handle`` that the candidate is, where it is one of several.
    """
    paces = candidate.paces()
    parts = parts_of(candidate.delta)
    found: dict[float, list[Tensor]] = {}
    for site, tensors in _places(handle, named).items():
        part = "" if "" in parts else site.part
        for suffix, tensor in tensors.items():
            pace = paces[part] * parts[part].pace(suffix)
            found.setdefault(pace, []).append(tensor)
    for module in handle.saved().values():
        found.setdefault(1.0, []).extend(module.parameters())
    return [
        {"params": tensors, "lr": candidate.rate * pace, "pace": pace}
        for pace, tensors in found.items()
    ]


def kept_bytes(task: Task, order: Order, handle: Handle) -> int:
    """Bytes that the first step keeps for its backward pass, each storage once, the frozen weights
    left out; and gradients and moments of what trains. The generators are as before."""
    frozen = {p.untyped_storage().data_ptr() for p in task.reader.parameters()}
    frozen |= {b.untyped_storage().data_ptr() for b in task.reader.buffers()}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    task.reader.train()
    device = next(task.reader.parameters()).device
    batch = to_device(task.fit.batch(order.rows(0)), device)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        loss = task.reader(**batch).loss
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return held + MOMENTS * sum(p.numel() * p.element_size() for p in handle.parameters())


def by_layer(handle: Handle, named: str = "") -> dict[str, int]:
    """Trained parameters by the index of the layer that they are in; ``named`` as above."""
    trained = [(site.path, t) for site, own in _places(handle, named).items() for t in own.values()]
    trained += [(path, p) for path, module in handle.saved().items() for p in module.parameters()]
    found: dict[str, int] = {}
    for path, tensor in trained:
        index = next((part for part in path.split(".") if part.isdigit()), "")
        found[index] = found.get(index, 0) + tensor.numel()
    return dict(sorted(found.items(), key=lambda item: (item[0] == "", int(item[0] or 0))))


def _places(handle: Handle, named: str) -> dict[Site, dict[str, Parameter]]:
    return {s: own for s, own in handle.by_place().items() if not named or s.part == named}
