"""What a delta does before and after the op of a linear place: gains and adapters.

    x → before → y = x Wᵀ + b + branches → after → y

A place keeps a tuple of such parts, empty for LoRA, in their ``order``. A part holds no tensors: it
names them on the place, so that copies, pickles and ``state_dict`` see parameters where they look
for them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from deltaops.errors import AttachError
from deltaops.ops import norm_bias

from .dora import row_norms, scaled
from .gate import gate_of


@dataclass(frozen=True)
class Part:
    """Nothing before and nothing after."""

    name: str
    """Of the adapter."""

    order: ClassVar[int] = 0
    """Where several are around one op, the lowest comes first, whichever was added first."""

    def before(self, place: Any, x: Tensor) -> Tensor:
        """What the op reads in the place of ``x`` ``[..., K]``."""
        return x

    def after(self, place: Any, y: Tensor, x: Tensor) -> Tensor:
        """What the layer returns in the place of ``y`` ``[..., N]``, for what the op has read."""
        return y


@dataclass(frozen=True)
class GainBefore(Part):
    """(IA)³ on an input: ``x ⊙ l``, l ``[1, K]``."""

    order: ClassVar[int] = 1

    def before(self, place: Any, x: Tensor) -> Tensor:
        """See :func:`_gained`."""
        return _gained(x, place.ia3_l[self.name], place)


@dataclass(frozen=True)
class GainAfter(Part):
    """(IA)³ on an output: ``y ⊙ l``, l ``[N, 1]``."""

    order: ClassVar[int] = 1

    def after(self, place: Any, y: Tensor, x: Tensor) -> Tensor:
        """See :func:`_gained`."""
        return _gained(y, place.ia3_l[self.name], place)


_FEW, _FEW_NARROW = {torch.float32: 1 << 18, torch.float64: 1 << 18}, 1 << 15
"""Elements by dtype, and of narrower ones, below which torch's own product is the faster one: one
node of its own against an autograd.Function. Beside a wider gain a narrow one is converted twice.
"""


def _gained(t: Tensor, gain: Tensor, place: Any) -> Tensor:
    """``t ⊙ l``, multiplied in the wider dtype, rounded once. Small ones by torch, and what is
    compiled, which the compiler fuses."""
    eager = torch.compiler.is_compiling() or (
        place.backend == "auto" and not place.strict and t.numel() < _FEW.get(t.dtype, _FEW_NARROW)
    )
    if eager:
        return (t * gain.flatten()).to(t.dtype)
    return norm_bias(t, gain.flatten(), norm=None, backend=place.backend, strict=place.strict)


@dataclass(frozen=True)
class Rescale(Part):
    """DoRA on an output; see :mod:`deltaops.modules.dora`."""

    def after(self, place: Any, y: Tensor, x: Tensor) -> Tensor:
        """The norms are new in every step, since A and B are."""
        weight, bias = place.base()
        a, b = place.lora_A[self.name].weight, place.lora_B[self.name].weight
        norms = row_norms(weight, a, b, place.lora[self.name].scaling)
        return scaled(y, bias, place.lora_magnitude_vector[self.name].weight, norms)


@dataclass(frozen=True)
class Sequential(Part):
    """An adapter after the layer: ``y + s · φ(norm(y) Downᵀ + d) Upᵀ + u``.

    It reads all that the layer returns, with what a span that ends there has added.
    """

    order: ClassVar[int] = 3

    def after(self, place: Any, y: Tensor, x: Tensor) -> Tensor:
        """One op; see :func:`deltaops.ops.bottleneck`."""
        return _adapted(self.name, place, y, None, y)


@dataclass
class Relay:
    """Carries the input of a sub-layer from its first layer to its last.

    Both places hold it. What is carried is taken within the same forward pass, so nothing outlives
    the sub-layer, unless that fails halfway: then the next pass replaces it, and copies and pickles
    are without. Under checkpointing both passes carry their own, and so does each thread.
    """

    active: bool = True
    carried: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """By thread."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Relay, (self.active,)

    def leave(self, x: Tensor) -> None:
        """What the first layer reads."""
        self.carried[_thread()] = x

    def take(self) -> Tensor:
        """What the first layer left.

        Raises: AttachError where it left nothing.
        """
        carried = self.carried
        x = carried.pop(_thread(), None)
        if x is None and carried:  # perhaps one of the two layers is compiled and the other is not
            if not torch.compiler.is_compiling():
                x = carried.pop(_COMPILED, None)
            elif len(carried) == 1:
                _, x = carried.popitem()
        if x is None:
            raise AttachError(
                "a sub-layer with an adapter beside it must run from its first layer to its last, "
                "in one thread, and its last was called without its first. Name single layers in "
                "target_modules instead of 'feed-forward'."
            )
        return x


_COMPILED = 0
"""Instead of a thread, which the compiler cannot ask for."""


def _thread() -> int:
    return _COMPILED if torch.compiler.is_compiling() else threading.get_ident()


@dataclass(frozen=True)
class SpanStart(Part):
    """The first layer of a sub-layer that an adapter stands beside."""

    order: ClassVar[int] = 0

    relay: Relay

    def before(self, place: Any, x: Tensor) -> Tensor:
        """Leaves ``x`` for the last layer."""
        if self.relay.active:
            self.relay.leave(x)
        return x


@dataclass(frozen=True)
class SpanEnd(Part):
    """The last layer: ``y + s · (φ(x Downᵀ + d) Upᵀ) + u`` with the x of the first one."""

    order: ClassVar[int] = 2

    relay: Relay

    def after(self, place: Any, y: Tensor, x: Tensor) -> Tensor:
        """One op; see :func:`deltaops.ops.bottleneck`."""
        return _adapted(self.name, place, self.relay.take(), y, y)


def _adapted(name: str, place: Any, x: Tensor, residual: Tensor | None, y: Tensor) -> Tensor:
    """``y`` and what the adapter ``name`` adds for ``x``, times its gate where it has one."""
    adapter, gate = place.adapter[name], gate_of(place, name)
    if gate is None:
        adapted: Tensor = adapter(x, residual, place.backend, place.strict)
        return adapted
    added = adapter(x, torch.zeros_like(y), place.backend, place.strict)
    gated: Tensor = y + gate(x).to(y.dtype) * added
    return gated


@dataclass(frozen=True)
class GatedBranch(Part):
    """LoRA with a gate: ``y + g · s · drop(x) Aᵀ Bᵀ``, beside the op, which knows no gates."""

    def after(self, place: Any, y: Tensor, x: Tensor) -> Tensor:
        """In torch, in the dtype of A or autocast's; rounded once."""
        a, b = place.lora_A[self.name].weight, place.lora_B[self.name].weight
        settings, gate = place.lora[self.name], gate_of(place, self.name)
        assert gate is not None
        wide = x.to(a.dtype)
        if place.training and settings.dropout:
            wide = functional.dropout(wide, settings.dropout)
        inner = functional.linear(functional.linear(wide, a) * settings.scaling, b)
        gated: Tensor = y + gate(x) * inner
        return gated.to(y.dtype)
