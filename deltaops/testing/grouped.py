"""A group of ``delta_linear`` for a backend that is told the settings in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deltaops.backends import GroupMember
from deltaops.backends.plain import PlainPlan


class GroupedPlan(PlainPlan):
    """See :class:`deltaops.backends.base.GroupingPlan`; ``runner`` has ``forward_group`` and
    ``backward_group``, too."""

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember], keep: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """See :class:`deltaops.backends.base.GroupingPlan`; S is kept in any case."""
        found: list[tuple[Tensor, Tensor | None]] = self._runner.forward_group(x, members)
        return found

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """See :class:`deltaops.backends.base.GroupingPlan`."""
        found: list[list[Tensor]] = self._runner.backward_group(grad_y, x, members, s, needs)
        return found


class Grouping:
    """Gives a backend that has both the plans of its groups."""

    def prepare(
        self,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> Any:
        """See :class:`deltaops.backends.base.PreparingBackend`."""
        return GroupedPlan(self, scaling, dropout, activation)
