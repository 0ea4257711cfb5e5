"""``nn.Embedding`` as a place for LoRA.      y = W[ids] + s · A[:, ids]ᵀ Bᵀ

W [V, D] stays frozen; A [r, V] and B [D, r] are PEFT's, in its layout. Reading r numbers of each
token out of A along its rows, and adding their gradients there, leaves no copy of A, transposed or
not: on a CPU that is a ``gather`` and its own backward, one thread to a row, so the same bits each
time. Elsewhere that backward would add in any order, and torch's embedding is taken.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops.paths import no_autocast

from .draws import draws_on
from .place import LoraSettings
from .replicas import refuse_replicas
from .switched import Switched


class DeltaEmbedding(Switched, nn.Embedding):
    """An ``nn.Embedding`` with LoRA branches by adapter name."""

    _replicate_for_data_parallel = refuse_replicas

    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora: dict[str, LoraSettings]

    def forward(self, input: Tensor) -> Tensor:
        """ids ``[...]`` → ``[..., D]`` in the dtype of the weight."""
        y = super().forward(input)
        off = self.off
        for name, settings in self.lora.items():
            if name in off:
                continue
            a, b = self.lora_embedding_A[name], self.lora_embedding_B[name]
            y = add_lora(y, input, a, b, settings.scaling, self.padding_idx)
        return y

    def add_lora(self, name: str, settings: LoraSettings, a: Tensor, b: Tensor) -> None:
        """Add the branch ``name`` with ``a [R, V]`` and ``b [D, R]``."""
        for side, factor in (("lora_embedding_A", a), ("lora_embedding_B", b)):
            if side not in self._modules:
                self.add_module(side, nn.ParameterDict())
            getattr(self, side)[name] = nn.Parameter(factor)
        self.lora[name] = settings

    def remove_lora(self, name: str) -> None:
        """Undo :meth:`add_lora`."""
        for side in ("lora_embedding_A", "lora_embedding_B"):
            del getattr(self, side)[name]
        del self.lora[name]
        self.__dict__["off"] = self.off - {name}

    def names(self) -> set[str]:
        """See :class:`Switched`."""
        return set(self.lora)

    def extra_repr(self) -> str:
        """That of nn.Embedding and the deltas."""
        deltas = "; ".join(f"{name}: r={s.r}, alpha={s.alpha:g}" for name, s in self.lora.items())
        inactive = "" if self.delta_active else ", inactive"
        return f"{super().extra_repr()}, lora=({deltas}){inactive}"


def add_lora(
    y: Tensor, ids: Tensor, a: Tensor, b: Tensor, scaling: float, padding: int | None
) -> Tensor:
    """``y + s · A[:, ids]ᵀ Bᵀ``, summed in the widest dtype and rounded once.

    Args:
        y: ``[..., D]``.
        ids: ``[...]``, from 0 to V − 1.
        a: ``[R, V]``.
        b: ``[D, R]``.
        scaling: s.
        padding: the id whose column of A gets no gradient, or None.
    Returns: ``[..., D]`` in the dtype of ``y``.
    """
    exact = torch.promote_types(torch.promote_types(y.dtype, a.dtype), torch.float32)
    with no_autocast(y.device):
        read = _columns(a.to(exact), ids.reshape(-1), padding)
        rows = y.reshape(-1, y.shape[-1]).to(exact)
        total = torch.addmm(rows, read, b.to(exact).T, alpha=scaling)
    return total.to(y.dtype).reshape(y.shape)


def _columns(a: Tensor, ids: Tensor, padding: int | None) -> Tensor:
    """``A[:, ids]ᵀ`` ``[M, R]``."""
    if not a.is_cpu:
        return functional.embedding(ids, a.T, padding)
    read = a.gather(1, ids.long().expand(len(a), -1)).T
    if padding is None:
        return read
    return torch.where((ids == padding).unsqueeze(1), read.detach(), read)


def start_embedding(
    rank: int,
    entries: int,
    width: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """``A [rank, entries]`` zero and ``B [width, rank]`` N(0, 1), drawn as ``start_values`` draws.

    Source: the code of Hu et al. 2021, whose start PEFT has as well.
    """
    a = torch.zeros(rank, entries, device=device, dtype=dtype)
    if device.type == "meta":
        return a, torch.empty(width, rank, device=device, dtype=dtype)
    b = torch.randn(
        width, rank, device=draws_on(generator), dtype=torch.float32, generator=generator
    )
    return a, b.to(device=device, dtype=dtype)


def become_embedding(module: nn.Module) -> DeltaEmbedding:
    """Swap the class of an exact ``nn.Embedding``; one that is a place already stays it."""
    if not isinstance(module, DeltaEmbedding):
        module.__dict__["off"] = frozenset()
        module.__dict__["lora"] = {}
        module.__class__ = DeltaEmbedding
    assert isinstance(module, DeltaEmbedding)
    return module


def unbecome_embedding(module: nn.Module) -> None:
    """Undo :func:`become_embedding`; nothing where that never came."""
    if not isinstance(module, DeltaEmbedding):
        return
    plain: Any = nn.Embedding
    module.__class__ = plain
    for name in ("lora_embedding_A", "lora_embedding_B"):
        module._modules.pop(name, None)
    for name in ("off", "lora"):
        module.__dict__.pop(name, None)
