"""Calls that are known: checked once, and from then on only their tensors are looked at.

A small layer takes less time than its checks. They look at dtypes, shapes, strides, devices and
settings, and so does the choice of a backend; all of that is a call's signature. What follows from
a signature, the plan, is kept; a plan holds no tensor.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor

from deltaops.backends import Backend, DeltaLinearPlan, PlainPlan
from deltaops.backends.cpu import native

from .paths import PLAIN

Signature = Hashable

_MOST = 4096


def make_plan(
    runner: Backend,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
) -> DeltaLinearPlan:
    """``runner``'s own plan where it has one."""
    prepare = getattr(runner, "prepare", None)
    if prepare is None:
        return PlainPlan(runner, scaling, dropout, activation)
    plan: DeltaLinearPlan = prepare(weight, a, b, branch_bias, scaling, dropout, activation)
    return plan


Seen = tuple[Signature, list[Tensor | None]] | None


def look(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Any],  # deltaops.ops.Branch
    backend: str,
    strict: bool,
) -> Seen:
    """The signature and the branches' tensors, a… b… bias…; None where one is of another class, has
    no memory of its own (meta, sparse) or not its signs, or where a name is no text."""
    found: Seen = _looker()(x, weight, bias, branches, backend, strict)
    return found


@cache
def _looker() -> Any:
    """The native core's, where there is one and torch lets it view tensors."""
    core = native()
    return look_at_attributes if isinstance(core, str) or not core.views() else core.look


def look_at_attributes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Any],  # deltaops.ops.Branch
    backend: str,
    strict: bool,
) -> Seen:
    """:func:`look` without the native core, which takes a third of the time."""
    if not (_plain(x) and _plain(weight)):
        return None
    # Written out, with is_cpu for the device: half the time of loops over tuples.
    parts: list[Hashable] = [backend, strict]
    parts += x.dtype, x.shape, x.stride(), x.is_cpu or x.device
    parts += weight.dtype, weight.shape, weight.stride(), weight.is_cpu or weight.device
    if bias is None:
        parts.append(None)
    elif _plain(bias):
        parts += bias.dtype, bias.shape, bias.stride(), bias.is_cpu or bias.device
    else:
        return None
    downs, ups, inners = [], [], []
    for a, b, scaling, dropout, activation, inner in branches:
        if not (_plain(a) and _plain(b)):
            return None
        parts += float(scaling), float(dropout), activation
        parts += a.dtype, a.shape, a.stride(), a.is_cpu or a.device
        parts += b.dtype, b.shape, b.stride(), b.is_cpu or b.device
        if inner is None:
            parts.append(None)
        elif _plain(inner):
            parts += inner.dtype, inner.shape, inner.stride(), inner.is_cpu or inner.device
        else:
            return None
        downs.append(a)
        ups.append(b)
        inners.append(inner)
    return tuple(parts), downs + ups + inners


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in PLAIN and not tensor.is_neg()


class Known(NamedTuple):
    """What is kept of a signature."""

    plan: DeltaLinearPlan
    random: bool
    """Whether a call draws a seed: some branch has dropout."""


class Plans(dict[Signature, Known]):
    """Those of this process. Safe to use from several threads: a lost plan is made again."""

    def keep(self, key: Signature, known: Known) -> None:
        """Remember ``known``; after some thousand different calls it starts anew."""
        if len(self) >= _MOST:
            self.clear()
        self[key] = known


PLANS = Plans()
