"""What the methods share that put a prompt before the tokens of a stack."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.modules import (
    PROMPTS,
    PromptedStack,
    add_prompt,
    draws_on,
    read_prompt,
    remove_prompt,
    room_of,
    token_table,
)

from .base import STACK, Binding, Delta, Promise, Site, adapter_dtype
from .causal import is_causal
from .targets import is_count
from .tasks import SEQ_CLS, task_of

NO_MERGE = "a prompt is positions of its own, which no weight of the model holds"

SPREAD = 0.02
"""Standard deviation of a random start where there are no tokens to take it from: that of
transformers' own start values."""


class PromptDelta(Delta):
    """What every method is that puts a prompt before the tokens."""

    places: ClassVar[frozenset[str]] = frozenset({STACK})
    once: ClassVar[str | None] = "the prompt before its tokens"
    promises: ClassVar[frozenset[Promise]] = frozenset(
        {Promise.STATED_AT_START, Promise.REVERT_RESTORES_BITS}
    )

    def unfit_together(self, sites: tuple[Site, ...]) -> str | None:
        """See :meth:`Delta.unfit_together`."""
        if len(sites) < 2:
            return None
        return (
            f"{sites[1].path!r} would be the second stack with a prompt, after "
            f"{sites[0].path!r}, and a file holds one. Name one of them in target_modules."
        )

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        take_away(site, modules)

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        assert isinstance(module, PromptedStack)
        module.prompt_active = active

    def unmergeable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unmergeable`."""
        return NO_MERGE

    def merged(self, module: nn.Module, name: str) -> dict[str, Tensor]:
        """Never asked; see :meth:`unmergeable`."""
        raise NotImplementedError(NO_MERGE)


def check_length(delta: Any) -> None:
    """Raises: ConfigError where ``num_virtual_tokens`` is no count."""
    if not is_count(delta.num_virtual_tokens):
        raise ConfigError(
            f"{type(delta).__name__}: num_virtual_tokens must be an integer ≥ 1, got "
            f"{delta.num_virtual_tokens!r}."
        )


def refuse_layers(delta: Any, why: str = "a prompt stands before the first layer") -> None:
    """Raises: ConfigError where ``layers_to_transform`` is set."""
    if delta.layers_to_transform is not None:
        raise ConfigError(
            f"{type(delta).__name__}: layers_to_transform must be None, got "
            f"{delta.layers_to_transform!r}: {why}."
        )


def misfit(stack: Any, length: int) -> str | None:
    """Why ``stack`` cannot have a prompt of ``length`` vectors; None when it can."""
    if is_decoder_of_two(stack):
        return "it reads an encoder: the prompt stands before what that encoder reads"
    table = token_table(stack)
    if getattr(stack, "embed_scale", 1.0) != 1.0 and type(table) is nn.Embedding:
        return (
            "it multiplies the embeddings of tokens by embed_scale, and does not say whether it "
            "does so to embeddings that it is given"
        )
    room = room_of(stack)
    if room is not None and room <= length:
        return f"it has {room} positions, and a prompt of {length} vectors leaves none for tokens"
    return None


def is_decoder_of_two(stack: Any) -> bool:
    """Whether ``stack`` is the decoder of a model that has an encoder too."""
    config = getattr(stack, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        return False
    return bool(getattr(stack, "is_decoder", False)) or "Decoder" in type(stack).__name__


def width_of(site: Site, stack: nn.Module) -> int:
    """d: the width of the embeddings, which ALBERT's blocks do not have."""
    table = token_table(stack)
    return site.out_features if table is None else table.embedding_dim


def beside(stack: nn.Module, autocast: bool) -> tuple[torch.device, torch.dtype]:
    """Where a prompt of ``stack`` lies, and in which dtype it is trained."""
    table = token_table(stack)
    weight = next(stack.parameters()) if table is None else table.weight
    return weight.device, adapter_dtype(weight, autocast)


def put(
    site: Site,
    modules: Mapping[str, nn.Module],
    binding: Binding,
    prompt: nn.Module,
    length: int,
    task_type: str | None,
) -> None:
    """Put ``prompt`` before the tokens of ``site``, and let a decoder know of it.

    What a head reads at the first position of a bidirectional stack is the prompt's first, in and
    outside of the stack, as in PEFT.
    """
    stack = modules[site.path]
    decoders = list(_readers(site.path, modules))
    task = task_type or task_of(modules[""])
    whole = bool(decoders) or (task == SEQ_CLS and not is_causal(stack))
    add_prompt(stack, binding.name, prompt, cut=not whole, room=room_of(stack))
    for decoder in decoders:
        read_prompt(decoder, length)


def take_away(site: Site, modules: Mapping[str, nn.Module]) -> None:
    """Undo :func:`put`; also where that failed halfway, or never came."""
    remove_prompt(modules[site.path])
    for decoder in _readers(site.path, modules):
        remove_prompt(decoder)


def prompt_of(module: nn.Module, name: str) -> nn.Module:
    """What makes the prompt ``name`` of a stack."""
    prompts: Any = module._modules[PROMPTS]
    found: nn.Module = prompts[name]
    return found


def start_rows(
    table: nn.Embedding | None,
    ids: Tensor | None,
    length: int,
    width: int,
    random: torch.Generator | None,
) -> Tensor:
    """A start ``[P, d]`` in float32.

    Args:
        table: of the tokens; None where there are none.
        ids: of the tokens that it starts from, ``[P]``; None draws numbers as scattered as the
            embeddings of tokens.
        length: P.
        width: d.
        random: draws.
    """
    if table is not None and ids is not None:
        return _embedded(table, ids).clone()
    spread = spread_of(table, length, random)
    noise = torch.randn(length, width, generator=random, device=draws_on(random))
    return noise.to(_home(table)) * spread


def spread_of(
    table: nn.Embedding | None, length: int, random: torch.Generator | None
) -> float | Tensor:
    """How scattered the embeddings of tokens are, by ``length`` of them or more."""
    if table is None:
        return SPREAD
    return _embedded(table, drawn(table, max(length, 64), random)).std()


def drawn(table: nn.Embedding, count: int, random: torch.Generator | None) -> Tensor:
    """Ids of ``count`` tokens of the vocabulary, drawn at random, some perhaps again."""
    home = draws_on(random)
    return torch.randint(0, table.num_embeddings, (count,), generator=random, device=home)


def _embedded(table: nn.Embedding, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = table(ids.to(_home(table)))  # called: some scale what they look up
        return found.float()


def _home(table: nn.Embedding | None) -> torch.device:
    return torch.device("cpu") if table is None else table.weight.device


def _readers(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The decoders beside the encoder at ``path``."""
    above = path.rpartition(".")[0]
    return [
        module
        for other, module in modules.items()
        if other.rpartition(".")[0] == above
        and other != path
        and is_decoder_of_two(module)
        and "encoder_attention_mask" in signature(type(module).forward).parameters
    ]
