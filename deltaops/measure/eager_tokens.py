"""Prompts and prefixes as one writes them in eager torch: concatenated, for every sequence anew.

    Prompt    [p₁ … p_P  e₁ … e_T] are the embeddings, and the mask gets P ones more
    Pool      the same of each sample's own; the term of its keys joins the loss
    Intrinsic the same of a prompt that is decoded from z, once a pass
    Prefix    [Pk; K] and [Pv; V], expanded over the batch, in torch's own attention; Pk and Pv are
              parameters, or rows of what an MLP makes of a small matrix, once a pass

A causal attention gets the mask that torch has for it otherwise, with the prefix seen by all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, one_hot

from deltaops.methods import Site
from deltaops.methods.base import MODEL, STACK
from deltaops.modules import PREFIX_POOL, PROMPTS, TEMPERATURE, Pool, PooledPrompts

from .eager_decoded import decoding

_NAME = "deltaops_eager_prefix"
_HELD = "eager_prefix"
"""In the ``__dict__`` of an attention: what returns its keys and values."""
_CHOSEN = "eager_prefix_chosen"
"""In the ``__dict__`` of the model: the rows that each sample of a pass chose ``[B, P]``."""
_ROWS = "eager_prefix_rows"
"""In the ``__dict__`` of the model: its :class:`_Rows`."""


def prompt(
    model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter], bound: nn.Module
) -> None:
    """Call the stack with longer embeddings; the states of the prompt are left to the reader."""
    vectors = t["prompt_embeddings"]
    _lengthen(model.get_submodule(site.path), lambda embeds, mask: vectors)


def intrinsic_prompt(
    model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter], bound: nn.Module
) -> None:
    """As :func:`prompt`, of a prompt that the delta's frozen decoder makes of ``z``."""
    (made,) = bound.get_submodule(PROMPTS).children()
    z = t["intrinsic"]
    stack: Any = model.get_submodule(site.path)
    flat = decoding(made.get_submodule("decoder"), z, stack)
    width = stack.get_input_embeddings().embedding_dim
    _lengthen(stack, lambda embeds, mask: flat().view(-1, width))


def prompt_pool(
    model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter], bound: nn.Module
) -> None:
    """As :func:`prompt`, of the prompts whose keys are nearest to a sample's mean embedding."""
    (pool,) = bound.get_submodule(PROMPTS).children()
    assert isinstance(pool, PooledPrompts)
    prompts, stack = t["prompt_pool.prompts"], model.get_submodule(site.path)
    chosen = _chooser(model, stack, delta, pool, t["prompt_pool.keys"])

    def choose(embeds: Tensor, mask: Tensor) -> Tensor:
        return prompts[chosen(embeds, mask)].flatten(1, 2).to(embeds.dtype)

    _lengthen(stack, choose)


def _chooser(
    model: nn.Module, stack: nn.Module, delta: Any, pool: Pool, keys: Tensor
) -> Callable[[Tensor, Tensor], Tensor]:
    """What chooses ``[B, k]`` by embeddings and mask, and adds its term to the model's loss."""
    term = list[Tensor]()

    def choose(embeds: Tensor, mask: Tensor) -> Tensor:
        wide = torch.promote_types(embeds.dtype, torch.float32)
        counted = mask.bool() & (mask.cumsum(1) <= (pool.tokens or mask.shape[1]))
        query = (embeds.detach().to(wide) * counted[..., None]).sum(1) / counted.sum(1, True)
        cosines = cosine_similarity(query[:, None], keys[None].to(wide), dim=-1)
        chosen = cosines.detach().topk(delta.top_k).indices.sort().values
        if stack.training:
            shares = one_hot(chosen, delta.size).sum((0, 1)) / chosen.numel()
            chances = (cosines / TEMPERATURE).softmax(-1).mean(0)
            pulled = (1 - cosines.gather(1, chosen)).mean()
            balance = delta.size * (shares * chances).sum() - 1
            term.append(delta.key_loss * pulled + delta.balance * balance)
        return chosen

    def join(module: nn.Module, args: Any, out: Any) -> Any:
        if not term:
            return out
        if isinstance(out, tuple):
            return out._replace(loss=out.loss + term.pop())  # type: ignore[attr-defined]  # a NamedTuple
        out["loss"] = out["loss"] + term.pop()
        return out

    model.register_forward_hook(join)
    return choose


def _lengthen(stack: nn.Module, made: Callable[[Tensor, Tensor], Tensor]) -> None:
    def lengthen(module: Any, args: Any, named: dict[str, Any]) -> Any:
        ids = args[0] if args else named.pop("input_ids")
        mask = named.pop("attention_mask")
        embeds = module.get_input_embeddings()(ids)
        before = made(embeds, mask)
        before = before.expand(len(embeds), -1, -1)
        longer = torch.cat([mask.new_ones(before.shape[:2]), mask], 1)
        inputs = {"inputs_embeds": torch.cat([before, embeds], 1), "attention_mask": longer}
        return (), named | inputs

    stack.register_forward_pre_hook(lengthen, with_kwargs=True)


def prefix(
    model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter], bound: nn.Module
) -> None:
    """Let the attention see keys and values of its own before those of the tokens.

    The model comes first where it has an MLP, whose rows its attentions then take in turn.
    """
    if site.place == MODEL:
        rows = _Rows({key.rpartition(".")[2]: leaf for key, leaf in t.items()})
        model.__dict__[_ROWS] = rows
        model.register_forward_pre_hook(rows)
        return
    _attend_by_name(model)
    held = model.get_submodule(site.path).__dict__
    if t:
        both = tuple(t.values())
        held[_HELD] = lambda: both
    else:
        held[_HELD] = model.__dict__[_ROWS].next(site)


def prefix_pool(
    model: nn.Module, delta: Any, site: Site, t: dict[str, nn.Parameter], bound: nn.Module
) -> None:
    """As :func:`prefix`, of those that the stack, which comes first, chose for each sample."""
    if site.place != STACK:
        _attend_by_name(model)
        both = tuple(t.values())
        held = model.__dict__[_CHOSEN]
        model.get_submodule(site.path).__dict__[_HELD] = lambda: tuple(
            _of_each(whole, held[0]) for whole in both
        )
        return
    pool = bound.get_submodule(PREFIX_POOL)
    assert isinstance(pool, Pool)
    stack = model.get_submodule(site.path)
    choose = _chooser(model, stack, delta, pool, t["prefix_pool.keys"])
    chosen = model.__dict__[_CHOSEN] = list[Tensor]()

    def begin(module: Any, args: Any, named: dict[str, Any]) -> None:
        ids = args[0] if args else named["input_ids"]
        items = choose(module.get_input_embeddings()(ids), named["attention_mask"])
        positions = torch.arange(delta.length, device=items.device)
        chosen[:] = [(items[..., None] * delta.length + positions).flatten(1)]

    stack.register_forward_pre_hook(begin, with_kwargs=True)


def _of_each(whole: Tensor, rows: Tensor) -> Tensor:
    """``[Hkv, N·L, D]`` and ``[B, P]`` → ``[B, Hkv, P, D]``."""
    return whole[:, rows].transpose(0, 1)


class _Rows:
    """All keys and values ``[P, R]``, those of one attention after the other: a hook that computes
    them before each pass."""

    def __init__(self, leaves: dict[str, nn.Parameter]) -> None:
        self.leaves = leaves
        self.taken = 0

    def __call__(self, module: nn.Module, args: Any) -> None:
        t = self.leaves
        inner = torch.tanh(linear(t["embedding"], t["down"], t["down_bias"]))
        self.rows = linear(inner, t["up"], t["up_bias"])

    def next(self, site: Site) -> Callable[[], Tensor]:
        """What returns the two ``[Hkv, P, D]`` of the next attention."""
        first, last = self.taken, self.taken + 2 * site.out_features
        self.taken = last
        shape = (-1, 2, site.heads, site.out_features // site.heads)
        return lambda: self.rows[:, first:last].reshape(shape).permute(1, 2, 0, 3)


def _attend_by_name(model: nn.Module) -> None:
    from transformers import PreTrainedModel
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks: Any = ALL_MASK_ATTENTION_FUNCTIONS
    attentions: Any = ALL_ATTENTION_FUNCTIONS
    if _NAME not in attentions:
        attentions.register(_NAME, _attend)
        masks.register(_NAME, masks["sdpa"])
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config._attn_implementation != _NAME:
            module.set_attn_implementation(_NAME)


def _attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **named: Any
) -> Any:
    """transformers' "sdpa" of longer keys and values ``[B, Hkv, P + T, D]``."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    made = module.__dict__.get(_HELD)
    if made is not None:
        held = made()
        if attention_mask is None and getattr(module, "is_causal", True):
            attention_mask = q.new_ones((1, 1, q.shape[2], k.shape[2]), dtype=torch.bool).tril()
        k, v = (
            torch.cat([own.expand(len(k), -1, -1, -1), given], 2)
            for own, given in zip(held, (k, v), strict=True)
        )
        if attention_mask is not None:
            seen = attention_mask.new_ones(*attention_mask.shape[:3], held[0].shape[-2])
            attention_mask = torch.cat([seen, attention_mask], 3)
    run: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    return run(module, q, k, v, attention_mask, **named)
