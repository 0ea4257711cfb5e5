"""A pool of prefixes: each sample sees the few whose keys are nearest to it, in every attention.

Prefixes, keys and values ``[Hkv, N·L, D]`` in each attention, and the keys ``[N, e]`` to choose by
are trained. All attentions of a stack go by one choice, which is made as
:class:`deltaops.PromptPool` makes it, learns by the same term and is told by the same
``deltaops.choices(model)``; no position is added. Prefixes start as :class:`deltaops.Prefix` does.
Of an encoder–decoder the encoder has them, whose tokens choose.
Source: Wang et al. 2022 (arXiv 2112.08654), with prefixes as by Wang et al. 2022 (arXiv 2204.04799)
in the place of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import ClassVar

from torch import nn

from deltaops.modules import (
    EMBEDDINGS,
    PREFIX_KEYS,
    PREFIX_POOL,
    PREFIX_VALUES,
    PooledPrefixes,
    activate_prefix,
    add_no_more,
    add_pool,
    add_prefix,
    add_to_loss,
    check_attention,
    has_prefix,
    know_tables,
    remove_pool,
    remove_prefix,
    token_table,
)

from . import stack
from .attentions import SPREAD_OF_VALUES, PrefixDelta, drawn, spread_of_keys
from .base import ATTENTION, STACK, Binding, Site
from .pool import check_pool, known_by, settings_of, start_keys
from .targets import ATTENTIONS, STACKS, check_flags, normalise

KEYS = f"{PREFIX_POOL}.keys"


@dataclass(frozen=True, repr=False)
class PrefixPool(PrefixDelta):
    """Settings of a pool of prefixes.

    Args:
        size: N, prefixes in the pool.
        length: L, positions of each.
        top_k: k, prefixes that a sample sees.
        query: as for :class:`deltaops.PromptPool`; so ``query_tokens``, ``key_loss``, ``balance``.
        query_tokens: see ``query``.
        key_loss: see ``query``.
        balance: see ``query``.
        target_modules: the stack that chooses and the attentions in it that have the prefixes:
            the roles "stack" and "attention", or names for either.
        exclude_modules: names or a regular expression, taken out of the targets.
        modules_to_save: modules that are trained whole and saved along, such as a new head.
        layers_to_transform: None; the choice concerns all layers.
        layers_pattern: empty, as ``layers_to_transform``.
        autocast_adapter_dtype: train in float32 where the model is float16 or bfloat16.
        task_type: a label of PEFT's, kept.
    Raises: ConfigError.
    """

    size: int = 10
    length: int = 5
    top_k: int = 5
    query: str = EMBEDDINGS
    query_tokens: int | None = None
    key_loss: float = 0.5
    balance: float = 0.1
    target_modules: str | tuple[str, ...] = (STACKS, ATTENTIONS)
    exclude_modules: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    autocast_adapter_dtype: bool = True
    task_type: str | None = None

    kind: ClassVar[str] = "prefix-pool"
    places: ClassVar[frozenset[str]] = frozenset({STACK, ATTENTION})

    def __post_init__(self) -> None:
        """Check every value; lists become tuples."""
        check_pool(self)
        check_flags(self, "autocast_adapter_dtype")
        stack.refuse_layers(self, "its stack chooses before the first layer, for all of them")
        normalise(self)

    def __repr__(self) -> str:
        """Whatever differs from its default."""
        return self._shown("size", "length", "top_k")

    def unbindable(self, module: nn.Module) -> str | None:
        """See :meth:`Delta.unbindable`."""
        if stack.is_decoder_of_two(module):
            return "it is a decoder's behind an encoder, whose tokens choose"
        if "inputs_embeds" in signature(type(module).forward).parameters:
            return None
        return super().unbindable(module)

    def unfit_together(self, sites: tuple[Site, ...]) -> str | None:
        """See :meth:`Delta.unfit_together`."""
        stacks = [site.path for site in sites if site.place == STACK]
        if not stacks:
            return "no stack is among the targets that could choose. Add 'stack' to target_modules."
        if len(stacks) > 1:
            return (
                f"{stacks[1]!r} would be the second stack with a pool, after {stacks[0]!r}. Name "
                "one of them, and attentions in it, in target_modules."
            )
        start = f"{stacks[0]}." if stacks[0] else ""
        inside = [site.path.startswith(start) for site in sites if site.place == ATTENTION]
        if not inside:
            return "no attention is among the targets. Add 'attention' to target_modules."
        if not all(inside):
            (path, *_) = (s.path for s in sites if not f"{s.path}.".startswith(start))
            return (
                f"{path!r} is not in {stacks[0]!r}, whose tokens choose. Name attentions in there."
            )
        return None

    def bind(self, site: Site, modules: Mapping[str, nn.Module], binding: Binding) -> None:
        """See :meth:`Delta.bind`. The stack comes before its attentions."""
        module, shapes = modules[site.path], self.shapes(site, modules[site.path])
        if site.place == STACK:
            device, dtype = stack.beside(module, self.autocast_adapter_dtype)
            keys = start_keys(self, shapes[KEYS], token_table(module), binding.generator)
            pool = PooledPrefixes(
                keys.to(device=device, dtype=dtype), self.length, **settings_of(self, module)
            ).train(module.training)
            add_pool(module, pool)
            add_to_loss(modules[""], pool)
            return
        check_attention(site.path, module)
        width = site.out_features // site.heads
        k, v = (
            drawn(shapes[PREFIX_KEYS], spread, module, binding, self.autocast_adapter_dtype)
            for spread in (spread_of_keys(module, width), SPREAD_OF_VALUES)
        )
        add_prefix(
            module, k, v, pool=_pool_above(modules, site.path), backend=binding.backend,
            strict=binding.strict,
        )  # fmt: skip
        know_tables(modules, site.path)

    def unbind(self, site: Site, modules: Mapping[str, nn.Module]) -> None:
        """See :meth:`Delta.unbind`."""
        module = modules[site.path]
        if site.place != STACK:
            remove_prefix(module)
            return
        pool = module._modules.get(PREFIX_POOL)
        if isinstance(pool, PooledPrefixes):
            add_no_more(modules[""], pool)
            remove_pool(module)

    def activate(self, module: nn.Module, active: bool, name: str) -> None:
        """See :meth:`Delta.activate`."""
        if has_prefix(module):
            activate_prefix(module, active)
        else:
            pool = module._modules[PREFIX_POOL]
            assert isinstance(pool, PooledPrefixes)
            pool.active = active

    def tensors(self, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
        """See :meth:`Delta.tensors`."""
        if has_prefix(module):
            return {key: module.get_parameter(key) for key in (PREFIX_KEYS, PREFIX_VALUES)}
        return {KEYS: module.get_parameter(KEYS)}

    def shapes(self, site: Site, module: nn.Module) -> dict[str, tuple[int, ...]]:
        """See :meth:`Delta.shapes`."""
        if site.place == STACK:
            return {KEYS: (self.size, known_by(self, site, module))}
        shape = site.heads, self.size * self.length, site.out_features // site.heads
        return dict.fromkeys((PREFIX_KEYS, PREFIX_VALUES), shape)


def _pool_above(modules: Mapping[str, nn.Module], path: str) -> PooledPrefixes:
    """That of the stack around the attention at ``path``, which was bound before."""
    above = path
    while True:
        above = above.rpartition(".")[0]
        pool = modules[above]._modules.get(PREFIX_POOL)
        if isinstance(pool, PooledPrefixes):
            return pool
