"""What a frozen decoder makes of q numbers, written out in torch.

θ = θ₀ + z R                       a random projection
θ = W₂ tanh(W₁ z + b₁) + b₂        a decoder that was fitted
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def decoding(decoder: nn.Module, z: Tensor, holder: nn.Module) -> Callable[[], Tensor]:
    """What returns θ, flat.

    Args:
        decoder: ours, whose buffers are copied in the dtype of ``z``.
        z: ``[q]``.
        holder: the module that has the copies, so that they count as the model's, as ours do.
    """
    frozen = {k: v.detach().to(z.dtype) for k, v in decoder.named_buffers()}
    for name, tensor in frozen.items():
        holder.register_buffer(f"eager_{name}", tensor, persistent=False)
    if "projection" in frozen:
        base, projection = frozen["base"].flatten(), frozen["projection"]
        return lambda: base + z @ projection
    first, first_bias, second, second_bias = (
        frozen[name] for name in ("first_weight", "first_bias", "second_weight", "second_bias")
    )
    return lambda: linear(torch.tanh(linear(z, first, first_bias)), second, second_bias)


class Decoded:
    """Everything that the adapters of a model have: a hook that decodes it before each pass."""

    def __init__(self, made: Callable[[], Tensor]) -> None:
        self.made = made
        self.taken = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        self.row = self.made()

    def next(self, layout: Mapping[str, tuple[int, ...]]) -> Callable[[], dict[str, Tensor]]:
        """What returns the tensors of the next adapter, called as in an adapter's file."""
        sizes = [torch.Size(shape).numel() for shape in layout.values()]
        first = self.taken
        self.taken += sum(sizes)

        def tensors() -> dict[str, Tensor]:
            parts = torch.split(self.row[first : first + sum(sizes)], sizes)
            return {
                f"adapter.{name}": part.view(shape)
                for (name, shape), part in zip(layout.items(), parts, strict=True)
            }

        return tensors
