"""Calls that are known: checked once, and from then on only their tensors are looked at.

A small layer takes less time than its checks. They look at dtypes, shapes, strides, devices and
settings, and so does the choice of a backend; all of that is a call's signature. What follows from
a signature, the plan, is kept; a plan holds no tensor.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor
from torch.nn import Parameter

from deltaops.backends import Backend, DeltaLinearPlan

Signature = tuple[Hashable, ...]

_MOST = 4096
_PLAIN = (Tensor, Parameter)


class PlainPlan:
    """The plan of a backend that prepares nothing: it is told the settings in every call."""

    def __init__(
        self,
        runner: Backend,
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> None:
        self._runner = runner
        self._settings = scaling, dropout, activation

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        seed: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`deltaops.backends.DeltaLinearPlan`."""
        return self._runner.forward(x, weight, bias, a, b, branch_bias, *self._settings, seed)

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.DeltaLinearPlan`."""
        return self._runner.backward(grad_y, x, weight, a, b, s, *self._settings, seed, needs)


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


def signature(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[
        tuple[Tensor, Tensor, float, float, str, Tensor | None]
    ],  # deltaops.ops.Branch
    backend: str,
    strict: bool,
) -> Signature | None:
    """All that the checks and the backends look at; None for tensors of another class."""
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return None
    # In one list, with is_cpu for the device: half the time of a loop over tuples.
    parts: list[Hashable] = [backend, strict]
    parts += x.dtype, x.shape, x.stride(), x.is_cpu or x.device
    parts += weight.dtype, weight.shape, weight.stride(), weight.is_cpu or weight.device
    if bias is None:
        parts.append(None)
    elif type(bias) in _PLAIN:
        parts += bias.dtype, bias.shape, bias.stride(), bias.is_cpu or bias.device
    else:
        return None
    for a, b, scaling, dropout, activation, inner in branches:
        if type(a) not in _PLAIN or type(b) not in _PLAIN:
            return None
        parts += float(scaling), float(dropout), activation
        parts += a.dtype, a.shape, a.stride(), a.is_cpu or a.device
        parts += b.dtype, b.shape, b.stride(), b.is_cpu or b.device
        if inner is None:
            parts.append(None)
        elif type(inner) in _PLAIN:
            parts += inner.dtype, inner.shape, inner.stride(), inner.is_cpu or inner.device
        else:
            return None
    return tuple(parts)


class Plans(dict[Signature, DeltaLinearPlan]):
    """Those of this process. Safe to use from several threads: a lost plan is made again."""

    def keep(self, key: Signature, plan: DeltaLinearPlan) -> None:
        """Remember ``plan``; after some thousand different calls it starts anew."""
        if len(self) >= _MOST:
            self.clear()
        self[key] = plan


PLANS = Plans()
