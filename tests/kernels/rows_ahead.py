"""Calls for ahead.py: adapters, norms, gated products, rotations and prompts, both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltaops.backends.triton import TritonBackend
from deltaops.backends.triton.targets import Target

HALF, FULL = torch.bfloat16, torch.float32


class Launch(Protocol):
    """A call of the backend on tensors that have shapes and no memory."""

    def __call__(self) -> None: ...


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Adapter:
    """A call of bottleneck with everything that it may have, or with nothing beside its norm."""

    m: int
    k: int
    r: int
    dtype: torch.dtype = HALF
    parameters: torch.dtype = HALF
    norm: str = "layer"
    activation: str = "gelu"
    padding: int = 0
    bare: bool = False
    scaling: float = 0.5

    def __call__(self) -> None:
        """Forward and every gradient."""
        run, p = TritonBackend(), self.parameters
        x = _empty(self.m, self.k + self.padding, dtype=self.dtype)[:, : self.k]
        gamma, beta, up_bias = (_empty(self.k, dtype=p) for _ in range(3))
        down, down_bias = _empty(self.r, self.k, dtype=p), _empty(self.r, dtype=p)
        up, full = _empty(self.k, self.r, dtype=p), not self.bare
        normed = full and self.norm != "none"
        affine = (gamma, beta) if normed else (None, None)
        biases = (down_bias, up_bias) if full else (None, None)
        y, h, stats = run.bottleneck_forward(
            x,
            x,
            *affine,
            down,
            biases[0],
            up,
            biases[1],
            self.scaling,
            1e-5,
            self.activation,
            self.norm,
        )
        run.bottleneck_backward(
            y, x, h, stats, *affine, down, up, self.scaling, self.activation, self.norm, True,
            [True, normed, normed, True, full, True, full],
        )  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """A call of norm_bias with everything that it may have."""

    m: int
    k: int
    dtype: torch.dtype = HALF
    parameters: torch.dtype = FULL
    norm: str = "layer"

    def __call__(self) -> None:
        """Forward and every gradient."""
        run, x = TritonBackend(), _empty(self.m, self.k, dtype=self.dtype)
        gamma, bias = (_empty(self.k, dtype=self.parameters) for _ in range(2))
        y, stats = run.norm_bias_forward(x, gamma, bias, 1e-5, self.norm)
        needs = [True, True, True]
        run.norm_bias_backward(y, x, stats, gamma, self.parameters, self.norm, needs)


@dataclass(frozen=True)
class Gated:
    """A call of gated on the halves of one matrix."""

    m: int
    k: int
    dtype: torch.dtype = HALF
    activation: str = "silu"

    def __call__(self) -> None:
        """Forward and both gradients."""
        run, both = TritonBackend(), _empty(self.m, 2 * self.k, dtype=self.dtype)
        gate, up = both[:, : self.k], both[:, self.k :]
        y = run.gated_forward(gate, up, self.activation)
        run.gated_backward(y, gate, up, self.activation, [True, True])


@dataclass(frozen=True)
class Rotary:
    """A call of rotary as a model makes it."""

    d: int
    dtype: torch.dtype = HALF
    tables: torch.dtype = FULL

    def __call__(self) -> None:
        """Both ways."""
        run, x = TritonBackend(), _empty(2, 1024, 32, self.d, dtype=self.dtype).transpose(1, 2)
        cos, sin = (_empty(1, 1024, self.d, dtype=self.tables) for _ in range(2))
        run.rotary_backward(run.rotary_forward(x, cos, sin, True), cos, sin, True)


@dataclass(frozen=True)
class Prompt:
    """A call of prompt_embedding."""

    d: int
    dtype: torch.dtype = HALF
    prompt: torch.dtype = FULL

    def __call__(self) -> None:
        """Both ways."""
        run, ids = TritonBackend(), _empty(8, 1000, dtype=torch.int64)
        prompt, table = (
            _empty(20, self.d, dtype=self.prompt),
            _empty(32000, self.d, dtype=self.dtype),
        )
        y = run.prompt_embedding_forward(prompt, ids, table)
        run.prompt_embedding_backward(y, 20, self.prompt)


CALLS: tuple[Callable[[], None], ...] = (
    # in one program for its rows, with the most lanes of a half model, and in two
    Adapter(8192, 4096, 128),
    Adapter(8192, 4096, 256),
    # the same with 16 rows
    Adapter(2048, 4096, 128),
    # float32 adapters on a half model, and nothing divides by 16: the most registers
    Adapter(8191, 4001, 13, HALF, FULL, padding=3),
    Norm(8192, 4096),
    Norm(8192, 14336),
    Norm(8192, 14336, norm="none"),
    Gated(8192, 14336, activation="gelu_tanh"),
    Rotary(128),
    Prompt(4096),
)
# The other rows of the tables, for one architecture: CI has no time for them on all.
VARIATIONS: tuple[Callable[[], None], ...] = (
    Adapter(512, 4096, 64, HALF, FULL),
    Adapter(8191, 4001, 100, padding=3),
    # the other ranks and norms, and float32 in one program for its rows and in two
    Adapter(8192, 4096, 64, norm="none"),
    Adapter(8192, 4096, 8),
    Adapter(8192, 4096, 16, norm="rms"),
    Adapter(8192, 4096, 64, norm="rms", bare=True),
    Adapter(8192, 4096, 16, FULL, FULL, norm="none"),
    Adapter(501, 4001, 13, FULL, FULL),
    Prompt(4001),
)

# The largest tiles, for GPUs with 99 KB of shared memory.
NARROW = (CALLS[0],)


def calls(target: Target) -> tuple[Callable[[], None], ...]:
    """All whose configurations are compiled for this GPU."""
    return CALLS + (VARIATIONS if target.name == "sm_90" else ())
