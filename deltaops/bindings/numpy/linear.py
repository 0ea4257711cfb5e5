"""``y = x Wᵀ + bias + Σᵢ sᵢ · φᵢ(dropᵢ(x) Aᵢᵀ + aᵢ) Bᵢᵀ`` and its gradients, on arrays.

x ``[M, K]``, weight ``[N, K]``, A ``[R, K]``, B ``[N, R]``. float32, or the bfloat16 of ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from deltaops.bindings.settings import code as word
from deltaops.bindings.settings import drop_threshold, threads
from deltaops.errors import ShapeError
from deltaops.native import ACTIVATIONS

from .arrays import (
    Array,
    call,
    check,
    check_oriented,
    code,
    core,
    gradients,
    memory,
    optional,
    output,
    rows,
    strides,
)
from .packed import PackedWeight

OP = "delta_linear"


class Branch(NamedTuple):
    """One low-rank branch: LoRA, or with an activation a parallel adapter."""

    a: Array
    """``[R, K]`` float32 or bfloat16."""
    b: Array
    """``[N, R]``, dtype of ``a``."""
    scaling: float = 1.0
    dropout: float = 0.0
    activation: str = "identity"
    bias: Array | None = None
    """``[R]``, dtype of ``a``, or None."""


class Checked:
    """The checked weight and branches of a layer, and the core's object for them.

    where: before the names in errors; k and like: inputs and dtype that a weight must have; all for
    a group.
    """

    def __init__(
        self,
        weight: Array | PackedWeight,
        branches: Sequence[Branch],
        where: str = "",
        k: int | None = None,
        like: Array | None = None,
    ) -> None:
        self.packed = weight if isinstance(weight, PackedWeight) else None
        plain = weight.weight if isinstance(weight, PackedWeight) else weight
        self.weight = check_oriented(OP, f"{where}weight", plain, (None, k), like)
        self.branches = [Branch(*b) for b in branches]
        (self.n, self.k), settings = self.weight.shape, []
        for i, b in enumerate(self.branches):
            a = check_oriented(OP, f"{where}branches[{i}].a", b.a, (None, self.k), None)
            rank = a.shape[0]
            check_oriented(OP, f"{where}branches[{i}].b", b.b, (self.n, rank), a)
            optional(OP, f"{where}branches[{i}].bias", b.bias, (rank,), a)
            activation = word(OP, f"{where}branches[{i}].activation", ACTIVATIONS, b.activation)
            drop = drop_threshold(OP, b.dropout)
            steps = (*strides(a), *strides(b.b))
            settings.append((*steps, rank, code(a), float(b.scaling), drop, activation))
        self.ranks = sum(b.a.shape[0] for b in self.branches)
        self.native = core().DeltaLinear(
            code(self.weight), self.n, self.k, *strides(self.weight), settings
        )

    def operands(self) -> list[tuple[int, int] | None]:
        """a…, b…, bias…"""
        parts = zip(*[(b.a, b.b, b.bias) for b in self.branches], strict=True)
        return [memory(array) for part in parts for array in part]

    def packed_memory(self, transposed: bool) -> tuple[int, int] | None:
        if self.packed is None:
            return None
        # held: another thread may have the weight packed anew while the core reads this
        self.read = self.packed.memory(transposed)
        return memory(self.read)

    def known(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shapes and dtypes of the gradients that there are beside that of x."""
        kinds = ("a", "b", "bias")
        named = {
            f"{kind}.{i}": getattr(b, kind) for kind in kinds for i, b in enumerate(self.branches)
        }
        arrays = {name: a for name, a in named.items() if a is not None}
        own: dict[str, tuple[tuple[int, ...], Any]] = {"bias": ((self.n,), self.weight.dtype)}
        return own | {name: (a.shape, a.dtype) for name, a in arrays.items()}


def delta_linear_forward(
    x: Array,
    weight: Array | PackedWeight,
    bias: Array | None = None,
    branches: Sequence[Branch] = (),
    *,
    seed: int = 0,
    adapter: Array | None = None,
    num_threads: int | None = None,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    """The layer's output, and what its backward pass wants.

    Args:
        x: ``[M, K]``; rows may lie apart.
        weight: ``[N, K]``, dtype of ``x``, with rows or columns of adjacent elements; or packed.
        bias: ``[N]``, dtype of ``x``, or None.
        branches: added to the frozen layer.
        seed: of the dropout, 64 bits.
        adapter: int32 ``[M]``: the number of each row's one branch, −1 for none. None: all rows
            have all branches.
        num_threads: None: all processors. Results depend on it in their last bits.
        out: y and s, contiguous, either of them None.
    Returns: y ``[M, N]`` in the dtype of ``x``; s ``[M, ΣR]`` float32.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    layer = Checked(weight, branches)
    y, s = _forward(layer, x, bias, seed, adapter, num_threads, out or (None, None), True)
    assert s is not None  # kept, as asked
    return y, s


def delta_linear(
    x: Array,
    weight: Array | PackedWeight,
    bias: Array | None = None,
    branches: Sequence[Branch] = (),
    *,
    seed: int = 0,
    adapter: Array | None = None,
    num_threads: int | None = None,
    out: Array | None = None,
) -> Array:
    """y alone; everything else as :func:`delta_linear_forward`."""
    layer = Checked(weight, branches)
    return _forward(layer, x, bias, seed, adapter, num_threads, (out, None), False)[0]


Outputs = tuple[Array | None, Array | None]
Given = tuple[Any, ...]
"""What the core takes: addresses, of arrays that the caller holds meanwhile."""


def _forward(
    layer: Checked,
    x: Array,
    bias: Array | None,
    seed: int,
    adapter: Array | None,
    num_threads: int | None,
    out: Outputs,
    keep: bool,
) -> tuple[Array, Array | None]:
    y, s, given = forward_of(layer, x, bias, seed, adapter, num_threads, out, keep)
    call(layer.native.forward, *given)
    return y, s


def forward_of(
    layer: Checked,
    x: Array,
    bias: Array | None,
    seed: int,
    adapter: Array | None,
    num_threads: int | None,
    out: Outputs,
    keep: bool,
    where: str = "",
) -> tuple[Array, Array | None, Given]:
    """y, s where it is kept, and the arguments of the call that fills them."""
    x = check(OP, "x", x, (None, layer.k), layer.weight, strided=True)
    bias = optional(OP, f"{where}bias", bias, (layer.n,), x)
    m = x.shape[0]
    adapter = optional(OP, f"{where}adapter", adapter, (m,), "int32")
    y = output(OP, f"{where}out", out[0], (m, layer.n), x.dtype)
    s = output(OP, f"{where}out", out[1], (m, layer.ranks), np.float32) if keep else None
    given = (
        rows(x),
        memory(layer.weight),
        memory(bias),
        memory(y),
        memory(s),
        layer.operands(),
        seed & 0xFFFFFFFFFFFFFFFF,
        threads(num_threads),
        layer.packed_memory(False),
        memory(adapter),
    )
    return y, s, given


def delta_linear_backward(
    grad_y: Array,
    x: Array | None,
    weight: Array | PackedWeight,
    s: Array | None,
    branches: Sequence[Branch] = (),
    *,
    seed: int = 0,
    adapter: Array | None = None,
    wanted: Iterable[str] | None = None,
    num_threads: int | None = None,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Gradients by name: "x", "bias", and of branch i "a.i", "b.i" and "bias.i".

    Args:
        grad_y: ``[M, N]``, dtype of the weight; rows may lie apart.
        x: as in the forward pass; None where no "a.i" is wanted.
        weight: as in the forward pass.
        s: what the forward pass returned; None where no "b.i" is wanted and no branch has an
            activation.
        branches: as in the forward pass.
        seed: so too.
        adapter: so too.
        wanted: names; None: all of them, "bias.i" where branch i has one.
        num_threads: None: all processors.
        out: arrays for some of the gradients, by name, contiguous.
    Raises: DtypeError, ShapeError, LayoutError, ConfigError.
    """
    layer = Checked(weight, branches)
    grad_y = check(OP, "grad_y", grad_y, (None, layer.n), layer.weight, strided=True)
    m = grad_y.shape[0]
    found = gradients(OP, {"x": ((m, layer.k), grad_y.dtype)} | layer.known(), wanted, out)
    given = backward_of(layer, grad_y, x, s, seed, adapter, num_threads, found)
    call(layer.native.backward, *given)
    return found


def backward_of(
    layer: Checked,
    grad_y: Array,
    x: Array | None,
    s: Array | None,
    seed: int,
    adapter: Array | None,
    num_threads: int | None,
    found: Mapping[str, Array],
    where: str = "",
    grad_x: bool | None = None,
) -> Given:
    """The arguments of the call that fills ``found``.

    grad_x: whether the gradient of x is wanted of a group; None: where ``found`` has it.
    """
    m, count = grad_y.shape[0], len(layer.branches)
    if x is not None:
        x = check(OP, "x", x, (m, layer.k), grad_y, strided=True)
    elif any(name.startswith("a.") for name in found):
        raise ShapeError(f"{OP}: x must be given where the gradient of a branch's a is wanted.")
    s = optional(OP, f"{where}s", s, (m, layer.ranks), "float32")
    adapter = optional(OP, f"{where}adapter", adapter, (m,), "int32")
    kinds = ("a", "b", "bias")
    return (
        rows(grad_y),
        rows(x),
        memory(layer.weight),
        memory(s),
        layer.operands(),
        seed & 0xFFFFFFFFFFFFFFFF,
        threads(num_threads),
        memory(found.get("x")),
        memory(found.get("bias")),
        [memory(found.get(f"{kind}.{i}")) for kind in kinds for i in range(count)],
        layer.packed_memory(True) if ("x" in found if grad_x is None else grad_x) else None,
        memory(adapter),
    )
