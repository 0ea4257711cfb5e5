"""Several ``delta_linear`` of the same x: q, k and v; gate and up.

x is read once for S of all and once for dA of all, and dx is written once; the GEMMs of y, but for
those of the plan ``cuda``, and the passes over dy go layer by layer. See
:mod:`deltaops.kernels.group`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.backends.plain import PlainPlan, thirds
from deltaops.reference.quantized import QuantizedWeight

from . import beside, branches, core, cuda, delta_linear, planner, quantized

MOST_ONE_LAUNCH = 4
"""Layers: DELTAOPS_CUDA_MAX_OUTPUTS of csrc/include/deltaops_cuda.h, with two products each."""


FOR_LIBRARY = "cuda", "beside"
"""Plans whose dx is the CUDA library's."""


class TritonDeltaLinear(PlainPlan):
    """A ``delta_linear`` of known settings; see :class:`deltaops.backends.base.GroupingPlan`."""

    def __init__(
        self,
        ranks: Sequence[int],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> None:
        super().__init__(delta_linear, scaling, dropout, activation)
        self.ranks = tuple(ranks)

    @property
    def rank(self) -> int:
        """Columns of S."""
        return sum(self.ranks)

    def fuses(self, m: int, weight: QuantizedWeight) -> bool:
        """See :class:`deltaops.backends.base.QuantizedPlan`."""
        return quantized.fuses(m, weight)

    def forward_quantized(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        operands: Sequence[Any],
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.QuantizedPlan`."""
        settings = self.scaling, self.dropout, self.activation
        return quantized.forward(x, weight, bias, *thirds(operands), *settings, seed)

    def backward_quantized(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: QuantizedWeight,
        operands: Sequence[Any],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.QuantizedPlan`."""
        (a, b, _), settings = thirds(operands), (self.scaling, self.dropout, self.activation)
        return quantized.backward(grad_y, x, weight, a, b, s, *settings, seed, needs)

    def dequantize(self, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
        """See :class:`deltaops.backends.base.QuantizedPlan`."""
        return quantized.dequantize(weight, dtype)

    def forward_given(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Any],
        s: Tensor,
    ) -> Tensor:
        """See :class:`deltaops.backends.base.GivenPlan`."""
        a, b, inner = thirds(operands)
        with core.device_of(x):
            u = branches.activate(s, a, inner, self.scaling, self.activation, None)
            return delta_linear.outputs(x, weight, bias, a, b, u, self.dropout)

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember], keep: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """See :class:`deltaops.backends.base.GroupingPlan`."""
        plans = _plans(members)
        with core.device_of(x):
            pieces, whole = _s_of(x, members)
            if _is_one_launch(x, members):
                return _outputs(x, members, pieces, whole)
            results: list[tuple[Tensor, Tensor | None]] = []
            for plan, member, piece in zip(plans, members, pieces, strict=True):
                a, b, inner = thirds(member.operands)
                u = piece
                if x.shape[0]:
                    settings = inner, plan.scaling, plan.activation
                    u = branches.activate(piece, a, *settings, member.adapter)
                y = delta_linear.outputs(x, member.weight, member.bias, a, b, u, plan.dropout)
                results.append((y, piece))
        return results

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """See :class:`deltaops.backends.base.GroupingPlan`. A product that the plan leaves to the
        library adds onto dx, rounded in between."""
        plans, first = _plans(members), grad_y[0]
        (m, k), device = (first.shape[0], members[0].weight.shape[1]), first.device
        grad_x = torch.empty((m, k), dtype=first.dtype, device=device) if needs[0][0] else None
        width = sum(p.rank for p in plans)
        with core.device_of(first):
            parts, plan = _parts(first, members), None
            if m and grad_x is not None:
                plan = _planned(grad_x, grad_y, members, parts)
            # as the products take it, unless it is summed itself
            rounded = plan in FOR_LIBRARY and not any(map(_wants_inner, plans, needs))
            kind = first.dtype if rounded else torch.float32
            grad_s = torch.empty((m, width), dtype=kind, device=device)
            found = [
                _pass_over_dy(*one)
                for one in zip(grad_y, members, s, _split(grad_s, plans), needs, strict=True)
            ]
            grad_a = [t for mine in found for t in mine.a]
            together = plan == "beside" and all(t is not None for t in grad_a)
            if together and grad_x is not None and x is not None and _is_describable(x):
                weights, factors = [m.weight for m in members], [part.a for part in parts]
                whole = beside.backward_group(
                    grad_x, grad_y, x, weights, factors, grad_s, _split(grad_s, plans)
                )
                rows = branches.columns([p.rank for p in plans])
                for mine, piece in zip(found, rows, strict=True):
                    mine.a[:] = [whole[piece]]
            else:
                if m and any(t is not None for t in grad_a):
                    core.kernels("group").grad_down_group(
                        grad_s, x, parts, grad_a, capability=core.capability(grad_s)
                    )
                if plan is not None and grad_x is not None:
                    _write_grad_input(plan, grad_x, grad_y, members, grad_s, parts)
        lists = [
            [t for t in (mine.bias, *mine.a, *mine.b, *mine.inner) if t is not None]
            for mine in found
        ]
        if not m:
            lists = [[t.zero_() for t in mine] for mine in lists]
        if grad_x is not None:
            lists[0].insert(0, grad_x)
        return lists


class _Found(NamedTuple):
    """Gradients of one layer, where they are wanted."""

    bias: Tensor | None
    a: list[Tensor | None]
    b: list[Tensor | None]
    inner: list[Tensor | None]
    """Of the branches' biases."""


def _s_of(x: Tensor, members: Sequence[GroupMember]) -> tuple[list[Tensor], Tensor | None]:
    """S of each layer: those that were made with x, or all in one pass over it, and then all side
    by side too."""
    made = [member.s for member in members if member.s is not None]
    if len(made) == len(members):
        return made, None
    plans = _plans(members)
    width = sum(p.rank for p in plans)
    s = torch.empty((x.shape[0], width), dtype=torch.float32, device=x.device)
    if x.shape[0]:
        core.kernels("group").project_group(x, _parts(x, members), s)
    return _split(s, plans), s


def _pass_over_dy(
    grad_y: Tensor, member: GroupMember, s: Tensor, grad_s: Tensor, needs: Sequence[bool]
) -> _Found:
    """dS and what follows from it alone; dA has memory, and is not written yet."""
    plan, (a, b, _) = _plan(member), thirds(member.operands)
    count, n, device = len(a), member.weight.shape[0], grad_y.device
    precision = core.kernels("precision").rank_precision(grad_y.dtype, a)
    bias = torch.empty(n, dtype=grad_y.dtype, device=device) if needs[1] else None
    wanted = branches.wanted(a, b, needs[2:], device)
    found = _Found(bias, wanted[:count], wanted[count : 2 * count], wanted[2 * count :])
    if not grad_y.numel():
        for t in (grad_s, *found.b, *found.inner):
            if t is not None:
                t.zero_()
        return found
    for i, piece in enumerate(branches.columns(plan.ranks)):
        inner = found.inner[i]
        of_s = needs[0] or found.a[i] is not None or inner is not None
        branches.pass_over_dy(
            grad_y,
            b[i],
            s[:, piece],
            scaling=plan.scaling[i],
            activation=plan.activation[i],
            precision=precision,
            grad_s=grad_s[:, piece] if of_s else None,
            grad_b=found.b[i],
            grad_bias=bias if i == 0 else None,
            adapter=member.adapter,
            number=i,
        )
        if inner is not None:
            inner.copy_(grad_s[:, piece].sum(0))
    if bias is not None and count == 0:
        torch.sum(grad_y, 0, out=bias)
    return found


def _wants_inner(plan: TritonDeltaLinear, needs: Sequence[bool]) -> bool:
    """Whether a gradient of a branch's bias is wanted, which is a sum of dS."""
    return any(needs[2 + 2 * len(plan.ranks) :])


def _is_describable(x: Tensor) -> bool:
    """Whether what runs beside dx can read it."""
    describable: bool = core.kernels("persistent").is_describable(x)
    return describable


def _write_grad_input(
    plan: str,
    grad_x: Tensor,
    grad_y: Sequence[Tensor],
    members: Sequence[GroupMember],
    grad_s: Tensor,
    parts: Sequence[Any],
) -> None:
    """dx as a layer of all rows of all weights would have it, by that layer's plan."""
    weights, factors = [member.weight for member in members], [part.a for part in parts]
    if plan in FOR_LIBRARY:  # "beside" where nothing is wanted beside it
        of_layers = _split(grad_s, _plans(members))
        cuda.grad_input_of_group(grad_x, grad_y, weights, of_layers, factors)
        return
    precision = core.kernels("precision").rank_precision(grad_x.dtype, factors)
    fused = plan == "fused"
    core.kernels("group").grad_input_group(
        grad_y, weights, grad_s, parts, grad_x,
        precision=precision, capability=core.capability(grad_x), has_base=fused,
    )  # fmt: skip
    if not fused:
        for dy, weight in zip(grad_y, weights, strict=True):
            grad_x.addmm_(dy, weight)


def _planned(
    grad_x: Tensor, grad_y: Sequence[Tensor], members: Sequence[GroupMember], parts: Sequence[Any]
) -> str:
    (m, k), weights = grad_x.shape, [member.weight for member in members]
    setting = planner.setting_of(
        grad_x.dtype,
        tuple([part.a.dtype for part in parts]),
        m,
        sum(weight.shape[0] for weight in weights),
        k,
        tuple([part.rank for part in parts]),
        any(part.dropout for part in parts),
    )
    # branches with masks have small tiles: see configs.grad_input_group
    plain = not setting.dropout and all(map(core.kernels("configs").is_aligned, weights))
    pairs = zip(grad_y, members, strict=True)
    able = not setting.dropout and all(_is_for_cuda(*pair) for pair in pairs)
    special: tuple[str, ...] = ()
    if able and len(parts) == len(members) <= MOST_ONE_LAUNCH:
        fits = beside.fits(m, k, setting.rank, grad_x.device)
        special = ("cuda", "beside") if fits else ("cuda",)
    return planner.choose(setting, "backward", grad_x.device, plain, special).plan


def _is_for_cuda(grad_y: Tensor, member: GroupMember) -> bool:
    """Whether the plan ``cuda`` takes the layer's part of dx."""
    a, _, _ = thirds(member.operands)
    given = member.weight, a, _plan(member).ranks, grad_y.device, False
    return "cuda" in delta_linear.special("backward", grad_y, *given)


def _is_one_launch(x: Tensor, members: Sequence[GroupMember]) -> bool:
    """Whether the plan ``cuda`` makes y of all layers, from S as it is: no activation, no bias
    within a branch, and every row with all branches."""
    if not x.shape[0] or len(members) > MOST_ONE_LAUNCH or not cuda.runs_on(x.device, "cuda"):
        return False
    for member in members:
        plan, (a, b, inner) = _plan(member), thirds(member.operands)
        linear = all(kind == branches.LINEAR for kind in plan.activation)
        if not linear or member.adapter is not None or any(t is not None for t in inner):
            return False
        if delta_linear.plan_of("forward", x, member.weight, a, b, plan.dropout) != "cuda":
            return False
    return True


def _outputs(
    x: Tensor, members: Sequence[GroupMember], s: Sequence[Tensor], whole: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """y of each layer by the plan ``cuda``, and its S as it came; ``whole``: all of them."""
    biases = [None if m.bias is None else m.bias.contiguous() for m in members]
    weights, ups = [m.weight for m in members], [thirds(m.operands)[1][0] for m in members]
    ys = [torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype, device=x.device) for w in weights]
    # rounded together, in one launch
    rounded = s if whole is None else _split(whole.to(x.dtype), _plans(members))
    cuda.outputs_of_group(ys, x, weights, biases, rounded, ups)
    return list(zip(ys, s, strict=True))


def _parts(x: Tensor, members: Sequence[GroupMember]) -> list[Any]:
    """All branches, as the kernels want them; ``x`` for its dtype."""
    made = core.kernels("group").Part
    parts = []
    for member in members:
        plan, (a, _, _) = _plan(member), thirds(member.operands)
        precision = core.kernels("precision").rank_precision(x.dtype, a)
        scaling = branches.project_scaling(plan.scaling, plan.activation)
        for i, down in enumerate(a):
            parts.append(
                made(
                    down,
                    scaling[i],
                    plan.dropout[i],
                    member.seed,
                    i,
                    precision,
                    member.adapter,
                )
            )
    return parts


def _plan(member: GroupMember) -> TritonDeltaLinear:
    assert isinstance(member.plan, TritonDeltaLinear)
    return member.plan


def _plans(members: Sequence[GroupMember]) -> list[TritonDeltaLinear]:
    return [_plan(member) for member in members]


def _split(s: Tensor, plans: Sequence[TritonDeltaLinear]) -> list[Tensor]:
    """S of each layer, of those side by side."""
    return [s[:, piece] for piece in branches.columns([plan.rank for plan in plans])]


def prepare(
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
) -> TritonDeltaLinear:
    """See :class:`deltaops.backends.base.PreparingBackend`."""
    return TritonDeltaLinear([t.shape[0] for t in a], scaling, dropout, activation)
