"""Prompt tuning: trained vectors before the embeddings of the tokens.      [p₁ … p_P  e₁ … e_T]

Only p [P, d] is trained. A prompt on an encoder–decoder stands before what the encoder reads. Where
PEFT has the model's task it computes the same, and there are two things to know about both:

A model that summarizes a sequence at its first position (BERT's pooler, RoBERTa's head) finds the
first vector of the prompt there. Positions count on from the prompt.

Ours differs where lengths show. Logits are those of the T tokens, so a language model's loss lacks
the prediction of the first token, as it does without a prompt; PEFT's has it. Positions that are
passed or that ``generate`` makes from the mask are kept; PEFT's count padding on the left as well.
Where a layer looks back through a window (Gemma), such padding stands in it before the tokens.

Source: Lester, Al-Rfou and Constant 2021 (arXiv 2104.08691).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import CheckpointError, ConfigError
from deltaops.modules import SoftPrompt, token_table

from . import stack
from .base import Binding, Site
from .peft_config import PROMPT_TENSOR, UNWRAPPED_PREFIX, listed, refuse_unknown
from .targets import STACKS, check_flags, is_count, normalise

STARTS = ("sample_vocab", "random")


@dataclass(frozen=True, repr=False)
class Prompt(stack.PromptDelta):
    """Settings of prompt tuning. Names and files are PEFT's.

    Args:
        num_virtual_tokens: P, the length of the prompt.
        prompt_tuning_init: how it starts: "sample_vocab", the embeddings of tokens drawn at random;
            "random", numbers as scattered as those are; or the ids of tokens whose embeddings it
            takes, cut or repeated to P: ``tokenizer("Classify the tweet:")["input_ids"]``. None for
            the first, and for the second where no tokens are read (an image's encoder), which can
            start no other way.
        num_transformer_submodules: P vectors that a file has, times so many. 2 in what PEFT writes
            for encoder–decoders, whose second half nothing reads.
        target_modules: which stack of blocks: the role "stack", or the name of one of several.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head; PEFT
            reads no file of a classifier without.
        layers_to_transform: None; a prompt concerns all layers.
        layers_pattern: empty, as ``layers_to_transform``.
        autocast_adapter_dtype: train in float32 where the embeddings are float16 or bfloat16.
        task_type: PEFT's label, such as "CAUSAL_LM"; by the class of the model where it is None.
    Raises: ConfigError.
    """

    num_virtual_tokens: int = 20
    prompt_tuning_init: str | tuple[int, ...] | None = None
    num_transformer_submodules: int = 1
    target_modules: str | tuple[str, ...] = STACKS
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "prompt"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    peft_role: ClassVar[str | None] = STACKS

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        stack.check_length(self)
        check_flags(self, "autocast_adapter_dtype")
        if self.prompt_tuning_init is not None:
            start = _start(self.prompt_tuning_init)
            object.__setattr__(self, "prompt_tuning_init", start)  # the dataclass is frozen
        if not is_count(self.num_transformer_submodules):
            raise ConfigError(
                "Prompt: num_transformer_submodules must be an integer ≥ 1, got "
                f"{self.num_transformer_submodules!r}."
            )
        stack.refuse_layers(self)
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown("num_virtual_tokens")

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        reason = stack.misfit(module, self.num_virtual_tokens)
        if reason is not None or self.prompt_tuning_init in (None, "random"):
            return reason
        table = token_table(module)
        if table is None:
            return 'it reads no tokens that a prompt could start from; prompt_tuning_init="random"'
        ids = self.prompt_tuning_init
        if isinstance(ids, tuple) and max(ids) >= table.num_embeddings:
            return (
                f"it has {table.num_embeddings} tokens, none with prompt_tuning_init's {max(ids)}"
            )
        return None

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        ((length, width),) = self.shapes(site, module).values()
        table = token_table(module)
        ids: Tensor | None = None
        if isinstance(self.prompt_tuning_init, tuple):
            given = torch.tensor(self.prompt_tuning_init, device="cpu")
            ids = given.repeat(-(-length // len(given)))[:length]
        elif table is not None and self.prompt_tuning_init != "random":
            ids = stack.drawn(table, length, binding.generator)
        rows = stack.start_rows(table, ids, length, width, binding.generator)
        device, dtype = stack.beside(module, self.autocast_adapter_dtype)
        prompt = SoftPrompt(rows.to(device=device, dtype=dtype), self.num_virtual_tokens)
        stack.put(site, modules, binding, prompt, self.num_virtual_tokens, self.task_type)

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """PEFT's name."""
        prompt = stack.prompt_of(module, name)
        assert isinstance(prompt, SoftPrompt)
        return {PROMPT_TENSOR: prompt.weight}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        rows = self.num_virtual_tokens * self.num_transformer_submodules
        return {PROMPT_TENSOR: (rows, stack.width_of(site, module))}

    def peft_takes(self, module: nn.Module) -> bool:
        """See :meth:`Delta.peft_takes`: its file does not say which of several stacks it means."""
        return not stack.is_decoder_of_two(module)

    def to_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """The prompt without the path of its stack; see :meth:`Delta.to_peft_tensors`."""
        ours = {site.key(PROMPT_TENSOR) for site in sites}
        return {PROMPT_TENSOR if k in ours else UNWRAPPED_PREFIX + k: t for k, t in tensors.items()}

    def from_peft_tensors(
        self, tensors: Mapping[str, Tensor], sites: tuple[Site, ...]
    ) -> dict[str, Tensor]:
        """See :meth:`Delta.from_peft_tensors`."""
        (site,) = sites
        return {
            site.key(PROMPT_TENSOR) if k == PROMPT_TENSOR else k.removeprefix(UNWRAPPED_PREFIX): t
            for k, t in tensors.items()
        }

    def to_peft(self, sites: tuple[Site, ...] = ()) -> dict[str, Any]:
        """The fields of peft's PromptTuningConfig. Its values are saved, so it starts at random."""
        return {
            "peft_type": self.peft_type,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": self.num_transformer_submodules,
            "prompt_tuning_init": "RANDOM",
            "modules_to_save": list(self.modules_to_save) or None,
            "task_type": self.task_type,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Prompt:
        """See :meth:`Delta.from_peft`; how it started does not matter any more."""
        refuse_unknown(cls.__name__, config, _FIELDS)
        try:
            return cls(
                num_virtual_tokens=config.get("num_virtual_tokens"),  # type: ignore[arg-type]  # checked there
                prompt_tuning_init="random",
                num_transformer_submodules=config.get("num_transformer_submodules") or 1,
                modules_to_save=listed(config, "modules_to_save") or (),
                task_type=config.get("task_type"),
            )
        except ConfigError as error:
            raise CheckpointError(f"adapter_config.json: {error}") from error


_FIELDS = (
    "num_virtual_tokens", "num_transformer_submodules", "prompt_tuning_init",
    "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "token_dim", "num_layers", "num_attention_heads",
)  # fmt: skip
"""Of PEFT's file, beside those of every tuner; the last three are the model's."""


def _start(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str) and value.lower() in STARTS:
        return value.lower()
    ids = () if isinstance(value, str) else _counted(value)
    if not ids:
        raise ConfigError(
            f"Prompt: prompt_tuning_init must be one of {', '.join(STARTS)} or the ids of tokens, "
            f'got {value!r}. For a text pass tokenizer(text)["input_ids"].'
        )
    return ids


def _counted(value: Any) -> tuple[int, ...]:
    """Token ids, of a list, a tensor or an array, also as a batch of one; else nothing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], list | tuple):
        value = value[0]
    if not isinstance(value, list | tuple):
        return ()
    plain = all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    return tuple(value) if plain else ()
