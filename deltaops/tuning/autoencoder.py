"""An auto-encoder of prompts or adapters, and one of them that is decoded from its code.

    z = E p + e                         E [q, n]
    p̂ = W₂ tanh(W₁ z + b₁) + b₂         W₁ [h, q], W₂ [n, h]

p [n] is a prompt, row after row, or all that the adapters of a model have.
Source: Qin et al. 2021 (arXiv 2110.07867), §3.2 and its released program for h = d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaops.methods.decoder import START, AdapterSizes, Sizes


class AutoEncoder(nn.Module):
    """To be trained over several tasks."""

    def __init__(self, sizes: Sizes | AdapterSizes) -> None:
        """Start as torch's linear layers do."""
        super().__init__()
        self.encoder = nn.Linear(sizes.rows, sizes.intrinsic_dim)
        self.first = nn.Linear(sizes.intrinsic_dim, sizes.hidden)
        self.second = nn.Linear(sizes.hidden, sizes.rows)

    def encode(self, found: Tensor) -> Tensor:
        """``[..., n]`` → ``[..., q]``."""
        codes: Tensor = self.encoder(found)
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """``[..., q]`` → ``[..., n]``."""
        found: Tensor = self.second(torch.tanh(self.first(codes)))
        return found

    @torch.no_grad()
    def tensors(self, found: Tensor) -> dict[str, Tensor]:
        """What a decoder's file holds; tuning begins at the mean code of ``found [N, n]``."""
        state = {
            f"{name}.{key}": tensor
            for name, layer in (("first", self.first), ("second", self.second))
            for key, tensor in layer.state_dict().items()
        }
        return state | {START: self.encode(found).mean(0)}


class Coded(nn.Module):
    """What one task has in full, encoded and decoded; in the place of what is trained."""

    told = "encoded and decoded, while that is trained"
    full: Tensor

    def __init__(self, full: Tensor, coder: AutoEncoder) -> None:
        """Stand for the first of ``full [N, n]``; :attr:`task` says which."""
        super().__init__()
        self.register_buffer("full", full, persistent=False)
        self.coder = coder
        self.task = 0
        self.error: Tensor | None = None
        """Of the last pass: mean squared difference from what it was."""

    def again(self) -> Tensor:
        """``[n]``"""
        one = self.full[self.task]
        found = self.coder.decode(self.coder.encode(one))
        self.error = (found - one).square().mean()
        return found


class CodedPrompt(Coded):
    """A prompt, for a stack that has one."""

    def __init__(self, full: Tensor, coder: AutoEncoder, width: int) -> None:
        """d is ``width``."""
        super().__init__(full, coder)
        self.width = width

    def forward(self) -> Tensor:
        """The prompt ``[P, d]``."""
        return self.again().view(-1, self.width)


class CodedAdapters(Coded):
    """All adapters of a model, for :class:`deltaops.modules.DecodedAdapters`."""

    def forward(self, z: Tensor, start: int, stop: int) -> Tensor:
        """``[stop − start]``, whatever z is."""
        return self.again()[start:stop]
