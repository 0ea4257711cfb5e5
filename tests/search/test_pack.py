"""Trials in one batch: the losses of each are those of the same trial alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deltaops import LoRA
from deltaops.errors import ConfigError
from deltaops.methods import Delta
from deltaops.search.candidate import Candidate
from deltaops.search.pack import NotByRows, Rows, check_packs, train_pack, unpackable
from deltaops.search.trainer import NotFinite, Result, train_alone
from deltaops.testing import relative_error
from deltaops.tuning.workshop import Settings, Task, Workshop

STEPS, RUNGS = 6, 3
CLOSE, EXACT = 1e-4, 1e-10
"""Training amplifies the rounding of float32, 1e-7, and of float64, 1e-16, step by step."""


@pytest.fixture(scope="module")
def shop(encoder: str) -> Workshop:
    return Workshop(encoder, Settings(seq_len=16))


@pytest.fixture(scope="module")
def task(shop: Workshop, data: str) -> Task:
    return shop.task("data", shop.examples("data", data))


def candidate(delta: Delta, rate: float = 0.01, batch: int = 4, shape: str = "linear") -> Candidate:
    return Candidate(delta, (("", rate),), batch, shape, 0.1)


MIXED = (
    candidate(LoRA(r=2, alpha=4)),
    candidate(LoRA(r=4, alpha=4, target_modules="key-value"), 0.003, 8),
    candidate(LoRA(r=1, alpha=8, lr_ratio=4.0), 0.02, 4, "cosine"),
)
WET = tuple(
    Candidate(LoRA(**vars(c.delta) | {"dropout": p}), c.rates, c.batch_size, c.schedule, c.warmup)
    for c, p in zip(MIXED, (0.1, 0.0, 0.5), strict=True)
)

Found = tuple[Any, list[float], dict[str, torch.Tensor]]


def packed(shop: Workshop, task: Task, candidates: Sequence[Candidate]) -> list[Found]:
    """Outcome, losses at each rung and tensors of each."""
    curves: list[list[float]] = [[] for _ in candidates]
    pairs = [
        (c, lambda rung, scores, own=curve: own.append(scores["loss"]) or True)
        for c, curve in zip(candidates, curves, strict=True)
    ]
    found, handle = train_pack(shop, task, pairs, STEPS, RUNGS)
    states = [
        {
            key.partition("/")[2]: tensor.clone()
            for key, tensor in handle.state().items()
            if key.startswith(f"c{i}/")
        }
        for i in range(len(candidates))
    ]  # fmt: skip
    handle.revert()
    return list(zip(found, curves, states, strict=True))


def alone(shop: Workshop, task: Task, one: Candidate) -> Found:
    curve: list[float] = []
    result, handle = train_alone(
        shop, task, one, STEPS, RUNGS, lambda rung, scores: curve.append(scores["loss"]) or True
    )
    state = {k: t.clone() for k, t in handle.state().items()}
    handle.revert()
    return result, curve, state


def assert_same(got: Found, wanted: Found) -> None:
    assert len(got[1]) == RUNGS
    torch.testing.assert_close(got[1], wanted[1], rtol=CLOSE, atol=0)
    assert got[2].keys() == wanted[2].keys()
    for name, tensor in got[2].items():
        assert relative_error(tensor, wanted[2][name]) < 10 * CLOSE, name
    assert got[0].scores["accuracy"] == wanted[0].scores["accuracy"]
    assert (got[0].parameters, got[0].layers) == (wanted[0].parameters, wanted[0].layers)


def test_a_pack_of_mixed_ranks_has_the_losses_of_each_alone(shop: Workshop, task: Task) -> None:
    for got, one in zip(packed(shop, task, MIXED), MIXED, strict=True):
        assert_same(got, alone(shop, task, one))


def test_in_float64_what_is_left_is_rounding(encoder: str, data: str) -> None:
    """Training amplifies 1e-16 as it does 1e-7; a fault would be as large as ever. Batches of one
    text are padded to the longest of all members."""
    shop = Workshop(encoder, Settings(seq_len=16))
    task = shop.task("data", shop.examples("data", data))
    task.reader.double()  # and the encoder in it
    ones = [candidate(LoRA(r=r, alpha=2 * r), 0.05, 1) for r in (4, 1, 2, 3)]
    for got, one in zip(packed(shop, task, ones), ones, strict=True):
        curve, state = alone(shop, task, one)[1:]
        torch.testing.assert_close(got[1], curve, rtol=EXACT, atol=0)
        for name, tensor in got[2].items():
            assert tensor.dtype == torch.float64
            assert relative_error(tensor, state[name]) < EXACT, name


def test_dropout_does_not_depend_on_the_pack(shop: Workshop, task: Task) -> None:
    together = packed(shop, task, WET)
    for got, one in zip(together, WET, strict=True):
        assert_same(got, packed(shop, task, [one])[0])
    dry = packed(shop, task, MIXED)
    assert together[0][1] != dry[0][1], "dropout must act"
    torch.testing.assert_close(together[1][1], dry[1][1], rtol=CLOSE, atol=0)


def test_a_pack_has_the_same_bits_twice(shop: Workshop, task: Task) -> None:
    first, second = packed(shop, task, WET), packed(shop, task, WET)
    assert [curve for _, curve, _ in first] == [curve for _, curve, _ in second]


def test_one_that_is_not_finite_leaves_the_others_alone(shop: Workshop, task: Task) -> None:
    wild = candidate(LoRA(r=2), 1e36)
    found = packed(shop, task, [MIXED[0], wild, MIXED[2]])
    assert isinstance(found[1][0], NotFinite)
    for i in (0, 2):
        assert_same(found[i], alone(shop, task, MIXED[i]))


def test_one_that_is_pruned_leaves_the_pack(shop: Workshop, task: Task) -> None:
    rungs: list[int] = []
    pairs = [
        (MIXED[0], lambda rung, scores: rungs.append(rung) or False),
        (MIXED[1], lambda rung, scores: True),
    ]
    (short, whole), handle = train_pack(shop, task, pairs, STEPS, RUNGS)
    handle.revert()
    assert isinstance(short, Result)
    assert short.pruned
    assert rungs == [1]
    assert isinstance(whole, Result)
    assert not whole.pruned


@pytest.mark.parametrize(
    ("delta", "reason"),
    [
        (LoRA(use_dora=True), "changes more"),
        (LoRA(target_modules=["word_embeddings"]), "other places"),
        (LoRA(target_modules=["query"], exclude_modules=["query"]), "refuses"),
    ],
)  # fmt: skip
def test_what_cannot_be_packed_says_why(shop: Workshop, delta: Delta, reason: str) -> None:
    assert reason in str(unpackable(shop, candidate(delta)))
    assert unpackable(shop, MIXED[0]) is None


def test_a_model_that_writes_has_no_packs(task: Task) -> None:
    check_packs(task)
    with pytest.raises(ConfigError, match="Pass --pack 1"):
        check_packs(dataclasses.replace(task, reader=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize("shape", [(1, 5, 8), (3, 4, 8), (15, 8), (3, 1, 5, 8)])
def test_a_layer_that_sees_no_rows_of_the_batch_is_refused(shape: tuple[int, ...]) -> None:
    rows = Rows()
    members: list[Any] = [SimpleNamespace(name="c0"), SimpleNamespace(name="c1")]
    rows.share(members, [1, 2], [5, 3])
    rows.check(torch.zeros(3, 5, 8))
    rows.check(torch.zeros(3, 8))
    with pytest.raises(NotByRows, match="3 texts"):
        rows.check(torch.zeros(shape))
