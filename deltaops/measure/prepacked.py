"""The strongest peer that plain torch allows: oneDNN's prepacked weights and ``addmm_``.

On AMD much of a float32 gain over ``F.linear`` is MKL's choice of AVX2 code. This peer has no such
handicap: oneDNN picks its instructions by what the CPU can do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prepacked:
    """A frozen weight, packed by oneDNN for both directions."""

    def __init__(self, weight: Tensor, bias: Tensor | None, m: int) -> None:
        """Pack for M rows. Raises: RuntimeError where oneDNN has no such kernel here."""
        self.forward_weight = torch.ops.mkldnn._reorder_linear_weight(weight, m)
        self.backward_weight = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), m)
        self.bias = bias
        probe = weight.new_zeros(m, weight.shape[1])
        self.backward(self.forward(probe))  # oneDNN refuses here, not inside the timing

    def forward(self, x: Tensor) -> Tensor:
        """``x Wᵀ + bias``."""
        return _product(x, self.forward_weight, self.bias)

    def backward(self, grad: Tensor) -> Tensor:
        """``grad W``."""
        return _product(grad, self.backward_weight, None)


def _product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class PrepackedLora(torch.autograd.Function):
    """LoRA on a :class:`Prepacked` weight; adapters in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float, w: Prepacked
    ) -> Tensor:
        """``x Wᵀ + bias + scaling · drop(x) aᵀ bᵀ``."""
        dropped, mask = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        s = dropped @ a.t()
        ctx.save_for_backward(dropped, mask, s, a, b)
        ctx.settings = scaling, dropout, w
        return w.forward(x).addmm_(s, b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        dropped, mask, s, a, b = ctx.saved_tensors
        scaling, dropout, w = ctx.settings
        g = (grad @ b).mul_(scaling)
        grad_x = w.backward(grad)
        if mask is None:
            grad_x.addmm_(g, a)
        else:
            grad_x.addcmul_(g @ a, mask.to(grad.dtype), value=1 / (1 - dropout))
        return grad_x, g.t() @ dropped, (grad.t() @ s).mul_(scaling), None, None, None
