"""The file of a decoder that was fitted to the prompts of several tasks.

    decoder.json            its sizes, a hash of its tensors, and how it was fitted
    decoder.safetensors     W₁, b₁, W₂, b₂ (:data:`deltaops.modules.FITTED`), and "start" [q]: the
                            mean of what those prompts are encoded as, where tuning begins

An adapter that was tuned with it holds q numbers and this hash, so the two cannot be mixed up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from deltaops.errors import CheckpointError
from deltaops.files import publishing
from deltaops.modules import FITTED

FACTS, TENSORS, START = "decoder.json", "decoder.safetensors", "start"
FORMAT, VERSION = "deltaops-decoder", 1


class Sizes(NamedTuple):
    """Of a decoder."""

    intrinsic_dim: int
    """q."""
    num_virtual_tokens: int
    """P."""
    width: int
    """d."""
    hidden: int
    """h."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its tensors."""
        q, length, width, hidden = self
        rows = length * width
        found = ((hidden, q), (hidden,), (rows, hidden), (rows,))
        return dict(zip(FITTED, found, strict=True)) | {START: (q,)}


def write_decoder(
    folder: Path, sizes: Sizes, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
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
    head = {"format": FORMAT, "version": VERSION, **sizes._asdict(), "digest": digest(held)}
    text = json.dumps(head | dict(facts), indent=2, ensure_ascii=False, allow_nan=False)
    with publishing(folder, FACTS) as scratch:
        safetensors.torch.save_file(held, scratch / TENSORS, metadata={"format": "pt"})
        (scratch / FACTS).write_text(text + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """What ``decoder.json`` says. Raises: CheckpointError where it is missing or no such file."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
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
    for name in Sizes._fields:
        value = facts.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"{folder / FACTS}: {name} must be an integer ≥ 1, got {value!r}. Fit it again."
            )
    if not isinstance(facts.get("digest"), str) or not _are_tasks(facts.get("tasks")):
        raise CheckpointError(
            f"{folder / FACTS} must have a digest, and tasks with name, texts, data and the scores "
            "of a full prompt. Fit it again."
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
    """Whether ``found`` is a loss and an accuracy."""
    return isinstance(found, dict) and all(
        isinstance(found.get(name), int | float) for name in ("loss", "accuracy")
    )


def sizes_of(facts: Mapping[str, Any]) -> Sizes:
    """The sizes in what :func:`read_facts` found."""
    return Sizes(*(facts[name] for name in Sizes._fields))


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
