"""A pool of prompts, of which each sample gets those whose keys are nearest to it.

    y = [p of the top-k keys, in the pool's order;  e₁ … e_T]            p [N, L, d]

Source: Wang et al. 2022 (arXiv 2112.08654), eq. 3.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .pool import Pool


class PooledPrompts(Pool):
    """N prompts with a key each."""

    def __init__(self, prompts: Tensor, keys: Tensor, **settings: Any) -> None:
        """Hold ``prompts [N, L, d]`` and ``keys [N, e]``.

        Args:
            prompts: of the pool.
            keys: of the prompts.
            **settings: of :class:`.pool.Pool`.
        """
        super().__init__(keys, **settings)
        self.prompts = nn.Parameter(prompts)

    @property
    def positions(self) -> int:
        """What is put before each sample: k·L."""
        return self.top_k * self.prompts.shape[1]

    def forward(self, query: Tensor) -> Tensor:
        """``q [B, e]`` → the chosen prompts ``[B, k·L, d]``."""
        indices = self.choose(query)
        # one gather; its gradient sums over the samples that chose a prompt
        length, width = self.prompts.shape[1:]
        rows = functional.embedding(indices, self.prompts.flatten(1))
        return rows.view(-1, self.top_k * length, width)
