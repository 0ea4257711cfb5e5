"""What every linear place shares: where its weight lies, its branches, and one call of the op.

    y = x Wᵀ + b + Σᵢ sᵢ · φᵢ(dropᵢ(x) Aᵢᵀ + aᵢ) Bᵢᵀ

Surgery makes a place by swapping ``__class__`` of an exact ``nn.Linear`` or ``Conv1D``; parameters,
their names and hooks stay as they were. ``forward`` runs once a layer and step, where a microsecond
is felt: it reads ``_parameters`` and ``_modules`` directly and builds nothing but the branches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, Layer, delta_linear
from deltaops.packing import PACKING, Policy
from deltaops.reference.activation import activate

from .factor import Factor
from .sharing import shared

UNFROZEN = "the base weight requires a gradient, which the fused op does not compute: plain torch"
"""The reason that ``deltaops.report`` shows while a place runs :func:`plain_linear`."""


class LoraSettings(NamedTuple):
    """What a place knows of one LoRA branch beside its two matrices."""

    r: int
    alpha: float
    scaling: float
    dropout: float


class LinearPlace(nn.Module):
    """Mixin of all places on a linear layer. Without branches it is the frozen layer itself."""

    base_class: type[nn.Module]
    """The exact type that surgery swapped, and that revert puts back."""

    backend: str
    """Passed to :func:`deltaops.ops.delta_linear`."""
    strict: bool
    """Passed to :func:`deltaops.ops.delta_linear`."""
    pack: Policy
    """Whether the CPU core may keep a packed copy of the weight; see :mod:`deltaops.packing`."""

    def base(self) -> tuple[Tensor, Tensor | None]:
        """Weight ``[N, K]`` and bias ``[N]`` as the op takes them."""
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        if weight is None:  # FSDP1 and parametrizations keep it elsewhere
            weight = self.weight
        bias: Any = parameters["bias"] if "bias" in parameters else self.bias
        return weight, bias

    def branches(self) -> list[Branch]:
        """The branches of the next call, dropout only in training."""
        return []

    def slow_reason(self) -> str | None:
        """Why the next call would leave the op for plain torch; None when it does not."""
        return UNFROZEN if self.base()[0].requires_grad else None

    def layer(self) -> Layer | None:
        """What the op takes for the next call; None where that leaves the op for plain torch."""
        weight, bias = self.base()
        if weight.requires_grad:
            return None
        if self.pack != "auto":
            PACKING.keep_policy(weight, self.pack)
        return Layer(weight, bias, self.branches())

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` → ``[..., N]``; see :func:`deltaops.ops.delta_linear`."""
        y = shared(self, x)
        if y is not None:
            return y
        layer = self.layer()
        if layer is None:
            return plain_linear(x, *self.base(), self.branches())
        weight, bias, branches = layer
        return delta_linear(x, weight, bias, branches, backend=self.backend, strict=self.strict)


class LoraPlace(LinearPlace):
    """Mixin of a place with LoRA branches, by adapter name."""

    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora: dict[str, LoraSettings]
    delta_active: bool
    """False while the deltas are disabled or already merged into the weight."""

    def branches(self) -> list[Branch]:
        """One branch for each adapter, none while they are disabled or merged."""
        if not self.delta_active:
            return []
        modules, training = self._modules, self.training
        # nn.ModuleDict's own lookup costs more than the rest of this function
        a, b = modules["lora_A"]._modules, modules["lora_B"]._modules  # type: ignore[union-attr]  # add_lora made them
        return [
            Branch(
                a[name]._parameters["weight"],  # type: ignore[union-attr, arg-type]  # a Factor's, not None
                b[name]._parameters["weight"],  # type: ignore[union-attr, arg-type]  # a Factor's, not None
                settings.scaling,
                settings.dropout if training else 0.0,
            )
            for name, settings in self.lora.items()
        ]

    def add_lora(self, name: str, settings: LoraSettings, a: Tensor, b: Tensor) -> None:
        """Add the branch ``name`` with ``a [R, K]`` and ``b [N, R]``."""
        self.lora_A[name] = Factor(a)
        self.lora_B[name] = Factor(b)
        self.lora[name] = settings

    def describe_deltas(self) -> str:
        """For ``extra_repr``: what is bound here."""
        parts = [
            f"{name}: r={s.r}, alpha={s.alpha:g}"
            + (f", dropout={s.dropout:g}" if s.dropout else "")
            for name, s in self.lora.items()
        ]
        state = "" if self.delta_active else ", inactive"
        return f"lora=({'; '.join(parts)}){state}"


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch]) -> Tensor:
    """The same layer in torch's own functions, for a weight that is trained as well.

    x ``[..., K]``, weight ``[N, K]`` → ``[..., N]``. Dropout draws torch's mask, not the op's.
    """
    base = functional.linear(x, weight, bias)
    y = base
    for a, b, scaling, dropout, activation, branch_bias in branches:
        wide = functional.dropout(x.to(a.dtype), dropout, training=dropout > 0.0)
        inner = activate(activation, functional.linear(wide, a, branch_bias))
        y = y + functional.linear(inner, b) * scaling
    return y.to(base.dtype)


def become(
    module: nn.Module, place: type[LinearPlace], backend: str, strict: bool, pack: Policy = "auto"
) -> None:
    """Swap ``module``'s class for ``place`` and give it the place's attributes.

    The class comes last: until then the module runs as it was, with unused attributes at most.
    """
    module.__dict__["backend"] = backend
    module.__dict__["strict"] = strict
    module.__dict__["pack"] = pack
    if issubclass(place, LoraPlace):
        module.__dict__["delta_active"] = True
        module.__dict__["lora"] = {}
        module.add_module("lora_A", nn.ModuleDict())
        module.add_module("lora_B", nn.ModuleDict())
    module.__class__ = place


def unbecome(module: nn.Module) -> None:
    """Undo :func:`become`: the exact class of before and none of the place's attributes."""
    if isinstance(module, LinearPlace):
        module.__class__ = module.base_class  # type: ignore[assignment]  # its exact class of before
    for name in ("lora_A", "lora_B"):
        module._modules.pop(name, None)
    for name in ("backend", "strict", "pack", "delta_active", "lora"):
        module.__dict__.pop(name, None)


def features(module: nn.Module) -> tuple[int, int]:
    """``(in_features, out_features)`` of a linear layer, of a Conv1D too (which stores ``[K, N]``).

    The weight itself is asked: resized embeddings leave stale attributes behind.
    """
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (rows, columns) if hasattr(module, "nf") else (columns, rows)
