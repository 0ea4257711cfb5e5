"""``delta_linear`` on CUDA: its passes and products put together, as the CPU's two calls are one.

    s, S = project(x, A)              [M, R] float32, which is kept, and as the product reads it
    y    = gemm(x Wᵀ + Σᵢ Sᵢ Bᵢᵀ + bias)
    dS, dB, dbias = grad_up(dy, B, S)
    dx   = gemm(dy W + Σᵢ maskᵢ(dSᵢ Aᵢ)),   dA = grad_down(dS, x)

The handlers are those of csrc/bindings/cudaxla_products.cpp.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from deltaops.native import ACTIVATIONS

from .autodiff import Operands
from .ffi import Array, ffi_call, like

if TYPE_CHECKING:
    from .layers import Settings

UNTAKEN = ("adapter", "packed", "packed_backward")
UNTYPED = ("seed", "s", *UNTAKEN)  # of a dtype of their own


def takes(
    settings: Sequence[Settings],
    arrays: Sequence[Array],
    layers: Sequence[Operands],
    wanted: Collection[str] = (),
) -> bool:
    """Whether CUDA has a call: bfloat16 alone, branches without activation, bias or rows of their
    own, weights that are not packed, and dropout in one of the layers at most."""
    given = [*arrays, *(a for layer in layers for name, a in layer.items() if name not in UNTYPED)]
    return (
        all(a.dtype == jnp.bfloat16 for a in given)
        and all(code == ACTIVATIONS["identity"] for mine in settings for code in mine.activation)
        and not any(name in layer for layer in layers for name in UNTAKEN)
        and not any(name.startswith("bias.") for names in (*layers, wanted) for name in names)
        and sum(any(mine.threshold) for mine in settings) <= 1
    )


def forward(
    settings: Sequence[Settings], x: Array, layers: Sequence[Operands]
) -> tuple[list[Array], list[Array]]:
    """Each layer's y ``[M, N]`` and S ``[M, ΣR]``."""
    results, states = [], []
    for mine, layer in zip(settings, layers, strict=True):
        lefts, rights, kept = [x], [layer["weight"]], []
        for i, name in enumerate(mine.names("a")):
            wide, narrow = _project(mine, i, x, layer[name], layer.get("seed"))
            kept.append(wide)
            lefts.append(narrow)
            up = layer[f"b.{i}"]
            rights.append(up.T if mine.transposed else up)
        n, _ = mine.sizes(layer)
        unmasked = [0] * len(lefts)
        y = _gemm(lefts, rights, mine.transposed, unmasked, unmasked, n, layer.get("bias"), None)
        results.append(y)
        states.append(jnp.concatenate([jnp.zeros((x.shape[0], 0), jnp.float32), *kept], axis=1))
    return results, states


def backward(
    settings: Sequence[Settings],
    grad_y: Sequence[Array],
    x: Array | None,
    layers: Sequence[Operands],
    wanted: Sequence[Collection[str]],
    wants_x: bool,
) -> tuple[Array | None, list[Operands]]:
    """The gradient of x where it is wanted; each layer's ``wanted``, in which "x" is nothing."""
    masked = any(number for mine in settings for number in mine.threshold)
    # all right matrices lie alike, and those of masked products across
    across = masked or not all(mine.transposed for mine in settings)
    lefts, rights, thresholds, numbers, found = [], [], [], [], []
    seed = next((layer["seed"] for layer in layers if "seed" in layer), None)
    for mine, dy, layer, some in zip(settings, grad_y, layers, wanted, strict=True):
        weight = layer["weight"]
        lefts.append(dy)
        rights.append(weight.T if across and mine.transposed else weight)
        thresholds.append(0)
        numbers.append(0)
        grads: Operands = {}
        at = 0
        for i, scaling in enumerate(mine.scaling):
            a, b, threshold = layer[f"a.{i}"], layer[f"b.{i}"], mine.threshold[i]
            s = layer["s"][:, at : at + a.shape[0]].astype(dy.dtype) if "s" in layer else None
            at += a.shape[0]
            needs = wants_x or f"a.{i}" in some
            ds, db, dbias = _grad_up(
                scaling, dy, b if needs else None, s if f"b.{i}" in some else None,
                "bias" in some and i == 0,
            )  # fmt: skip
            if db is not None:
                grads[f"b.{i}"] = db
            if dbias is not None:
                grads["bias"] = dbias
            if ds is None:
                continue
            if f"a.{i}" in some:
                assert x is not None  # autodiff.py keeps it where some gradient of an A is wanted
                grads[f"a.{i}"] = _grad_down(ds, x, threshold, i, layer.get("seed"))
            lefts.append(ds)
            rights.append(a if across else a.T)
            thresholds.append(threshold)
            numbers.append(i)
        if "bias" in some and not mine.scaling:
            alone = _grad_up(1.0, dy, None, None, True)[2]
            assert alone is not None  # it was asked for
            grads["bias"] = alone
        found.append(grads)
    if not wants_x:
        return None, found
    _, k = settings[0].sizes(layers[0])
    return _gemm(lefts, rights, across, thresholds, numbers, k, None, seed), found


def _workspace(part: str, *sizes: int) -> Any:
    """A result on a multiple of 16 bytes, as the batch of vmap is laid out."""
    count = getattr(importlib.import_module("deltaops._xla_cuda"), f"{part}_workspace")(*sizes)
    return like((-(-count // 16) * 16,), jnp.uint8)


def _gemm(
    lefts: Sequence[Array],
    rights: Sequence[Array],
    across: bool,
    thresholds: Sequence[int],
    numbers: Sequence[int],
    columns: int,
    bias: Array | None,
    seed: Array | None,
) -> Array:
    seeded = any(thresholds)
    (out,) = ffi_call(
        "gemm",
        [like((lefts[0].shape[0], columns), lefts[0].dtype)],
        [*lefts, *rights, *_there(bias), *(_there(seed) if seeded else [])],
        threshold=np.array(thresholds, np.int32),
        branch=np.array(numbers, np.int32),
        across=np.int32(across),
        biased=np.int32(bias is not None),
        seeded=np.int32(seeded),
    )
    return out


def _project(mine: Settings, i: int, x: Array, a: Array, seed: Array | None) -> tuple[Array, Array]:
    (m, k), r, threshold = x.shape, a.shape[0], mine.threshold[i]
    s, narrow, _ = ffi_call(
        "project",
        [like((m, r), jnp.float32), like((m, r), x.dtype), _workspace("project", m, k, r)],
        [x, a, *(_there(seed) if threshold else [])],
        scaling=np.float32(mine.scaling[i]),
        threshold=np.int32(threshold),
        branch=np.int32(i),
    )
    return s, narrow


def _grad_up(
    scaling: float, dy: Array, b: Array | None, s: Array | None, bias: bool
) -> tuple[Array | None, Array | None, Array | None]:
    """dS where b is given, dB where S is, and the gradient of the bias where it is wanted."""
    (m, n), dtype = dy.shape, dy.dtype
    r = b.shape[1] if b is not None else s.shape[1] if s is not None else 0
    shapes = [(m, r), (n, r), (n,)]
    flags = [b is not None, s is not None, bias]
    if not any(flags):
        return None, None, None
    results = [like(shape, dtype) for shape, flag in zip(shapes, flags, strict=True) if flag]
    found = iter(
        ffi_call(
            "grad_up",
            [*results, _workspace("grad_up", m, n, r)],
            [dy, *_there(b), *_there(s)],
            wanted=np.array(flags, np.int32),
            scaling=np.float32(scaling),
        )
    )
    ds, db, dbias = (next(found) if flag else None for flag in flags)
    return ds, db, dbias


def _grad_down(ds: Array, x: Array, threshold: int, i: int, seed: Array | None) -> Array:
    (m, k), r = x.shape, ds.shape[1]
    grad_a, _ = ffi_call(
        "grad_down",
        [like((r, k), x.dtype), _workspace("grad_down", m, k, r)],
        [ds, x, *(_there(seed) if threshold else [])],
        threshold=np.int32(threshold),
        branch=np.int32(i),
    )
    return grad_a


def _there(a: Array | None) -> list[Array]:
    return [] if a is None else [a]
