"""What the products refuse: a status and a sentence, before anything is read or written."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import pytest
import torch

from . import emulated, products
from .products import Layer

INVALID, UNSUPPORTED = 1, 2
BF16 = torch.bfloat16

Change = Callable[[Sequence[Layer]], object]


def replaced(name: str, rows: int, cols: int, dtype: torch.dtype = BF16, pad: int = 0) -> Change:
    """Another matrix in the first layer."""
    return lambda layers: setattr(layers[0], name, products.normal(rows, cols, dtype, 1, pad))


REFUSED: dict[str, tuple[str, int, Change, str]] = {
    "float32": (
        "outputs", UNSUPPORTED, replaced("left", 16, 24, torch.float32),
        "outputs: dtype must be bf16 (1) or f16 (2), got 0",
    ),
    "weight of another K": (
        "outputs", INVALID, replaced("weight", 16, 32),
        "outputs: weight must be [16, 24], got [16, 32]",
    ),
    "weight of another dtype": (
        "outputs", INVALID, replaced("weight", 16, 24, torch.float16),
        "outputs: weight must have the first matrix's dtype 1, got 2",
    ),
    "rows off 16 bytes": (
        "outputs", UNSUPPORTED, replaced("factor", 16, 8, pad=1),
        "outputs: b must have rows on 16 bytes, for the copy engine",
    ),
    "s without b": (
        "outputs", INVALID, lambda layers: setattr(layers[0], "factor", None),
        "outputs: s and b must both be there or both be absent",
    ),
    "another x": (
        "outputs", INVALID, lambda layers: setattr(layers[1], "left", products.normal(16, 24, BF16, 9)),
        "outputs: x of layer 1 must be that of the first",
    ),
    "no gradient": (
        "grad_input", INVALID, replaced("left", 16, 8),
        "grad_input: grad_y must be [16, 16], got [16, 8]",
    ),
    "two gradients": (
        "grad_input", INVALID,
        lambda layers: setattr(layers[1], "out", products.normal(16, 24, BF16, 1)),
        "grad_input: grad_x is the first layer's, and must be absent in layer 1",
    ),
    "dropout in a group": (
        "grad_input", UNSUPPORTED, lambda layers: setattr(layers[0], "threshold", 5),
        "so it is taken for one layer alone, got 2",
    ),
    "more than all dropped": (
        "grad_input", INVALID, lambda layers: setattr(layers[0], "threshold", 65537),
        "drop_threshold must be p * 65536, so 0 to 65536, got 65537",
    ),
}  # fmt: skip


def layers_of(name: str) -> list[Layer]:
    if name == "outputs":
        return products.output_layers(16, 24, [16, 16], [8, 8], BF16)
    return products.gradient_layers(16, 24, [16, 16], [8, 8], BF16)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, status, change, says = REFUSED[case]
    layers = layers_of(name)
    change(layers)
    assert products.call(name, layers) == status
    assert says in emulated.error()
    assert all(one.out is None or case == "two gradients" or one.out.t.isnan().all()
               for one in layers)  # fmt: skip


def test_another_gpu() -> None:
    assert products.call("outputs", layers_of("outputs"), capability=80) == UNSUPPORTED
    assert "runs on Hopper (compute capability 9.0), GPU 0 has 8.0" in emulated.error()


def test_too_small_a_workspace() -> None:
    args = products.outputs_args(layers_of("outputs"))
    with emulated.grid(capability=90) as lib:
        needed = ctypes.c_int64()
        assert lib.deltaops_cuda_outputs_workspace(args, 2, ctypes.byref(needed)) == 0
        assert needed.value == 2 * 16 * 8 * 2
        space = torch.empty(needed.value, dtype=torch.uint8)
        short = ctypes.c_int64(needed.value - 1)
        pointer = ctypes.c_void_p(space.data_ptr())
        assert lib.deltaops_cuda_outputs(0, args, 2, pointer, short, None) == INVALID
    assert "outputs: the workspace must have 512 bytes on 16 bytes, got 511" in emulated.error()


def test_structs_of_another_header() -> None:
    args = products.outputs_args(layers_of("outputs"))
    args[1].struct_size -= 8
    with emulated.grid(capability=90) as lib:
        assert lib.deltaops_cuda_outputs(0, args, 2, None, ctypes.c_int64(), None) == INVALID
        assert "struct_size of layer 1 must be" in emulated.error()
        assert lib.deltaops_cuda_outputs(0, args, 5, None, ctypes.c_int64(), None) == INVALID
        assert "count must be 1 to 4 layers, got 5" in emulated.error()
