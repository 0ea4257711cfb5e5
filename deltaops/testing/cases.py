"""The shapes, strides and settings that every backend of ``delta_linear`` is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaops.backends import DeltaLinearCall


@dataclass(frozen=True)
class DeltaLinearTensors:
    """The arguments of one call, in the order of the backends' ``forward``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: list[Tensor]
    b: list[Tensor]
    branch_bias: list[Tensor | None]
    scaling: list[float]
    dropout: list[float]
    activation: list[str]
    seed: Tensor | None
    adapter: Tensor | None = None

    def to(self, dtype: torch.dtype) -> DeltaLinearTensors:
        """The same values in another dtype; strides are kept."""
        return DeltaLinearTensors(
            self.x.to(dtype),
            self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            [t.to(dtype) for t in self.a],
            [t.to(dtype) for t in self.b],
            [None if t is None else t.to(dtype) for t in self.branch_bias],
            self.scaling,
            self.dropout,
            self.activation,
            self.seed,
            self.adapter,
        )

    def forward_arguments(self) -> tuple[object, ...]:
        """For ``backend.forward(*…)``."""
        return (
            self.x, self.weight, self.bias, self.a, self.b, self.branch_bias, self.scaling,
            self.dropout, self.activation, self.seed, *self.by_row(),
        )  # fmt: skip

    def by_row(self) -> tuple[Tensor, ...]:
        """The last argument of both, where there is one."""
        return () if self.adapter is None else (self.adapter,)

    def backward_arguments(self, grad_y: Tensor, s: Tensor) -> tuple[object, ...]:
        """For ``backend.backward(*…, needs, *by_row())``."""
        return (
            grad_y, self.x, self.weight, self.a, self.b, s, self.scaling, self.dropout,
            self.activation, self.seed,
        )  # fmt: skip

    def all_needed(self) -> list[bool]:
        """``needs`` of ``backend.backward`` for every gradient that there is."""
        biases = [t is not None for t in self.branch_bias]
        return [True, self.bias is not None, *[True] * (2 * len(self.a)), *biases]

    def joined(self, grads: list[Tensor]) -> list[Tensor]:
        """All gradients, those of the branches' biases as one: the error of a single number, as of
        a branch of rank 1, is luck."""
        count = sum(t is not None for t in self.branch_bias)
        return [*grads[: len(grads) - count], torch.cat(grads[-count:])] if count else grads

    def call(self) -> DeltaLinearCall:
        """For ``backend.unsupported(…)``."""
        return DeltaLinearCall.of(
            self.x, self.weight, self.a, self.branch_bias, self.dropout, self.activation,
            self.adapter is not None,
        )  # fmt: skip


@dataclass(frozen=True)
class DeltaLinearCase:
    """One row of the table; ``str`` is its test id."""

    m: int
    n: int
    k: int
    ranks: tuple[int, ...]
    dropout: tuple[float, ...] = ()
    bias: bool = True
    layout: str = "row"
    """Of the weight: "row" as nn.Linear, "col" as Conv1D."""
    padding: int = 0
    """Extra elements behind each row of x, so that its rows are strided."""
    activation: tuple[str, ...] = ()
    branch_bias: tuple[bool, ...] = ()
    routed: str = ""
    """How rows have one branch each: "mixed" in any order, some with none; "samples" by runs of
    neighbours; "one" all have the first branch; "none" all have none. Else every row has all
    branches."""

    def __str__(self) -> str:
        parts = [f"{self.m}x{self.n}x{self.k}", "r" + "+".join(map(str, self.ranks or (0,)))]
        parts += [f"p{max(self.dropout)}"] if any(self.dropout) else []
        parts += [] if self.bias else ["nobias"]
        parts += ["conv1d"] if self.layout == "col" else []
        parts += ["strided"] if self.padding else []
        parts += ["+".join(self.activation)] if self.activation else []
        parts += ["branchbias"] if any(self.branch_bias) else []
        parts += [f"by-row-{self.routed}"] if self.routed else []
        return "-".join(parts)

    def tensors(
        self,
        dtype: torch.dtype,
        *,
        adapter_dtype: torch.dtype | None = None,
        device: str = "cpu",
        seed: int = 0,
    ) -> DeltaLinearTensors:
        """Random arguments of unit scale, the same for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

        def place(t: Tensor, to: torch.dtype) -> Tensor:
            return t.to(device=device, dtype=to)

        x = place(normal(self.m, self.k + self.padding), dtype)[:, : self.k]
        weight = place(normal(self.n, self.k, scale=self.k**-0.5), dtype)
        if self.layout == "col":
            weight = weight.t().contiguous().t()
        narrow, count = adapter_dtype or dtype, len(self.ranks)
        return DeltaLinearTensors(
            x,
            weight,
            place(normal(self.n), dtype) if self.bias else None,
            [place(normal(r, self.k, scale=self.k**-0.5), narrow) for r in self.ranks],
            [place(normal(self.n, r, scale=r**-0.5), narrow) for r in self.ranks],
            [
                place(normal(r), narrow) if there else None
                for r, there in zip(self.ranks, self.branch_bias or (False,) * count, strict=True)
            ],
            [2.0 / (1 + i) for i in range(count)],
            list(self.dropout or (0.0,) * count),
            list(self.activation or ("identity",) * count),
            torch.tensor([0x1234_5678_9ABC_DEF0 + seed], device=device),
            self._adapter(generator, device),
        )

    def _adapter(self, generator: torch.Generator, device: str) -> Tensor | None:
        if not self.routed:
            return None
        ids = torch.full((self.m,), -1 if self.routed == "none" else 0, dtype=torch.int32)
        if self.routed == "samples":  # runs of a seventh, the first and another with none
            ids = (torch.arange(self.m) * 7 // self.m % (len(self.ranks) + 1) - 1).int()
        if self.routed == "mixed":  # branch 1 has no rows where there are more than two
            ids = torch.randint(-1, len(self.ranks), (self.m,), generator=generator).int()
            if len(self.ranks) > 2:
                ids[ids == 1] = -1
        return ids.to(device)

    def grad_y(self, dtype: torch.dtype, *, device: str = "cpu", seed: int = 1) -> Tensor:
        """A random output gradient ``[M, N]``."""
        generator = torch.Generator().manual_seed(seed)
        grad = torch.randn(self.m, self.n, generator=generator, dtype=torch.float64)
        return grad.to(device=device, dtype=dtype)


DELTA_LINEAR_CASES = (
    DeltaLinearCase(64, 48, 32, (8,)),
    DeltaLinearCase(0, 16, 16, (4,)),
    DeltaLinearCase(1, 64, 64, (16,)),
    DeltaLinearCase(1, 33, 71, (3,), layout="col"),
    DeltaLinearCase(5, 130, 67, (1,), bias=False),
    DeltaLinearCase(7, 1, 1, (1,)),
    DeltaLinearCase(13, 17, 300, (), bias=True),
    DeltaLinearCase(33, 19, 23, (1,), layout="col"),
    DeltaLinearCase(65, 129, 257, (24,), padding=3),
    DeltaLinearCase(128, 96, 64, (100,)),
    DeltaLinearCase(96, 70, 40, (64,), dropout=(0.1,)),
    DeltaLinearCase(40, 31, 29, (5,), dropout=(0.5,), layout="col", padding=7),
    DeltaLinearCase(3, 40, 72, (4,), dropout=(0.25,)),
    DeltaLinearCase(50, 37, 53, (4, 9), dropout=(0.3, 0.0)),
    DeltaLinearCase(50, 37, 53, (8, 1, 16), dropout=(0.3, 0.2, 0.1), bias=False),
    DeltaLinearCase(12, 20, 24, (3,), dropout=(1.0,)),
    DeltaLinearCase(300, 200, 700, (16,)),
    # long sums: over k forward, over n and over m backward
    DeltaLinearCase(20, 24, 4100, (3,)),
    DeltaLinearCase(3, 12, 16500, (2,), bias=False),
    DeltaLinearCase(20, 4100, 24, (3,), layout="col"),
    DeltaLinearCase(4100, 12, 20, (2,)),
    # parallel adapters
    DeltaLinearCase(64, 48, 32, (8,), activation=("relu",)),
    DeltaLinearCase(130, 37, 300, (24,), padding=3, activation=("gelu",), branch_bias=(True,)),
    DeltaLinearCase(65, 96, 64, (40,), activation=("gelu_tanh",), branch_bias=(True,)),
    DeltaLinearCase(5, 130, 67, (17,), bias=False, activation=("silu",), branch_bias=(True,)),
    DeltaLinearCase(1, 64, 64, (16,), activation=("gelu_tanh",)),
    DeltaLinearCase(0, 16, 16, (4,), activation=("silu",), branch_bias=(True,)),
    DeltaLinearCase(33, 19, 23, (1,), layout="col", activation=("gelu",), branch_bias=(True,)),
    DeltaLinearCase(
        50, 37, 53, (4, 9, 8), dropout=(0.3, 0.0, 0.25),
        activation=("identity", "relu", "silu"), branch_bias=(False, True, True),
    ),
    DeltaLinearCase(
        50, 37, 53, (8, 1, 16), dropout=(0.0, 0.2, 0.1), bias=False,
        activation=("gelu", "identity", "gelu_tanh"), branch_bias=(True, True, False),
    ),
    DeltaLinearCase(
        12, 20, 24, (3, 2), dropout=(1.0, 1.0),
        activation=("silu", "identity"), branch_bias=(True, True),
    ),
)  # fmt: skip

ROUTED_CASES = (
    DeltaLinearCase(129, 71, 67, (1, 8, 24, 5), routed="mixed"),
    DeltaLinearCase(64, 48, 32, (8, 4), routed="one"),
    DeltaLinearCase(33, 19, 23, (3, 5), dropout=(0.3, 0.0), routed="none"),
    DeltaLinearCase(0, 16, 16, (4, 4), routed="mixed"),
    DeltaLinearCase(1, 33, 71, (3, 2), routed="one", layout="col"),
    DeltaLinearCase(5, 130, 67, (1, 2), bias=False, routed="mixed"),
    DeltaLinearCase(
        131, 50, 72, (4, 9, 16, 1), dropout=(0.3, 0.2, 0.0, 1.0), padding=3, routed="mixed"
    ),
    DeltaLinearCase(150, 80, 300, (16, 20, 40), dropout=(0.1, 0.1, 0.2), routed="mixed"),
    DeltaLinearCase(20, 24, 4100, (3, 1), dropout=(0.1, 0.0), layout="col", routed="mixed"),
    DeltaLinearCase(4100, 12, 20, (2, 3), routed="mixed"),
    DeltaLinearCase(
        150, 37, 53, (4, 9, 8), dropout=(0.3, 0.0, 0.25), routed="mixed",
        activation=("identity", "gelu", "silu"), branch_bias=(False, True, True),
    ),
    DeltaLinearCase(290, 130, 100, (5, 16, 8), dropout=(0.1, 0.0, 0.3), routed="samples"),
    DeltaLinearCase(150, 128, 192, (16, 4, 20), bias=False, routed="samples"),
)  # fmt: skip
"""A batch that mixes adapters; a backend is held to them where it takes ``call.routed``."""
