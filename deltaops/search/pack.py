"""Train several LoRA candidates in one batch over the same frozen model.

The batch is the members' batches one after the other, and the places are told whose each sample is
(:class:`deltaops.modules.Samples`): the frozen products run once, over all rows, and a member's
branch over its own. The loss is the sum of the members' mean losses, so that each has the gradient
that it would have alone; each has its own optimizer, clipping, schedule and end.

What is the same as alone, to the rounding of products of other sizes:

order     a member's batches are :class:`Order`'s for its own batch size and the study's seed.
padding   rows are as long as the longest of all members; what is beyond a text is masked.
start     each member's A and B are drawn as if it were attached by itself.
dropout   each member has a generator of its own, seeded by the study, and draws one mask a layer
          and step, in the layers' order, over its own rows as long as they would be alone. So the
          masks do not depend on who else is in the pack. They are not those of the fused op, which
          counts rows of a whole batch: of a study with ``pack``, candidates that can be packed are
          trained here also when they are alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltaops.errors import ConfigError, DeltaopsError
from deltaops.methods import Combined, LoRA
from deltaops.methods.base import LINEAR
from deltaops.modules import SAMPLES, Samples
from deltaops.surgery import Handle, attach, plan
from deltaops.tuning.loop import CLIP, make_optimizer, to_device
from deltaops.tuning.sentence import NamedClasses
from deltaops.tuning.tokens import Order
from deltaops.tuning.workshop import Stopped, Task, Workshop

from .candidate import Candidate
from .trainer import NotFinite, OnRung, Result, by_layer, groups, judged, rungs


class NotByRows(Exception):
    """A layer of the model that sees something else than the texts of its batch, one after the
    other: a pack could not tell whose they are."""


def check_packs(task: Task) -> None:
    """Raises: ConfigError where no candidate could share a batch."""
    if not isinstance(task.reader, NamedClasses):
        raise ConfigError(
            "--pack needs an encoder that answers by the names of labels, and this model writes "
            "its answers. Pass --pack 1."
        )


def unpackable(shop: Workshop, candidate: Candidate) -> str | None:
    """Why a candidate must be trained by itself; None where it can share a batch."""
    delta = candidate.delta
    if type(delta) is not LoRA:
        return "it is no LoRA"
    if delta.use_dora or delta.init_lora_weights not in (True, "gaussian"):
        return "it changes more of a layer than what it adds"
    if delta.modules_to_save:
        return "it trains whole modules"
    try:
        sites = plan(shop.model, delta).sites
    except DeltaopsError:
        return "the model refuses it"  # as attaching it will say in full
    if any(site.place != LINEAR for site in sites):
        return "it is on other places than linear layers"
    return None


@dataclass
class Member:
    """One candidate of a pack."""

    name: str
    candidate: Candidate
    on_rung: OnRung
    order: Order
    masks: torch.Generator
    optimizer: torch.optim.Optimizer
    pieces: list[Tensor]
    """All that it trains, a tensor for each rate; see :func:`_joined`."""
    scores: dict[str, float] = field(default_factory=dict)
    outcome: Result | NotFinite | None = None

    @property
    def dropout(self) -> float:
        """Of its branches."""
        return float(self.candidate.delta.dropout)  # type: ignore[union-attr]  # a LoRA


def train_pack(
    shop: Workshop,
    task: Task,
    candidates: Sequence[tuple[Candidate, OnRung]],
    steps: int,
    count: int,
) -> tuple[list[Result | NotFinite], Handle]:
    """Train all of ``candidates``; they stay attached, as the parts ``c0``, ``c1``, ….

    Args:
        shop: has the model.
        task: of the shop.
        candidates: that :func:`unpackable` has no word against, with who is told of evaluations.
        steps: of each.
        count: evaluations of each.
    Returns: what each found, or what broke it, in their order; and the handle of all.
    Raises: Stopped, NotByRows, and what the model raises for the batch of all; the model is then
        as it was.
    """
    seed = shop.settings.seed
    named = {f"c{i}": candidate.delta for i, (candidate, _) in enumerate(candidates)}
    drawn_by = {name: torch.Generator().manual_seed(seed) for name in named}
    handle = attach(shop.model, Combined(named), generator=drawn_by)  # type: ignore[arg-type]  # each is a LoRA
    try:
        members = []
        for name, (candidate, on_rung) in zip(named, candidates, strict=True):
            trained = _joined(groups(handle, candidate, name))
            members.append(
                Member(
                    name, candidate, on_rung,
                    Order(len(task.fit), candidate.batch_size, seed),
                    torch.Generator(next(handle.model.parameters()).device).manual_seed(seed),
                    make_optimizer(trained, 1.0),  # each step sets the rate
                    [p for group in trained for p in group["params"]],
                )
            )  # fmt: skip
        with _routed(handle, any(member.dropout for member in members)) as rows:
            _train(shop, task, members, rows, handle, steps, count)
        found = [member.outcome for member in members]
        return [one for one in found if one is not None], handle
    except BaseException:  # also KeyboardInterrupt: the model is used again
        handle.revert()
        raise


def _train(
    shop: Workshop,
    task: Task,
    members: Sequence[Member],
    rows: Rows,
    handle: Handle,
    steps: int,
    count: int,
) -> None:
    judges = {step: number for number, step in enumerate(rungs(steps, count), 1)}
    live = list(members)
    task.reader.train()  # once: a walk through all modules takes as long as a layer
    for step in range(steps):
        if shop.should_stop():
            raise Stopped
        if not live:
            return
        loss = _step(task, live, rows, step, steps)
        live = [member for member in live if member.outcome is None]
        shop.on_step("pack", step + 1, loss)
        if step + 1 not in judges:
            continue
        for member in live:
            rows.only(member)
            try:
                member.scores = judged(shop, task)
            except NotFinite as error:
                member.outcome = error
                continue
            going = member.on_rung(judges[step + 1], member.scores)
            if step + 1 == steps or not going:
                member.outcome = Result(
                    member.scores, step + 1 < steps, sum(p.numel() for p in member.pieces), None,
                    None, by_layer(handle, member.name),
                )  # fmt: skip
        live = [member for member in live if member.outcome is None]


def _step(task: Task, live: Sequence[Member], rows: Rows, step: int, steps: int) -> float:
    """One of all members. Returns: the mean of their losses."""
    picked = [member.order.rows(step) for member in live]
    lengths = [max(len(task.fit.ids[i]) for i in own) for own in picked]
    batch = task.fit.batch([i for own in picked for i in own])
    rows.share(live, [len(own) for own in picked], lengths)
    device = next(task.reader.parameters()).device
    placed = to_device(batch, device)
    logits: Tensor = task.reader(**placed).logits
    sizes = [len(own) for own in picked]
    pairs = zip(torch.split(logits, sizes), torch.split(placed["labels"], sizes), strict=True)
    losses = torch.stack([functional.cross_entropy(own, right) for own, right in pairs])
    losses.sum().backward()  # type: ignore[no-untyped-call]  # torch's has no types
    values: list[float] = losses.tolist()
    for member, value in zip(live, values, strict=True):
        if not math.isfinite(value):
            member.outcome = NotFinite(f"the loss of step {step + 1} is {value}")
            continue
        rate = member.candidate.rate_of(steps).rate(step)
        for group in member.optimizer.param_groups:
            group["lr"] = rate * group["pace"]
        torch.nn.utils.clip_grad_norm_(member.pieces, CLIP)
        member.optimizer.step()
    for member in live:
        member.optimizer.zero_grad(set_to_none=False)  # the layers' gradients are views of it
    return float(sum(values) / len(values))


# ------------------------------------------------------------------------------------- the places


class Rows(Samples):
    """Which rows of a batch are whose; what every place of the pack reads."""

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.sizes: list[int] = []
        self.lengths: list[int] = []
        self.alone: Member | None = None
        """Whose all batches are."""
        super().__init__(())

    def share(
        self, members: Sequence[Member], sizes: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """The next batch is of these members, of so many texts each, and they so long."""
        self.members, self.sizes, self.lengths = list(members), list(sizes), list(lengths)
        self.alone = None
        self.tell([m.name for m, size in zip(members, sizes, strict=True) for _ in range(size)])

    def only(self, member: Member) -> None:
        """All batches are of this member."""
        self.share([member], [1], [0])
        self.alone = member

    def check(self, x: Tensor) -> None:
        """Raises: NotByRows where x is neither ``[B, T, K]`` nor ``[B, K]`` of the batch."""
        if self.alone is not None:
            return
        batch = (len(self.names), max(self.lengths))[: x.dim() - 1]
        if x.dim() not in (2, 3) or x.shape[:-1] != batch:
            raise NotByRows(f"{list(x.shape)} in a batch of {len(self.names)} texts")


def _dropped(place: Any, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
    """Add to y ``[B, T, N]`` what the branches with dropout give of x ``[B, T, K]``.

    Args: a :class:`deltaops.modules.DeltaPlace` in training, whose op had none of these.
    """
    first = 0
    for member, size, length in zip(rows.members, rows.sizes, rows.lengths, strict=True):
        if member.dropout and member.name in place.lora:
            here = (slice(first, first + size), slice(length))[: x.dim() - 1]
            own = x[here]
            keep = 1 - member.dropout
            mask = torch.empty_like(own).bernoulli_(keep, generator=member.masks).div_(keep)
            inner = functional.linear(own * mask, place.lora_A[member.name].weight)
            scaled = place.lora[member.name].scaling * place.lora_B[member.name].weight
            y[here] += functional.linear(inner, scaled)
        first += size
    return y


def _forward(place: Any, rows: Rows, x: Tensor) -> Tensor:
    """``[B, T, K]`` → ``[B, T, N]`` of a place where a member has dropout of its own."""
    if not place.training:
        return type(place).forward(place, x)  # type: ignore[no-any-return]  # a place's
    rows.check(x)
    off = place.off
    place.__dict__["off"] = off | {m.name for m in rows.members if m.dropout}
    try:
        y = type(place).forward(place, x)
    finally:
        place.__dict__["off"] = off
    return _dropped(place, rows, x, y)


@contextmanager
def _routed(handle: Handle, dropout: bool) -> Iterator[Rows]:
    """Inside, the places of ``handle`` tell the members' rows apart.

    dropout: of any member. Layers that share an input then run one by one.
    """
    rows = Rows()
    places = [handle.model.get_submodule(path) for path in handle.sites]
    try:
        for place in places:
            place.__dict__[SAMPLES] = rows
            if dropout:
                place.__dict__["forward"] = partial(_forward, place, rows)
        yield rows
    finally:
        for place in places:
            place.__dict__[SAMPLES] = None
            place.__dict__.pop("forward", None)


def _joined(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The optimizer's groups, the tensors of each laid one after the other in a single one, of
    which they and their gradients become views: optimizer and norm of many small ones cost as much
    as the layers."""
    joined = []
    for group in found:
        tensors: list[Tensor] = group["params"]
        whole = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in tensors]))
        whole.grad = torch.zeros_like(whole)
        first = 0
        for p in tensors:
            last = first + p.numel()
            p.data = whole.data[first:last].view_as(p)
            p.grad = whole.grad[first:last].view_as(p)
            first = last
        joined.append(group | {"params": [whole]})
    return joined
