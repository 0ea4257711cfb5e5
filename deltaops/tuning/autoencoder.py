"""An auto-encoder of prompts, and a prompt that is decoded from the code of one of them.

    z = E p + e                         E [q, P·d]
    p̂ = W₂ tanh(W₁ z + b₁) + b₂         W₁ [h, q], W₂ [P·d, h]

Source: Qin et al. 2021 (arXiv 2110.07867), §3.2 and its released program for h = d.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaops.methods.decoder import START, Sizes


class AutoEncoder(nn.Module):
    """To be trained over the prompts of several tasks."""

    def __init__(self, sizes: Sizes) -> None:
        """Start as torch's linear layers do."""
        super().__init__()
        self.sizes = sizes
        flat = sizes.num_virtual_tokens * sizes.width
        self.encoder = nn.Linear(flat, sizes.intrinsic_dim)
        self.first = nn.Linear(sizes.intrinsic_dim, sizes.hidden)
        self.second = nn.Linear(sizes.hidden, flat)

    def encode(self, prompts: Tensor) -> Tensor:
        """``[..., P, d]`` → ``[..., q]``."""
        found: Tensor = self.encoder(prompts.flatten(-2))
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """``[..., q]`` → ``[..., P, d]``."""
        flat: Tensor = self.second(torch.tanh(self.first(codes)))
        return flat.view(*codes.shape[:-1], self.sizes.num_virtual_tokens, self.sizes.width)

    @torch.no_grad()
    def tensors(self, prompts: Tensor) -> dict[str, Tensor]:
        """What a decoder's file holds; tuning begins at the mean code of ``prompts [N, P, d]``."""
        state = {
            f"{name}.{key}": tensor
            for name, layer in (("first", self.first), ("second", self.second))
            for key, tensor in layer.state_dict().items()
        }
        return state | {START: self.encode(prompts).mean(0)}


class CodedPrompt(nn.Module):
    """The prompt of a task, encoded and decoded, in the place of a trained one."""

    told = "encoded and decoded, while that is trained"
    prompts: Tensor

    def __init__(self, prompts: Tensor, coder: AutoEncoder) -> None:
        """Stand for the first of ``prompts [N, P, d]``; :attr:`task` says which."""
        super().__init__()
        self.register_buffer("prompts", prompts, persistent=False)
        self.coder = coder
        self.task = 0
        self.error: Tensor | None = None
        """Of the last prompt: mean squared difference from what it was."""

    def forward(self) -> Tensor:
        """The prompt ``[P, d]``."""
        prompt = self.prompts[self.task]
        found = self.coder.decode(self.coder.encode(prompt))
        self.error = (found - prompt).square().mean()
        return found
