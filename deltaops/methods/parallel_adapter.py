"""Parallel adapters: a bottleneck beside a sub-layer.    f(x) + s · φ(x Downᵀ + d) Upᵀ + u

By default f is a whole feed-forward, as He et al. have it: x is what the feed-forward's first layer
reads (after the norm, where a model normalizes first), and the branch joins what its last layer
returns, before the residual. Beside one named layer, f(x) = x Wᵀ + b, and the branch runs in the
layer's own op; its bias u is then the layer's bias, trained from where it stands.

Down [R, K] starts like LoRA's A, Up [N, R] and the biases at zero: the model starts as it was. In
the paper's code s multiplies u as well, which is the same set of functions.
Where a model drops elements of the feed-forward's output (BERT, GPT-2), the branch shares that
dropout.
Source: He et al. 2022 (arXiv 2110.04366), table 1 and §4.6 (s = 4, φ = relu, R = K / 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltaops.modules import (
    Bottleneck,
    DeltaPlace,
    Factor,
    Relay,
    copies,
    has_copies,
    start_values,
    train_copies,
    unbecome,
    zeros_for,
)

from . import bottleneck
from .base import Binding, Delta, Promise, Site, adapter_dtype
from .linear import become_place
from .targets import FEED_FORWARD, check_flags, normalise


@dataclass(frozen=True, repr=False)
class ParallelAdapter(Delta):
    """Settings of a parallel adapter.

    Args:
        size: R, the width of the bottleneck; None divides the layer's input by
            ``reduction_factor``.
        reduction_factor: width of the layer's input / R; has to divide it.
        non_linearity: φ: "relu", "gelu" (by erf), "gelu_tanh", "silu" or "identity".
        scaling: s, dimensionless.
        target_modules: what it stands beside: the role "feed-forward", or linear layers by name or
            regular expression as for :class:`deltaops.LoRA`.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: indices of the layers that get the delta.
        layers_pattern: names of the module list that the indices count, such as "layers".
        autocast_adapter_dtype: keep the adapter in float32 where the weight is float16 or bfloat16.
        task_type: a label that files keep; see :class:`deltaops.LoRA`.
    Raises: ConfigError.
    """

    size: int | None = None
    reduction_factor: int = 2
    non_linearity: str = "relu"
    scaling: float = 4.0
    target_modules: str | tuple[str, ...] = FEED_FORWARD
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "parallel"
    trains_copies: ClassVar[bool] = True
    promises: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.IDENTITY_AT_START, Promise.REVERT_RESTORES_BITS}
    )

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        bottleneck.check(self)
        check_flags(self, "autocast_adapter_dtype")
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown()

    def unfit(self, site: Site) -> str | None:
        """See :meth:`Delta.unfit`."""
        return bottleneck.misfit(self, _inputs(site))

    def claims(self, site: Site, module: nn.Module) -> dict[str, bool]:
        """See :meth:`Delta.claims`."""
        return {} if site.entry else {"weight": False, "bias": True}

    def gate_width(self, site: Site) -> int | None:
        """See :meth:`Delta.gate_width`: beside a whole feed-forward, since a bias has none."""
        return _inputs(site) if site.entry else None

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        weight: Any = module.weight
        down, up = start_values(
            bottleneck.rank_of(self, _inputs(site)),
            _inputs(site),
            site.out_features,
            device=weight.device,
            dtype=adapter_dtype(weight, self.autocast_adapter_dtype),
            generator=binding.generator,
        )
        branch = not site.entry
        adapter = Bottleneck(Factor(down), Factor(up), bottleneck.settings_of(self), branch=branch)
        place = become_place(module, self.kind, binding)
        if branch:
            place.add_branch(binding.name, adapter)
            bias = module._parameters.get("bias")
            start = zeros_for(module, site.out_features) if bias is None else bias
            train_copies(module, {"bias": start}, binding.name)
        else:
            relay = Relay()
            place.add_adapter(binding.name, adapter, relay)
            begins = become_place(modules[site.entry], self.kind, binding)
            begins.begin_span(binding.name, relay)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        unbecome(modules[site.path])
        if site.entry:
            unbecome(modules[site.entry])

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
        own = copies(module, name) if has_copies(module, name) else {}
        return bottleneck.held(module, name) | own

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        branch = not site.entry
        width, outputs = _inputs(site), site.out_features
        found = bottleneck.shapes(bottleneck.rank_of(self, width), width, outputs, branch=branch)
        return found | ({"bias": (outputs,)} if branch else {})


def _inputs(site: Site) -> int:
    """K: a feed-forward begins as wide as it ends."""
    return site.out_features if site.entry else site.in_features
