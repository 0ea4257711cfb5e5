"""A pool of prefixes, of which each sample sees those whose keys are nearest to it.

    Y = softmax(scale · Q [Pk; K]ᵀ + m) [Pv; V]      Pk, Pv [Hkv, N·L, D] in each attention
    m = 0 where the prefix is one of the sample's top-k, −∞ at the other N − k

The whole pool is the prefix of an attention, shared by the batch, and the choice is a bias on its
scores: one op for all samples, and no prefix is copied for any. A stack of blocks chooses once in
each pass, before its first block, from the tokens that begin a sequence. A cache keeps what the
sequences in it have chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, ShapeError

from .backward import backward_runs, check_backward_runs
from .pool import Pool, query_of
from .prefix_cache import CHOICE, keep_choice
from .prompt import PromptedStack
from .replicas import refuse_replicas

PREFIX_POOL = "prefix_pool"
"""The pool's name on its stack."""


class PooledPrefixes(Pool):
    """The keys of N prefixes, each of L positions; the attentions have the prefixes themselves.

    A stack calls :meth:`begin` and :meth:`end` around its forward pass.
    """

    _replicate_for_data_parallel = refuse_replicas

    def __init__(self, keys: Tensor, length: int, **settings: Any) -> None:
        """Hold ``keys [N, e]``.

        Args:
            keys: of the prefixes.
            length: L.
            **settings: of :class:`.pool.Pool`.
        """
        super().__init__(keys, **settings)
        self.length = length
        self.active = True
        self.asleep = False
        """While the stack tells what a sample is known by, which no prefix has a part in."""
        self._of_pass: Tensor | None = None
        self._of_graph: Tensor | None = None
        """Of the pass whose backward pass runs, for blocks that this runs again."""

    def seen(self, samples: int) -> Tensor:
        """Which positions each sample of this pass sees, bool ``[B, 1, 1, N·L]``.

        Raises: AttachError where nothing was chosen; ShapeError for another number of samples.
        """
        found = self._of_pass
        if found is None and not torch.compiler.is_compiling() and backward_runs():
            found = self._of_graph
        if found is None:
            raise AttachError(
                "prefix pool: an attention must be called by the stack of blocks that it is in, "
                "which chooses prefixes for its tokens, and was called by itself. Call the model."
            )
        if len(found) != samples:
            raise ShapeError(
                f"prefix pool: prefixes were chosen for {len(found)} samples, and an attention "
                f"was called with {samples}. Call the model on whole sequences, or with the cache "
                "that it returned for them."
            )
        return found

    def begin(
        self, module: Any, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Choose for the pass of ``module``, whose forward takes ``names``, that begins."""
        if not self.active:
            return
        given = dict(zip(names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        if cache is not None and bool(cache.get_seq_length() > 0):
            self._of_pass = getattr(cache, CHOICE, None)
            if self._of_pass is None:
                raise AttachError(
                    "prefix pool: past_key_values must come from a pass of the model with its "
                    "pool, which keeps in it what was chosen, and holds tokens of another. Start "
                    "without a cache."
                )
            return
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(
                f"prefix pool: attention_mask must be [B, T], of tokens, got {found}. What is made "
                "for every pair of tokens, or for a cache of fixed size, does not say which are "
                'padding: pass that of the tokens; to generate cache_implementation="dynamic".'
            )
        self._of_pass = self._chosen(module, given, names)
        if cache is not None:
            setattr(cache, CHOICE, self._of_pass)  # also where the stack does not return it

    def _chosen(self, stack: Any, given: dict[str, Any], names: tuple[str, ...]) -> Tensor:
        embeds = given.get("inputs_embeds")
        if embeds is None:
            embeds = stack.get_input_embeddings()(given["input_ids"])
        forward = _without_prompt(stack)
        self.asleep = True
        try:
            query = query_of(self, stack, embeds, given, names, forward)
        finally:
            self.asleep = False
        items = self.choose(query)
        chosen = torch.zeros(len(items), len(self.keys), dtype=torch.bool, device=items.device)
        chosen = chosen.scatter(1, items, torch.ones_like(items, dtype=torch.bool))
        return chosen.repeat_interleave(self.length, 1)[:, None, None]

    def end(self, module: Any, args: Any, out: Any) -> None:
        """Forget it, also after an error, but for a cache, and for blocks that run again."""
        chosen, self._of_pass = self._of_pass, None
        if chosen is None:
            return
        if torch.compiler.is_compiling():  # which runs no block again
            cache = out.get("past_key_values") if isinstance(out, dict) else None
            if cache is not None:
                keep_choice(cache, chosen)
            return
        for found in _values(out):
            if hasattr(found, "get_seq_length"):
                keep_choice(found, chosen)
            elif isinstance(found, Tensor) and found.requires_grad:
                # several passes may come before their backward passes, which begin here
                self._of_graph = chosen
                found.register_hook(partial(self._again, chosen))  # type: ignore[no-untyped-call]  # torch's

    def _again(self, chosen: Tensor, grad: Tensor) -> None:
        self._of_graph = chosen

    def __getstate__(self) -> dict[str, Any]:
        """Also without what was chosen for a pass."""
        return super().__getstate__() | {"_of_pass": None, "_of_graph": None, "asleep": False}


def _without_prompt(stack: Any) -> Callable[[dict[str, Any]], Any]:
    """The stack's own forward, without hooks, and without a prompt that it may have."""
    if isinstance(stack, PromptedStack):
        return stack.base_forward
    return partial(_named, stack)


def _named(stack: Any, given: dict[str, Any]) -> Any:
    return type(stack).forward(stack, **given)


def _values(out: Any) -> Iterator[Any]:
    """What a stack returned, and what is in a tuple of it."""
    values = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else (out,)
    for value in values:
        if isinstance(value, tuple):
            yield from value
        else:
            yield value


def add_pool(stack: nn.Module, pool: PooledPrefixes) -> None:
    """Have ``stack`` choose by ``pool``, which becomes a part of it.

    Raises: AttachError in a torch that does not tell a block that is run again.
    """
    check_backward_runs()
    names = tuple(signature(type(stack).forward).parameters)[1:]  # a compiler cannot ask
    stack.add_module(PREFIX_POOL, pool)
    stack.register_forward_pre_hook(Begins(pool, names), with_kwargs=True)
    stack.register_forward_hook(Ends(pool), always_call=True)


def remove_pool(stack: nn.Module) -> None:
    """Undo :func:`add_pool`; nothing where that never came."""
    stack._modules.pop(PREFIX_POOL, None)
    for key, before in list(stack._forward_pre_hooks.items()):
        if isinstance(before, Begins):
            del stack._forward_pre_hooks[key]
            stack._forward_pre_hooks_with_kwargs.pop(key, None)
    for key, after in list(stack._forward_hooks.items()):
        if isinstance(after, Ends):
            del stack._forward_hooks[key]
            stack._forward_hooks_always_called.pop(key, None)


class Begins:
    """The hook before the forward pass of a stack."""

    def __init__(self, pool: PooledPrefixes, names: tuple[str, ...]) -> None:
        self.pool, self.names = pool, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See :meth:`PooledPrefixes.begin`."""
        self.pool.begin(module, self.names, args, kwargs)


class Ends:
    """The hook after it."""

    def __init__(self, pool: PooledPrefixes) -> None:
        self.pool = pool

    def __call__(self, module: nn.Module, args: Any, out: Any) -> None:
        """See :meth:`PooledPrefixes.end`."""
        self.pool.end(module, args, out)
