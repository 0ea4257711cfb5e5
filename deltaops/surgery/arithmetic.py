"""Sums of LoRA adapters, from files to a file.      Δ = Σᵢ wᵢ · sᵢ · Bᵢ Aᵢ

Concatenating ranks is the sum itself: A = [A₁; A₂; …], B = [w₁s₁B₁ w₂s₂B₂ …]. A lower rank is the
best there is, by the singular values of Δ, which is never made: with Q_b R_b = B and Q_a R_a = Aᵀ
they are those of R_b R_aᵀ, [R, R]. The error, ‖Δ − Δ_r‖ / ‖Δ‖ by Frobenius, follows from those that
are dropped. All of it in float64, rounded once.
Source: Eckart and Young 1936 (doi 10.1007/BF02288367).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaops.errors import CheckpointError, ConfigError
from deltaops.methods import LoRA
from deltaops.methods.base import PEFT_PREFIX
from deltaops.methods.targets import is_count, is_number

from .files import PEFT, read_config, read_weights, write_adapter

_SIDES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
)
"""Ends of the keys of A ``[r, K]`` and B ``[N, r]``: of linear layers, of embeddings."""


class Row(NamedTuple):
    """One layer of a sum."""

    path: str
    ranks: tuple[int, ...]
    """Of the adapters that are there."""
    rank: int
    """Of the result."""
    error: float
    """Of the result: ‖Δ − Δ_r‖ / ‖Δ‖, 0 where nothing was dropped."""


@dataclass(frozen=True)
class Sum:
    """What :func:`sum_adapters` wrote. Print it, or read ``rows``."""

    rows: tuple[Row, ...]
    error: float
    """Of all layers together."""

    def __str__(self) -> str:
        wide = max(len(row.path) for row in self.rows)
        lines = [f"{'layer':<{wide}}  ranks → rank  error"]
        lines += [
            f"{row.path:<{wide}}  {'+'.join(map(str, row.ranks))} → {row.rank}  {row.error:.3g}"
            for row in self.rows
        ]
        return "\n".join([*lines, f"{len(self.rows)} layers, error of all {self.error:.3g}"])


class _Adapter(NamedTuple):
    folder: str
    config: dict[str, Any]
    delta: LoRA
    factors: dict[str, tuple[Tensor, Tensor]]
    """Beginning of the keys of a layer, and how they end → A and B."""


def sum_adapters(
    folders: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> Sum:
    """Write the weighted sum of LoRA adapters as one LoRA adapter, in PEFT's format.

    Args:
        folders: of adapters in PEFT's format, as ``handle.save`` and PEFT write them, of one base
            model; one alone, to lower its rank. A layer that some lack has the others' sum.
        out: folder for the result; its scale is 1, the weights and scales are in B.
        weights: of the adapters, one each; 1 without them.
        rank: at most this rank in each layer, by singular values; None concatenates ranks, which
            drops nothing.
    Returns: what each layer's rank is and how far the result is off.
    Raises: ConfigError for weights or a rank that are none; CheckpointError for a file that is
        damaged, is no LoRA of linear layers and embeddings without DoRA and ``modules_to_save``, or
        of another base model or shape. Nothing is written then.
    """
    chosen = [1.0] * len(folders) if weights is None else list(weights)
    _check(folders, chosen, rank)
    adapters = [_read(Path(folder)) for folder in folders]
    _check_bases(adapters)
    keys = list(dict.fromkeys(key for adapter in adapters for key in adapter.factors))
    tensors: dict[str, Tensor] = {}
    rows: list[Row] = []
    dropped = total = 0.0
    for key in keys:
        a, b, ranks = _stacked(key, adapters, chosen)
        held = [_dtype(t) for adapter in adapters for t in adapter.factors.get(key, ())]
        dtype = reduce(torch.promote_types, held)
        begin, side = key.rsplit("|", 1)
        end_a, end_b = _SIDES[int(side)]
        path = begin.removeprefix(PEFT_PREFIX)
        _check_fit(path, dtype, b.to(dtype))
        a, b, lost, whole = lowered(a, b, min(rank or len(a), *a.shape, len(b)), rank is None)
        a, b = a.to(dtype), b.to(dtype)
        _check_fit(path, dtype, a, b)
        tensors[f"{begin}{end_a}"], tensors[f"{begin}{end_b}"] = a, b
        rows.append(Row(path, ranks, len(a), math.sqrt(lost / whole) if lost else 0.0))
        dropped, total = dropped + lost, total + whole
    write_adapter(Path(out), _config(adapters[0].config, rows), tensors, PEFT)
    return Sum(tuple(rows), math.sqrt(dropped / total) if dropped else 0.0)


def _check(folders: Sequence[Any], weights: list[Any], rank: int | None) -> None:
    if isinstance(folders, (str, os.PathLike)) or not folders:
        raise ConfigError(f"sum_adapters: expected a list of folders, got {folders!r}.")
    if len(weights) != len(folders) or not all(map(is_number, weights)):
        raise ConfigError(
            f"sum_adapters: weights must be {len(folders)} finite numbers, one for each adapter, "
            f"got {weights!r}."
        )
    if rank is not None and not is_count(rank):
        raise ConfigError(f"sum_adapters: rank must be an integer ≥ 1 or None, got {rank!r}.")


def _read(folder: Path) -> _Adapter:
    """Raises: CheckpointError for what a sum cannot have."""
    config = read_config(folder, PEFT)
    if config.get("peft_type") != LoRA.peft_type:
        raise CheckpointError(
            f"sum_adapters: {str(folder)!r} must be a LoRA, got {config.get('peft_type')!r}."
        )
    delta = LoRA.from_peft(config)
    beyond = {
        "use_dora": delta.use_dora,
        "init_lora_weights": isinstance(delta.init_lora_weights, str)
        and delta.init_lora_weights != "gaussian",
        "modules_to_save": bool(delta.modules_to_save),
        "target_parameters": bool(delta.target_parameters),
    }
    if any(beyond.values()):
        named = ", ".join(f"{k}={config.get(k)!r}" for k, found in beyond.items() if found)
        raise CheckpointError(
            f"sum_adapters: {str(folder)!r} has {named}, of which there is no sum: it takes plain "
            "LoRA on linear layers and embeddings."
        )
    return _Adapter(str(folder), config, delta, _factors(folder))


def _factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    tensors = read_weights(folder, PEFT)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for key in sorted(tensors):
        for side, (end_a, end_b) in enumerate(_SIDES):
            begin = key.removesuffix(end_a)
            if begin != key and f"{begin}{end_b}" in tensors:
                found[f"{begin}|{side}"] = tensors.pop(key), tensors.pop(f"{begin}{end_b}")
    if tensors or not found:
        odd = next(iter(sorted(tensors)), "no tensors at all")
        raise CheckpointError(
            f"sum_adapters: {PEFT.weights} in {str(folder)!r} must hold pairs of A and B, and has "
            f"{odd!r}."
        )
    for key, (a, b) in found.items():
        floats = a.is_floating_point() and b.is_floating_point()
        if not floats or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
            raise CheckpointError(
                f"sum_adapters: A and B at {key.rsplit('|', 1)[0]!r} in {str(folder)!r} must be "
                f"[r, K] and [N, r], got {list(a.shape)} and {list(b.shape)}."
            )
        if not all(bool(torch.isfinite(t.double()).all()) for t in (a, b)):
            raise CheckpointError(
                f"sum_adapters: {key.rsplit('|', 1)[0]!r} in {str(folder)!r} holds NaN or "
                "infinity; the training that wrote it had diverged."
            )
    return found


def _check_bases(adapters: list[_Adapter]) -> None:
    first = adapters[0]
    for adapter in adapters[1:]:
        bases = [one.config.get("base_model_name_or_path") for one in (first, adapter)]
        if all(bases) and bases[0] != bases[1]:
            raise CheckpointError(
                f"sum_adapters: {adapter.folder!r} is of the base model {bases[1]!r}, and "
                f"{first.folder!r} of {bases[0]!r}. Their sum would fit neither."
            )


def _dtype(tensor: Tensor) -> torch.dtype:
    """In which a sum with it is held: torch promotes no float8."""
    return torch.float32 if tensor.element_size() == 1 else tensor.dtype


def _check_fit(path: str, dtype: torch.dtype, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise CheckpointError(
            f"sum_adapters: the sum at {path!r} must fit into {dtype}, and does not. Pass smaller "
            "weights."
        )


def _first(key: str, adapters: list[_Adapter]) -> tuple[Tensor, Tensor]:
    return next(adapter.factors[key] for adapter in adapters if key in adapter.factors)


def _stacked(
    key: str, adapters: list[_Adapter], weights: list[float]
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """A ``[R, K]`` and B ``[N, R]`` of the sum, in float64, and the ranks of its parts."""
    path = key.rsplit("|", 1)[0].removeprefix(PEFT_PREFIX)
    like_a, like_b = _first(key, adapters)
    a: list[Tensor] = []
    b: list[Tensor] = []
    for adapter, weight in zip(adapters, weights, strict=True):
        if key not in adapter.factors:
            continue
        down, up = adapter.factors[key]
        if down.shape[1] != like_a.shape[1] or up.shape[0] != like_b.shape[0]:
            raise CheckpointError(
                f"sum_adapters: {path!r} is {down.shape[1]}→{up.shape[0]} in {adapter.folder!r}, "
                f"and {like_a.shape[1]}→{like_b.shape[0]} in another. Are they of one base model?"
            )
        if len(down) != adapter.delta.rank(path):
            raise CheckpointError(
                f"sum_adapters: {path!r} in {adapter.folder!r} has rank {len(down)}, and its "
                f"{PEFT.config} says {adapter.delta.rank(path)}, by which its scale is."
            )
        a.append(down.double())
        b.append(up.double() * (weight * adapter.delta.scaling_at(path)))
    return torch.cat(a), torch.cat(b, dim=1), tuple(len(part) for part in a)


def lowered(a: Tensor, b: Tensor, rank: int, exact: bool) -> tuple[Tensor, Tensor, float, float]:
    """A and B of at most ``rank``, ‖Δ − Δ_r‖² and ‖Δ‖²; ``exact`` leaves them as they are."""
    if exact or len(a) <= rank:
        return a, b, 0.0, float(((b.T @ b) * (a @ a.T)).sum())
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, sigma, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = sigma[:rank].sqrt()
    down = (q_a @ v[:rank].T * root).T
    up = q_b @ u[:, :rank] * root
    squares = sigma.square()
    return down.contiguous(), up, float(squares[rank:].sum()), float(squares.sum())


def _config(config: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """That of the first adapter with the result's ranks, and alphas that make every scale 1."""
    ranks = {row.path: row.rank for row in rows}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # the longest first: the first that matches counts, and a short path may end a longer one
    odd = {
        re.escape(p): ranks[p] for p in sorted(ranks, key=len, reverse=True) if ranks[p] != usual
    }
    same = {re.escape(p): usual for p in ranks if ranks[p] == usual} if odd else {}
    pattern = dict(sorted((odd | same).items(), key=lambda item: -len(item[0])))
    return config | {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted(ranks),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
