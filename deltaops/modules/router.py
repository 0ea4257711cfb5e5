"""The router of a mixture as a place for LoRA.      logits = x (W + s · B A)ᵀ

W [E, K] stays frozen; A [r, K] and B [E, r] are trained. Routers differ in what they make of the
logits, so each runs its own program, on the sum instead of W. One sum in a pass costs r/T of the
product of T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltaops.ops.paths import no_autocast

from .factor import Factor
from .place import LoraSettings
from .replicas import refuse_replicas
from .switched import Switched

WEIGHT = "weight"
"""The parameter, by transformers' name."""


class DeltaRouter(Switched, nn.Module):
    """Mixin over a class of router: LoRA branches by adapter name."""

    _replicate_for_data_parallel = refuse_replicas

    base_class: type[nn.Module]
    """The exact type that surgery swapped, and that revert puts back."""

    weight: nn.Parameter
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora: dict[str, LoraSettings]
    delta_kind: str
    """For the report."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the router's own ``forward`` takes and gives."""
        if self.off and not self.delta_active:
            return super().forward(*args, **kwargs)
        # another thread may run this module, so what reads the sum is a view of it
        view = nn.Module.__new__(self.base_class)
        view.__dict__.update(self.__dict__)
        view.__dict__[WEIGHT] = self.total()
        return self.base_class.forward(view, *args, **kwargs)

    def total(self) -> Tensor:
        """``W + Σᵢ sᵢ · Bᵢ Aᵢ`` ``[E, K]``, summed in float32 at least and rounded once."""
        weight = self.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = weight.to(exact)
        with no_autocast(weight.device):
            for name, settings in self.lora.items():
                if name in self.off:
                    continue
                a, b = self.factors(name)
                total = torch.addmm(total, b.to(exact), a.to(exact), alpha=settings.scaling)
        return total.to(weight.dtype)

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B of the adapter ``name``."""
        a, b = (side[name].get_parameter("weight") for side in (self.lora_A, self.lora_B))
        return a, b

    def add_lora(self, name: str, settings: LoraSettings, a: Tensor, b: Tensor) -> None:
        """Add the branch ``name`` with ``a [R, K]`` and ``b [E, R]``."""
        for side, factor in (("lora_A", a), ("lora_B", b)):
            if side not in self._modules:
                self.add_module(side, nn.ModuleDict())
            getattr(self, side)[name] = Factor(factor)
        self.lora[name] = settings

    def names(self) -> set[str]:
        """See :class:`Switched`."""
        return set(self.lora)

    def extra_repr(self) -> str:
        """The deltas."""
        deltas = "; ".join(f"{name}: r={s.r}, alpha={s.alpha:g}" for name, s in self.lora.items())
        return f"lora=({deltas}){'' if self.delta_active else ', inactive'}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the class of before; the subclass is made where it is wanted."""
        return _blank, (self.base_class,), self.__dict__


_classes: dict[type[nn.Module], type[DeltaRouter]] = {}


def _over(base: type[nn.Module]) -> type[DeltaRouter]:
    """:class:`DeltaRouter` over exactly ``base``; the same class each time."""
    if base not in _classes:
        made = type(f"Delta{base.__name__}", (DeltaRouter, base), {"base_class": base})
        _classes.setdefault(base, made)
    return _classes[base]


def _blank(base: type[nn.Module]) -> nn.Module:
    kind = _over(base)
    return kind.__new__(kind)


def become_router(module: nn.Module) -> DeltaRouter:
    """Swap the class of a router; one that is a place already stays it."""
    if not isinstance(module, DeltaRouter):
        module.__dict__.update(off=frozenset(), lora={}, delta_kind="lora")
        module.__class__ = _over(type(module))
    assert isinstance(module, DeltaRouter)
    return module


def unbecome_router(module: nn.Module) -> None:
    """Undo :func:`become_router`; nothing where that never came."""
    if not isinstance(module, DeltaRouter):
        return
    module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
    for name in ("lora_A", "lora_B"):
        module._modules.pop(name, None)
    for name in ("off", "lora", "delta_kind"):
        module.__dict__.pop(name, None)


def is_router(module: nn.Module) -> bool:
    """Whether ``module`` computes with a matrix ``weight`` of its own and is called a router."""
    kind = getattr(type(module), "base_class", type(module))
    weight = module._parameters.get(WEIGHT)
    named = any(word in kind.__name__.lower() for word in ("router", "gate"))
    return named and weight is not None and weight.dim() == 2 and not isinstance(module, nn.Linear)
