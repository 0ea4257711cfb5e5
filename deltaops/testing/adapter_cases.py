"""The shapes and settings that every backend of ``bottleneck`` and ``norm_bias`` is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _optional(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


class _Draw:
    """Random tensors, the same for every dtype up to rounding."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        wide = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return (wide * scale).to(dtype)


@dataclass(frozen=True)
class BottleneckTensors:
    """The arguments of one call, in the order of the backends' ``bottleneck_forward``."""

    x: Tensor
    residual: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    scaling: float
    eps: float
    activation: str
    norm: str

    def to(self, dtype: torch.dtype) -> BottleneckTensors:
        """The same values in another dtype; where x is its own residual it stays that."""
        x = self.x.to(dtype)
        return replace(
            self,
            x=x,
            residual=x if self.residual is self.x else _optional(self.residual, dtype),
            gamma=_optional(self.gamma, dtype),
            beta=_optional(self.beta, dtype),
            down=self.down.to(dtype),
            down_bias=_optional(self.down_bias, dtype),
            up=self.up.to(dtype),
            up_bias=_optional(self.up_bias, dtype),
        )

    def forward_arguments(self) -> tuple[object, ...]:
        """For ``backend.bottleneck_forward(*…)``."""
        return (
            self.x, self.residual, self.gamma, self.beta, self.down, self.down_bias, self.up,
            self.up_bias, self.scaling, self.eps, self.activation, self.norm,
        )  # fmt: skip

    def backward_arguments(self, grad_y: Tensor, h: Tensor, stats: Tensor) -> tuple[object, ...]:
        """For ``backend.bottleneck_backward(*…, needs)``."""
        return (
            grad_y, self.x, h, stats, self.gamma, self.beta, self.down, self.up, self.scaling,
            self.activation, self.norm, self.residual is self.x,
        )  # fmt: skip

    def leaves(self) -> dict[str, Tensor]:
        """Everything that has a gradient in ``bottleneck_backward``, in its order."""
        named = {
            "x": self.x, "gamma": self.gamma, "beta": self.beta, "down": self.down,
            "down_bias": self.down_bias, "up": self.up, "up_bias": self.up_bias,
        }  # fmt: skip
        return {name: t for name, t in named.items() if t is not None}

    def needs(self) -> list[bool]:
        """``needs`` for every gradient that there is."""
        present = self.leaves()
        names = ("x", "gamma", "beta", "down", "down_bias", "up", "up_bias")
        return [name in present for name in names]


@dataclass(frozen=True)
class BottleneckCase:
    """One row of the table; ``str`` is its test id."""

    m: int
    k: int
    r: int
    activation: str = "relu"
    norm: str = "none"
    residual: str = "x"
    """"x", "other" or "none"."""
    bare: bool = False
    """Without the biases and without gamma and beta."""
    padding: int = 0
    """Extra elements behind each row of x, so that its rows are strided."""

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.k}-r{self.r}-{self.activation}"]
        parts += [] if self.norm == "none" else [self.norm]
        parts += [] if self.residual == "x" else [f"res.{self.residual}"]
        parts += ["bare"] if self.bare else []
        parts += ["strided"] if self.padding else []
        return "-".join(parts)

    def tensors(
        self, dtype: torch.dtype, *, parameter_dtype: torch.dtype | None = None, seed: int = 0
    ) -> BottleneckTensors:
        """Random arguments of unit scale."""
        draw, p = _Draw(seed), parameter_dtype or dtype
        m, k, r = self.m, self.k, self.r
        x = draw(m, k + self.padding, dtype=dtype)[:, :k]
        other = draw(m, k, dtype=dtype)
        down = draw(r, k, dtype=p, scale=k**-0.5)
        up = draw(k, r, dtype=p, scale=r**-0.5)
        vectors = [draw(n, dtype=p) for n in (k, k, r, k)]
        gamma, beta, down_bias, up_bias = (None if self.bare else v for v in vectors)
        normed = self.norm != "none"
        return BottleneckTensors(
            x,
            {"x": x, "other": other, "none": None}[self.residual],
            gamma if normed else None,
            beta if normed else None,
            down,
            down_bias,
            up,
            up_bias,
            0.75,
            1e-5,
            self.activation,
            self.norm,
        )

    def grad_y(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """A random output gradient ``[M, K]``."""
        return _Draw(seed)(self.m, self.k, dtype=dtype)


BOTTLENECK_CASES = (
    BottleneckCase(64, 48, 8),
    BottleneckCase(0, 16, 4, "gelu", "layer"),
    BottleneckCase(1, 33, 3, "silu", "layer"),
    BottleneckCase(7, 1, 1, "gelu_tanh"),
    BottleneckCase(5, 67, 1, "gelu", "rms", "other"),
    BottleneckCase(13, 300, 17, "silu", "layer", "none"),
    BottleneckCase(131, 129, 24, "gelu_tanh", "layer", padding=3),
    BottleneckCase(97, 53, 100, "identity", "none", "none", bare=True),
    BottleneckCase(61, 71, 37, "gelu", "none", "other", padding=5),
    BottleneckCase(40, 29, 5, "relu", "rms", bare=True),
    BottleneckCase(300, 700, 16, "gelu", "layer", "other"),
)


@dataclass(frozen=True)
class NormBiasCase:
    """One row of the table of ``norm_bias``; ``str`` is its test id."""

    m: int
    k: int
    norm: str = "layer"
    gamma: bool = True
    bias: bool = True
    padding: int = 0
    offset: float = 0.0
    """Added to x: a mean far from 0 costs digits where the variance is taken carelessly."""

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.k}-{self.norm}"]
        parts += [] if self.gamma else ["nogamma"]
        parts += [] if self.bias else ["nobias"]
        parts += ["strided"] if self.padding else []
        parts += ["offset"] if self.offset else []
        return "-".join(parts)

    def tensors(
        self, dtype: torch.dtype, *, parameter_dtype: torch.dtype | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, gamma and bias."""
        draw, p = _Draw(seed), parameter_dtype or dtype
        x = (draw(self.m, self.k + self.padding, dtype=torch.float64) + self.offset).to(dtype)
        gamma, bias = draw(self.k, dtype=p), draw(self.k, dtype=p)
        return x[:, : self.k], gamma if self.gamma else None, bias if self.bias else None

    def grad_y(self, dtype: torch.dtype, *, seed: int = 1) -> Tensor:
        """A random output gradient ``[M, K]``."""
        return _Draw(seed)(self.m, self.k, dtype=dtype)


NORM_BIAS_CASES = (
    NormBiasCase(64, 48),
    NormBiasCase(0, 16),
    NormBiasCase(1, 33, "rms"),
    NormBiasCase(7, 2),
    NormBiasCase(131, 129, "layer", padding=3),
    NormBiasCase(97, 53, "rms", gamma=False),
    NormBiasCase(40, 29, "layer", gamma=False, bias=False),
    NormBiasCase(61, 71, "rms", bias=False, padding=5),
    NormBiasCase(300, 1030, "layer", offset=30.0),
    NormBiasCase(0, 5, "none"),
    NormBiasCase(130, 67, "none", bias=False, padding=2),
    NormBiasCase(5, 1, "none", gamma=False),
    NormBiasCase(37, 200, "none"),
)
