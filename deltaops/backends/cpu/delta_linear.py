"""``delta_linear`` in the native core: a plan for each known layer, and single calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.packing import PACKING, SMALLEST, Layout
from deltaops.reference.philox import drop_threshold

from .core import ACTIVATIONS, DTYPES, as_rows, core, empty

_Prepared = tuple[Any, tuple[Any, ...]]
"""A call that was not made yet, and what must live until it is."""


class CpuDeltaLinear:
    """A ``delta_linear`` of known shapes and strides.

    See :class:`deltaops.backends.base.DeltaLinearPlan`. A small layer takes less time than the
    conversion of its sizes, so that is done here, once.
    """

    def __init__(
        self,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> None:
        self._shape = n, k = tuple(weight.shape)
        self._strides = row_stride, col_stride = weight.stride()
        self._packable = n * k >= SMALLEST
        ranks = [t.shape[0] for t in a]
        self._ranks = sum(ranks)
        # as the core takes them: nearly always as they are, and then no call looks again
        given = [*a, *b, *branch_bias]
        tidy = self._tidy(given)
        self._copies = any([p is not q for p, q in zip(given, tidy, strict=True)])
        a, b = tidy[: len(a)], tidy[len(a) : 2 * len(a)]
        self._grads = [
            *[((r, k), (k, 1), t.dtype) for t, r in zip(a, ranks, strict=True)],
            *[((n, r), (r, 1), t.dtype) for t, r in zip(a, ranks, strict=True)],
            *[((r,), (1,), t.dtype) for t, r in zip(a, ranks, strict=True)],
        ]
        self._core = core()
        self._native = self._core.DeltaLinear(
            DTYPES[weight.dtype],
            n,
            k,
            row_stride,
            col_stride,
            [
                (
                    *a_i.stride(),
                    *b_i.stride(),
                    a_i.shape[0],
                    DTYPES[a_i.dtype],
                    scaling[i],
                    drop_threshold(dropout[i]),
                    ACTIVATIONS[activation[i]],
                )
                for i, (a_i, b_i) in enumerate(zip(a, b, strict=True))
            ],
        )

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Tensor | None],
        seed: Tensor | None,
        keep: bool,
        adapter: Tensor | None = None,
        group: list[_Prepared] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`deltaops.backends.base.DeltaLinearPlan`.

        group: where the call is put instead of being made.
        """
        if not x.is_contiguous():
            x = as_rows(x)
        if bias is not None:
            bias = bias.contiguous()
        if self._copies:
            operands = self._tidy(operands)
        m = x.size(0)
        y = empty(m, self._shape[0], x.dtype)
        s = empty(m, self._ranks, torch.float32) if keep else None
        threads = torch.get_num_threads()
        packed = self._packed(weight, False, threads) if self._packable else None
        call = (self._native.forward if group is None else self._native.forward_call)(
            x,
            weight,
            bias,
            y,
            s,
            operands,
            0 if seed is None else _seed(seed),
            threads,
            packed,
            adapter,
        )
        if group is not None:
            group.append((call, (bias, operands, packed)))
        return y, s

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember], keep: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """See :class:`deltaops.backends.base.GroupingPlan`."""
        x = as_rows(x)
        group: list[_Prepared] = []
        results = []
        for plan, weight, bias, operands, seed, adapter, _made in members:
            assert isinstance(plan, CpuDeltaLinear)
            results.append(plan.forward(x, weight, bias, operands, seed, keep, adapter, group))
        self._core.delta_linear_group_forward([call for call, _ in group])
        return results

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        operands: Sequence[Tensor | None],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
        adapter: Tensor | None = None,
        group: list[_Prepared] | None = None,
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.DeltaLinearPlan`.

        group: where the call is put instead of being made; its first one gets the gradient of x.
        """
        grad_y, s = as_rows(grad_y), s.contiguous()
        if x is not None:
            x = as_rows(x)
        if self._copies:
            operands = self._tidy(operands)
        m, (n, k) = grad_y.shape[0], self._shape
        grad_x = empty(m, k, grad_y.dtype) if needs[0] and not group else None
        grad_bias = torch.empty(n, dtype=grad_y.dtype) if needs[1] else None
        wanted = [
            torch.empty_strided(shape, strides, dtype=dtype) if need else None
            for need, (shape, strides, dtype) in zip(needs[2:], self._grads, strict=True)
        ]
        threads = torch.get_num_threads()
        packed = None
        if self._packable and needs[0]:
            packed = self._packed(weight, True, threads)
        call = (self._native.backward if group is None else self._native.backward_call)(
            grad_y,
            x,
            weight,
            s,
            operands,
            0 if seed is None else _seed(seed),
            threads,
            grad_x,
            grad_bias,
            wanted,
            packed,
            adapter,
        )
        if group is not None:
            group.append((call, (grad_y, s, operands, packed)))
        return [g for g in (grad_x, grad_bias, *wanted) if g is not None]

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """See :class:`deltaops.backends.base.GroupingPlan`."""
        if x is not None:
            x = as_rows(x)
        group: list[_Prepared] = []
        results = []
        for grad, member, s_i, wanted in zip(grad_y, members, s, needs, strict=True):
            plan, weight, _bias, operands, seed, adapter, _made = member
            assert isinstance(plan, CpuDeltaLinear)
            results.append(
                plan.backward(grad, x, weight, operands, s_i, seed, wanted, adapter, group)
            )
        self._core.delta_linear_group_backward([call for call, _ in group])
        return results

    @staticmethod
    def _tidy(operands: Sequence[Tensor | None]) -> list[Any]:
        """Each as the core takes it: matrices with a unit stride, vectors of adjacent elements."""
        return [None if t is None else t if 1 in t.stride() else t.contiguous() for t in operands]

    def _packed(self, weight: Tensor, transposed: bool, threads: int) -> Tensor | None:
        (n, k), (row_stride, col_stride) = self._shape, self._strides
        layout = Layout(weight.data_ptr(), n, k, row_stride, col_stride, DTYPES[weight.dtype])
        return PACKING.packed(self._core, weight, layout, transposed, threads)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    adapter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See :class:`deltaops.backends.base.Backend`."""
    plan = CpuDeltaLinear(weight, a, b, branch_bias, scaling, dropout, activation)
    y, s = plan.forward(x, weight, bias, [*a, *b, *branch_bias], seed, True, adapter)
    assert s is not None  # kept, as asked
    return y, s


def backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    needs: Sequence[bool],
    adapter: Tensor | None = None,
) -> list[Tensor]:
    """See :class:`deltaops.backends.base.Backend`."""
    absent = [None] * len(a)
    plan = CpuDeltaLinear(weight, a, b, absent, scaling, dropout, activation)
    return plan.backward(grad_y, x, weight, [*a, *b, *absent], s, seed, needs, adapter)


def _seed(seed: Tensor) -> int:
    return int(seed) & 0xFFFFFFFFFFFFFFFF
