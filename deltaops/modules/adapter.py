"""A bottleneck adapter's parameters, held where a place's op reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltaops.ops import Branch, bottleneck

from .draws import draws_on
from .factor import Factor
from .kronecker import KroneckerSum


class AdapterSettings(NamedTuple):
    """What a place knows of an adapter beside its parameters."""

    activation: str
    scaling: float
    eps: float = 1e-5
    """Of its norm, if it has one."""


class Held(NamedTuple):
    """The tensors of an adapter; N is K."""

    down: Tensor
    """``[R, K]``"""
    up: Tensor
    """``[K, R]``"""
    down_bias: Tensor
    """``[R]``"""
    up_bias: Tensor | None
    """``[K]``"""
    norm_weight: Tensor | None = None
    """``[K]``"""
    norm_bias: Tensor | None = None
    """``[K]``"""


def adapt(
    x: Tensor,
    residual: Tensor | None,
    held: Held,
    settings: AdapterSettings,
    backend: str,
    strict: bool,
) -> Tensor:
    """``residual + s · φ(norm(x) Downᵀ + d) Upᵀ + u``, all ``[..., K]``; None adds x itself."""
    if residual is not None and residual.dtype is not x.dtype:
        x = x.to(residual.dtype)  # T5 keeps one layer of its feed-forward in float32
    return bottleneck(
        x,
        held.down,
        held.up,
        held.down_bias,
        held.up_bias,
        residual="x" if residual is None else residual,
        scaling=settings.scaling,
        activation=settings.activation,
        norm=None if held.norm_weight is None else "layer",
        gamma=held.norm_weight,
        beta=held.norm_bias,
        eps=settings.eps,
        backend=backend,
        strict=strict,
    )


class Bottleneck(nn.Module):
    """``down [R, K]``, ``up [N, R]``, a bias after each, and perhaps a norm before.

    After a layer, or beside a sub-layer, N is K. Beside one layer it is a branch of that layer's
    op, and the bias after ``up`` is the layer's own.
    """

    down: Factor | KroneckerSum
    up: Factor | KroneckerSum
    down_bias: nn.Parameter
    up_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None

    def __init__(
        self,
        down: Factor | KroneckerSum,
        up: Factor | KroneckerSum,
        settings: AdapterSettings,
        *,
        norm: bool = False,
        branch: bool = False,
    ) -> None:
        """Hold the start values; biases are zero and the norm is the plain one.

        Args:
            down: of a weight ``[R, K]``.
            up: of a weight ``[N, R]``.
            settings: see there.
            norm: whether its input is normalized first.
            branch: leave the bias after ``up`` to the layer.
        """
        super().__init__()
        self.settings = settings
        self.down, self.up = down, up
        like = down.weight
        rank, width = like.shape
        self.down_bias = nn.Parameter(like.new_zeros(rank))
        self.up_bias = None if branch else nn.Parameter(like.new_zeros(up.weight.shape[0]))
        self.norm_weight = nn.Parameter(like.new_ones(width)) if norm else None
        self.norm_bias = nn.Parameter(like.new_zeros(width)) if norm else None

    def forward(self, x: Tensor, residual: Tensor | None, backend: str, strict: bool) -> Tensor:
        """See :func:`adapt`."""
        held = Held(
            self.down.weight, self.up.weight, self.down_bias, self.up_bias, self.norm_weight,
            self.norm_bias,
        )  # fmt: skip
        return adapt(x, residual, held, self.settings, backend, strict)

    def branch(self) -> Branch:
        """``s · φ(x Downᵀ + d) Upᵀ`` for :func:`deltaops.ops.delta_linear`."""
        settings = self.settings
        return Branch(
            self.down.weight,
            self.up.weight,
            settings.scaling,
            0.0,
            settings.activation,
            self.down_bias,
        )

    def extra_repr(self) -> str:
        """Settings."""
        return f"{self.settings.activation}, scaling={self.settings.scaling:g}"


def near_zero(
    rank: int,
    width: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """``down [rank, width]`` and ``up [width, rank]``, N(0, 10⁻²) cut at two deviations.

    Drawn as :func:`start_values` draws.
    Source: Houlsby et al. 2019, §3.6.
    """
    shapes = (rank, width), (width, rank)
    if device.type == "meta":
        down, up = (torch.empty(shape, device=device, dtype=dtype) for shape in shapes)
        return down, up
    found = []
    for shape in shapes:
        drawn = torch.empty(shape, device=draws_on(generator), dtype=torch.float32)
        nn.init.trunc_normal_(drawn, std=1e-2, a=-2e-2, b=2e-2, generator=generator)
        found.append(drawn.to(device=device, dtype=dtype))
    return found[0], found[1]
