"""BitFit: train the biases, and nothing else.      y = x Wᵀ + (b + Δb)

What is trained is a copy of each bias in its place; the original waits and comes back by its bits.
A layer or norm without a bias gets one that starts at zero, and loses it on revert. The gradient of
a bias is a sum of the gradient of y, so no input is kept for it.
Source: Ben Zaken et al. 2021 (arXiv 2106.10199).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from deltaops.modules import (
    DeltaPlace,
    activate_copies,
    allow_bias,
    copies,
    disallow_bias,
    give_back,
    is_norm,
    lacks_bias,
    train_copies,
    unbecome,
    zeros_for,
)

from .base import EXACT, LINEAR, NORM, Binding, Delta, Promise, Site, wide
from .linear import become_place
from .targets import ALL_LINEAR, ALL_NORM, check_flags, normalise


@dataclass(frozen=True, repr=False)
class BitFit(Delta):
    """Settings of BitFit. A bias is trained in the dtype of its layer.

    Args:
        target_modules: whose biases are trained: roles, names or a regular expression as for
            :class:`deltaops.LoRA`. By default every linear layer but the output embedding, and
            every LayerNorm and RMSNorm; convolutions are left out.
        create_missing: give layers and norms without a bias one that starts at zero. False leaves
            those alone that a role found, and refuses those that are named.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: indices of the layers that get the delta.
        layers_pattern: names of the module list that the indices count, such as "layers".
        task_type: a label that files keep; see :class:`deltaops.LoRA`.
    Raises: ConfigError.
    """

    target_modules: str | tuple[str, ...] = (ALL_LINEAR, ALL_NORM)
    create_missing: bool = True
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    task_type: str | None = None

    kind: ClassVar[str] = "bitfit"
    places: ClassVar[frozenset[str]] = frozenset({LINEAR, NORM})
    trains_copies: ClassVar[bool] = True
    promises: ClassVar[frozenset[Promise]] = EXACT

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        check_flags(self, "create_missing")
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown()

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        missing = module._parameters.get("bias") is None
        return "it has no bias" if missing and not self.create_missing else None

    def claims(self, site: Site, module: nn.Module) -> dict[str, bool]:
        """See :meth:`Delta.claims`."""
        return {"bias": True}

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        if site.place == NORM:
            allow_bias(module, binding.backend, binding.strict)
        else:
            become_place(module, self.kind, binding)
        bias = module._parameters.get("bias")
        start = zeros_for(module, site.out_features) if bias is None else bias
        train_copies(module, {"bias": start}, binding.name)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        module = modules[site.path]
        if site.place == NORM:
            give_back(module)
            disallow_bias(module)
        else:
            unbecome(module)

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        if isinstance(module, DeltaPlace):
            module.turn(name, active)
        else:
            activate_copies(module, active, name)

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        if is_norm(module) and lacks_bias(module):
            return "the norm's own forward adds no bias, so none can be merged into it"
        return None

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """The trained bias itself."""
        return {k: v.detach().to(wide(v), copy=True) for k, v in copies(module, name).items()}

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """The whole bias, not its difference from the original."""
        return copies(module, name)

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {"bias": (site.out_features,)}
