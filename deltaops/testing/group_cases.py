"""The layers of one x that every backend of ``delta_linear_group`` is held to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cases import DeltaLinearCase, DeltaLinearTensors


@dataclass(frozen=True)
class GroupCase:
    """One row of the table; ``str`` is its test id."""

    layers: tuple[DeltaLinearCase, ...]
    """Of one m, k and padding."""

    def __str__(self) -> str:
        return "+".join(map(str, self.layers))

    def tensors(
        self, dtype: torch.dtype, *, adapter_dtype: torch.dtype | None = None
    ) -> list[DeltaLinearTensors]:
        """Those of each layer, with the first one's x."""
        made = [
            case.tensors(dtype, adapter_dtype=adapter_dtype, seed=i)
            for i, case in enumerate(self.layers)
        ]
        return [replace(t, x=made[0].x) for t in made]

    def grad_y(self, dtype: torch.dtype) -> list[Tensor]:
        """A random output gradient ``[M, N]`` of each."""
        return [case.grad_y(dtype, seed=i) for i, case in enumerate(self.layers)]


_One = DeltaLinearCase

GROUP_CASES = (
    GroupCase((_One(64, 48, 32, (8,)), _One(64, 16, 32, (8,)), _One(64, 16, 32, ()))),
    GroupCase((
        _One(131, 70, 40, (5,), dropout=(0.5,), padding=7),
        _One(131, 31, 40, (4, 9), dropout=(0.3, 0.0), bias=False, padding=7),
    )),
    GroupCase((
        _One(33, 19, 23, (3, 5), routed="mixed"),
        _One(33, 8, 23, (17,), layout="col", activation=("gelu",), branch_bias=(True,)),
    )),
    GroupCase((_One(1, 33, 71, (30,)), _One(1, 17, 71, (8,), bias=False))),
    GroupCase((_One(0, 16, 16, (4,)), _One(0, 5, 16, ()))),
    GroupCase((_One(401, 48, 1100, (16,)),) * 2),
)  # fmt: skip
