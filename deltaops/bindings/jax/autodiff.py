"""What makes a pair of native calls one differentiable function of JAX.

Operands go by name in one dict, and what is absent is not in it. JAX says which of them somebody
differentiates for, so that no other gradient is computed and nothing is saved for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax

from deltaops.errors import GradientError

from .ffi import Array

Operands = dict[str, Array]


class Op(NamedTuple):
    """One op; settings are hashable and static."""

    name: str
    forward: Callable[[Any, Operands, bool], tuple[Any, Operands]]
    """(settings, operands, whether to keep) → y, or several, and what the backward pass wants."""
    backward: Callable[[Any, Operands, Any, tuple[str, ...]], Operands]
    """(settings, operands and what was kept, grad_y, names) → the gradients of these names.
    Of several y, grad_y has None for those that nobody used."""
    saved: Callable[[Any, Collection[str], tuple[str, ...]], Collection[str]]
    """(settings, operands there are, names wanted) → operands that the backward pass reads."""
    frozen: frozenset[str]
    """Operands that have no gradient."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Names:
    wanted: tuple[str, ...]
    all: tuple[str, ...]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def apply(op: Op, settings: Any, operands: Operands) -> Array:
    """The op's result; of an op that has several a tuple of them, whatever the type says.

    Raises: GradientError where somebody differentiates for a frozen operand.
    """
    y: Array = op.forward(settings, operands, False)[0]
    return y


def _forward(op: Op, settings: Any, operands: dict[str, Any]) -> tuple[Any, Any]:
    wanted = tuple(name for name, operand in operands.items() if operand.perturbed)
    for name in wanted:
        if name in op.frozen:
            raise GradientError(
                f"{op.name}: {name} is frozen and has no gradient, and one was asked for. Do not "
                "differentiate for it, or pass jax.lax.stop_gradient of it."
            )
    values = {name: operand.value for name, operand in operands.items()}
    y, kept = op.forward(settings, values, bool(wanted))
    names = op.saved(settings, values, wanted)
    saved = {name: values[name] for name in names if name in values} | kept
    return y, (_Names(wanted, tuple(values)), saved)


def _unless_zero(grad: Any) -> Any:
    return None if isinstance(grad, jax.custom_derivatives.SymbolicZero) else grad


def _backward(op: Op, settings: Any, residuals: Any, grad_y: Any) -> tuple[Any]:
    names, saved = residuals
    found: Operands = {}
    used = jax.tree.map(_unless_zero, grad_y)
    if names.wanted and jax.tree.leaves(used):
        found = op.backward(settings, saved, used, names.wanted)
    return ({name: found.get(name) for name in names.all},)


apply.defvjp(_forward, _backward, symbolic_zeros=True)
