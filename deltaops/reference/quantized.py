"""Quantised weights, and what they stand for

    int8   W[n, k] = codes[n, k] · scales[n]                        one scale for each output
    nf4    W.flat[i] = NF4[code i] · scales[i div block]            Dettmers et al. 2023, §3

codes of int8 [N,K] int8; of nf4 [⌈N·K/2⌉] uint8, two codes a byte, the first in the upper half, as
bitsandbytes has them. scales float32, [N] or [⌈N·K/block⌉]. Each product is taken in float32
(float64 where that is asked for) and rounded once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class QuantizedWeight(NamedTuple):
    """A frozen weight ``[N, K]``.

    Attributes:
        codes: as above.
        scales: as above.
        shape: N and K.
        kind: "int8" or "nf4".
        block: elements that share a scale; K for int8.
    """

    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]
    kind: str
    block: int


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 values of NF4, ascending, in float32: quantiles of the normal distribution, one of them
zero, scaled to 1. The bits that files of codes are meant for, which differ from quantiles computed
anew in the last ones. Source: Dettmers et al. 2023 (arXiv 2305.14314), §3 and appendix E."""


def nf4_table(device: torch.device) -> Tensor:
    """:data:`NF4` as ``[16]`` float32."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """W ``[N, K]`` in ``dtype``, contiguous, however the codes lie."""
    (n, k), work = weight.shape, torch.promote_types(dtype, torch.float32)
    if weight.kind == "int8":
        return (weight.codes.contiguous().to(work) * weight.scales.to(work).unsqueeze(1)).to(dtype)
    bytes_ = weight.codes.flatten()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).flatten()[: n * k]
    values = nf4_table(weight.codes.device).to(work)[codes.long()]
    scales = weight.scales.to(work).repeat_interleave(weight.block)[: n * k]
    return (values * scales).to(dtype).view(n, k)


def quantize_int8(weight: Tensor) -> QuantizedWeight:
    """The nearest codes of each row of ``weight [N, K]``, scaled by its largest element."""
    wide = weight.float()
    scales = wide.abs().amax(1) / 127.0 if wide.numel() else wide.new_zeros(wide.shape[0])
    steps = torch.where(scales == 0.0, 1.0, scales).unsqueeze(1)
    codes = (wide / steps).round().to(torch.int8)
    n, k = weight.shape
    return QuantizedWeight(codes, scales, (n, k), "int8", k)


def quantize_nf4(weight: Tensor, block: int = 64) -> QuantizedWeight:
    """The nearest codes of ``weight [N, K]``, each ``block`` elements scaled by their largest."""
    n, k = weight.shape
    flat = torch.nn.functional.pad(weight.float().flatten(), (0, -n * k % block)).view(-1, block)
    scales = flat.abs().amax(1)
    steps = torch.where(scales == 0.0, 1.0, scales).unsqueeze(1)
    table = nf4_table(weight.device)
    codes = torch.bucketize(flat / steps, (table[1:] + table[:-1]) / 2).flatten()[: n * k]
    pairs = torch.nn.functional.pad(codes, (0, n * k % 2)).view(-1, 2).to(torch.uint8)
    return QuantizedWeight((pairs[:, 0] << 4) | pairs[:, 1], scales, (n, k), "nf4", block)
