"""Several frozen layers of the same x in one pass over it, and one gradient of it, on arrays.

    yⱼ = x Wⱼᵀ + biasⱼ + deltasⱼ(x)          dx = Σⱼ dxⱼ

Each layer as in :mod:`.linear`, with the bits that it gives alone; dx is summed in float32 and
rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from deltaops.errors import ShapeError
from deltaops.native import MAX_GROUP

from .arrays import Array, call, check, core, gradients
from .linear import Branch, Checked, Outputs, backward_of, forward_of
from .packed import PackedWeight

OP = "delta_linear_group"


class Layer(NamedTuple):
    """The arguments of ``delta_linear`` beside x."""

    weight: Array | PackedWeight
    bias: Array | None = None
    branches: Sequence[Branch] = ()
    seed: int = 0
    adapter: Array | None = None


def delta_linear_group_forward(
    x: Array,
    layers: Sequence[Layer],
    *,
    num_threads: int | None = None,
    out: Sequence[Outputs] | None = None,
) -> list[tuple[Array, Array]]:
    """``[delta_linear_forward(x, …) for each layer]``, to the bit, in one pass over x.

    Args:
        x: ``[M, K]`` float32 or bfloat16; rows may lie apart.
        layers: 1 to 16; K is common, N of each its own.
        num_threads: None: all processors. Results depend on it in their last bits.
        out: y and s of each layer, contiguous, any of them None.
    Returns: y ``[M, N]`` in the dtype of ``x`` and s ``[M, ΣR]`` float32 of each layer.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    layers = _listed(layers)
    x = check(OP, "x", x, (None, None), strided=True)
    outs = [(None, None)] * len(layers) if out is None else list(out)
    _same_number("out", outs, layers)
    results, calls = [], []
    held = [_checked(i, layer, x.shape[1], x) for i, layer in enumerate(layers)]
    for i, (layer, made, into) in enumerate(zip(layers, held, outs, strict=True)):
        y, s, given = forward_of(
            made, x, layer.bias, layer.seed, layer.adapter, num_threads, into, True, _where(i)
        )
        assert s is not None  # kept, as asked
        results.append((y, s))
        calls.append(made.native.forward_call(*given))
    call(core().delta_linear_group_forward, calls)
    return results


def delta_linear_group_backward(
    grad_y: Sequence[Array],
    x: Array | None,
    layers: Sequence[Layer],
    s: Sequence[Array | None],
    *,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients by name: "x", and of layer j "j.bias", "j.a.i", "j.b.i" and "j.bias.i".

    Args:
        grad_y: ``[M, N]`` of each layer, dtype of the weights; rows may lie apart.
        x: as in the forward pass; None where no "j.a.i" is wanted.
        layers: as in the forward pass.
        s: what the forward pass returned of each layer; None where no "j.b.i" is wanted and no
            branch has an activation.
        wanted: names; None: all of them, "j.bias.i" where the branch has one.
        num_threads: None: all processors.
        out: arrays for some of the gradients, by name, contiguous.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    layers = _listed(layers)
    _same_number("grad_y", grad_y, layers)
    _same_number("s", s, layers)
    first = check(OP, "grad_y[0]", grad_y[0], (None, None), strided=True)
    m, k = first.shape[0], None
    if x is not None:
        k = check(OP, "x", x, (m, None), first, strided=True).shape[1]
    held: list[Checked] = []
    for i, layer in enumerate(layers):
        held.append(_checked(i, layer, k, first))
        k = held[0].k
    grads = [
        check(OP, f"grad_y[{i}]", grad, (m, made.n), first, strided=True)
        for i, (grad, made) in enumerate(zip(grad_y, held, strict=True))
    ]
    known: dict[str, tuple[tuple[int, ...], Any]] = {"x": ((m, held[0].k), first.dtype)}
    for i, made in enumerate(held):
        known |= {f"{i}.{name}": like for name, like in made.known().items()}
    found = gradients(OP, known, wanted, out)
    calls = []
    for i, (layer, made, grad, mine) in enumerate(zip(layers, held, grads, s, strict=True)):
        own = {name: found[f"{i}.{name}"] for name in made.known() if f"{i}.{name}" in found}
        if i == 0 and "x" in found:  # the sum over all layers is the first one's
            own["x"] = found["x"]
        given = backward_of(
            made, grad, x, mine, layer.seed, layer.adapter, num_threads, own, _where(i),
            "x" in found,
        )  # fmt: skip
        calls.append(made.native.backward_call(*given))
    call(core().delta_linear_group_backward, calls)
    return found


def _listed(layers: Iterable[Layer]) -> list[Layer]:
    listed = [Layer(*layer) for layer in layers]
    if not 1 <= len(listed) <= MAX_GROUP:
        raise ShapeError(f"{OP}: layers must be 1 to {MAX_GROUP}, got {len(listed)}. Divide them.")
    return listed


def _checked(i: int, layer: Layer, k: int | None, like: Array) -> Checked:
    return Checked(layer.weight, layer.branches, _where(i), k, like)


def _where(i: int) -> str:
    return f"layers[{i}]."


def _same_number(name: str, given: Sequence[object], layers: Sequence[Layer]) -> None:
    if len(given) != len(layers):
        raise ShapeError(
            f"{OP}: {name} must be one for each of {len(layers)} layers, got {len(given)}."
        )
