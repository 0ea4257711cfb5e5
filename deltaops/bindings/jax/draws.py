"""The dropout of ``delta_linear`` on its own: the same stream of numbers, on the CPU and CUDA."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltaops.bindings.settings import DRAWS, drop_threshold
from deltaops.errors import ConfigError, ShapeError

from .autodiff import Op, Operands, apply
from .ffi import Array, as_array, as_rows, ffi_call, like


class Settings(NamedTuple):
    """What is static of a call."""

    branch: int
    threshold: int

    def attributes(self) -> dict[str, np.int32]:
        """As the handlers take them."""
        return {"branch": np.int32(self.branch), "threshold": np.int32(self.threshold)}


def dropout(x: Array, key: Array, p: float, *, branch: int = 0) -> Array:
    """x as the branch of that number reads it in ``delta_linear`` under this key.

    Args:
        x: ``[…, K]`` float32 or bfloat16.
        key, p, branch: as of :func:`dropout_mask`.
    Returns: shape and dtype of ``x``: 0 where dropped, else x · 65536 / (65536 − round(65536 p)).
    Raises: DtypeError, ShapeError, ConfigError; what JAX raises as for :func:`dropout_mask`.
    Gradients: ``x``; first order, reverse mode.
    Source: Srivastava et al. 2014 (JMLR 15).
    """
    op = "dropout"
    x = as_rows(op, "x", x)
    settings = _settings(op, p, branch)
    flat = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return apply(DROPOUT, settings, {"x": flat, "seed": seed_of(op, key)}).reshape(x.shape)


def dropout_mask(key: Array, shape: Sequence[int], p: float, *, branch: int = 0) -> Array:
    """Which elements of x the branch of that number keeps in ``delta_linear`` under this key.

    Kept ones are multiplied by 65536 / (65536 − round(65536 p)).

    Args:
        key: of ``jax.random``.
        shape: ``[M, K]``: rows and inputs.
        p: probability to be dropped, from 0 to 1; a multiple of 2⁻¹⁶ is used.
        branch: its number in the list of branches.
    Returns: bool ``[M, K]``, True where x stays.
    Raises: ConfigError, ShapeError; what JAX raises for a platform other than the CPU and CUDA, and
        for CUDA where ``deltaops._xla_cuda`` was not built.
    """
    op = "dropout_mask"
    shape = tuple(shape)
    if len(shape) != 2 or min(shape) < 0:
        raise ShapeError(f"{op}: shape must be [M, K], got {list(shape)}.")
    return _mask(_settings(op, p, branch), seed_of(op, key), shape)


def _settings(op: str, p: float, branch: int) -> Settings:
    if not 0 <= branch < 2**31:
        raise ConfigError(f"{op}: branch must be the number of a branch, got {branch!r}.")
    return Settings(branch, drop_threshold(op, p))


def _mask(settings: Settings, seed: Array, shape: tuple[int, ...]) -> Array:
    (keep,) = ffi_call("dropout_mask", [like(shape, jnp.bool_)], [seed], **settings.attributes())
    return keep


def _drop(settings: Settings, x: Array, seed: Array) -> Array:
    threshold = settings.threshold
    scale = DRAWS / (DRAWS - threshold) if threshold < DRAWS else 0.0

    def on_cpu(x: Array, seed: Array) -> Array:
        scaled = (x.astype(jnp.float32) * np.float32(scale)).astype(x.dtype)
        return jnp.where(_mask(settings, seed, x.shape), scaled, jnp.zeros_like(x))

    def on_cuda(x: Array, seed: Array) -> Array:
        given = [x, seed]
        return ffi_call("dropout", [like(x.shape, x.dtype)], given, **settings.attributes())[0]

    y: Array = jax.lax.platform_dependent(x, seed, cpu=on_cpu, cuda=on_cuda)
    return y


def forward(settings: Settings, operands: Operands, keep: bool) -> tuple[Array, Operands]:
    """y ``[M, K]``; nothing more is kept."""
    return _drop(settings, operands["x"], operands["seed"]), {}


def backward(
    settings: Settings, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradient of x: the same elements of that of y."""
    return {"x": _drop(settings, grad_y, operands["seed"])}


def _saved(settings: Settings, there: Collection[str], wanted: tuple[str, ...]) -> Collection[str]:
    return ["seed"]


DROPOUT = Op("dropout", forward, backward, _saved, frozenset({"seed"}))


def seed_of(op: str, key: Array | None, name: str = "key") -> Array:
    """64 bits of a key, as two words."""
    if key is None:
        raise ConfigError(
            f"{op}: {name} must be a key of jax.random where a branch has dropout, got None. Pass "
            "one, or branches with dropout=0 where nothing trains."
        )
    key = as_array(op, name, key)
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    if data.ndim != 1 or data.shape[0] < 2 or data.dtype != jnp.uint32:
        raise ConfigError(
            f"{op}: {name} must be one key of jax.random of at least 64 bits, got "
            f"{data.dtype}{list(data.shape)}."
        )
    return data[:2]
