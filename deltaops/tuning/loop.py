"""A plain training loop: AdamW on what trains, linear warm-up and decay, clipped gradients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from deltaops.errors import ConfigError

from .tokens import Order, TokenSet

CLIP = 1.0
FUSED = ("cpu", "cuda")
"""Devices on which torch's AdamW updates all tensors in one call."""


@dataclass(frozen=True)
class Schedule:
    """Steps in all, peak learning rate and the part of the steps that warms up to it."""

    steps: int
    lr: float
    warmup: float = 0.06

    def rate(self, step: int) -> float:
        """Learning rate of ``step`` (from 0): up to ``lr`` linearly, then down to 0."""
        warm = max(1, round(self.steps * self.warmup))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * (self.steps - step) / max(1, self.steps - warm)


@dataclass(frozen=True)
class Point:
    """One step: its number (from 1), mean loss in nats, learning rate and tokens a second."""

    step: int
    loss: float
    lr: float
    tokens_per_second: float


class Steering(Protocol):
    """Such as a :class:`deltaops.strategy.Controller`."""

    def after_backward(self, loss: float) -> object:
        """Gradients are whole."""

    def after_step(self) -> object:
        """The optimizer has stepped."""


def make_optimizer(groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay: a delta starts at zero, and is pulled there by nothing else.

    Args:
        groups: such as ``handle.parameter_groups(lr)``; "pace" is a group's factor of the rate.
        lr: of groups that have none.
    """
    trained = [p for group in groups for p in group["params"]]
    if not trained:
        raise ConfigError("nothing to train: no parameter requires a gradient. Attach a delta.")
    # a delta is many small tensors: one call for all of them takes a quarter of the time
    fused = all(p.device.type in FUSED for p in trained)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.0, fused=fused)


def train(
    model: torch.nn.Module,
    data: TokenSet,
    order: Order,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    start: int = 0,
    on_step: Callable[[Point], None],
    should_stop: Callable[[], bool] = lambda: False,
    steer: Steering | None = None,
) -> bool:
    """Train from step ``start`` on; the model stays in training mode.

    Args:
        steer: told of each step's gradients, before they are clipped, and of its end.
    Returns: whether all steps are done; False where ``should_stop`` ended it after a whole step.
    Raises: ConfigError where the loss is no longer finite.
    """
    device = next(model.parameters()).device
    model.train()
    for step in range(start, schedule.steps):
        if should_stop():
            return False
        began = time.perf_counter()
        rate = schedule.rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("pace", 1.0)
        batch = data.batch(order.rows(step))
        loss = model(**to_device(batch, device)).loss
        loss.backward()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ConfigError(
                f"the loss of step {step + 1} is {value}; the run was stopped. Try a smaller --lr, "
                "or --dtype float32."
            )
        if steer is not None:
            steer.after_backward(value)
        # asked anew in each step: what steers may have put others there
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if steer is not None:
            steer.after_step()
        seconds = time.perf_counter() - began
        tokens = int(batch["attention_mask"].sum())
        on_step(Point(step + 1, value, rate, tokens / seconds))
    return True


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    data: TokenSet,
    batch_size: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, float] | None:
    """Mean loss in nats (per predicted token, or per example) and, of classes, the accuracy.

    Args:
        should_stop: asked before each batch.
        on_batch: called after each, for a progress bar.
    Returns: ``{"loss": …, "accuracy": …}``, or None where ``should_stop`` ended it.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    total, weight, right = 0.0, 0, 0
    for first in range(0, len(data), batch_size):
        if should_stop():
            model.train(was_training)
            return None
        batch = data.batch(range(first, min(first + batch_size, len(data))))
        out = model(**to_device(batch, device))
        labels = batch["labels"]
        # a model of B·T labels predicts B·(T-1) of them: the first token of a row has no past
        count = len(labels) if data.classes is not None else int((labels[:, 1:] >= 0).sum())
        total += float(out.loss) * count
        weight += count
        if data.classes is not None:
            right += int((out.logits.argmax(-1).cpu() == labels).sum())
        on_batch()
    model.train(was_training)
    result = {"loss": total / max(1, weight)}
    if data.classes is not None:
        result["accuracy"] = right / weight
    return result


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Any]:
    """The batch on ``device``."""
    return {name: t.to(device) for name, t in batch.items()}
