"""Intrinsic adapters: everything that a model's adapters have, decoded from q trained numbers.

    θ = θ₀ + σ/√q · z R        all parameters of all adapters, n of them; R [q, n] fixed

Without a decoder that was fitted to adapters of other tasks, R is a random projection around the
start θ₀ of an :class:`deltaops.Adapter`, both made from the seed alone: that measures how few
numbers a task needs at all (Aghajanyan et al. 2021, arXiv 2012.13255). R takes q·n numbers of
memory, and none of a file.

They are decoded once in each pass, for all places. What a place runs is the adapter's own op.
Source: Qin et al. 2021 (arXiv 2110.07867), §3, whose prompts become adapters; the start values are
those of Houlsby et al. 2019 (arXiv 1902.00751), §3.6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, ConfigError
from deltaops.modules import (
    DecodedAdapters,
    DecodedBottleneck,
    DeltaPlace,
    RandomRows,
    activate_hooks,
    adapter_rows,
    draws_on,
    drop_hooks,
)

from . import bottleneck
from .adapter import Adapter
from .base import MODEL, Binding, Site, Stored, adapter_dtype
from .linear import become_place
from .targets import is_count

SPREAD = 1e-2
"""σ: what Houlsby et al. draw Down and Up with, so that numbers near 1 move them by as much."""
_NAME = "intrinsic_adapter"
"""The decoder's name on the model, and its part of keys."""
_KEY = f"{_NAME}.intrinsic"
_PREFIX = "adapter."
"""Of an adapter's tensors in files."""


@dataclass(frozen=True, repr=False)
class IntrinsicAdapter(Adapter):
    """Settings of intrinsic adapters: those of :class:`deltaops.Adapter` and their own.

    Args:
        intrinsic_dim: q, the numbers that are trained, for all places together.
        seed: makes the random projection, and the start that it goes around.
    Raises: ConfigError.
    """

    intrinsic_dim: int = 5
    seed: int = 0

    kind: ClassVar[str] = "intrinsic-adapter"

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        super().__post_init__()
        if not is_count(self.intrinsic_dim):
            raise ConfigError(
                f"IntrinsicAdapter: intrinsic_dim must be an integer ≥ 1, got "
                f"{self.intrinsic_dim!r}."
            )
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not whole or not 0 <= self.seed < 2**63:
            raise ConfigError(
                f"IntrinsicAdapter: seed must be an integer ≥ 0 and below 2⁶³, got {self.seed!r}."
            )

    def __repr__(self) -> str:
        """Whatever differs from its default, and what decodes."""
        return f"{super().__repr__()}, {RandomRows.told}"

    # ------------------------------------------------------------------------------- binding

    def leave(self, model: nn.Module) -> None:
        """See :meth:`Delta.leave`."""
        drop_hooks(model)

    def switch(self, model: nn.Module, active: bool) -> None:
        """See :meth:`Delta.switch`: nothing is decoded for adapters that are off."""
        activate_hooks(model, active)

    def on_model(self, sites: tuple[Site, ...]) -> tuple[int, int] | None:
        """q and n."""
        sizes = (torch.Size(shape).numel() for s in sites for shape in self._layout(s).values())
        return self.intrinsic_dim, sum(sizes)

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`. The model, with its decoder, comes before the places."""
        module = modules[site.path]
        if site.place == MODEL:
            self._bind_decoder(site, module)
            return
        source = modules[""].get_submodule(_NAME)
        assert isinstance(source, DecodedAdapters)
        layout = self._layout(site)
        settings = bottleneck.settings_of(self)
        adapter, taken = adapter_rows(source, modules, site.path, layout, settings)
        _start(source.decoder.base[taken], layout)  # type: ignore[index]  # a tensor
        become_place(module, self.kind, binding).add_adapter(binding.name, adapter, None)

    def _bind_decoder(self, site: Site, model: nn.Module) -> None:
        if hasattr(model, _NAME):
            raise AttachError(
                f"IntrinsicAdapter: {type(model).__name__} must have no {_NAME!r} yet, and has "
                "one. Rename it."
            )
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = adapter_dtype(weight, self.autocast_adapter_dtype)
        q, n = site.in_features, site.out_features
        if weight.device.type == "meta":
            base, projection = (torch.empty(s, device="meta") for s in ((n,), (q, n)))
        else:
            random = torch.Generator().manual_seed(self.seed)
            base = torch.empty(n, device=draws_on(random), dtype=torch.float32)
            nn.init.trunc_normal_(base, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD, generator=random)
            projection = torch.randn(
                (q, n), generator=random, device=draws_on(random), dtype=torch.float32
            )
            projection *= SPREAD / q**0.5
        z = torch.zeros(q, device=weight.device)
        made = DecodedAdapters(z, RandomRows(base, projection))
        model.add_module(_NAME, made.to(device=weight.device, dtype=dtype))

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        module = modules[site.path]
        if site.place != MODEL:
            super().unbind(site, modules)
        elif isinstance(module._modules.get(_NAME), DecodedAdapters):
            del module._modules[_NAME]

    def activate(self, module: nn.Module, active: bool) -> None:
        """See :meth:`Delta.activate`."""
        if isinstance(module, DeltaPlace):  # not the model, which :meth:`switch` sees to
            super().activate(module, active)

    # ----------------------------------------------------------------------------------- files

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """The numbers, which the model has."""
        source = module._modules.get(_NAME)
        return {_KEY: source.intrinsic} if isinstance(source, DecodedAdapters) else {}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {_KEY: (self.intrinsic_dim,)} if site.place == MODEL else {}

    def portable(
        self,
        modules: Mapping[str, nn.Module],
        name: str,
        state: Mapping[str, Tensor],
        sites: tuple[Site, ...],
        *,
        flat: bool,
    ) -> Stored:
        """See :meth:`Delta.portable`: flat, the adapters themselves."""
        if not flat:
            return Stored(self, state, sites)
        places = tuple(site for site in sites if site.place != MODEL)
        found = {key: tensor for key, tensor in state.items() if key != _KEY}
        with torch.no_grad():
            for site in places:
                adapter = self._adapter(modules[site.path], name)
                for suffix, tensor in adapter.tensors().items():
                    found[site.key(_PREFIX + suffix)] = tensor.cpu()
        same = {field.name: getattr(self, field.name) for field in fields(Adapter)}
        return Stored(Adapter(**same), found, places)

    # ---------------------------------------------------------------------------------- details

    def _layout(self, site: Site) -> dict[str, tuple[int, ...]]:
        """Of the adapter of ``site``, by the names that it has in an adapter's file."""
        width = site.out_features
        rank = bottleneck.rank_of(self, width)
        found = bottleneck.shapes(rank, width, width, norm=self.layer_norm)
        return {suffix.removeprefix(_PREFIX): shape for suffix, shape in found.items()}

    @staticmethod
    def _adapter(module: Any, name: str) -> DecodedBottleneck:
        found = module.adapter[name]
        assert isinstance(found, DecodedBottleneck)
        return found


def _start(base: Tensor, layout: Mapping[str, tuple[int, ...]]) -> None:
    """Biases of zero and plain norms in ``base``, which was drawn for weights throughout."""
    sizes = [torch.Size(shape).numel() for shape in layout.values()]
    for name, part in zip(layout, base.split(sizes), strict=True):
        if not name.endswith(".weight"):
            part.fill_(float(name == "norm_weight"))
