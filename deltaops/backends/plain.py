"""The plan of a backend that prepares nothing: it is told the settings in every call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


class PlainPlan:
    """See the head of this file; ``runner`` has a backend's ``forward`` and ``backward``."""

    def __init__(
        self,
        runner: Any,
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> None:
        self._runner = runner
        self.scaling = tuple(scaling)
        self.dropout = tuple(dropout)
        self.activation = tuple(activation)

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Any],
        seed: Tensor | None,
        keep: bool,
        adapter: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`deltaops.backends.base.DeltaLinearPlan`."""
        a, b, inner = thirds(operands)
        settings = self.scaling, self.dropout, self.activation
        # a backend that has never heard of adapters by row is not told of them
        rest = () if adapter is None else (adapter,)
        found: tuple[Tensor, Tensor] = self._runner.forward(
            x, weight, bias, a, b, inner, *settings, seed, *rest
        )
        return found

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        operands: Sequence[Any],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
        adapter: Tensor | None = None,
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.DeltaLinearPlan`."""
        a, b, _ = thirds(operands)
        settings = self.scaling, self.dropout, self.activation
        rest = () if adapter is None else (adapter,)
        found: list[Tensor] = self._runner.backward(
            grad_y, x, weight, a, b, s, *settings, seed, needs, *rest
        )
        return found


def thirds(operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """a, b and the branches' biases, of a sequence a… b… branch_bias…."""
    count = len(operands) // 3
    return (
        list(operands[:count]),
        list(operands[count : 2 * count]),
        list(operands[2 * count :]),
    )
