"""How many floating-point operations an op's products take, for torch's counter.

    with FlopCounterMode(custom_mapping=deltaops.ops.flop_formulas()) as counter:
        model(**batch).loss.backward()
    counter.get_total_flops()

Counted as torch counts its own ops: two for each multiply-add of a product, nothing for what goes
element by element, and an attention as if nothing were masked. Backward, what no gradient asks for
is not counted, since it is not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """Registered op → its count, for ``torch.utils.flop_counter.FlopCounterMode``.

    Ops without products, such as a norm, are not among them: they count as nothing.
    """
    ops = torch.ops.deltaops
    found: dict[Any, Callable[..., int]] = {
        ops.delta_linear: _delta_linear,
        ops.delta_linear_backward: _delta_linear_backward,
        ops.bottleneck: _bottleneck,
        ops.bottleneck_backward: _bottleneck_backward,
        ops.attention: _attention,
        ops.attention_backward: _attention_backward,
        ops.prefix_attention: _prefix_attention,
        ops.prefix_attention_backward: _prefix_attention_backward,
        ops.dora_norm: _dora_norm,
    }
    for formula in found.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # torch's word for: give it tensors
    return found


def _delta_linear(
    x: Tensor, weight: Tensor, _bias: Tensor | None, a: Sequence[Tensor], *given: Any, **_: Any
) -> int:
    n, k = weight.shape
    m = x.numel() // k
    return 2 * m * n * k + 2 * m * _ranks(a, adapter=given[7]) * (n + k)


def _delta_linear_backward(
    grad_y: Tensor, _x: Tensor | None, weight: Tensor, a: Sequence[Tensor], *given: Any, **_: Any
) -> int:
    needs: Sequence[bool] = given[6]
    adapter: Tensor | None = given[7]
    n, k = weight.shape
    m = grad_y.numel() // n
    of_x, count = needs[0], len(a)
    of_a, of_b, of_bias = (needs[2 + j * count : 2 + (j + 1) * count] for j in range(3))
    through = [a[i] for i in range(count) if of_x or of_a[i] or of_bias[i]]
    per_n = _ranks(through, adapter) + _ranks([t for t, want in zip(a, of_b, strict=True) if want],
                                              adapter)  # fmt: skip
    per_k = _ranks([t for t, want in zip(a, of_a, strict=True) if want], adapter)
    if of_x:
        per_k += _ranks(a, adapter)
    return 2 * m * (n * k * of_x + n * per_n + k * per_k)


def _ranks(a: Sequence[Tensor], adapter: Tensor | None) -> int:
    """Of all branches, or, where each row has one of them, of the largest."""
    found = [len(t) for t in a]
    return sum(found) if adapter is None else max(found, default=0)


def _bottleneck(
    x: Tensor, _residual: Any, _gamma: Any, _beta: Any, down: Tensor, *_given: Any, **_: Any
) -> int:
    return 4 * x.numel() * len(down)


def _bottleneck_backward(grad_y: Tensor, *given: Any, **_: Any) -> int:
    down: Tensor = given[5]
    needs: Sequence[bool] = given[-2]
    of_x, of_gamma, of_beta, of_down, of_down_bias, of_up, _of_up_bias = needs
    past_down = of_x or of_gamma or of_beta
    through_up = past_down or of_down or of_down_bias
    return 2 * grad_y.numel() * len(down) * (through_up + past_down + of_down + of_up)


def _attention(q: Tensor, k: Tensor, *_given: Any, **_: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def _attention_backward(_grad_y: Tensor, q: Tensor, k: Tensor, *given: Any, **_: Any) -> int:
    return 2 * q.numel() * k.shape[2] * _of_attention(*given[-2])


def _prefix_attention(
    q: Tensor, k: Tensor, _v: Tensor, prefix_k: Tensor, *_given: Any, **_: Any
) -> int:
    return 4 * q.numel() * (k.shape[2] + prefix_k.shape[-2])


def _prefix_attention_backward(
    _grad_y: Tensor, q: Tensor, k: Tensor, _v: Tensor, prefix_k: Tensor, *given: Any, **_: Any
) -> int:
    of_q, of_k, of_v, of_prefix_k, of_prefix_v = given[-2]
    of_keys = _of_attention(of_q, of_k, of_v)
    of_prefix = _of_attention(of_q, of_prefix_k, of_prefix_v)
    return 2 * q.numel() * (k.shape[2] * of_keys + prefix_k.shape[-2] * of_prefix)


def _of_attention(of_q: bool, of_k: bool, of_v: bool) -> int:
    """Products of a backward pass: the scores again, their gradient, and what is wanted."""
    if not (of_q or of_k or of_v):
        return 0
    return 1 + (of_q or of_k) + of_q + of_k + of_v


def _dora_norm(weight: Tensor, a: Tensor, _b: Tensor, *_given: Any, **_: Any) -> int:
    n, k = weight.shape
    r = len(a)
    return 2 * r * (n * k + r * k + n * r)  # W Aᵀ, A Aᵀ, and B with the latter
