"""Read and write an adapter's two files without trusting them, and without losing the old ones.

Writing stages every file completely (on disk, flushed) before the first one takes its place, so a
full disk or a crash leaves the previous checkpoint as it was. Reading parses JSON and safetensors
only; a pickle is refused, because opening one runs whatever code it holds.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
from torch import Tensor

from deltaops.errors import CheckpointError
from deltaops.files import MARK, sync, umask

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
MANIFEST = "deltaops.json"
TENSORS = "deltaops.safetensors"


class Files(NamedTuple):
    """Names of the two files of an adapter."""

    config: str
    weights: str


PEFT = Files(CONFIG, WEIGHTS)
"""PEFT's format, for the methods that PEFT has."""
OURS = Files(MANIFEST, TENSORS)
"""Our own, for all others."""


def files_in(folder: Path) -> Files:
    """Which of the two formats ``folder`` holds; PEFT's where it holds neither.

    Raises: CheckpointError where it holds both.
    """
    found = [files for files in (PEFT, OURS) if (folder / files.config).exists()]
    if len(found) == 2:
        raise CheckpointError(
            f"load: {str(folder)!r} holds two adapters, in {CONFIG} and {MANIFEST}. Move one of "
            "them and its weights elsewhere."
        )
    return found[0] if found else PEFT


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], files: Files = PEFT
) -> None:
    """Write both files of an adapter into ``folder``; all or nothing.

    A folder that does not exist yet appears with both files at once. In one that does, both files
    are staged beside the old ones and then renamed over them, weights first; an adapter in the
    other format goes.
    Raises: CheckpointError with the operating system's reason; what was there is untouched.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _staging(folder) as stage:
            safetensors.torch.save_file(
                dict(tensors), stage / files.weights, metadata={"format": "pt"}
            )
            (stage / files.config).write_text(text, encoding="utf-8")
            for name in (files.weights, files.config):
                (stage / name).chmod(0o666 & ~umask())
                sync(stage / name)
            if folder.exists():
                for name in (files.weights, files.config):
                    os.replace(stage / name, folder / name)
                for name in OURS if files == PEFT else PEFT:
                    (folder / name).unlink(missing_ok=True)
                sync(folder)
            else:
                stage.chmod(0o777 & ~umask())
                os.rename(stage, folder)
            sync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"save: could not write the adapter to {str(folder)!r}: {error}. A checkpoint that was "
            "there before is unchanged. Free some space or choose another folder."
        ) from error


def read_config(folder: Path, files: Files = PEFT) -> dict[str, Any]:
    """The parsed ``adapter_config.json`` or ``deltaops.json``.

    Raises: CheckpointError when the folder or file is missing, or is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"load: {str(folder)!r} is not a folder. Pass the folder that holds {CONFIG} and "
            f"{WEIGHTS}; download an adapter from a hub first."
        )
    try:
        config = json.loads((folder / files.config).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"load: {str(folder)!r} has no {files.config}, so it is not an adapter that PEFT or "
            f"deltaops saved. It holds: {_content(folder)}."
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"load: {files.config} in {str(folder)!r} cannot be read: {error}. Save the adapter "
            "again."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(
            f"load: {files.config} must hold an object, got {type(config).__name__}."
        )
    return config


def read_weights(folder: Path, files: Files = PEFT) -> dict[str, Tensor]:
    """The tensors of the adapter's safetensors file, on the CPU.

    Raises: CheckpointError when it is missing, truncated or no safetensors file, or when there is
        only a pickle.
    """
    file = folder / files.weights
    if not file.is_file():
        if files == PEFT and (folder / PICKLE).exists():
            raise CheckpointError(
                f"load: {str(folder)!r} has only {PICKLE}, a pickle, and opening one runs the code "
                f"in it. `deltaops convert {folder} NEW_FOLDER` reads it without running it."
            )
        raise CheckpointError(
            f"load: {str(folder)!r} has no {files.weights}. It holds: {_content(folder)}."
        )
    return read_tensors(file)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises: CheckpointError."""
    try:
        # not mapped into memory: a file replaced meanwhile must not change what was checked
        return safetensors.torch.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        # KeyError: a dtype that this torch does not know; the last two: torch.frombuffer
        raise CheckpointError(
            f"load: {str(file)!r} is truncated or no safetensors file: {error}. Copy or save it "
            "again."
        ) from error


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder on the same disk; gone afterwards, unless it was renamed into its place."""
    home = folder if folder.exists() else folder.parent
    stage = Path(tempfile.mkdtemp(prefix=MARK, dir=home))
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _content(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "") if names else "nothing"
