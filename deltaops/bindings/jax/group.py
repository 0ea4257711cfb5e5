"""Several frozen layers of the same x in one pass over it, and one gradient of it, for JAX on the
CPU; on CUDA what :mod:`.on_cuda` takes, layer by layer but for that gradient."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from deltaops.errors import ShapeError
from deltaops.native import MAX_GROUP

from . import layers as native
from .autodiff import Op, Operands, apply
from .ffi import Array
from .linear import FROZEN, Branch, PackedWeight, prepare

OP = "delta_linear_group"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "bias", "branches", "key", "adapter"],
    meta_fields=["transposed"],
)
@dataclass(frozen=True)
class Layer:
    """The arguments of :func:`.linear.delta_linear` beside x. A pytree."""

    weight: Array | PackedWeight
    bias: Array | None = None
    branches: Sequence[Branch] = ()
    key: Array | None = None
    adapter: Array | None = None
    transposed: bool = False


def delta_linear_group(
    x: Array, layers: Sequence[Layer], *, num_threads: int | None = None
) -> list[Array]:
    """``[delta_linear(x, …) for each layer]``, to the bit, in one pass over x.

    Args:
        x: ``[…, K]`` float32 or bfloat16.
        layers: 1 to 16; K is common, N of each its own.
        num_threads: None: all processors. Results depend on it in their last bits.
    Returns: ``[…, N]`` of each layer.
    Raises: as ``delta_linear``.
    Gradients: as ``delta_linear``'s; that of x is summed in float32 and rounded once.
    """
    listed = list(layers)
    if not 1 <= len(listed) <= MAX_GROUP:
        raise ShapeError(f"{OP}: layers must be 1 to {MAX_GROUP}, got {len(listed)}. Divide them.")
    settings, shapes = [], []
    operands: Operands = {}
    for i, layer in enumerate(listed):
        mine, own, shape = prepare(
            x, layer.weight, layer.bias, layer.branches, layer.key, layer.adapter,
            layer.transposed, num_threads, f"layers[{i}].",
        )  # fmt: skip
        settings.append(mine)
        operands |= {"x": own.pop("x")} | {f"{i}.{name}": a for name, a in own.items()}
        shapes.append(shape)
    found: Any = apply(DELTA_LINEAR_GROUP, tuple(settings), operands)
    return [y.reshape(shape) for y, shape in zip(found, shapes, strict=True)]


Settings = tuple[native.Settings, ...]


def _own(operands: Operands, i: int) -> Operands:
    prefix = f"{i}."
    return {n.removeprefix(prefix): a for n, a in operands.items() if n.startswith(prefix)}


def forward(
    settings: Settings, operands: Operands, keep: bool
) -> tuple[tuple[Array, ...], Operands]:
    """y ``[M, N]`` of each layer, and where ``keep`` says so its S ``[M, ΣR]``."""
    own = [_own(operands, i) for i in range(len(settings))]
    y, s = native.forward(settings, operands["x"], own, keep)
    return tuple(y), {f"{i}.s": state for i, state in enumerate(s)}


def backward(
    settings: Settings,
    operands: Operands,
    grad_y: tuple[Array | None, ...],
    wanted: tuple[str, ...],
) -> Operands:
    """The gradients of ``wanted``; layers whose y nobody used (None) take no part."""
    used = [(i, grad) for i, grad in enumerate(grad_y) if grad is not None]
    some = [
        [name.removeprefix(f"{i}.") for name in wanted if name.startswith(f"{i}.")] for i, _ in used
    ]
    if "x" not in wanted and not any(some):
        return {}
    grad_x, found = native.backward(
        [settings[i] for i, _ in used],
        [grad for _, grad in used],
        operands.get("x"),
        [_own(operands, i) for i, _ in used],
        some,
        "x" in wanted,
    )
    named = {f"{i}.{n}": g for (i, _), one in zip(used, found, strict=True) for n, g in one.items()}
    return named if grad_x is None else named | {"x": grad_x}


def _saved(settings: Settings, there: Collection[str], wanted: tuple[str, ...]) -> list[str]:
    names = [
        f"{i}.{name}"
        for i, mine in enumerate(settings)
        for name in native.saved(mine, "x" in wanted)
    ]
    return [*names, "x"] if any(".a." in name for name in wanted) else names


DELTA_LINEAR_GROUP = Op(
    OP,
    forward,
    backward,
    _saved,
    frozenset(f"{i}.{name}" for i in range(MAX_GROUP) for name in FROZEN),
)
