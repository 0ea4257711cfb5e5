"""Intrinsic prompt tuning: a prompt that is decoded from q trained numbers.        p = decoder(z)

The decoder is frozen. Fitted to the trained prompts of several tasks (``deltaops intrinsic fit``)
it spans what they have in common, and a new task is learnt by its few numbers. Without one it is a
fixed random projection around the embeddings of tokens drawn at random, both made from the seed
alone: that measures how few numbers a task needs at all (Aghajanyan et al. 2021, arXiv 2012.13255),
and those are hundreds. The prompt costs the model something before it is trained, the more of it
the longer it is, and whatever its vectors are: a handful of numbers does not make up for that. Nor
do they learn at a prompt's rate, of which a direction drawn at random sees a part: take 0.1 to 1.

The prompt is decoded once in each pass, and shared by the batch.
Source: Qin et al. 2021 (arXiv 2110.07867), §3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.modules import DecodedPrompt, FittedDecoder, RandomDecoder, token_table

from . import stack
from .base import Binding, Site, Stored
from .decoder import (
    PROMPT,
    START,
    Sizes,
    check_numbers,
    open_decoder,
    read_facts,
    read_tensors,
    sizes_of,
)
from .peft_config import PROMPT_TENSOR
from .prompt import Prompt
from .targets import STACKS, check_flags, normalise

KEY = "intrinsic"
LENGTH, DIMENSION = 20, 250
"""P and q where neither the settings nor a decoder say them; q is the larger one of Qin et al."""


@dataclass(frozen=True, repr=False)
class IntrinsicPrompt(stack.PromptDelta):
    """Settings of intrinsic prompt tuning.

    Args:
        intrinsic_dim: q, the numbers that are trained; the decoder's, or 250 without one, whose
            projection takes q·P·d numbers of memory.
        num_virtual_tokens: P, the length of the prompt; the decoder's, or 20 without one.
        decoder: folder of ``deltaops intrinsic fit``; None for a fixed random projection. An
            adapter's file holds this path, not the decoder; a flat one the prompt alone.
        decoder_digest: of the decoder's tensors, read from its folder; files keep it.
        seed: makes the random projection, and what it goes around; of no use beside a decoder.
        target_modules: as for :class:`deltaops.Prompt`.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: None; a prompt concerns all layers.
        layers_pattern: empty, as ``layers_to_transform``.
        autocast_adapter_dtype: train in float32 where the embeddings are float16 or bfloat16.
        task_type: as for :class:`deltaops.Prompt`.
    Raises: ConfigError; CheckpointError where the decoder cannot be read.
    """

    intrinsic_dim: int | None = None
    num_virtual_tokens: int | None = None
    decoder: str | os.PathLike[str] | None = None
    decoder_digest: str | None = None
    seed: int = 0
    target_modules: str | tuple[str, ...] = STACKS
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "intrinsic-prompt"

    def __post_init__(self) -> None:
        """Check every value, take sizes from the decoder; lists become tuples."""
        if self.decoder is None:
            if self.num_virtual_tokens is None:
                self._put(num_virtual_tokens=LENGTH)
            if self.intrinsic_dim is None:
                self._put(intrinsic_dim=DIMENSION)
        else:
            self._read_decoder()
        stack.check_length(self)
        check_numbers(self)
        check_flags(self, "autocast_adapter_dtype")
        stack.refuse_layers(self)
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default, and what decodes."""
        shown = self._shown("intrinsic_dim", "num_virtual_tokens")
        shown = shown.replace(f", decoder_digest={self.decoder_digest!r}", "")
        return shown if self.decoder is not None else f"{shown}, {RandomDecoder.told}"

    @property
    def length(self) -> int:
        """P."""
        assert self.num_virtual_tokens is not None  # never None once made
        return self.num_virtual_tokens

    @property
    def dimension(self) -> int:
        """q."""
        assert self.intrinsic_dim is not None  # never None once made
        return self.intrinsic_dim

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        reason = stack.misfit(module, self.length)
        if reason is not None or self.decoder is None:
            return reason
        width, table = self._sizes().width, token_table(module)
        if table is not None and table.embedding_dim != width:
            return f"its embeddings are {table.embedding_dim} wide, and the decoder makes {width}"
        return None

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`."""
        module = modules[site.path]
        device, dtype = stack.beside(module, self.autocast_adapter_dtype)
        decoder, start = self._random(site, module) if self.decoder is None else self._fitted()
        prompt = DecodedPrompt(start, decoder).to(device=device, dtype=dtype)
        stack.put(site, modules, binding, prompt, self.length, self.task_type)

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """See :meth:`Delta.tensors`."""
        prompt = stack.prompt_of(module, name)
        assert isinstance(prompt, DecodedPrompt)
        return {KEY: prompt.intrinsic}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        return {KEY: (self.dimension,)}

    def portable(
        self,
        modules: Mapping[str, nn.Module],
        name: str,
        state: Mapping[str, Tensor],
        sites: tuple[Site, ...],
        *,
        flat: bool,
    ) -> Stored:
        """See :meth:`Delta.portable`: flat, the prompt itself, as one of prompt tuning."""
        if not flat:
            return Stored(self, state, sites)
        (site,) = sites
        prompt = stack.prompt_of(modules[site.path], name)
        assert isinstance(prompt, DecodedPrompt)
        with torch.no_grad(), torch.autocast(prompt.intrinsic.device.type, enabled=False):
            rows = prompt().cpu()
        found = {key: t for key, t in state.items() if key != site.key(KEY)}
        delta = Prompt(
            num_virtual_tokens=self.length,
            prompt_tuning_init="random",
            target_modules=self.target_modules,
            exclude_modules=self.exclude_modules,
            modules_to_save=self.modules_to_save,
            autocast_adapter_dtype=self.autocast_adapter_dtype,
            task_type=self.task_type,
        )
        return Stored(delta, found | {site.key(PROMPT_TENSOR): rows}, sites)

    # -------------------------------------------------------------------------------- decoders

    def _random(self, site: Site, module: nn.Module) -> tuple[nn.Module, Tensor]:
        random = torch.Generator().manual_seed(self.seed)
        table, width = token_table(module), stack.width_of(site, module)
        ids = None if table is None else stack.drawn(table, self.length, random)
        base = stack.start_rows(table, ids, self.length, width, random)
        spread = stack.spread_of(table, self.length, random)
        shape = (self.dimension, self.length * width)
        projection = torch.randn(shape, generator=random, device=random.device)
        projection = projection / self.dimension**0.5
        decoder = RandomDecoder(base, projection.to(base.device) * spread)
        return decoder, base.new_zeros(self.dimension)

    def _fitted(self) -> tuple[nn.Module, Tensor]:
        folder, _ = open_decoder(self, PROMPT)  # another may lie there by now
        tensors = read_tensors(folder)
        return FittedDecoder(tensors, self._sizes().width), tensors[START].clone()

    def _sizes(self) -> Sizes:
        assert self.decoder is not None
        found = sizes_of(read_facts(Path(self.decoder)))
        assert isinstance(found, Sizes)  # it was when the settings were made
        return found

    def _read_decoder(self) -> None:
        folder, facts = open_decoder(self, PROMPT)
        sizes = sizes_of(facts)
        assert isinstance(sizes, Sizes)
        for name in ("num_virtual_tokens", "intrinsic_dim"):
            asked, has = getattr(self, name), getattr(sizes, name)
            if asked is not None and asked != has:
                raise ConfigError(
                    f"IntrinsicPrompt: {name} must be the decoder's {has}, got {asked!r}. Leave it "
                    "out, or fit another decoder."
                )
        self._put(
            decoder=str(folder), decoder_digest=facts["digest"],
            num_virtual_tokens=sizes.num_virtual_tokens, intrinsic_dim=sizes.intrinsic_dim,
        )  # fmt: skip

    def _put(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen; this is its start
