"""The dropout stream, held against plain Python integers written from the paper."""

from __future__ import annotations

import pytest
import torch

from deltaops.reference.philox import draws, drop_threshold, dropout_scale, keep_scale

MASK = 0xFFFFFFFF


def plain_draw(k: int, m: int, stream: int, seed: int) -> int:
    counter = [k >> 3, m & MASK, m >> 32, stream]
    key = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(7):
        p0, p1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & MASK,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & MASK,
        ]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return (counter[(k & 7) >> 1] >> (16 * (k & 1))) & 0xFFFF


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("stream", [0, 3])
def test_stream_equals_plain_integers(seed: int, stream: int) -> None:
    got = draws(5, 19, torch.tensor([seed]), stream)
    want = [[plain_draw(k, m, stream, seed & (2**64 - 1)) for k in range(19)] for m in range(5)]
    assert got.tolist() == want


def test_draws_are_uniform() -> None:
    got = draws(512, 512, torch.tensor([7]), 0).double() / 65536
    assert abs(got.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 512
    assert abs(got.var() - 1 / 12) < 1e-3


def test_streams_and_seeds_differ() -> None:
    first = draws(64, 64, torch.tensor([7]), 0)
    assert (first == draws(64, 64, torch.tensor([7]), 1)).float().mean() < 0.01
    assert (first == draws(64, 64, torch.tensor([8]), 0)).float().mean() < 0.01


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_scale_keeps_the_expectation(p: float) -> None:
    scale = dropout_scale(torch.ones(400, 400, dtype=torch.float64), p, torch.tensor([3]), 0)
    assert scale is not None
    assert abs(float((scale == 0).double().mean()) - p) < 0.01
    threshold = drop_threshold(p)
    assert keep_scale(threshold) * (1 - threshold / 65536) == pytest.approx(1.0)


def test_extremes() -> None:
    x, seed = torch.ones(8, 8), torch.tensor([0])
    assert dropout_scale(x, 0.0, None, 0) is None
    everything = dropout_scale(x, 1.0, seed, 0)
    assert everything is not None
    assert not everything.any()
    with pytest.raises(ValueError, match="needs a seed"):
        dropout_scale(x, 0.5, None, 0)
