"""Load a transformers model and its tokenizer for tuning; what goes wrong is told in one message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local folder or hub id. Raises: ConfigError."""
    from transformers import AutoTokenizer

    with _telling(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(_local(name))


def load_causal_lm(name: str, dtype: torch.dtype) -> Any:
    """A language model. Raises: ConfigError."""
    from transformers import AutoModelForCausalLM

    with _telling(name, "causal language model"):
        return AutoModelForCausalLM.from_pretrained(_local(name), dtype=dtype)


def load_classifier(name: str, labels: Sequence[str], pad: int, dtype: torch.dtype) -> Any:
    """A model with a head for ``labels``, new where the checkpoint has none of this size.

    Raises: ConfigError.
    """
    from transformers import AutoModelForSequenceClassification

    with _telling(name, "classifier"):
        model = AutoModelForSequenceClassification.from_pretrained(
            _local(name),
            dtype=dtype,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            ignore_mismatched_sizes=True,
        )
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = pad  # decoders look for the last token that is not padding
    return model


def head_names(model: torch.nn.Module) -> tuple[str, ...]:
    """What stands beside the base model and has parameters: the head, trained whole."""
    base = getattr(model, "base_model_prefix", "")
    return tuple(
        name
        for name, child in model.named_children()
        if name != base and next(child.parameters(), None) is not None
    )


def longest_input(model: torch.nn.Module) -> int | None:
    """How many positions the model has, None where it sets no limit."""
    config: Any = model.config
    value = getattr(config, "max_position_embeddings", None)
    if not isinstance(value, int) or value <= 0:
        return None
    # RoBERTa's family starts to count behind the padding's index
    offset = getattr(config, "pad_token_id", None) or 0
    return value - offset - 1 if "roberta" in str(getattr(config, "model_type", "")) else value


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises: ConfigError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a CPU-only torch asserts
        raise ConfigError(
            f"--device {name!r} cannot be used: {str(error).splitlines()[0]}. "
            "Use auto, cpu or cuda."
        ) from error
    return device


def _local(name: str) -> str:
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            what = (
                "it is an adapter, so name the model it was made for"
                if (path / "adapter_config.json").is_file()
                else "a model's folder has one"
            )
            raise ConfigError(f"--model {name}: there is no config.json in it; {what}.")
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")):
        raise ConfigError(f"--model {name}: expected a folder with a model, or a hub id.")
    return name


@contextlib.contextmanager
def _telling(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a wrong name or a missing network into a ConfigError."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        if isinstance(error, ConfigError):
            raise
        first = str(error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(
            f"--model {name}: no {what} could be loaded from it: {first}\n"
            "Name a local folder (save_pretrained makes one), or a hub id with the network at hand."
        ) from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
