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
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from deltaops.ops import delta_linear
from deltaops.ops.paths import no_autocast, records
from deltaops.packing import PACKING

from .adapter import AdapterSettings, Held, adapt
from .intrinsic import FITTED, Decoding
from .replicas import refuse_replicas
from .rows import Rows, rows_of

Layout = Mapping[str, tuple[int, ...]]
"""Name → shape of an adapter's tensors, in their order."""


LARGE = 1 << 22
"""Elements of a projection from which on it is read from memory, on a CPU."""


PIECES = 8
"""Of z, summed apart by several threads and then added: always as many, so that no team changes a
bit."""


class _Projected(torch.autograd.Function):
    """``z R`` for z ``[q]`` and a large frozen R ``[q, n]``.

    Both ways take what reading R takes: on two cores of Zen 5, of 904 MB, 19 ms by sums over pieces
    of z, and 14 for the gradient ``R dθ``, which is a layer of one row. Torch's product of a vector
    with a matrix takes 30 and 28.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        each = len(z) // PIECES
        whole = PIECES * each
        parts = torch.bmm(
            z[:whole].view(PIECES, 1, each), rows[:whole].view(PIECES, each, rows.shape[1])
        )
        return torch.addmm(parts.sum(0), z[None, whole:], rows[whole:])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        PACKING.keep_policy(rows, "never")  # a copy of it would be as large, and gain nothing
        return delta_linear(grad[None], rows)[0], None


def _project(z: Tensor, rows: Tensor) -> Tensor:
    if z.is_cpu and rows.numel() >= LARGE and records(z, rows):
        projected: Tensor = _Projected.apply(z, rows)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
        return projected
    return z @ rows


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
        return self.base[start:stop] + _project(z, self.projection[:, start:stop])


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
