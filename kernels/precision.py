"""In which precision the rank terms are multiplied.

A rank term works in the wider of the adapter's dtype and that of x, as PEFT does with float32
adapters on a bfloat16 model. Half types multiply exactly into fp32 accumulators. Float32 work on
a half-precision model goes through the tensor cores in three TF32 products (about 2⁻²¹), so that
float32 gradients are worth their format; AMD's matrix cores multiply float32 as it is. A float32
model gets IEEE products in these kernels, no TF32; products that a plan leaves to the library obey
torch.set_float32_matmul_precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

AMD = torch.version.hip is not None
"""Whether the kernels are compiled for an AMD GPU."""

_TRITON = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Precision:
    """``work``: operand type of the rank terms; ``dot``: Triton's input_precision for them."""

    work: tl.dtype
    dot: str

    @property
    def wide(self) -> bool:
        """Whether rank terms work in fp32: their operands take more registers."""
        return self.work == tl.float32


def rank_precision(x: torch.dtype, adapters: Sequence[Tensor]) -> Precision:
    """The precision for activations of dtype ``x`` with these adapters (all branches alike)."""
    work = x
    for adapter in adapters:
        work = torch.promote_types(work, adapter.dtype)
    return Precision(_TRITON[work], "ieee" if AMD or x == torch.float32 else "tf32x3")
