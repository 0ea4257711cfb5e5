"""S of a layer that was made with its x, in the pass of the op before (:mod:`.foresee`).

It waits in this thread until the layer is called with that very tensor and those very factors.
Whoever is not asks for S as ever: a wrong guess costs time and changes nothing.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from deltaops.backends import DeltaLinearPlan, GivenPlan, GroupMember, ProducingBackend


class Ahead:
    """The layers whose S is to be made with y, and, once y is there, S of each."""

    def __init__(self, runner: ProducingBackend, members: Sequence[GroupMember]) -> None:
        self.runner = runner
        self.members = tuple(members)
        self.s: Sequence[Tensor] = ()

    def leave(self, y: Tensor) -> None:
        """Let S wait for the layers' calls with ``y``."""
        made = [_made(member, s) for member, s in zip(self.members, self.s, strict=True)]
        SLOT.waiting = _Waiting(weakref.ref(y), _version(y), made)


class Made(NamedTuple):
    """What waits for a layer."""

    plan: DeltaLinearPlan
    a: tuple[Tensor, ...]
    versions: tuple[int | None, ...]
    s: Tensor
    """``[M, ΣR]`` float32."""
    seed: Tensor | None
    """By which dropout went."""


class _Waiting(NamedTuple):
    y: weakref.ref[Tensor]
    version: int | None
    made: list[Made]


class _Slot(threading.local):
    waiting: _Waiting | None = None


SLOT = _Slot()
"""What waits in this thread; looked at before a call of :func:`claim`, which costs more."""


def claim(x: Tensor, plan: DeltaLinearPlan, operands: Sequence[Tensor | None]) -> Made | None:
    """What waits for the layer of these ``operands`` that is called with ``x``, once."""
    waiting = SLOT.waiting
    if waiting is None or waiting.y() is not x:
        return None
    if waiting.version != _version(x):
        SLOT.waiting = None
        return None
    a = operands[: len(operands) // 3]
    for i, made in enumerate(waiting.made):
        same = len(a) == len(made.a) and all([t is u for t, u in zip(a, made.a, strict=True)])
        fresh = same and made.versions == tuple([_version(t) for t in made.a])
        if fresh and _alike(plan, made.plan):
            del waiting.made[i]
            if not waiting.made:
                SLOT.waiting = None
            return made
    return None


class WithS:
    """A plan that has its S already; see :class:`deltaops.backends.DeltaLinearPlan`."""

    def __init__(self, plan: GivenPlan, s: Tensor) -> None:
        self.plan = plan
        self.s = s

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Tensor | None],
        seed: Tensor | None,
        keep: bool,
        adapter: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """S is what was made; ``seed`` has decided it, and the backward pass reads it again."""
        return self.plan.forward_given(x, weight, bias, operands, self.s), self.s

    def backward(self, *args: Any) -> list[Tensor]:
        """The plan's own."""
        return self.plan.backward(*args)


def _made(member: GroupMember, s: Tensor) -> Made:
    a = tuple([t for t in member.operands[: len(member.operands) // 3] if t is not None])
    return Made(member.plan, a, tuple([_version(t) for t in a]), s, member.seed)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version


def _alike(plan: DeltaLinearPlan, other: DeltaLinearPlan) -> bool:
    """Whether both have the same settings: strides of x, which y's stand-in may not have had, make
    two of what is one."""
    return plan is other or (type(plan) is type(other) and vars(plan) == vars(other))
