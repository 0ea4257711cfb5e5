"""prefix_attention beside what eager PEFT runs, forward and backward:  pytest -s benchmarks

That is a copy of the prefix for each sequence, another of keys and values with it before them, and
torch's scaled_dot_product_attention under a mask that has grown (made once, untimed, as a model
makes one for all layers). The ratio, which -s prints, is of turns: each round times both.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deltaops.measure.interleave import interleaved
from deltaops.ops import prefix_attention
from deltaops.testing import AttentionCase, PrefixAttentionCase

# an extra: whoever tests without timing need not have it
pytest.importorskip("pytest_benchmark", reason="pip install '.[bench]'")

ROUNDS = 7
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def copied(q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, mask: Tensor | None) -> Tensor:
    """Eager PEFT; the mask has the prefix in it."""
    keys, values = (
        torch.cat([shared.to(own.dtype).expand(q.shape[0], -1, -1, -1), own], 2)
        for shared, own in ((pk, k), (pv, v))
    )
    return scaled_dot_product_attention(q, keys, values, mask)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [128, 512])
@pytest.mark.parametrize("prefix", [16, 64])
def test_forward_and_backward(
    prefix: int, length: int, dtype: str, causal: bool, benchmark: Any
) -> None:
    case = PrefixAttentionCase(prefix, AttentionCase(8, 8, length, 64, causal=causal), wide=True)
    leaves = [t.requires_grad_() for t in case.tensors(DTYPES[dtype]).inputs]
    grad_y = case.grad_y(DTYPES[dtype])
    seen = None
    if causal:
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        seen = torch.cat([seen.new_ones(length, prefix), seen], 1)[None, None]

    def ours() -> list[Tensor]:
        y = prefix_attention(*leaves, causal=causal, backend="cpu")
        return [y, *torch.autograd.grad(y, leaves, grad_y)]

    def eager() -> list[Tensor]:
        y = copied(*leaves, seen)
        return [y, *torch.autograd.grad(y, leaves, grad_y)]

    for mine, theirs in zip(ours(), eager(), strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < (1e-5 if dtype == "float32" else 2e-2)
    timings = interleaved({"ours": ours, "eager": eager}, rounds=ROUNDS)
    ratio = timings["eager"].over(timings["ours"])
    assert ratio is not None  # both have played every round
    name = f"P={prefix} L={length} {dtype} {'causal' if causal else 'all'}"
    print(
        f"\n{name}: {1e3 * timings['ours'].median:.2f} ms, eager "
        f"{1e3 * timings['eager'].median:.2f} ms, ratio {ratio.median:.2f} "
        f"({ratio.low:.2f} to {ratio.high:.2f})"
    )
    benchmark.group = f"prefix_attention {name}"
    benchmark.extra_info["eager over ours"] = ratio.median
    benchmark.pedantic(ours, rounds=3, warmup_rounds=0)
