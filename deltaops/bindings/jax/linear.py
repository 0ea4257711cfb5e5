"""``delta_linear`` for JAX on the CPU, and on CUDA what :mod:`.on_cuda` takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deltaops.bindings import numpy as on_numpy
from deltaops.bindings.settings import code, drop_threshold, threads
from deltaops.native import ACTIVATIONS

from . import layers
from .autodiff import Op, Operands, apply
from .draws import seed_of
from .ffi import Array, as_rows, check
from .layers import Settings

OP = "delta_linear"


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["a", "b", "bias"],
    meta_fields=["scaling", "dropout", "activation"],
)
@dataclass(frozen=True)
class Branch:
    """One low-rank branch: LoRA, or with an activation a parallel adapter. A pytree."""

    a: Array
    """``[R, K]`` float32 or bfloat16."""
    b: Array
    """``[N, R]``, dtype of ``a``."""
    scaling: float = 1.0
    dropout: float = 0.0
    activation: str = "identity"
    bias: Array | None = None
    """``[R]``, dtype of ``a``, or None."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "forward", "backward"],
    meta_fields=["transposed"],
)
@dataclass(frozen=True)
class PackedWeight:
    """A frozen weight and its copies in the orders in which the core reads it. A pytree."""

    weight: Array
    forward: Array
    backward: Array
    transposed: bool


def pack_weight(
    weight: Array, *, transposed: bool = False, num_threads: int | None = None
) -> PackedWeight:
    """Pack a frozen weight once, outside of jit, for :func:`delta_linear`.

    Args:
        weight: ``[N, K]``, or ``[K, N]`` where ``transposed``; float32 or bfloat16.
        transposed: as Flax has its kernels.
        num_threads: that pack it; None: all processors.
    Raises: DtypeError, ShapeError, ConfigError.
    """
    weight = check("pack_weight", "weight", weight, (None, None))
    host = np.asarray(weight)
    made = on_numpy.PackedWeight(host.T if transposed else host, num_threads=num_threads)
    forward, backward = (jnp.asarray(made.memory(way)) for way in (False, True))
    return PackedWeight(weight, forward, backward, transposed)


def delta_linear(
    x: Array,
    weight: Array | PackedWeight,
    bias: Array | None = None,
    branches: Sequence[Branch] = (),
    *,
    key: Array | None = None,
    adapter: Array | None = None,
    transposed: bool = False,
    num_threads: int | None = None,
) -> Array:
    """``y = x Wᵀ + bias + Σᵢ sᵢ · φᵢ(dropᵢ(x) Aᵢᵀ + aᵢ) Bᵢᵀ`` as one native call each way.

    Works under jit, grad, vmap, scan and remat. vmap adds rows to one forward call where the batch
    shares weights and branches and there is no dropout; else it calls once for each element.

    Args:
        x: ``[…, K]`` float32 or bfloat16.
        weight: ``[N, K]``, dtype of ``x``, or packed.
        bias: ``[N]``, dtype of ``x``, or None.
        branches: added to the frozen layer.
        key: of ``jax.random``, for the dropout; needed where a branch has one. The mask is the same
            for the same key, and each layer wants its own.
        adapter: int32 ``[…]``: the number of each row's one branch, −1 for none. None: all rows
            have all branches.
        transposed: the weight is ``[K, N]``, as Flax has its kernels. A packed weight knows.
        num_threads: None: all processors. Results depend on it in their last bits.
    Returns: ``[…, N]`` in the dtype of ``x``.
    Raises: DtypeError, ShapeError, ConfigError, GradientError; what JAX raises for a platform that
        has no such call.
    Gradients: x, bias, and all arrays of the branches; first order, reverse mode. The weight has
        none.
    Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3.
    """
    settings, operands, shape = prepare(
        x, weight, bias, branches, key, adapter, transposed, num_threads
    )
    return apply(DELTA_LINEAR, settings, operands).reshape(shape)


def prepare(
    x: Array,
    weight: Array | PackedWeight,
    bias: Array | None,
    branches: Sequence[Branch],
    key: Array | None,
    adapter: Array | None,
    transposed: bool,
    num_threads: int | None,
    where: str = "",
) -> tuple[Settings, Operands, tuple[int, ...]]:
    """The checked call, rows flattened, and the shape of its result.

    where: of a group, before the names in errors.
    """
    packed = weight if isinstance(weight, PackedWeight) else None
    plain, transposed = (packed.weight, packed.transposed) if packed else (weight, transposed)
    x = as_rows(OP, "x", x)
    w = check(OP, f"{where}weight", plain, (None, None), x.dtype)
    n, k = w.shape[::-1] if transposed else w.shape
    x = check(OP, f"x (for {where}weight)" if where else "x", x, (*x.shape[:-1], k))
    rows = math.prod(x.shape[:-1])
    operands = {"x": x.reshape(rows, k), "weight": w}
    if bias is not None:
        operands["bias"] = check(OP, f"{where}bias", bias, (n,), x.dtype)
    for i, branch in enumerate(branches):
        a = check(OP, f"{where}branches[{i}].a", branch.a, (None, k))
        operands[f"a.{i}"] = a
        b = check(OP, f"{where}branches[{i}].b", branch.b, (n, a.shape[0]), a.dtype)
        operands[f"b.{i}"] = b
        if branch.bias is not None:
            inner = check(OP, f"{where}branches[{i}].bias", branch.bias, a.shape[:1], a.dtype)
            operands[f"bias.{i}"] = inner
    settings = Settings(
        tuple(float(b.scaling) for b in branches),
        tuple(drop_threshold(OP, b.dropout) for b in branches),
        tuple(code(OP, "activation", ACTIVATIONS, b.activation) for b in branches),
        transposed,
        threads(num_threads),
    )
    if any(settings.threshold):
        operands["seed"] = seed_of(OP, key, f"{where}key")
    if adapter is not None:
        ids = check(OP, f"{where}adapter", adapter, x.shape[:-1], jnp.int32)
        operands["adapter"] = ids.reshape(rows)
    if packed:
        operands |= {"packed": packed.forward, "packed_backward": packed.backward}
    return settings, operands, (*x.shape[:-1], n)


def forward(settings: Settings, operands: Operands, keep: bool) -> tuple[Array, Operands]:
    """y ``[M, N]``, and where ``keep`` says so S ``[M, ΣR]``."""
    (y,), s = layers.forward([settings], operands["x"], [operands], keep)
    return y, {"s": s[0]} if keep else {}


def backward(
    settings: Settings, operands: Operands, grad_y: Array, wanted: tuple[str, ...]
) -> Operands:
    """The gradients of ``wanted``."""
    x, wants_x = operands.get("x"), "x" in wanted
    grad_x, (found,) = layers.backward([settings], [grad_y], x, [operands], [wanted], wants_x)
    return found if grad_x is None else found | {"x": grad_x}


def _saved(settings: Settings, there: Collection[str], wanted: tuple[str, ...]) -> list[str]:
    names = layers.saved(settings, "x" in wanted)
    return [*names, "x"] if any(name.startswith("a.") for name in wanted) else names


FROZEN = frozenset({"weight", "seed", "adapter", "packed", "packed_backward"})
DELTA_LINEAR = Op(OP, forward, backward, _saved, FROZEN)
