"""Adapters after a sub-layer.      y + s · φ(norm(y) Downᵀ + d) Upᵀ + u,    y = x Wᵀ + b

y is what the last linear layer of a sub-layer returns, before it is added to the residual stream.
Houlsby's stand after each attention and each feed-forward, Pfeiffer's after each feed-forward only.
Down [R, N] and Up [N, R] start near zero, so that the model starts near what it was.

Where a model drops elements of a sub-layer's output (BERT, GPT-2, T5), the paper's adapter comes
after that dropout, ours before it: the same in evaluation; in training, the sum is dropped out.
Source: Houlsby et al. 2019 (arXiv 1902.00751), fig. 2; Pfeiffer et al. 2021 (arXiv 2005.00247).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.modules import Bottleneck, DeltaPlace, Factor, near_zero, unbecome

from . import bottleneck
from .base import Binding, Delta, Promise, Site, adapter_dtype
from .linear import become_place
from .targets import ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT, check_flags, normalise

STYLES = {
    "houlsby": (ATTENTION_OUTPUT, FEED_FORWARD_OUTPUT),
    "pfeiffer": (FEED_FORWARD_OUTPUT,),
}


@dataclass(frozen=True, repr=False)
class Adapter(Delta):
    """Settings of a bottleneck adapter after a sub-layer.

    Args:
        style: "houlsby" or "pfeiffer": where it stands while ``target_modules`` is None.
        size: R, the width of the bottleneck; None divides the layer's by ``reduction_factor``.
        reduction_factor: width of the layer / R; has to divide it.
        non_linearity: φ: "relu", "gelu" (by erf), "gelu_tanh", "silu" or "identity".
        layer_norm: normalize the adapter's input, with a weight and a bias of its own.
        scaling: s, dimensionless.
        target_modules: the layers that it follows: roles, names or a regular expression as for
            :class:`deltaops.LoRA`; None leaves it to ``style``.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: indices of the layers that get the delta.
        layers_pattern: names of the module list that the indices count, such as "layers".
        autocast_adapter_dtype: keep the adapter in float32 where the weight is float16 or bfloat16.
        task_type: a label that files keep; see :class:`deltaops.LoRA`.
    Raises: ConfigError.
    """

    style: str = "houlsby"
    size: int | None = None
    reduction_factor: int = 16
    non_linearity: str = "gelu"
    layer_norm: bool = False
    scaling: float = 1.0
    target_modules: str | tuple[str, ...] | None = None  # type: ignore[assignment]  # never None once made
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "adapter"
    promises: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.NEAR_IDENTITY_AT_START, Promise.REVERT_RESTORES_BITS}
    )

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        if not isinstance(self.style, str) or self.style not in STYLES:
            raise ConfigError(
                f"{type(self).__name__}: style must be one of {', '.join(STYLES)}, got "
                f"{self.style!r}. Name other places in target_modules."
            )
        bottleneck.check(self)
        check_flags(self, "layer_norm", "autocast_adapter_dtype")
        if self.target_modules is None:
            object.__setattr__(self, "target_modules", STYLES[self.style])  # it is frozen
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        if self.target_modules == STYLES[self.style]:
            shown = replace(self)
            object.__setattr__(shown, "target_modules", None)
            return shown._shown("style")
        return self._shown("style")

    def unfit(self, site: Site) -> str | None:
        """See :meth:`Delta.unfit`."""
        return bottleneck.misfit(self, site.out_features)

    def gate_width(self, site: Site) -> int | None:
        """See :meth:`Delta.gate_width`."""
        return site.out_features

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        weight: Any = module.weight
        down, up = near_zero(
            bottleneck.rank_of(self, site.out_features),
            site.out_features,
            device=weight.device,
            dtype=adapter_dtype(weight, self.autocast_adapter_dtype),
            generator=binding.generator,
        )
        adapter = Bottleneck(
            Factor(down), Factor(up), bottleneck.settings_of(self), norm=self.layer_norm
        )
        become_place(module, self.kind, binding).add_adapter(binding.name, adapter, None)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        unbecome(modules[site.path])

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        assert isinstance(module, DeltaPlace)
        module.turn(name, active)

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        return bottleneck.NO_MERGE

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Never asked; see :meth:`unmergeable`."""
        raise NotImplementedError(bottleneck.NO_MERGE)

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """See :meth:`Delta.tensors`."""
        return bottleneck.held(module, name)

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        width = site.out_features
        rank = bottleneck.rank_of(self, width)
        return bottleneck.shapes(rank, width, width, norm=self.layer_norm)
