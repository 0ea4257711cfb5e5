"""Sums of adapters against sums of their weights' changes, in our reader and in PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops import IA3, LoRA
from deltaops.errors import CheckpointError, ConfigError
from deltaops.surgery import sum_adapters
from deltaops.surgery.files import CONFIG, WEIGHTS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

FIRST = LoRA(r=3, alpha=5, use_rslora=True, target_modules=["query", "value"])
SECOND = LoRA(
    r=2, alpha=4, target_modules=["value", "word_embeddings"], rank_pattern={"0.*value": 4}
)


def write(folder: Path, delta: Any, seed: int = 1) -> dict[str, Tensor]:
    """An adapter with trained-looking values in ``folder``; returns what it adds to each weight."""
    model = build("bert")
    before = {k: p.detach().double() for k, p in model.named_parameters()}
    handle = deltaops.attach(model, delta)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    handle.save(folder)
    return changes(folder, before)


def changes(folder: Path, before: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """By weight, what the adapter in ``folder`` adds, merged in float64."""
    model = build("bert").double()
    before = before or {k: p.detach().clone() for k, p in model.named_parameters()}
    merged = deltaops.load(model, folder).merge_and_unload()
    found = {k: p.detach() - before[k] for k, p in merged.named_parameters()}
    return {k: change for k, change in found.items() if bool(change.any())}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[list[Path], list[dict[str, Tensor]]]:
    folders = [tmp_path / "a", tmp_path / "b"]
    return folders, [
        write(folder, delta, seed)
        for seed, (folder, delta) in enumerate(zip(folders, (FIRST, SECOND), strict=True))
    ]


def summed(parts: list[dict[str, Tensor]], weights: list[float]) -> dict[str, Tensor]:
    keys = [k for part in parts for k in part]
    zero = torch.zeros(())
    return {
        k: sum((w * part.get(k, zero) for w, part in zip(weights, parts, strict=True)), zero)
        for k in keys
    }


def test_concatenated_ranks_are_the_weighted_sum(
    pair: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    folders, parts = pair
    found = sum_adapters(folders, tmp_path / "sum", weights=[0.7, -0.3])
    assert found.error == 0.0
    assert {row.ranks for row in found.rows} == {(3,), (2,), (3, 4), (3, 2)}
    assert all(row.rank == sum(row.ranks) and row.error == 0.0 for row in found.rows)
    ours, expected = changes(tmp_path / "sum"), summed(parts, [0.7, -0.3])
    assert ours.keys() == expected.keys()
    for key in expected:
        assert relative_error(ours[key], expected[key]) < bound(0.0, torch.float32)


def test_peft_reads_the_sum_as_we_do(
    pair: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    sum_adapters(pair[0], tmp_path / "sum", rank=3)
    model = build("bert")
    deltaops.load(model, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(build("bert"), tmp_path / "sum").eval()
    error = relative_error(answer("bert", theirs), answer("bert", model))
    assert error < 16 * bound(0.0, torch.float32)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_lower_rank_is_the_best_one_and_says_its_error(
    rank: int, pair: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    folders, parts = pair
    found = sum_adapters(folders, tmp_path / "sum", weights=[1.5, 0.5], rank=rank)
    ours, expected = changes(tmp_path / "sum"), summed(parts, [1.5, 0.5])
    missed = total = 0.0
    for row in found.rows:
        exact = expected[f"{row.path}.weight"]
        sigma = torch.linalg.svdvals(exact)
        best = float(sigma[rank:].norm() / sigma.norm())
        assert row.rank == min(rank, sum(row.ranks))
        assert row.error == pytest.approx(best, rel=1e-5, abs=1e-6)
        change = ours.get(f"{row.path}.weight", torch.zeros(()))
        assert float((change - exact).norm() / exact.norm()) == pytest.approx(best, abs=1e-6)
        missed += float((change - exact).square().sum())
        total += float(exact.square().sum())
    assert found.error == pytest.approx((missed / total) ** 0.5, rel=1e-5)
    assert f"error of all {found.error:.3g}" in str(found)


def test_opposites_cancel_and_one_alone_stays(
    pair: tuple[list[Path], list[dict[str, Tensor]]], tmp_path: Path
) -> None:
    (first, _), parts = pair
    sum_adapters([first, first], tmp_path / "zero", weights=[1, -1], rank=2)
    for change in changes(tmp_path / "zero").values():
        assert float(change.abs().max()) < 1e-7
    assert sum_adapters([first], tmp_path / "same", rank=64).error == 0.0
    same = changes(tmp_path / "same")
    for key, change in parts[0].items():
        assert relative_error(same[key], change) < bound(0.0, torch.float32)


def spoil(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora=True, of which there is no sum"),
        ({"modules_to_save": ["pooler"]}, "modules_to_save"),
        ({"r": 7}, "has rank 3, and its adapter_config.json says 7"),
        ({"base_model_name_or_path": "other"}, "is of the base model 'other'"),
    ],
)
def test_what_has_no_sum_is_refused(
    fields: dict[str, Any],
    message: str,
    pair: tuple[list[Path], list[dict[str, Tensor]]],
    tmp_path: Path,
) -> None:
    (first, second), _ = pair
    spoil(second, base_model_name_or_path="one")
    spoil(first, **fields)
    with pytest.raises(CheckpointError, match=message):
        sum_adapters([second, first], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_foreign_and_truncated_files_and_wrong_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", FIRST)
    write(tmp_path / "ia3", IA3())
    with pytest.raises(CheckpointError, match="must be a LoRA, got 'IA3'"):
        sum_adapters([tmp_path / "a", tmp_path / "ia3"], tmp_path / "sum")
    with pytest.raises(ConfigError, match="weights must be 1 finite numbers"):
        sum_adapters([tmp_path / "a"], tmp_path / "sum", weights=[1, 2])
    with pytest.raises(ConfigError, match="rank must be an integer ≥ 1"):
        sum_adapters([tmp_path / "a"], tmp_path / "sum", rank=0)
    with pytest.raises(ConfigError, match="expected a list of folders"):
        sum_adapters(str(tmp_path / "a"), tmp_path / "sum")
    whole = (tmp_path / "a" / WEIGHTS).read_bytes()
    (tmp_path / "a" / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        sum_adapters([tmp_path / "a"], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("rank", [None, 1])
def test_a_sum_that_does_not_fit_is_refused(rank: int | None, tmp_path: Path) -> None:
    write(tmp_path / "a", FIRST)
    for weight in (1e60, 1e308):
        with pytest.raises(CheckpointError, match=r"must fit into torch.float32"):
            sum_adapters([tmp_path / "a"], tmp_path / "sum", weights=[weight], rank=rank)
    assert not (tmp_path / "sum").exists()
