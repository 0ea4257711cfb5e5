"""How a frozen model answers, with nothing beside a delta to train.

written    a language model, or an encoder–decoder, writes the answer         (:mod:`.answers`)
named      an encoder puts a text nearest to the name of one of the labels   (:mod:`.sentence`)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from deltaops.errors import ConfigError

from .answers import AnswerSet, answer_texts, score
from .encoder import encoder_folder, load_encoder, load_weights
from .loop import evaluate
from .named import NamedSet, name_texts
from .read import Example
from .sentence import NamedClasses, name_vectors
from .tokens import TokenSet, load_tokenizer

WRITTEN, NAMED = "written", "named"


class Answering(ABC):
    """A frozen model, its tokenizer, and how it answers."""

    answers: ClassVar[str]

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @abstractmethod
    def texts(self, examples: Sequence[Example], seq_len: int) -> TokenSet:
        """The examples of a task, cut at ``seq_len`` tokens. Raises: DataError."""

    @abstractmethod
    def reader(self, data: TokenSet) -> nn.Module:
        """What has a loss for the batches of ``data``; made while the model has no delta.

        Raises: DataError, ConfigError for labels that it cannot answer by.
        """

    @abstractmethod
    def score(self, reader: nn.Module, data: Any, batch_size: int) -> dict[str, float]:
        """Mean loss in nats, and accuracy."""


class Written(Answering):
    """By a language model or an encoder–decoder; its loss is per token of the answers."""

    answers: ClassVar[str] = WRITTEN

    def texts(self, examples: Sequence[Example], seq_len: int) -> AnswerSet:
        """See :meth:`Answering.texts`."""
        apart = bool(self.model.config.is_encoder_decoder)
        return answer_texts(examples, self.tokenizer, seq_len, apart=apart)

    def reader(self, data: TokenSet) -> nn.Module:
        """The model."""
        found: nn.Module = self.model
        return found

    def score(self, reader: nn.Module, data: Any, batch_size: int) -> dict[str, float]:
        """See :func:`~.answers.score`."""
        return score(reader, data, batch_size)


class Named(Answering):
    """By an encoder; its loss is per text."""

    answers: ClassVar[str] = NAMED

    def texts(self, examples: Sequence[Example], seq_len: int) -> NamedSet:
        """See :meth:`Answering.texts`."""
        return name_texts(examples, self.tokenizer, seq_len)

    def reader(self, data: TokenSet) -> nn.Module:
        """The encoder, beside the vectors of the labels' names."""
        assert isinstance(data, NamedSet)
        return NamedClasses(self.model, name_vectors(self.model, self.tokenizer, data.names))

    def score(self, reader: nn.Module, data: Any, batch_size: int) -> dict[str, float]:
        """See :func:`~.loop.evaluate`."""
        found = evaluate(reader, data, batch_size)
        assert found is not None  # nobody stops it
        return found


def load_answering(model: str, answers: str | None) -> Answering:
    """The model in a folder or of a hub id.

    Args:
        model: its folder or id.
        answers: "written" or "named"; None goes by the model's kind.
    Raises: ConfigError.
    """
    if answers not in (None, WRITTEN, NAMED):
        raise ConfigError(f"--answers must be {WRITTEN} or {NAMED}, got {answers!r}.")
    folder = encoder_folder(model)
    config = _config(folder, model)
    if (answers or _kind(config, model)) == NAMED:
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(
                f"--answers {NAMED} needs an encoder, and --model {model} is an encoder–decoder, "
                f"which writes its answers. Pass --answers {WRITTEN}."
            )
        encoder, _ = load_encoder(folder, model)
        return Named(encoder, load_tokenizer(folder, encoder.config))
    writer = _load_writer(folder, config, model)
    return Written(writer, load_tokenizer(folder, writer.config))


def _config(folder: str, model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--model {model} cannot be loaded: {error}. Give a folder with a language model, an "
            "encoder–decoder or an encoder, and its tokenizer, or a hub id."
        ) from error


def _kind(config: Any, model: str) -> str:
    """By transformers' own lists: what fills in masked words is an encoder.

    Raises: ConfigError for a model in neither list.
    """
    from transformers.models.auto import modeling_auto

    if getattr(config, "is_encoder_decoder", False):
        return WRITTEN
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return WRITTEN if getattr(config, "is_decoder", False) else NAMED
    if config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return WRITTEN
    raise ConfigError(
        f"--model {model} is a {config.model_type!r}, which transformers lists neither as a "
        f"language model nor as one of masked words. Say how it answers: --answers {WRITTEN}, or "
        f"{NAMED} for an encoder."
    )


def _load_writer(folder: str, config: Any, model: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    remedy = (
        "Give a folder with a language model or an encoder–decoder, its head included, and its "
        "tokenizer, or a hub id."
    )
    return load_weights(kind, folder, model, remedy)
