"""What a backend is: an implementation of the ops that can say, in words, what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor


class DeltaLinearCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``delta_linear``. Hashable."""

    device: str
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, ...]
    m: int
    n: int
    k: int
    ranks: tuple[int, ...]
    dropout: bool
    weight_layout: str
    """"row" [N,K] as nn.Linear keeps it, "col" its transpose as Conv1D does, else "strided"."""
    activations: tuple[str, ...] = ()
    """Those of the branches that have one other than "identity"."""
    branch_bias: bool = False
    """Whether some branch has a bias."""

    @property
    def op(self) -> str:
        """The op's name."""
        return "delta_linear"

    @property
    def rank(self) -> int:
        """Total rank."""
        return sum(self.ranks)

    @property
    def title(self) -> str:
        """One line for people."""
        return (
            f"delta_linear M={self.m} N={self.n} K={self.k} ranks={list(self.ranks)} "
            f"{self.dtype} on {self.device}{' with dropout' if self.dropout else ''}"
            f"{''.join(' ' + name for name in self.activations)}"
        )

    @classmethod
    def of(
        cls,
        x: Tensor,
        weight: Tensor,
        a: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> DeltaLinearCall:
        """The call of these tensors; x ``[..., K]``."""
        # Once a call: lists inside tuple() are faster than generators, is_cpu than device.type.
        n, k = weight.shape
        return cls(
            "cpu" if x.is_cpu else x.device.type,
            x.dtype,
            tuple([t.dtype for t in a]),
            x.numel() // k if k else 0,
            n,
            k,
            tuple([t.shape[0] for t in a]),
            any(dropout),
            weight_layout(weight),
            tuple([name for name in activation if name != "identity"]),
            any([t is not None for t in branch_bias]),
        )


def weight_layout(weight: Tensor) -> str:
    """``"row"``, ``"col"`` or ``"strided"``; see :class:`DeltaLinearCall`."""
    rows, columns = weight.stride()
    if columns == 1:
        return "row"
    return "col" if rows == 1 else "strided"


class CrossEntropyCall(NamedTuple):
    """All that a backend may look at to accept or refuse a ``cross_entropy``. Hashable."""

    device: str
    dtype: torch.dtype
    m: int
    v: int

    @property
    def op(self) -> str:
        """The op's name."""
        return "cross_entropy"

    @property
    def title(self) -> str:
        """One line for people."""
        return f"cross_entropy M={self.m} V={self.v} {self.dtype} on {self.device}"

    @classmethod
    def of(cls, logits: Tensor) -> CrossEntropyCall:
        """The call of these logits ``[M, V]``."""
        device = "cpu" if logits.is_cpu else logits.device.type
        return cls(device, logits.dtype, *logits.shape)


Call: TypeAlias = DeltaLinearCall | CrossEntropyCall
"""A call of any op: ``call.op`` names it."""


class Backend(Protocol):
    """An implementation of ``delta_linear``. Tensors come flattened: x ``[M, K]``, y ``[M, N]``."""

    name: str

    def unavailable(self) -> str | None:
        """Why nothing runs here at all, and the remedy; None when it is ready."""

    def unsupported(self, call: Call) -> str | None:
        """Why this call cannot run, in words; None when it can."""

    def forward(
        self,
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
    ) -> tuple[Tensor, Tensor]:
        """``(y [M, N], S [M, ΣR] float32)``; see :mod:`deltaops.reference.delta_linear`.

        The lists have one entry for each branch; ``branch_bias`` has None where there is none.
        """

    def backward(
        self,
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
    ) -> list[Tensor]:
        """The wanted gradients, in the order x, bias, a…, b…, branch_bias…."""


class CrossEntropyBackend(Backend, Protocol):
    """One that also has ``cross_entropy``: logits ``[M, V]``, target ``[M]`` int64."""

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """``(loss, state [M, 2])``; see :mod:`deltaops.reference.cross_entropy`."""

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        state: Tensor,
        ignore_index: int,
        mean: bool,
    ) -> Tensor:
        """``grad_logits [M, V]``."""
