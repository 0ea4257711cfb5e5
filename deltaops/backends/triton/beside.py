"""The plan ``beside``: a pass over x, on the multiprocessors that y and dx leave over.

Backward, dA while dx is computed; forward, S while y is (:func:`cuda.outputs_and_s`).

Tiles are computed in rounds, one a multiprocessor; the last round rarely needs all of them. As many
as can be spared without a round more make the pass meanwhile, which then takes no time of its own.
dS goes before dx, since dx and dA need it, in one pass over dy with dB; or dB, too, goes beside dx,
where the layer is so wide that dx takes longer than reading both x and dy there. S is what y's
tiles need last, and is made in their launch, which waits for it row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import branches, core, cuda

LEAST = 4
"""Multiprocessors that must be left over: fewer would read for longer than the product takes."""
PRODUCTS_A_BYTE = 43
"""Multiply-adds of a persistent dx in the time in which the passes beside it read a byte, both of
one multiprocessor: on an H200 2.9e12 and, for 64 ranks, 68e9 a second."""
MOST_RANK = 128
"""Of dA: of more a program has no registers for the sums of a block of columns."""
MOST_RANK_OF_BOTH, LEAST_ROWS_OF_BOTH = 64, 4096
"""Of dA and dB. On an H200 layers of 14336 gain 1 to 4 % by it, of 8192 and of 32768 rows; of 512
they gain nothing, and lose 6 % where they have 64 ranks."""
OF_Y = 128, 256
"""Rows and columns of its tiles by the plan ``cuda``, where they make S too."""
MOST_RANK_OF_S = 64
"""Of a launch that makes S too: csrc/cuda/hopper/project.h."""


def left_over(tiles: int, multiprocessors: int) -> int:
    """Multiprocessors that are not needed to compute ``tiles`` in as many rounds."""
    rounds = -(-tiles // multiprocessors)
    return multiprocessors - -(-tiles // rounds)


def fits(m: int, k: int, rank: int, device: torch.device | str) -> bool:
    """Whether a persistent dx ``[M, K]`` leaves enough over."""
    return rank <= MOST_RANK and core.has_room_beside(device) and _spare(m, k, device) >= LEAST


def makes_s(m: int, n: int, rank: int, device: torch.device | str) -> bool:
    """Whether y ``[M, N]`` by the plan ``cuda`` leaves enough over to make S ``[M, rank]``."""
    rows, columns = -(-m // OF_Y[0]), -(-n // OF_Y[1])
    together = 2 if rows % 2 == 0 or rows > 16 else 1  # as csrc/cuda/hopper_gemm.cu has it
    tiles = -(-rows // together) * columns
    spare = together * left_over(tiles, core.multiprocessors(device) // together)
    return rank <= MOST_RANK_OF_S and spare >= LEAST


def forward(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """Write y; S ``[M, R]`` of one LoRA branch without dropout."""
    with core.device_of(x):
        return cuda.outputs_and_s(y, x, weight, bias, a, b, scaling)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """dx, the bias's gradient where it is wanted, dA, and dB where it is wanted; of one LoRA branch
    without dropout.

    Args:
        needs: of x, the bias, A and B; those of x and A are always made.
    """
    grad_x, grad_a = torch.empty_like(x), torch.empty_like(a)
    grad_s = torch.empty_like(s, dtype=x.dtype)  # as dx and dA multiply it
    grad_b = torch.empty_like(b) if needs[3] else None
    grad_bias = grad_y.new_empty(grad_y.shape[1]) if needs[1] else None
    passes = [(grad_s, x, grad_a)]
    last_sums: list[tuple[Tensor, Tensor]] = []
    with_grad_s = grad_b  # what of dB the pass that makes dS makes, too
    if grad_b is not None and grad_bias is None and reads_dy(x, grad_y, s.shape[1]):
        passes.append((s, grad_y, grad_b.t()))
        with_grad_s = None
    precision = core.kernels("precision").rank_precision(x.dtype, [a])

    def write(multiprocessors: int) -> None:
        _write_grad_input(grad_x, grad_y, weight, grad_s, a, multiprocessors)

    with core.device_of(x):
        branches.pass_over_dy(
            grad_y, b, s, scaling=scaling, activation=branches.LINEAR, precision=precision,
            grad_s=grad_s, grad_b=with_grad_s, grad_bias=grad_bias, postponed=last_sums,
        )  # fmt: skip
        _meanwhile(write, passes, last_sums)
    return [t for t in (grad_x, grad_bias, grad_a, grad_b) if t is not None]


def backward_group(
    grad_x: Tensor,
    grad_y: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    a: Sequence[Tensor],
    grad_s: Tensor,
    of_layers: Sequence[Tensor],
) -> Tensor:
    """Write dx of layers of one x, by the plan ``cuda``; returns dA of all, ``[ΣR, K]``. On the
    current GPU.

    Args:
        grad_s: dS of all ``[M, ΣR]``, of which ``of_layers`` are the columns of each; no dropout.
    """
    grad_a = x.new_empty((grad_s.shape[1], x.shape[1]))

    def write(multiprocessors: int) -> None:
        cuda.grad_input_of_group(grad_x, grad_y, weight, of_layers, a, multiprocessors)

    _meanwhile(write, [(grad_s, x, grad_a)], [])
    return grad_a


def reads_dy(x: Tensor, grad_y: Tensor, rank: int) -> bool:
    """Whether dB goes beside dx, too: whether dx takes longer than x and dy to be read there."""
    (m, n), k, device = grad_y.shape, x.shape[1], x.device
    if rank > MOST_RANK_OF_BOTH or m < LEAST_ROWS_OF_BOTH:
        return False
    if not core.kernels("persistent").is_describable(grad_y):
        return False
    spare = _spare(m, k, device)
    reading = PRODUCTS_A_BYTE * x.element_size() * (n + k) * (core.multiprocessors(device) - spare)
    return n * k * spare >= reading


def _meanwhile(
    write: Callable[[int], None],
    passes: Sequence[tuple[Tensor, Tensor, Tensor]],
    last_sums: Sequence[tuple[Tensor, Tensor]],
) -> None:
    """``write`` dx on as many multiprocessors as its rounds need, and on the others ``passes``, of
    which the first reads x, and what the pass over dy has left to be summed."""
    x = passes[0][1]
    (m, k), device = x.shape, x.device
    spare = _spare(m, k, device)
    try:
        with core.aside(device):
            for left, right, out in passes:
                rounded = left.to(right.dtype)  # S in fp32 would be read again and again
                core.kernels("beside").beside(rounded, right, out, programs=spare)
            for partials, out in last_sums:
                core.kernels("reduce").sum_partials(partials, out)
        write(core.multiprocessors(device) - spare)
    finally:
        core.together(device)


def _write_grad_input(
    grad_x: Tensor,
    grad_y: Tensor,
    weight: Tensor,
    grad_s: Tensor,
    a: Tensor,
    multiprocessors: int,
) -> None:
    if cuda.runs_on(grad_x.device, "cuda"):
        cuda.grad_input_of_group(grad_x, [grad_y], [weight], [grad_s], [a], multiprocessors)
        return
    core.kernels("persistent_grad_input").persistent_grad_input(
        grad_y, weight, grad_s, a, grad_x, dropout=0.0, seed=None,
        capability=core.capability(grad_x), multiprocessors=multiprocessors,
    )  # fmt: skip


def _spare(m: int, k: int, device: torch.device | str) -> int:
    config = core.kernels("configs").persistent(m, 90, masked=False)
    return left_over(-(-m // config.rows) * -(-k // config.cols), core.multiprocessors(device))
