"""The state of a controller in one safetensors file, its JSON in the metadata; never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltaops.errors import CheckpointError
from deltaops.files import write_atomically

FILE = "controller.safetensors"
"""Its name beside a Trainer's checkpoint, and in the --out of ``deltaops tune``."""
_KEY = "deltaops_controller"
_LAST = "trainer_state.json"
"""What a Trainer writes last into a checkpoint."""


def ahead_of(checkpoint: Path) -> Path:
    """Where the state waits while ``checkpoint`` is written, beside its folder.

    A Trainer writes its files, deletes older checkpoints and only then tells its callbacks: a
    process that is killed in between has the state there.
    """
    return checkpoint.with_name(f"{checkpoint.name}-{FILE}")


def state_of(checkpoint: Path) -> Path:
    """The file with the state that belongs to ``checkpoint``; where it would be, without one.

    A run that was resumed from an older checkpoint writes later ones again. Killed meanwhile, it
    leaves two states: the one that waits is of the checkpoint if that was whole after it.
    """
    inside, ahead, last = checkpoint / FILE, ahead_of(checkpoint), checkpoint / _LAST
    if not ahead.is_file():
        return inside
    if not inside.is_file():
        return ahead
    whole = last.is_file() and last.stat().st_mtime_ns >= ahead.stat().st_mtime_ns
    return ahead if whole else inside


def tidy(folder: Path, but: Path | None = None) -> None:
    """Delete states that wait in ``folder`` for checkpoints that never came or are deleted.

    Args:
        folder: that a Trainer writes checkpoints into.
        but: a checkpoint that is still to come.
    """
    for ahead in folder.glob(f"checkpoint-*-{FILE}"):
        checkpoint = ahead.with_name(ahead.name.removesuffix(f"-{FILE}"))
        if checkpoint != but and not checkpoint.is_dir():
            ahead.unlink(missing_ok=True)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state`` atomically. Raises: CheckpointError."""
    head = {_KEY: json.dumps(state["facts"], ensure_ascii=False, allow_nan=False)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state["tensors"].items()}
    write_atomically(path, lambda part: save_file(tensors, part, metadata=head))


def read_state(path: Path) -> dict[str, Any]:
    """Undo :func:`write_state`. Raises: CheckpointError for a missing, damaged or foreign file."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as the state of a controller: {type(error).__name__}: {error}. "
            "Resume from a checkpoint that was written with a Controller, and whole."
        ) from error
    return {"facts": facts, "tensors": tensors}
