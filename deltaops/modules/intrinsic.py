"""A prompt that is decoded from q numbers, once in each pass.

    p = p₀ + σ/√q · z R                 R [q, P·d] of the standard normal: a fixed random projection
    p = W₂ tanh(W₁ z + b₁) + b₂         W₁ [h, q], W₂ [P·d, h]: a decoder fitted to other prompts

Only z [q] is trained. What decodes it is frozen and in no state dict: it is made again from a seed,
or read from its own file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.errors import AttachError

FITTED = ("first.weight", "first.bias", "second.weight", "second.bias")
"""Names of a fitted decoder's tensors: W₁ [h, q], b₁ [h], W₂ [P·d, h], b₂ [P·d]."""


class Decoding(nn.Module):
    """What decodes: frozen tensors in no state dict, which have values from the start or never."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Decoding:
        """Refuse memory where there were no values, as ``to_empty`` gives it.

        Raises: AttachError, before anything is changed here.
        """
        if any(buffer.is_meta and not fn(buffer).is_meta for buffer in self.buffers()):
            raise AttachError(
                "an intrinsic delta that was attached on the device meta has no decoder: that is "
                "made when it is attached, and no state dict has it. Give the model its weights "
                "(to_empty, load_state_dict), then attach."
            )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        return self


class RandomDecoder(Decoding):
    """A fixed random projection around a prompt p₀."""

    told = "decoded by a fixed random projection, made from its seed and not stored"
    base: Tensor
    projection: Tensor

    def __init__(self, base: Tensor, projection: Tensor) -> None:
        """Hold p₀ ``[P, d]`` and the scaled projection ``[q, P·d]``."""
        super().__init__()
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("projection", projection, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """``[q]`` → ``[P, d]``."""
        return self.base + (z @ self.projection).view_as(self.base)


class FittedDecoder(Decoding):
    """A decoder that was fitted to the prompts of several tasks."""

    told = "decoded by a decoder fitted to the prompts of other tasks"
    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    def __init__(self, tensors: dict[str, Tensor], width: int) -> None:
        """Hold ``tensors``, called as in :data:`FITTED`; d is ``width``."""
        super().__init__()
        self.width = width
        for name in FITTED:
            self.register_buffer(name.replace(".", "_"), tensors[name], persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """``[q]`` → ``[P, d]``."""
        inner = torch.tanh(functional.linear(z, self.first_weight, self.first_bias))
        return functional.linear(inner, self.second_weight, self.second_bias).view(-1, self.width)


class DecodedPrompt(nn.Module):
    """A prompt of which z is trained."""

    def __init__(self, z: Tensor, decoder: nn.Module) -> None:
        """Decode z ``[q]`` by ``decoder``."""
        super().__init__()
        self.intrinsic = nn.Parameter(z)
        self.decoder = decoder

    @property
    def told(self) -> str:
        """For the report."""
        return f"{self.decoder.told}, from {self.intrinsic.numel()} numbers"

    def forward(self) -> Tensor:
        """The prompt ``[P, d]``."""
        found: Tensor = self.decoder(self.intrinsic)
        return found
