"""The products of ``delta_linear`` by the C ABI, on the emulated GPU, and what they should give."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deltaops.reference.philox import draws, keep_scale

from . import emulated
from .emulated import Bordered, Matrix, view

SEED = 2**40 + 12345
THRESHOLD = 13107
"""Of dropout, p = 0.2."""


class OutputsArgs(ctypes.Structure):
    """deltaops_cuda_outputs_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_int32),
        *((name, Matrix) for name in ("x", "weight", "bias", "s", "b", "y")),
    )


class GradInputArgs(ctypes.Structure):
    """deltaops_cuda_grad_input_args."""

    _fields_ = (
        ("struct_size", ctypes.c_uint32),
        ("reserved", ctypes.c_int32),
        *((name, Matrix) for name in ("grad_y", "weight", "grad_s", "a", "grad_x")),
        ("seed", ctypes.c_void_p),
        ("stream", ctypes.c_uint32),
        ("drop_threshold", ctypes.c_uint32),
    )


def normal(rows: int, cols: int, dtype: torch.dtype, seed: int, pad: int = 0) -> Bordered:
    generator = torch.Generator().manual_seed(seed)
    return Bordered(torch.randn(rows, cols, generator=generator).to(dtype), pad)


@dataclass
class Layer:
    """One layer, with what is absent as None."""

    left: Bordered
    """x or grad_y."""
    weight: Bordered
    s: Bordered | None
    factor: Bordered | None
    """b or a."""
    out: Bordered | None
    bias: Bordered | None = None
    threshold: int = 0
    stream: int = 0
    seed: Tensor = field(default_factory=lambda: torch.tensor([SEED]))

    def operands(self) -> list[Bordered]:
        found = (self.left, self.weight, self.s, self.factor, self.out, self.bias)
        return [one for one in found if one is not None]


def to_8(n: int) -> int:
    """Elements that are missing to whole rows of 16 bytes."""
    return -n % 8


def output_layers(
    m: int, k: int, outputs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, *,
    bias: bool = True, s_dtype: torch.dtype | None = None,
) -> list[Layer]:  # fmt: skip
    """Layers of the forward products; a rank of 0: no branch."""
    x = normal(m, k, dtype, 1, to_8(k))
    return [
        Layer(
            x,
            normal(n, k, dtype, 2 + i, to_8(k)),
            normal(m, r, s_dtype or torch.float32, 12 + i, to_8(r)) if r else None,
            normal(n, r, dtype, 22 + i, to_8(r)) if r else None,
            Bordered.empty(m, n, dtype, to_8(n)),
            normal(1, n, dtype, 32 + i) if bias else None,
        )
        for i, (n, r) in enumerate(zip(outputs, ranks, strict=True))
    ]


def gradient_layers(
    m: int, k: int, outputs: Sequence[int], ranks: Sequence[int], dtype: torch.dtype, *,
    threshold: int = 0, stream: int = 0,
) -> list[Layer]:  # fmt: skip
    """Layers of the gradient of x; the first has the output."""
    return [
        Layer(
            normal(m, n, dtype, 1 + i, to_8(n)),
            normal(n, k, dtype, 11 + i, to_8(k)),
            normal(m, r, torch.float32, 21 + i) if r else None,
            normal(r, k, dtype, 31 + i, to_8(k)) if r else None,
            None if i else Bordered.empty(m, k, dtype, to_8(k)),
            threshold=threshold,
            stream=stream,
        )
        for i, (n, r) in enumerate(zip(outputs, ranks, strict=True))
    ]


def result(layer: Layer) -> Tensor:
    """What was written to its output."""
    assert layer.out is not None
    return layer.out.t


def _t(one: Bordered | None) -> Tensor | None:
    return None if one is None else one.t


def outputs_args(layers: Sequence[Layer]) -> ctypes.Array[OutputsArgs]:
    size = ctypes.sizeof(OutputsArgs)
    return (OutputsArgs * len(layers))(
        *(
            OutputsArgs(size, 0, *map(view, map(_t, (o.left, o.weight, o.bias, o.s, o.factor, o.out))))
            for o in layers
        )
    )  # fmt: skip


def gradient_args(layers: Sequence[Layer]) -> ctypes.Array[GradInputArgs]:
    size = ctypes.sizeof(GradInputArgs)
    return (GradInputArgs * len(layers))(
        *(
            GradInputArgs(
                size, 0, *map(view, map(_t, (o.left, o.weight, o.s, o.factor, o.out))),
                o.seed.data_ptr(), o.stream, o.threshold,
            )
            for o in layers
        )
    )  # fmt: skip


def call(name: str, layers: Sequence[Layer], **gpu: int) -> int:
    """The status of ``deltaops_cuda_<name>``; primitives may touch its operands alone.

    Args:
        gpu: as for :func:`emulated.grid`.
    """
    args = outputs_args(layers) if name == "outputs" else gradient_args(layers)
    with emulated.grid(**({"capability": 90} | gpu)) as lib:
        needed = ctypes.c_int64()
        count = len(layers)
        status: int = getattr(lib, f"deltaops_cuda_{name}_workspace")(
            args, count, ctypes.byref(needed)
        )
        if status:
            return status
        space = Bordered.empty(1, needed.value // 2, torch.bfloat16)
        for one in (space, *(b for layer in layers for b in layer.operands())):
            one.allow()
        status = getattr(lib, f"deltaops_cuda_{name}")(
            0, args, count, ctypes.c_void_p(space.t.data_ptr()), needed, None
        )
        assert space.intact()
        assert all(one.intact() for layer in layers for one in layer.operands())
        return status


def expected_outputs(layers: Sequence[Layer]) -> list[Tensor]:
    """In float64 from the operands as given, S rounded to the dtype of x as the kernels do."""
    found = []
    for layer in layers:
        y = layer.left.t.double() @ layer.weight.t.double().t()
        if layer.s is not None and layer.factor is not None:
            y += layer.s.t.to(layer.left.t.dtype).double() @ layer.factor.t.double().t()
        if layer.bias is not None:
            y += layer.bias.t.double()
        found.append(y)
    return found


def expected_gradient(layers: Sequence[Layer]) -> Tensor:
    """In float64 from the operands as given, dS rounded as the kernels do."""
    total = torch.zeros(())
    for layer in layers:
        if layer.s is not None and layer.factor is not None:
            down = layer.s.t.to(layer.left.t.dtype).double() @ layer.factor.t.double()
            if layer.threshold:
                kept = draws(*down.shape, layer.seed, layer.stream) >= layer.threshold
                down *= kept * keep_scale(layer.threshold)
            total = total + down
        total = total + layer.left.t.double() @ layer.weight.t.double()
    return total
