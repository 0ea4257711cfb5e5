"""One factor of a low-rank branch, held where PEFT holds it: ``lora_A.default.weight``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .draws import draws_on


class Factor(nn.Module):
    """A matrix that a place's op reads; it has no forward of its own.

    Not an ``nn.Linear``, so that code which walks a model for linear layers (quantizers, a second
    match of "all-linear") does not take an adapter for a layer of the base model.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        """Hold ``weight`` ``[R, K]`` or ``[N, R]`` as a trainable parameter."""
        super().__init__()
        self.weight = nn.Parameter(weight)

    def extra_repr(self) -> str:
        """Shape and dtype."""
        rows, columns = self.weight.shape
        return f"{rows}×{columns}, {str(self.weight.dtype).removeprefix('torch.')}"


def start_values(
    rank: int,
    in_features: int,
    out_features: int,
    *,
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator | None,
    gaussian: bool = False,
) -> tuple[Tensor, Tensor]:
    """``A [rank, in_features]`` Kaiming-uniform with a=√5 and ``B [out_features, rank]`` zero.

    With ``gaussian``, A is N(0, 1/rank²).

    Drawn in float32 on the generator's device (the CPU without one) and moved then, so that a seed
    gives the same start on every device. On the meta device nothing is drawn.
    Source: Hu et al. 2021, §4.1, with the distribution that their code and PEFT use.
    """
    if device.type == "meta":
        a = torch.empty(rank, in_features, device=device, dtype=dtype)
        return a, torch.empty(out_features, rank, device=device, dtype=dtype)
    a = torch.empty(rank, in_features, device=draws_on(generator), dtype=torch.float32)
    if gaussian:
        nn.init.normal_(a, std=1 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)
    b = torch.zeros(out_features, rank, device=device, dtype=dtype)
    return a.to(device=device, dtype=dtype), b
