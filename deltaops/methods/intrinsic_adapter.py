"""Intrinsic adapters: everything that a model's adapters have, decoded from q trained numbers.

    θ = decoder(z)        all parameters of all adapters, n of them

The decoder is frozen. Fitted to the adapters of several tasks (``deltaops intrinsic fit --of
adapter``) it spans what they have in common. Without one it is a fixed random projection around
the start of an :class:`deltaops.Adapter`, both made from the seed alone: that measures how few
numbers a task needs at all (Aghajanyan et al. 2021, arXiv 2012.13255). The projection takes q·n
numbers of memory, and none of a file.

They are decoded once in each pass, for all places. What a place runs is the adapter's own op.
Source: Qin et al. 2021 (arXiv 2110.07867), §3, whose prompts become adapters; the start values are
those of Houlsby et al. 2019 (arXiv 1902.00751), §3.6.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, CheckpointError, ConfigError
from deltaops.modules import (
    DecodedAdapters,
    DecodedBottleneck,
    DeltaPlace,
    FittedRows,
    RandomRows,
    activate_hooks,
    adapter_rows,
    draws_on,
    drop_hooks,
)

from . import bottleneck
from .adapter import Adapter
from .base import MODEL, Binding, Site, Stored, adapter_dtype
from .decoder import ADAPTER, FACTS, START, check_numbers, open_decoder, read_facts, read_tensors
from .linear import become_place

DIMENSION = 5
"""q where neither the settings nor a decoder say it: hundreds would be better, and the projection
takes q times the numbers of all adapters."""
SPREAD = 1e-2
"""Standard deviation of Down and Up at the start: Houlsby et al.'s."""
SCALE = 0.1
"""σ: numbers near 1 move each parameter about as far as training a full adapter does, so that
learning rates are those of prompts' numbers."""
_NAME = "intrinsic_adapter"
"""The decoder's name on the model, and its part of keys."""
_KEY = f"{_NAME}.intrinsic"
_PREFIX = "adapter."
"""Of an adapter's tensors in files."""


@dataclass(frozen=True, repr=False)
class IntrinsicAdapter(Adapter):
    """Settings of intrinsic adapters: those of :class:`deltaops.Adapter` and their own.

    Args:
        intrinsic_dim: q, the numbers that are trained, for all places together; the decoder's, or
            5 without one.
        decoder: folder of ``deltaops intrinsic fit --of adapter``, which says all settings of the
            adapters; None for a fixed random projection. A file holds this path, not the decoder;
            a flat one the adapters themselves.
        decoder_digest: of the decoder's tensors, read from its folder; files keep it.
        seed: makes the random projection, and the start that it goes around; of no use beside a
            decoder.
    Raises: ConfigError; CheckpointError where the decoder cannot be read.
    """

    intrinsic_dim: int | None = None
    decoder: str | os.PathLike[str] | None = None
    decoder_digest: str | None = None
    seed: int = 0

    kind: ClassVar[str] = "intrinsic-adapter"
    once: ClassVar[str | None] = "the decoder of all adapters"

    def __post_init__(self) -> None:
        """Check every value, take settings from the decoder; lists become tuples."""
        if self.decoder is not None:
            self._read_decoder()
        elif self.intrinsic_dim is None:
            object.__setattr__(self, "intrinsic_dim", DIMENSION)  # it is frozen
        super().__post_init__()
        check_numbers(self)

    def __repr__(self) -> str:
        """Whatever differs from its default, and what decodes."""
        shown = super().__repr__().replace(f", decoder_digest={self.decoder_digest!r}", "")
        return f"{shown}, {(RandomRows if self.decoder is None else FittedRows).told}"

    @property
    def dimension(self) -> int:
        """q."""
        assert self.intrinsic_dim is not None  # never None once made
        return self.intrinsic_dim

    # ------------------------------------------------------------------------------- binding

    def leave(self, model: nn.Module) -> None:
        """See :meth:`Delta.leave`."""
        drop_hooks(model)

    def switch(self, model: nn.Module, active: bool) -> None:
        """See :meth:`Delta.switch`: nothing is decoded for adapters that are off."""
        activate_hooks(model, active, DecodedAdapters)

    def on_model(self, sites: tuple[Site, ...]) -> tuple[int, int] | None:
        """q and n."""
        sizes = (torch.Size(shape).numel() for s in sites for shape in self._layout(s).values())
        return self.dimension, sum(sizes)

    def unfit_together(self, sites: tuple[Site, ...]) -> str | None:
        """See :meth:`Delta.unfit_together`: a decoder's numbers are for places in turn."""
        if self.decoder is None:
            return None
        theirs = [tuple(place) for place in read_facts(Path(self.decoder))["places"]]
        ours = [(site.path, site.out_features) for site in sites]
        if ours == theirs:
            return None
        odd = next((p for p in (*ours, *theirs) if (p in ours) != (p in theirs)), ours[0])
        return (
            f"the decoder in {self.decoder!r} makes adapters of {len(theirs)} places, and the "
            f"{len(ours)} here are others: {odd[0]!r}, {odd[1]} wide, for one. Use the model that "
            "it was fitted on."
        )

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`. The model, with its decoder, comes before the places."""
        module = modules[site.path]
        if site.place == MODEL:
            self._bind_decoder(site, module)
            return
        source = modules[""].get_submodule(_NAME)
        assert isinstance(source, DecodedAdapters)
        place = next(module.parameters(), source.intrinsic)
        if place.device != source.intrinsic.device:
            raise AttachError(
                "IntrinsicAdapter: the model must be on one device, since all adapters are decoded "
                f"at once, on {source.intrinsic.device}; {site.path!r} is on {place.device}. Move "
                "it there, or use Adapter."
            )
        layout = self._layout(site)
        settings = bottleneck.settings_of(self)
        adapter, taken = adapter_rows(source, modules, site.path, layout, settings)
        if isinstance(source.decoder, RandomRows):
            _start(source.decoder.base[taken], layout)
        become_place(module, self.kind, binding).add_adapter(binding.name, adapter, None)

    def _bind_decoder(self, site: Site, model: nn.Module) -> None:
        if hasattr(model, _NAME):
            raise AttachError(
                f"IntrinsicAdapter: {type(model).__name__} must have no {_NAME!r} yet, and has "
                "one. Rename it."
            )
        weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        dtype = adapter_dtype(weight, self.autocast_adapter_dtype)
        z, decoder = self._random(site, weight) if self.decoder is None else self._fitted()
        made = DecodedAdapters(z, decoder)
        model.add_module(_NAME, made.to(device=weight.device, dtype=dtype))

    def _random(self, site: Site, weight: Tensor) -> tuple[Tensor, nn.Module]:
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
            projection *= SCALE / q**0.5
        return torch.zeros(q, device=weight.device), RandomRows(base, projection)

    def _fitted(self) -> tuple[Tensor, nn.Module]:
        folder, _ = open_decoder(self, ADAPTER)  # another may lie there by now
        tensors = read_tensors(folder)
        return tensors[START].clone(), FittedRows(tensors)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        module = modules[site.path]
        if site.place != MODEL:
            super().unbind(site, modules)
        elif isinstance(module._modules.get(_NAME), DecodedAdapters):
            del module._modules[_NAME]

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        if isinstance(module, DeltaPlace):  # not the model, which :meth:`switch` sees to
            super().activate(module, active, name)

    # ----------------------------------------------------------------------------------- files

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """The numbers, which the model has."""
        source = module._modules.get(_NAME)
        return {_KEY: source.intrinsic} if isinstance(source, DecodedAdapters) else {}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {_KEY: (self.dimension,)} if site.place == MODEL else {}

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
        adapters = {site: self._adapter(modules[site.path], name) for site in places}
        with torch.no_grad():
            # as a pass decodes them, all of a stack at once: apart, their bits would be others
            made = {rows: rows.compute() for rows in {a.rows for a in adapters.values()}}
            for site, adapter in adapters.items():
                parts = made[adapter.rows]
                for suffix, tensor in adapter.tensors(parts[adapter.first]).items():
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

    def _read_decoder(self) -> None:
        folder, facts = open_decoder(self, ADAPTER)
        theirs = adapter_in(facts)
        found = {f.name: (f.default, getattr(theirs, f.name)) for f in fields(Adapter)}
        found["intrinsic_dim"] = (None, facts["intrinsic_dim"])
        for own in ("modules_to_save", "task_type"):
            del found[own]
        for name, (default, value) in found.items():
            asked = getattr(self, name)
            asked = tuple(asked) if isinstance(asked, list) else asked
            if asked not in (default, value):
                raise ConfigError(
                    f"IntrinsicAdapter: {name} must be the decoder's {value!r}, got {asked!r}. "
                    "Leave it out, or fit another decoder."
                )
            object.__setattr__(self, name, value)  # it is frozen
        object.__setattr__(self, "decoder", str(folder))
        object.__setattr__(self, "decoder_digest", facts["digest"])

    @staticmethod
    def _adapter(module: Any, name: str) -> DecodedBottleneck:
        found = module.adapter[name]
        assert isinstance(found, DecodedBottleneck)
        return found


def adapter_in(facts: Mapping[str, Any]) -> Adapter:
    """What the decoder makes whose file says ``facts``. Raises: CheckpointError."""
    try:
        places = [(str(path), int(width)) for path, width in facts["places"]]
        if not places:
            raise ValueError("no places")
        return Adapter(**facts["adapter"])
    except (ConfigError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{FACTS} of a decoder must have the settings of an adapter and its places: "
            f"{type(error).__name__}: {error}. Fit it again with `deltaops intrinsic fit`."
        ) from error


def _start(base: Tensor, layout: Mapping[str, tuple[int, ...]]) -> None:
    """Biases of zero and plain norms in ``base``, which was drawn for weights throughout."""
    sizes = [torch.Size(shape).numel() for shape in layout.values()]
    for name, part in zip(layout, torch.split(base, sizes), strict=True):
        if not name.endswith(".weight"):
            part.fill_(float(name == "norm_weight"))
