"""LoRA as two others publish it, written anew from their mathematics: peers for a GPU.

    Unsloth      an autograd Function over the library's products: y = x Wᵀ, then y += s (x Aᵀ) Bᵀ
                 in place; dx = dy W, then dx += s (dy B) A in place. Keeps x alone and makes x Aᵀ
                 again. Its fast path has no dropout.
    LoRAFusion   the graph is cut at S (Zhu et al. 2025, arXiv 2510.00206): dropout and S in one
                 reading of x, x Wᵀ and S Bᵀ in one GEMM, dS and dB in one reading of dy, dy W and
                 dS A in one GEMM, dA by the library. Keeps x̂ = drop(x), the mask and S.

The kernels of the second are this project's, so that a difference is one of plans. Both are held to
float64 before they are timed. One branch, adapters in the dtype of x, no bias; rows side by side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaops.backends.triton import core
from deltaops.ops.delta_linear import draw_seed


class Unsloth(torch.autograd.Function):
    """See the head of this file."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """``x Wᵀ + scaling · x aᵀ bᵀ``."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return (x @ weight.t()).addmm_(x @ a.t(), b.t(), alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        x, weight, a, b = ctx.saved_tensors
        grad_s = grad_y @ b
        grad_b = (grad_y.t() @ (x @ a.t())).mul_(ctx.scaling)
        grad_a = (grad_s.t() @ x).mul_(ctx.scaling)
        grad_x = (grad_y @ weight).addmm_(grad_s, a, alpha=ctx.scaling)
        return grad_x, None, grad_a, grad_b, None


def unsloth(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``x Wᵀ + scaling · x aᵀ bᵀ``, differentiable in x, a and b."""
    y: Tensor = Unsloth.apply(x, weight, a, b, scaling)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
    return y


class LoraFusion(torch.autograd.Function):
    """See the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: float,
        seed: Tensor | None,
    ) -> Tensor:
        """``x Wᵀ + scaling · drop(x) aᵀ bᵀ``."""
        precision = core.kernels("precision").rank_precision(x.dtype, [a])
        s = torch.empty((x.shape[0], a.shape[0]), dtype=torch.float32, device=x.device)
        y = torch.empty((x.shape[0], b.shape[0]), dtype=x.dtype, device=x.device)
        dropped, keep = x, None
        with core.device_of(x):
            if dropout:
                dropped, keep = core.kernels("stored_dropout").drop_and_project(
                    x, a, s, scaling=scaling, dropout=dropout, seed=seed
                )
            else:
                core.kernels("project").project(x, a, s, scaling=scaling, precision=precision)
            core.kernels("forward").forward_gemm(
                x, weight, None, s, [b], y, precision=precision, capability=core.capability(x)
            )
        ctx.save_for_backward(dropped, keep, s, weight, a, b)
        ctx.settings = scaling, dropout, precision
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, a and b."""
        dropped, keep, s, weight, a, b = ctx.saved_tensors
        scaling, dropout, precision = ctx.settings
        grad_s, grad_b = torch.empty_like(s), torch.empty_like(b)
        capability = core.capability(grad_y)
        with core.device_of(grad_y):
            core.kernels("grad_up").grad_up(
                grad_y, b, s, scaling=scaling, precision=precision, grad_s=grad_s, grad_b=grad_b,
                capability=capability,
            )  # fmt: skip
            grad_a = grad_s.to(dropped.dtype).t() @ dropped
            if keep is not None:
                grad_x = core.kernels("stored_dropout").stored_grad_input(
                    grad_y, weight, grad_s, a, keep,
                    dropout=dropout, precision=precision, capability=capability,
                )  # fmt: skip
            else:
                grad_x = torch.empty_like(dropped)
                kernels = core.kernels("grad_input")
                kernels.grad_input_gemm(
                    grad_y, weight, kernels.Downs.of_layer(grad_s, [a], [0.0], None), grad_x,
                    precision=precision, capability=capability,
                )  # fmt: skip
        return grad_x, None, grad_a, grad_b, None, None, None


def lora_fusion(
    x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """``x Wᵀ + scaling · drop(x) aᵀ bᵀ``, differentiable in x, a and b. The mask comes from torch's
    generator, as that of :func:`deltaops.delta_linear` does."""
    seed = draw_seed(x.device) if dropout else None
    y: Tensor = LoraFusion.apply(  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
        x, weight, a, b, scaling, dropout, seed
    )
    return y


def lora_fusion_unavailable(device: torch.device | str) -> str | None:
    """None, or why :func:`lora_fusion` cannot run there."""
    if not core.installed():
        return "triton is not installed"
    if torch.device(device).type != "cuda" and not core.interpreting():
        return "its kernels run on a GPU, or in Triton's interpreter"
    return None
