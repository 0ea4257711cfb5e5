"""Several frozen linear layers of the same x, as one op: q, k and v; gate and up.

    yᵢ = x Wᵢᵀ + biasᵢ + deltasᵢ(x)          dx = Σᵢ dxᵢ

x is read once for all of them, and its gradient written once: neither is there a pass over x a
layer, nor one over dx for each that is added. Only eager calls are grouped: what somebody looks at
(a compiler, a transform, a mode), and what a backend has no group for, is layer after layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltaops.backends import GroupingPlan, GroupMember

from .delta_linear import Branch, cast_layer, delta_linear, draw_seed, prepare, watched
from .made import claim
from .paths import needs_grad, shaped

MOST = 16
"""Layers in a group (deltaops.h); more are taken one after the other."""


class Layer(NamedTuple):
    """A frozen linear layer with its branches: the arguments of :func:`delta_linear` beside x."""

    weight: Tensor
    bias: Tensor | None = None
    branches: Sequence[Branch] = ()
    adapter: Tensor | None = None


def delta_linear_group(
    x: Tensor, layers: Sequence[Layer], *, backend: str = "auto", strict: bool = False
) -> list[Tensor]:
    """``[delta_linear(x, *layer) for layer in layers]``, in one pass over x where that is possible.

    Args:
        x: activations ``[..., K]``, floating point.
        layers: each as :func:`delta_linear` takes it; K is common, N of each its own.
        backend: passed to each.
        strict: passed to each.
    Returns: ``[..., Nᵢ]`` of each layer, the bits that it gives alone.
    Raises: what :func:`delta_linear` raises.
    Gradients: those of :func:`delta_linear`, on the CPU with their bits; that of ``x`` is summed up
        in float32 and rounded once, so its last bits may differ from a sum of rounded ones. Where
        a plan on a GPU leaves the products to the library, it is rounded after each.
    """
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64 and x.is_floating_point():
            x = x.to(target)
            layers = [
                Layer(*cast_layer(weight, bias, branches, target), adapter)
                for weight, bias, branches, adapter in layers
            ]
        with torch.autocast(device, enabled=False):
            return _run(x, layers, backend, strict)
    return _run(x, layers, backend, strict)


def _run(x: Tensor, layers: Sequence[Layer], backend: str, strict: bool) -> list[Tensor]:
    members = None if watched() else _members(x, layers, backend, strict)
    if members is None:
        return [delta_linear(x, *layer, backend=backend, strict=strict) for layer in layers]
    tensors = [t for m in members for t in (m.weight, m.bias, m.seed, m.adapter, *m.operands)]
    if needs_grad(x, *tensors):
        plans = [(m.plan, len(m.operands), m.s) for m in members]
        return list(GroupFunction.apply(x, plans, *tensors))  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
    return [y for y, _ in _forward(x, members, False)]


def _members(
    x: Tensor, layers: Sequence[Layer], backend: str, strict: bool
) -> list[GroupMember] | None:
    """The layers' calls; None where they have no backend in common that takes them together."""
    if not 1 < len(layers) <= MOST:
        return None
    prepared = []
    for layer in layers:
        call = prepare(x, *layer, backend, strict)
        if call is None:
            return None
        prepared.append(call)
    kinds = {type(known.plan) for known, *_ in prepared}
    if len(kinds) != 1 or not hasattr(prepared[0][0].plan, "forward_group"):
        return None
    found = [
        GroupMember(plan, layer.weight, layer.bias, operands, None, ids)
        for layer, ((plan, _), operands, ids) in zip(layers, prepared, strict=True)
    ]
    made = [
        claim(x, member.plan, member.operands) if member.adapter is None else None
        for member in found
    ]
    if None not in made:  # else S of all is made in one pass over x
        return [
            member._replace(seed=one.seed, s=one.s)
            for member, one in zip(found, made, strict=True)
            if one is not None
        ]
    # seeds are drawn last: one layer after the other, none is drawn in vain
    return [
        member._replace(seed=draw_seed(x.device)) if known.random else member
        for member, (known, _, _) in zip(found, prepared, strict=True)
    ]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _forward(
    x: Tensor, members: Sequence[GroupMember], keep: bool
) -> list[tuple[Tensor, Tensor | None]]:
    results = cast(GroupingPlan, members[0].plan).forward_group(_rows(x), members, keep)
    if x.dim() == 2:
        return results
    return [(shaped(y, (*x.shape[:-1], y.shape[-1])), s) for y, s in results]


def _backward(
    grad_y: Sequence[Tensor],
    x: Tensor | None,
    members: Sequence[GroupMember],
    s: Sequence[Tensor],
    needs: Sequence[Sequence[bool]],
) -> list[list[Tensor]]:
    plan = cast(GroupingPlan, members[0].plan)
    flat = None if x is None else _rows(x)
    grads = plan.backward_group([_rows(g) for g in grad_y], flat, members, s, needs)
    if needs[0][0] and grad_y[0].dim() != 2:
        grad_x = grads[0][0]
        grads[0][0] = shaped(grad_x, (*grad_y[0].shape[:-1], grad_x.shape[-1]))
    return grads


class GroupFunction(torch.autograd.Function):
    """The eager path. Tensors come by layer: weight, bias, seed, adapter, a…, b…, branch_bias…."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plans: list[Any], *tensors: Tensor | None) -> Any:
        members, at = [], 0
        for plan, count, made in plans:
            weight, bias, seed, adapter, *operands = tensors[at : at + 4 + count]
            assert weight is not None
            members.append(GroupMember(plan, weight, bias, operands, seed, adapter, made))
            at += 4 + count
        results = _forward(x, members, True)
        wants = ctx.needs_input_grad[2:]
        saved: list[Tensor | None] = []
        any_a, at = False, 0
        for member, (_y, s) in zip(members, results, strict=True):
            count = len(member.operands) // 3
            any_a = any_a or True in wants[at + 4 : at + 4 + count]
            saved += member.weight, s, member.seed, member.adapter, *member.operands[: 2 * count]
            at += 4 + 3 * count
        ctx.save_for_backward(x if any_a else None, *saved)
        ctx.plans = plans
        ctx.set_materialize_grads(False)
        return tuple([y for y, _ in results])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        wants_x, _plans, *wants = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(wants)
        # those whose output was used; where the others' gradients go, nothing is written
        members, places, s, dy, needs = [], [], [], [], []
        at = saved_at = 0
        for (plan, length, _), grad in zip(ctx.plans, grad_y, strict=True):
            count = length // 3
            weight, s_i, seed, adapter, *operands = saved[saved_at : saved_at + 4 + 2 * count]
            if grad is not None:
                # the branches' biases are not read again
                operands += [None] * count
                members.append(GroupMember(plan, weight, None, operands, seed, adapter))
                places.append(at)
                s.append(s_i)
                dy.append(grad.resolve_neg())
                needs.append([wants_x, wants[at + 1], *wants[at + 4 : at + 4 + length]])
            at += 4 + length
            saved_at += 4 + 2 * count
        if not members:
            return (None, None, *grads)
        found = _backward(dy, x, members, s, needs)
        grad_x = found[0].pop(0) if wants_x else None
        for place, want, mine in zip(places, needs, found, strict=True):
            each = iter(mine)
            slots = [place + 1, *range(place + 4, place + 2 + len(want))]
            for slot, need in zip(slots, want[1:], strict=True):
                grads[slot] = next(each) if need else None
        return (grad_x, None, *grads)
