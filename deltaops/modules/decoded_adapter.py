"""Adapters whose parameters are all decoded from q numbers, once in each pass.

    θ = θ₀ + σ/√q · z R                R [q, n] of the standard normal: a fixed random projection
    θ = W₂ tanh(W₁ z + b₁) + b₂        W₁ [h, q], W₂ [n, h]: a decoder fitted to other adapters

θ [n] is everything that the adapters have, one place after the other: biases, perhaps a norm, Down
and Up. Only z [q] is trained. What decodes it is frozen and in no state dict: it is made again from
a seed, or read from its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .adapter import AdapterSettings, Held, adapt
from .draws import no_autocast
from .intrinsic import FITTED, Decoding
from .replicas import refuse_replicas
from .rows import Rows, rows_of

Layout = Mapping[str, tuple[int, ...]]
"""Name → shape of an adapter's tensors, in their order."""


class RandomRows(Decoding):
    """A fixed random projection around a start θ₀."""

    told = "decoded by a fixed random projection, made from its seed and not stored"
    base: Tensor
    projection: Tensor

    def __init__(self, base: Tensor, projection: Tensor) -> None:
        """Hold θ₀ ``[n]`` and the scaled projection ``[q, n]``."""
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("projection", projection, persistent=False)

    def forward(self, z: Tensor, start: int, stop: int) -> Tensor:
        """``[q]`` → ``[stop − start]``."""
        return self.base[start:stop] + z @ self.projection[:, start:stop]


class FittedRows(Decoding):
    """A decoder that was fitted to the adapters of several tasks."""

    told = "decoded by a decoder fitted to the adapters of other tasks"
    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold ``tensors``, called as in :data:`~.intrinsic.FITTED`."""
        super().__init__()
        for name in FITTED:
            self.register_buffer(name.replace(".", "_"), tensors[name], persistent=False)

    def forward(self, z: Tensor, start: int, stop: int) -> Tensor:
        """``[q]`` → ``[stop − start]``."""
        inner = torch.tanh(linear(z, self.first_weight, self.first_bias))
        return linear(inner, self.second_weight[start:stop], self.second_bias[start:stop])


class DecodedAdapters(nn.Module):
    """The numbers of all adapters of a model, and what decodes them."""

    _replicate_for_data_parallel = refuse_replicas

    def __init__(self, z: Tensor, decoder: nn.Module) -> None:
        """Decode z ``[q]`` by ``decoder``."""
        super().__init__()
        self.intrinsic = nn.Parameter(z)
        self.decoder = decoder

    def forward(self, start: int, stop: int) -> Tensor:
        """Parameters ``start`` to ``stop``, ``[1, stop − start]``; autocast does not round them."""
        with no_autocast(self.intrinsic.device):
            found: Tensor = self.decoder(self.intrinsic, start, stop)
        return found[None]


class DecodedBottleneck(nn.Module):
    """One of those adapters: what :class:`~.adapter.Bottleneck` is, without parameters."""

    def __init__(self, rows: Rows, first: int, layout: Layout, settings: AdapterSettings) -> None:
        """Read the parameters that joined ``rows`` at ``first``."""
        super().__init__()
        self.rows = rows
        self.first = first
        self.layout = dict(layout)
        self.sizes = [prod(shape) for shape in layout.values()]
        self.settings = settings

    def tensors(self, row: Tensor | None = None) -> dict[str, Tensor]:
        """By the names of the layout; views of ``row [1, n]``, of what is decoded without one."""
        if row is None:
            row = self.rows.current(self.first, sum(self.sizes))
        parts = zip(self.layout.items(), torch.split(row[0], self.sizes), strict=True)
        return {name: part.view(shape) for (name, shape), part in parts}

    def forward(self, x: Tensor, residual: Tensor | None, backend: str, strict: bool) -> Tensor:
        """See :func:`~.adapter.adapt`."""
        t = self.tensors()
        held = Held(
            t["down.weight"], t["up.weight"], t["down_bias"], t["up_bias"], t.get("norm_weight"),
            t.get("norm_bias"),
        )  # fmt: skip
        return adapt(x, residual, held, self.settings, backend, strict)

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.settings.activation}, scaling={self.settings.scaling:g}, decoded"


def adapter_rows(
    source: DecodedAdapters,
    modules: Mapping[str, nn.Module],
    path: str,
    layout: Layout,
    settings: AdapterSettings,
) -> tuple[DecodedBottleneck, slice]:
    """The adapter of the place at ``path``, and which of all parameters it reads.

    Args:
        source: of the model.
        modules: of the model, by path.
        path: of the place.
        layout: of the adapter.
        settings: of the adapter.
    """
    rows = rows_of(source, modules, path)
    size = sum(prod(shape) for shape in layout.values())
    first = rows.join(size)
    start = rows.start + first
    return DecodedBottleneck(rows, first, layout, settings), slice(start, start + size)
