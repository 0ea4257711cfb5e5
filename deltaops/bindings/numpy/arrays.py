"""NumPy arrays as the native core's memory: checked, never copied.

An array that the core cannot use as it lies is refused with what to do about it; whether a copy is
worth it is the caller's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from deltaops.errors import ConfigError, DtypeError, LayoutError, ShapeError
from deltaops.native import BF16, F32, load

Array = np.ndarray[Any, np.dtype[Any]]
Size = int | None
"""Of an axis; None: any."""


@cache
def core() -> ModuleType:
    """The compiled module.

    Raises: ImportError where it is not there; BuildError for one of another build.
    """
    module = load()
    if isinstance(module, str):
        raise ImportError(module)
    return module


def call(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """One of the core's functions.

    Raises: LayoutError with the core's sentence, where arrays overlap or leave what it can count.
    """
    try:
        return function(*arguments, **named)
    except ValueError as error:
        raise LayoutError(str(error)) from None


def code(a: Array) -> int | None:
    """The core's number of an array's dtype; None where it has none. bf16 is that of ml_dtypes."""
    if a.dtype == np.float32:
        return F32
    return BF16 if a.dtype.name == "bfloat16" else None


def check(
    op: str,
    name: str,
    a: object,
    shape: Sequence[Size],
    dtype: Array | str | None = None,
    *,
    strided: bool = False,
    written: bool = False,
) -> Array:
    """``a``, when the core can use it as it lies.

    Args:
        op: the subject of errors, with ``name``.
        a: what was passed.
        shape: that it must have.
        dtype: an array whose dtype it must have, the name of one, or None: float32 or bfloat16.
        strided: whether rows may lie apart; else elements are contiguous.
        written: whether it is an output.
    Raises: DtypeError, ShapeError, LayoutError.
    """
    if not isinstance(a, np.ndarray) or isinstance(a, np.ma.MaskedArray):
        raise DtypeError(
            f"{op}: {name} must be a plain numpy.ndarray, got {type(a).__name__}. Pass "
            "numpy.asarray of it, in the dtype wanted."
        )
    _check_dtype(op, name, a, dtype)
    if a.ndim != len(shape) or any([n is not None and n != m for n, m in zip(shape, a.shape)]):  # noqa: B905 -- ranks are compared first
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ShapeError(
            f"{op}: {name} must be [{wanted}], got {list(a.shape)}. Reshape it, or check which "
            "array was meant."
        )
    _check_memory(op, name, a, strided, written)
    return a


def _check_dtype(op: str, name: str, a: Array, dtype: Array | str | None) -> None:
    if isinstance(dtype, str):
        fits = a.dtype == np.dtype(dtype)
        wanted = dtype
    elif dtype is None:
        fits = code(a) is not None
        wanted = "float32 or bfloat16 (of ml_dtypes)"
    else:
        fits = a.dtype == dtype.dtype
        wanted = str(dtype.dtype)
    if not fits:
        order = "" if a.dtype.isnative else " of foreign byte order"
        raise DtypeError(
            f"{op}: {name} must be {wanted}, got {a.dtype.name}{order}. Convert it with astype."
        )


def _check_memory(op: str, name: str, a: Array, strided: bool, written: bool) -> None:
    reason = None
    if not a.flags.aligned:
        reason = f"lie at multiples of its {a.itemsize} bytes, and is misaligned"
    elif written and not a.flags.writeable:
        reason = "be writable, since the result goes there, and is read-only"
    elif strided and not a.flags.c_contiguous:
        if a.strides[-1] != a.itemsize and a.shape[-1] > 1:
            reason = f"have adjacent elements in its last axis, and has strides {a.strides}"
        elif any([step % a.itemsize for step in a.strides]):
            reason = f"have strides of whole elements, and has {a.strides} bytes"
    elif not a.flags.c_contiguous:
        reason = f"be contiguous, and has strides {a.strides}"
    if reason:
        raise LayoutError(f"{op}: {name} must {reason}. Copy it: numpy.ascontiguousarray or copy.")


def check_oriented(
    op: str, name: str, a: object, shape: Sequence[Size], dtype: Array | None
) -> Array:
    """:func:`check` of a weight or an adapter: rows or columns of adjacent elements.

    Raises: as :func:`check`.
    """
    if isinstance(a, np.ndarray) and a.ndim == 2 and not a.flags.c_contiguous:
        if a.strides[0] == a.itemsize:
            return check(op, name, a.T, shape[::-1], dtype, strided=True).T
    return check(op, name, a, shape, dtype, strided=True)


def optional(
    op: str, name: str, a: object, shape: Sequence[Size], dtype: Array | str | None = None
) -> Array | None:
    """:func:`check` of what may be None."""
    return None if a is None else check(op, name, a, shape, dtype)


def output(op: str, name: str, given: object, shape: tuple[int, ...], dtype: Any) -> Array:
    """``given``, checked, or a new array."""
    if given is None:
        return np.empty(shape, dtype)
    return check(op, name, given, shape, np.empty(0, dtype), written=True)


Wanted = Mapping[str, tuple[tuple[int, ...], Any]]
"""Gradients by name, with shape and dtype."""


def gradients(
    op: str, known: Wanted, wanted: Iterable[str] | None, out: Mapping[str, Array] | None
) -> dict[str, Array]:
    """Arrays for the gradients to go to, by name, in the order of ``known``.

    Args:
        op: the subject of errors.
        known: those that there are.
        wanted: the names of some, or None: all of ``known``.
        out: arrays for some of them.
    Raises: ConfigError for a name that is none, and as :func:`check`.
    """
    names = list(known) if wanted is None else list(wanted)
    out = out or {}
    for kind, given in (("wanted", names), ("out", out)):
        for name in given:
            if name not in known or (kind == "out" and name not in names):
                raise ConfigError(
                    f"{op}: {kind} names {name!r}, which must be one of the gradients "
                    f"{', '.join(known if kind == 'wanted' else names)}."
                )
    return {
        name: output(op, f"out[{name!r}]", out.get(name), *known[name])
        for name in known
        if name in names
    }


def address(a: Array | None) -> int:
    """Of the first element; 0 where there is no array."""
    return 0 if a is None else a.__array_interface__["data"][0]


def memory(a: Array | None) -> tuple[int, int] | None:
    """Address and number of elements, as ``delta_linear`` takes memory."""
    return None if a is None else (address(a), a.size)


def rows(a: Array | None) -> tuple[int, int, int] | None:
    """Address, rows and their distance, as ``delta_linear`` takes matrices."""
    return None if a is None else (address(a), a.shape[0], stride(a))


def parameter(a: Array | None) -> tuple[int, int]:
    """Address and dtype, as the core takes contiguous parameters."""
    return (0, 0) if a is None else (address(a), code(a) or 0)


def stride(a: Array | None) -> int:
    """From one row to the next, in elements."""
    return 0 if a is None else strides(a)[0]


def strides(a: Array) -> tuple[int, ...]:
    """In elements; as contiguous ones have them where NumPy leaves them open."""
    if a.flags.c_contiguous:
        steps, step = [], 1
        for size in reversed(a.shape):
            steps.append(step)
            step *= size
        return tuple(reversed(steps))
    return tuple(step // a.itemsize for step in a.strides)
