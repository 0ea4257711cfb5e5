"""A matrix that is a sum of Kronecker products, held by their small factors.

    W = Σᵢ Aᵢ ⊗ (Sᵢ Tᵢᵀ),    i = 1…n

A [n, n, n] is the rule; S [n, rows/n, r] and T [n, columns/n, r] are thin. W [rows, columns] is
formed once a forward pass and read by the op as any other weight: rows is a bottleneck, so W has
as many elements as a few rows of activations, and forming it is one product [n², n] × [n, R·K/n²].
Source: Zhang et al. 2021 (arXiv 2102.08597), eq. 4; Mahabadi et al. 2021 (2106.04647), eq. 6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltaops.ops.paths import no_autocast, records

from .draws import draws_on


class KroneckerSum(nn.Module):
    """The factors of one W: a rule of its own, or that of another one.

    A shared rule is registered with its owner alone: transformers refuses to save a model that
    names one tensor twice. The others ask the owner each time, so that they follow whatever a move,
    a ``load_state_dict(assign=True)`` or a copy puts there.
    """

    phm_rule: nn.Parameter
    """The owner's."""
    owner: KroneckerSum
    """In the ``__dict__`` alone: not a child."""
    s: nn.Parameter
    t: nn.Parameter

    def __init__(self, rule: Tensor | KroneckerSum, s: Tensor, t: Tensor) -> None:
        """Hold ``s``, ``t`` and, unless it is another one's, the rule as trainable parameters.

        Args:
            rule: ``[n, n, n]``, or who has it.
            s: ``[n, rows/n, r]``.
            t: ``[n, columns/n, r]``.
        """
        super().__init__()
        if isinstance(rule, Tensor):
            self.phm_rule = nn.Parameter(rule)
            self.__dict__["owner"] = self
        else:
            self.__dict__["owner"] = rule
        self.s = nn.Parameter(s)
        self.t = nn.Parameter(t)

    @property
    def weight(self) -> Tensor:
        """W ``[rows, columns]``, formed anew; gradients reach the factors."""
        return kronecker_sum(self.owner.phm_rule, self.s, self.t)

    def extra_repr(self) -> str:
        """Sizes and dtype."""
        n, rows, rank = self.s.shape
        columns = self.t.shape[1]
        dtype = str(self.s.dtype).removeprefix("torch.")
        return f"{n * rows}×{n * columns}, n={n}, rank={rank}, {dtype}"


def kronecker_sum(rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """``Σᵢ Aᵢ ⊗ (Sᵢ Tᵢᵀ)``; see the module.

    Args:
        rule: A ``[n, n, n]``; converted to the device and dtype of ``s`` where it has others.
        s: ``[n, p, r]``.
        t: ``[n, q, r]``.
    Returns: ``[n·p, n·q]`` in the dtype of ``s``, also under autocast: its small factors would lose
        what the op, which rounds W once, keeps.
    """
    with no_autocast(s.device):
        rule = rule.to(device=s.device, dtype=s.dtype)
        if records(rule, s, t):
            formed: Tensor = _Formed.apply(rule, s, t)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return formed
        return _form(rule, s, t)[0]


class _Formed(torch.autograd.Function):
    """The same with its gradients written out, of first order.

    The products are of a few thousand numbers, so what they take is their calls: torch's own nodes
    make twice as many.
    """

    @staticmethod
    def forward(ctx: Any, rule: Tensor, s: Tensor, t: Tensor) -> Tensor:
        weight, inner = _form(rule, s, t)
        ctx.save_for_backward(rule, s, t, inner)
        return weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rule, s, t, inner = ctx.saved_tensors
        n, p, q = len(rule), s.shape[1], t.shape[1]
        with no_autocast(s.device):
            blocks = grad.reshape(n, p, n, q).transpose(1, 2).reshape(n * n, p * q)
            of_inner = torch.mm(rule.reshape(n, n * n), blocks).view(n, p, q)
            of_rule = torch.mm(inner, blocks.T).view(n, n, n)
            return of_rule, torch.bmm(of_inner, t), torch.bmm(of_inner.mT, s)


def _form(rule: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """W, and the ``Sᵢ Tᵢᵀ`` as ``[n, p·q]``."""
    n, p, q = len(rule), s.shape[1], t.shape[1]
    inner = torch.bmm(s, t.mT).view(n, p * q)
    blocks = torch.mm(rule.reshape(n, n * n).T, inner).view(n, n, p, q)
    return blocks.transpose(1, 2).reshape(n * p, n * q), inner


def start_rule(
    n: int,
    std: float,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> Tensor:
    """A rule ``[n, n, n]`` of N(0, ``std``²), drawn as :func:`start_values` draws."""
    rule = _blank((n, n, n), device, generator)
    if not rule.is_meta:
        nn.init.normal_(rule, std=std, generator=generator)
    return rule.to(device=device, dtype=dtype)


def start_sum(
    rule: Tensor | KroneckerSum,
    n: int,
    rows: int,
    columns: int,
    rank: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> KroneckerSum:
    """A matrix ``[rows, columns]`` of S and T that are Glorot-uniform for each i.

    Args:
        rule: see :class:`KroneckerSum`.
        n: divides ``rows`` and ``columns``.
        rank: r.
    """
    found = []
    for size in (rows, columns):
        factor = _blank((n, size // n, rank), device, generator)
        if not factor.is_meta:
            for part in factor:
                nn.init.xavier_uniform_(part, generator=generator)
        found.append(factor.to(device=device, dtype=dtype))
    return KroneckerSum(rule, *found)


def _blank(
    shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """What start values for ``device`` are drawn into; on the device "meta" nothing is drawn."""
    home = device if device.type == "meta" else draws_on(generator)
    return torch.empty(shape, device=home, dtype=torch.float32)
