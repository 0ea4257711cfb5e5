"""The file of a decoder that was fitted to the prompts, or the adapters, of several tasks.

    decoder.json            what it is of, its sizes, a hash of its tensors, and how it was fitted
    decoder.safetensors     W₁, b₁, W₂, b₂ (:data:`deltaops.modules.FITTED`), and "start" [q]: the
                            mean of what those prompts are encoded as, where tuning begins

An adapter that was tuned with it holds q numbers and this hash, so the two cannot be mixed up.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from deltaops.errors import CheckpointError, ConfigError
from deltaops.files import publishing
from deltaops.modules import FITTED

from .targets import is_count

FACTS, TENSORS, START = "decoder.json", "decoder.safetensors", "start"
FORMAT, VERSION = "deltaops-decoder", 1


PROMPT, ADAPTER = "prompt", "adapter"
"""What a decoder makes."""


class Sizes(NamedTuple):
    """Of a decoder of prompts."""

    intrinsic_dim: int
    """q."""
    num_virtual_tokens: int
    """P."""
    width: int
    """d."""
    hidden: int
    """h."""

    @property
    def of(self) -> str:
        """What it makes."""
        return PROMPT

    @property
    def rows(self) -> int:
        """P·d, the numbers that it makes."""
        return self.num_virtual_tokens * self.width

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return _shapes(self.intrinsic_dim, self.hidden, self.rows)


class AdapterSizes(NamedTuple):
    """Of a decoder of adapters."""

    intrinsic_dim: int
    """q."""
    parameters: int
    """n, of all adapters of a model."""
    hidden: int
    """h."""

    @property
    def of(self) -> str:
        """What it makes."""
        return ADAPTER

    @property
    def rows(self) -> int:
        """n."""
        return self.parameters

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        return _shapes(self.intrinsic_dim, self.hidden, self.rows)


def _shapes(q: int, hidden: int, rows: int) -> dict[str, tuple[int, ...]]:
    found = ((hidden, q), (hidden,), (rows, hidden), (rows,))
    return dict(zip(FITTED, found, strict=True)) | {START: (q,)}


_SIZES: dict[str, type[Sizes | AdapterSizes]] = {PROMPT: Sizes, ADAPTER: AdapterSizes}


def write_decoder(
    folder: Path,
    sizes: Sizes | AdapterSizes,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write a decoder into ``folder``, whole or not at all.

    Args:
        folder: which is made where it is not there.
        sizes: of the decoder.
        tensors: as ``sizes.shapes()``.
        facts: how it was fitted, as JSON can hold it.
    Raises: CheckpointError.
    """
    held = {name: tensors[name].detach().cpu().contiguous() for name in sizes.shapes()}
    head = {
        "format": FORMAT, "version": VERSION, "of": sizes.of, **sizes._asdict(),
        "digest": digest(held),
    }  # fmt: skip
    text = json.dumps(head | dict(facts), indent=2, ensure_ascii=False, allow_nan=False)
    with publishing(folder, FACTS) as scratch:
        safetensors.torch.save_file(held, scratch / TENSORS, metadata={"format": "pt"})
        (scratch / FACTS).write_text(text + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``decoder.json`` says. Raises: CheckpointError where it is missing or no such file."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} holds no decoder that can be read: {error}. Fit one with "
            "`deltaops intrinsic fit`, or name the folder where it lies now."
        ) from error
    known = isinstance(facts, dict) and facts.get("format") == FORMAT
    if not known or facts.get("version") != VERSION:
        raise CheckpointError(
            f"{folder / FACTS} must have format={FORMAT!r} and version={VERSION}. Read it with the "
            "deltaops that wrote it, or fit it again with `deltaops intrinsic fit`."
        )
    if facts.get("of") not in tuple(_SIZES):
        raise CheckpointError(
            f"{folder / FACTS} must be of={PROMPT!r} or {ADAPTER!r}, got {facts.get('of')!r}. Fit "
            "it again with `deltaops intrinsic fit`."
        )
    for name in _SIZES[facts["of"]]._fields:
        value = facts.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{folder / FACTS}: {name} must be an integer ≥ 1, got {value!r}. Fit it again."
            )
    if not isinstance(facts.get("digest"), str) or not _are_tasks(facts.get("tasks")):
        raise CheckpointError(
            f"{folder / FACTS} must have a digest, and tasks with name, texts, data and the scores "
            "of a full prompt or adapter. Fit it again."
        )
    return facts


def _are_tasks(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(task, dict)
        and all(isinstance(task.get(name), str) for name in ("name", "texts", "data"))
        and is_scores(task.get("full"))
        for task in found
    )


def is_scores(found: Any) -> bool:
    """Whether ``found`` is a loss and an accuracy, both finite."""
    return isinstance(found, dict) and all(
        isinstance(found.get(name), int | float) and abs(found[name]) <= sys.float_info.max
        for name in ("loss", "accuracy")
    )


def sizes_of(facts: Mapping[str, Any]) -> Sizes | AdapterSizes:
    """The sizes in what :func:`read_facts` found."""
    kind = _SIZES[facts["of"]]
    return kind(*(facts[name] for name in kind._fields))


def open_decoder(delta: Any, of: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a delta's decoder and what its file says.

    Args:
        delta: with ``decoder``, a path, and ``decoder_digest``, None or what it has to be.
        of: what it has to make.
    Raises: ConfigError; CheckpointError where it cannot be read, or is another.
    """
    if not isinstance(delta.decoder, str | os.PathLike):
        raise ConfigError(
            f"{type(delta).__name__}: decoder must be the path of a folder, got {delta.decoder!r}."
        )
    folder = Path(delta.decoder).expanduser().resolve()
    facts = read_facts(folder)
    if facts["of"] != of:
        method = {PROMPT: "IntrinsicPrompt", ADAPTER: "IntrinsicAdapter"}[facts["of"]]
        raise CheckpointError(
            f"{folder} must hold a decoder of the kind {of!r}, and has one of {facts['of']!r}. Use "
            f"it with {method}, or fit another."
        )
    if delta.decoder_digest not in (None, facts["digest"]):
        raise CheckpointError(
            f"{folder} holds another decoder than the one that the numbers were tuned with. Put "
            "that one there, or tune them again."
        )
    return folder, facts


def check_numbers(delta: Any) -> None:
    """Raises: ConfigError where ``intrinsic_dim`` or ``seed`` is out of range."""
    title = type(delta).__name__
    if not is_count(delta.intrinsic_dim):
        raise ConfigError(
            f"{title}: intrinsic_dim must be an integer ≥ 1, got {delta.intrinsic_dim!r}."
        )
    whole = isinstance(delta.seed, int) and not isinstance(delta.seed, bool)
    if not whole or not 0 <= delta.seed < 2**63:
        raise ConfigError(
            f"{title}: seed must be an integer ≥ 0 and below 2⁶³, got {delta.seed!r}."
        )


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The decoder's tensors, checked against ``decoder.json``. Raises: CheckpointError."""
    facts = read_facts(folder)
    try:
        tensors = safetensors.torch.load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder / TENSORS} cannot be read: {error}. Fit it again with `deltaops intrinsic "
            "fit`."
        ) from error
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if shapes != sizes_of(facts).shapes() or digest(tensors) != facts.get("digest"):
        raise CheckpointError(
            f"{folder / TENSORS} holds other tensors than {FACTS} says. Both have to come from one "
            "`deltaops intrinsic fit`."
        )
    return tensors


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and every bit."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
