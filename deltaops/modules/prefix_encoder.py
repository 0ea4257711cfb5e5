"""A reparameterised prefix: all keys and values of a model from one small matrix.

    rows = Up · tanh(Down · e + d) + u      for each of P positions, e [E], Down [C, E], Up [R, C]

The R rows are the keys and values of all attentions, one after the other. Training this instead of
the rows themselves is steadier. A pass computes them once: see :mod:`.rows`.
Source: Li and Liang 2021 (arXiv 2101.00190), §4.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltaops.ops.paths import no_autocast

from .replicas import refuse_replicas


def encode(
    embedding: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
) -> Tensor:
    """``[P, E], [C, E], [C], [R, C], [R]`` → rows ``[P, R]``."""
    return linear(torch.tanh(linear(embedding, down, down_bias)), up, up_bias)


class PrefixEncoder(nn.Module):
    """The parameters, float32 at best: they are small, and what they compute feeds every layer."""

    _replicate_for_data_parallel = refuse_replicas

    def __init__(
        self, embedding: Tensor, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor
    ) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.down = nn.Parameter(down)
        self.down_bias = nn.Parameter(down_bias)
        self.up = nn.Parameter(up)
        self.up_bias = nn.Parameter(up_bias)

    def forward(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, ``[P, stop − start]``; autocast does not round them."""
        up: Tensor = self.up
        up_bias: Tensor = self.up_bias
        if stop - start < up.shape[0]:
            up, up_bias = up[start:stop], up_bias[start:stop]
        with no_autocast(self.embedding.device):
            return encode(self.embedding, self.down, self.down_bias, up, up_bias)
