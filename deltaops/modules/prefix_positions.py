"""Positions of a model whose prefix has the first P: each token's is P further.

PEFT puts a prefix into the cache of keys, and models count their tokens from what is cached. Here a
hook before whatever turns positions into numbers adds P:

    nn.Embedding of positions       to its indices (BERT, GPT-2); padding, which has an index of its
                                    own in RoBERTa, keeps that
    rotary embedding                to ``position_ids`` (Llama)
    embedding that counts itself    to ``past_key_values_length`` (BART's decoder)
    T5's relative bias              the bias gets P columns more, of the keys before all tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import AttachError, ConfigError, ShapeError

_EMBEDDINGS = ("wpe", "position_embeddings", "position_embedding", "embed_positions")
"""Names of embeddings of positions."""
_COUNTS = ("input_ids", "past_key_values_length", "position_ids")
"""What an embedding that counts tokens itself takes."""


class Shift:
    """The hook: positions of ``module`` move by ``length``."""

    def __init__(self, how: str, length: int) -> None:
        self.how = how
        self.length = length
        self.active = True

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the positions moved."""
        if not self.active:
            return None
        if self.how == "embedding":
            return (self._moved(module, args[0]), *args[1:]), kwargs
        if self.how == "rotary":
            if "position_ids" in kwargs:
                return args, kwargs | {"position_ids": kwargs["position_ids"] + self.length}
            return (args[0], args[1] + self.length, *args[2:]), kwargs
        if self.how == "counting":
            return self._counted(module, args, kwargs)
        return self._biased(module, args, kwargs)

    def _moved(self, module: nn.Embedding, ids: Tensor) -> Tensor:
        """Indices + P, but for padding's."""
        known = ids.is_cpu and ids.numel() > 0 and not torch.compiler.is_compiling()
        first = 0 if module.padding_idx is None else module.padding_idx + 1
        # on another device the largest index is not known without waiting for it
        last = int(ids.max()) if known else first + ids.shape[-1] - 1
        self._check(module, last - first + 1, module.num_embeddings - first)
        if module.padding_idx is None:
            return ids + self.length
        return torch.where(ids == module.padding_idx, ids, ids + self.length)

    def _counted(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(_COUNTS, args, strict=False)) | kwargs
        past = given.get("past_key_values_length", 0)
        if given.get("position_ids") is not None:
            given["position_ids"] = given["position_ids"] + self.length
        else:
            tokens = given["input_ids"].shape[1]
            self._check(module, past + tokens, module.num_embeddings - getattr(module, "offset", 0))
            given["past_key_values_length"] = past + self.length
        return (), given

    def _biased(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """T5: the bias that the module would compute, with the prefix's columns first."""
        if kwargs.get("position_bias") is not None:
            return None
        states, cache, mask = args[0], kwargs.get("past_key_values"), kwargs.get("mask")
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        keys = past + states.shape[1] if mask is None else mask.shape[-1]
        bias = module.compute_bias(
            states.shape[1], self.length + keys, device=states.device,
            past_seen_tokens=self.length + past,
        )  # fmt: skip
        return args, kwargs | {"position_bias": bias}

    def _check(self, module: nn.Module, tokens: int, limit: int) -> None:
        if tokens + self.length > limit:
            raise ShapeError(
                f"prefix: {type(module).__name__} has {limit} positions, of which the prefix takes "
                f"{self.length}, and got {tokens} tokens. Pass at most {limit - self.length}, or "
                "attach with shift_positions=False."
            )


def shift_positions(modules: Mapping[str, nn.Module], path: str, length: int) -> None:
    """Move the positions of the stack that the attention at ``path`` is in; again moves nothing.

    Args:
        modules: of the model, by path.
        path: of an attention.
        length: P.
    Raises: AttachError where nothing says how tokens are positioned; ConfigError where the model
        has no more than P positions.
    """
    above, found = path, list[tuple[nn.Module, str]]()
    while above and not found:
        above = above.rpartition(".")[0]
        holder = modules[above]
        found = [
            (module, how)
            for name, module in holder.named_modules()
            if (how := _how(name.rpartition(".")[2], module))
        ]
    if not found:
        raise AttachError(
            f"Prefix: shift_positions needs to know what positions the tokens of {path!r}, and "
            "found no embedding of positions, rotary embedding or relative bias above it. Attach "
            "with shift_positions=False."
        )
    for module, how in found:
        limit = getattr(module, "num_embeddings", None)
        if isinstance(limit, int) and how != "biased" and limit <= length:
            raise ConfigError(
                f"Prefix: num_virtual_tokens must leave tokens a position, and {length} are all of "
                f"the {limit} of {type(module).__name__}. Use fewer, or pass "
                "shift_positions=False."
            )
        if not any(isinstance(hook, Shift) for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(Shift(how, length), with_kwargs=True)


def _how(name: str, module: Any) -> str | None:
    """How ``module`` gives tokens their positions; None for all others."""
    if name in _EMBEDDINGS and type(module) is nn.Embedding:
        return "embedding"
    if getattr(module, "has_relative_attention_bias", False) and hasattr(module, "compute_bias"):
        return "biased"
    taken = tuple(signature(type(module).forward).parameters)[1:]
    if "position_ids" in taken[1:2] and "rotary" in type(module).__name__.lower():
        return "rotary"
    return "counting" if name in _EMBEDDINGS and taken == _COUNTS else None
