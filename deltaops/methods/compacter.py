"""Compacter: adapters after a sub-layer whose weights are sums of Kronecker products.

    y + s · φ(norm(y) Downᵀ + d) Upᵀ + u,    Down and Up = Σᵢ Aᵢ ⊗ (Sᵢ Tᵢᵀ),    i = 1…n

The A [n, n] are one set for all layers and both weights, or each weight's own; S and T have r
columns. So an adapter has 2·r·(K + R) numbers and its biases, where a plain one has 2·K·R.
It stands where :class:`deltaops.Adapter` does: Compacter after attentions and feed-forwards,
Compacter++ after feed-forwards only (style "pfeiffer").
Source: Mahabadi et al. 2021 (arXiv 2106.04647), §3 and §4; the start values are its code's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from deltaops.errors import ConfigError
from deltaops.modules import Bottleneck, KroneckerSum, start_rule, start_sum

from . import bottleneck
from .adapter import Adapter
from .base import Binding, Site, adapter_dtype
from .linear import become_place
from .targets import check_flags, is_count, is_number

_RULE = "adapter.down.phm_rule"


@dataclass(frozen=True, repr=False)
class Compacter(Adapter):
    """Settings of a Compacter: those of :class:`deltaops.Adapter` and its own.

    Args:
        style: "houlsby" (Compacter) or "pfeiffer" (Compacter++).
        size: R; it and the layer's width have to be multiples of ``phm_dim``.
        reduction_factor: width of the layer / R; has to divide it.
        phm_dim: n, the number of Kronecker products in a weight and the size of each A.
        phm_rank: r, the rank of each S Tᵀ.
        shared_phm_rule: one set of A for all layers, instead of one for each weight.
        phm_init_range: standard deviation of A at the start.
    Raises: ConfigError.
    """

    reduction_factor: int = 32
    phm_dim: int = 4
    phm_rank: int = 1
    shared_phm_rule: bool = True
    phm_init_range: float = 1e-4

    kind: ClassVar[str] = "compacter"

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        super().__post_init__()
        for field in ("phm_dim", "phm_rank"):
            if not is_count(getattr(self, field)):
                raise ConfigError(
                    f"Compacter: {field} must be an integer ≥ 1, got {getattr(self, field)!r}."
                )
        if not is_number(self.phm_init_range) or self.phm_init_range <= 0:
            raise ConfigError(
                f"Compacter: phm_init_range must be above 0, got {self.phm_init_range!r}. "
                "With A = 0 no gradient reaches anything; 1e-4 is usual."
            )
        check_flags(self, "shared_phm_rule")

    def unfit(self, site: Site) -> str | None:
        """See :meth:`Delta.unfit`."""
        width = site.out_features
        reason = bottleneck.misfit(self, width)
        if reason is not None:
            return reason
        rank = bottleneck.rank_of(self, width)
        for size, what in ((width, f"{width} features"), (rank, f"bottleneck of {rank}")):
            if size % self.phm_dim:
                return f"phm_dim={self.phm_dim} does not divide its {what}"
        if self.phm_rank > rank // self.phm_dim:
            return (
                f"phm_rank={self.phm_rank} is above {rank // self.phm_dim}, its bottleneck of "
                f"{rank} / phm_dim"
            )
        return None

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        reason = self.unfit(site)
        if reason is not None:  # a file says what it says; sizes may not fit
            raise ConfigError(f"attach: {site.path!r}: {reason}.")
        module = modules[site.path]
        weight: Any = module.weight
        start: dict[str, Any] = {
            "device": weight.device,
            "dtype": adapter_dtype(weight, self.autocast_adapter_dtype),
            "generator": binding.generator,
        }

        width = site.out_features
        rank = bottleneck.rank_of(self, width)

        def matrix(rows: int, columns: int) -> KroneckerSum:
            rule: Any = binding.common.get(_RULE)
            if rule is None:
                rule = start_rule(self.phm_dim, self.phm_init_range, **start)
            return start_sum(rule, self.phm_dim, rows, columns, self.phm_rank, **start)

        down = matrix(rank, width)
        if self.shared_phm_rule:
            binding.common.setdefault(_RULE, down)
        up = matrix(width, rank)
        adapter = Bottleneck(down, up, bottleneck.settings_of(self), norm=self.layer_norm)
        become_place(module, self.kind, binding).add_adapter(binding.name, adapter, None)

    def shared(self, suffix: str) -> bool:
        """See :meth:`Delta.shared`."""
        return self.shared_phm_rule and suffix == _RULE

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        width, n, r = site.out_features, self.phm_dim, self.phm_rank
        rank = bottleneck.rank_of(self, width)
        found = bottleneck.vectors(rank, width, width, norm=self.layer_norm)
        for side, rows, columns in (("down", rank, width), ("up", width, rank)):
            if side == "down" or not self.shared_phm_rule:
                found[f"adapter.{side}.phm_rule"] = (n, n, n)
            found[f"adapter.{side}.s"] = (n, rows // n, r)
            found[f"adapter.{side}.t"] = (n, columns // n, r)
        return found
