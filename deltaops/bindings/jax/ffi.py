"""The handlers of ``deltaops._xla``, and of ``deltaops._xla_cuda`` where it was built, registered
with JAX once, and calls of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from deltaops.errors import DtypeError, ShapeError
from deltaops.native import check_abi

Array = jax.Array


@cache
def cuda_built() -> bool:
    """Whether deltaops was built with handlers for CUDA."""
    return importlib.util.find_spec("deltaops._xla_cuda") is not None


@cache
def _register() -> None:
    """Raises: ImportError where the CPU's module is not there or CUDA's cannot be loaded;
    BuildError for one of another build."""
    try:
        module: Any = importlib.import_module("deltaops._xla")
    except ImportError as error:
        raise ImportError(
            f"deltaops._xla could not be imported ({error}). It is built where jax is installed: "
            "`pip install jax`, then `DELTAOPS_JAX=1 python setup.py build_ext --inplace` in a "
            "checkout, elsewhere `DELTAOPS_JAX=1 pip install --force-reinstall --no-cache-dir "
            "deltaops`."
        ) from error
    check_abi("deltaops._xla", module.abi_version())
    for name, capsule in module.TARGETS.items():
        jax.ffi.register_ffi_target(f"deltaops_{name}", capsule, platform="cpu")
    if cuda_built():
        cuda: Any = importlib.import_module("deltaops._xla_cuda")
        for name, capsule in cuda.TARGETS.items():
            jax.ffi.register_ffi_target(f"deltaops_{name}", capsule, platform="CUDA")


def ffi_call(
    name: str, results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Array], **settings: Any
) -> list[Array]:
    """What a handler writes: ``results``, with the axes of vmap in front of them."""
    _register()
    call = jax.ffi.ffi_call(f"deltaops_{name}", list(results), vmap_method="expand_dims")
    return list(call(*operands, **settings))


def as_array(op: str, name: str, a: Any) -> Array:
    """``a`` as a JAX array of any shape and dtype.

    Raises: DtypeError for what JAX has no dtype for.
    """
    try:
        return jnp.asarray(a)
    except (TypeError, ValueError) as error:
        raise DtypeError(
            f"{op}: {name} must be an array for JAX, got {type(a).__name__} ({error})."
        ) from error


def check(op: str, name: str, a: Any, shape: Sequence[int | None], dtype: Any = None) -> Array:
    """``a`` as a JAX array of this shape (None: any size) and dtype, or one of several (None:
    float32 or bfloat16).

    Raises: DtypeError, ShapeError.
    """
    array = as_array(op, name, a)
    known = (jnp.float32, jnp.bfloat16) if dtype is None else dtype
    known = known if isinstance(known, tuple) else (known,)
    if array.dtype not in known:
        wanted = " or ".join(jnp.dtype(t).name for t in known)
        raise DtypeError(f"{op}: {name} must be {wanted}, got {array.dtype}. Convert it by astype.")
    if array.ndim != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, array.shape, strict=True)
    ):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ShapeError(
            f"{op}: {name} must be [{wanted}], got {list(array.shape)}. Reshape it, or check which "
            "array was meant."
        )
    return array


def as_rows(op: str, name: str, a: Any) -> Array:
    """``a`` as ``[…, K]``, float32 or bfloat16.

    Raises: DtypeError, ShapeError.
    """
    array = as_array(op, name, a)
    return check(op, name, array, (*array.shape[: max(array.ndim - 1, 0)], None))


def like(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """A result."""
    return jax.ShapeDtypeStruct(tuple(shape), dtype)  # type: ignore[no-untyped-call]  # JAX's own has no types
