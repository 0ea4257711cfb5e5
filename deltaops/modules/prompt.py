"""Trained vectors before the embeddings that a stack of blocks reads.

    [p₁ … p_P  e₁ … e_T]  →  blocks  →  [· … ·  h₁ … h_T]        p [P, d], e [B, T, d]

The stack's own forward runs on P + T positions. What it is given (embeddings, mask, positions,
token types) is lengthened, and what it returns is cut to the T that its caller knows: so labels,
heads, poolings and ``generate`` need not know of a prompt. Where a cache is filled already, the
prompt is in it, and only mask and positions are lengthened.

transformers takes lengths from masks and positions, which come from the caller and count tokens,
and from the cache, whose layers hold P more: inside the stack, masks are made from that. Outside,
``generate`` subtracts the cache's length from the number of tokens to know which of them are new,
so there a cache counts tokens only (:class:`_TokenCache`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from deltaops.errors import ShapeError
from deltaops.ops import prompt_embedding

from .pool import query_of, returns_dict
from .prompt_pool import PooledPrompts
from .replicas import refuse_replicas

PROMPTS = "prompt_encoder"
"""The ModuleDict of a prompted stack: the adapter's name → what makes its prompt."""


class SoftPrompt(nn.Module):
    """A prompt that is trained itself."""

    told = "trained itself"
    """For the report."""

    def __init__(self, weight: Tensor, length: int) -> None:
        """Hold ``weight`` ``[≥ P, d]``, of which the first ``length`` rows are the prompt."""
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.length = length

    def forward(self) -> Tensor:
        """The prompt ``[P, d]``."""
        return self.weight[: self.length]


class _Swapped(nn.Module):
    """Mixin of what surgery makes by swapping ``__class__``."""

    _replicate_for_data_parallel = refuse_replicas

    base_class: type[nn.Module]
    """The class of before."""
    mixin: type[_Swapped]
    """What was put before it."""
    names: tuple[str, ...]
    """Of what the forward of before takes."""

    def run(self, given: dict[str, Any]) -> Any:
        """What takes the place of the forward of before, whose arguments are ``given``."""
        raise NotImplementedError  # a mixin of mixins

    def base_forward(self, given: dict[str, Any]) -> Any:
        """The forward of before."""
        return self.base_class.forward(self, **given)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copied and pickled by the class of before; the subclass is made where it is wanted."""
        return _blank, (self.mixin, self.base_class), self.__dict__


class PromptedStack(_Swapped):
    """Mixin of a stack whose tokens have a prompt before them."""

    prompt_active: bool
    prompt_cut: bool
    """Whether the positions of the prompt are cut off what the stack returns."""
    prompt_room: int | None
    """How many positions the stack has for prompt and tokens; None where there is no limit."""

    def run(self, given: dict[str, Any]) -> Any:
        """See :class:`_Swapped`."""
        if not self.prompt_active:
            return self.base_forward(given)
        prompts: Any = self._modules[PROMPTS]
        (prompt,) = prompts.values()
        vectors: Tensor | None = None if isinstance(prompt, PooledPrompts) else prompt()
        length = prompt.positions if vectors is None else vectors.shape[0]
        past = _uncovered(given.get("past_key_values"))
        begins = bool(past == 0)
        if begins:
            self._check_room(length, _tokens(given), past)
            given["inputs_embeds"] = (
                _chosen(self, prompt, given)
                if vectors is None
                else _embeddings(self, vectors, given)
            )
            if "input_ids" in given:
                given["input_ids"] = None
        elif self.prompt_room is not None:
            self._check_room(length, _tokens(given), past - length)
        _lengthen(given, length, begins)
        as_tuple = not returns_dict(self, given)
        if as_tuple:  # whose items have no names
            given["return_dict"] = True
        found = self.base_forward(given)
        if begins and self.prompt_cut:
            found = _cut(found, length)
        cache = getattr(found, "past_key_values", None)
        if cache is not None and not torch.compiler.is_compiling():
            _cover(cache, length)
        return found.to_tuple() if as_tuple else found

    def told(self) -> str:
        """What runs, for the report."""
        prompts: Any = self._modules[PROMPTS]
        (prompt,) = prompts.values()
        off = "" if self.prompt_active else "; the delta is disabled"
        return f"the stack's own forward after a prompt that is {prompt.told}{off}"

    def _check_room(self, length: int, tokens: int, past: int) -> None:
        room = self.prompt_room
        if room is not None and length + past + tokens > room:
            raise ShapeError(
                f"prompt: {length} vectors of the prompt and {past + tokens} tokens must fit into "
                f"the {room} positions of {self.base_class.__name__}. The prompt leaves "
                f"{room - length} of them: cut the tokens there, or use fewer num_virtual_tokens."
            )


class PromptReader(_Swapped):
    """Mixin of a decoder that reads what a prompted encoder returns, prompt included."""

    prompt_length: int

    def run(self, given: dict[str, Any]) -> Any:
        """See :class:`_Swapped`; states that have no prompt, of a switched-off one, stay alone."""
        states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.dim() == 2:
            more = states.shape[1] - mask.shape[1]
            if more == self.prompt_length:
                given["encoder_attention_mask"] = _with_ones(mask, more)
        return self.base_forward(given)


def add_prompt(
    stack: nn.Module, name: str, prompt: nn.Module, *, cut: bool, room: int | None
) -> None:
    """Put a prompt before the tokens of ``stack``.

    Args:
        stack: a module whose forward takes ``inputs_embeds``.
        name: of the adapter.
        prompt: called without arguments, once in each pass, it returns ``[P, d]``.
        cut: whether the positions of the prompt are cut off what the stack returns.
        room: how many positions there are for prompt and tokens; None where there is no limit.
    """
    stack.add_module(PROMPTS, nn.ModuleDict({name: prompt}))
    stack.__dict__.update(prompt_active=True, prompt_cut=cut, prompt_room=room)
    stack.__class__ = _over(PromptedStack, type(stack))


def exchange_prompt(stack: nn.Module, prompt: nn.Module) -> None:
    """Have ``prompt`` make the prompt of a stack that has one."""
    prompts: Any = stack._modules[PROMPTS]
    for name in prompts:
        prompts[name] = prompt


def read_prompt(decoder: nn.Module, length: int) -> None:
    """Let ``decoder`` read the states of an encoder whose prompt has ``length`` vectors."""
    decoder.__dict__["prompt_length"] = length
    decoder.__class__ = _over(PromptReader, type(decoder))


def remove_prompt(module: nn.Module) -> None:
    """Undo :func:`add_prompt` or :func:`read_prompt`; nothing where neither was done."""
    if isinstance(module, _Swapped):
        module.__class__ = module.base_class  # type: ignore[assignment]  # its class of before
    for name in ("prompt_active", "prompt_cut", "prompt_room", "prompt_length"):
        module.__dict__.pop(name, None)
    module._modules.pop(PROMPTS, None)


def has_prompt(module: nn.Module) -> bool:
    """Whether ``module`` has a prompt or reads the states of one that has, active or not."""
    return isinstance(module, _Swapped)


def token_table(stack: Any) -> nn.Embedding | None:
    """The embedding of the tokens of ``stack``; None where it reads no tokens (an image's)."""
    getter = getattr(stack, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except NotImplementedError:  # how transformers says that a model has none
        return None
    return table if isinstance(table, nn.Embedding) else None


def room_of(stack: nn.Module) -> int | None:
    """How many positions ``stack`` has; None where they are computed and not looked up.

    A learned table is an embedding outside the blocks that is called after positions. RoBERTa's and
    BART's begin some entries later.
    """
    for path, module in stack.named_modules():
        name = path.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or not ("position" in name or name == "wpe"):
            continue
        if any(part.isdigit() for part in path.split(".")):
            continue  # of a block
        first = getattr(module, "offset", None)
        if first is None:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
        return module.num_embeddings - int(first)
    return None


# -------------------------------------------------------------------------------- what goes in


def _embeddings(stack: Any, vectors: Tensor, given: dict[str, Any]) -> Tensor:
    """``[B, P + T, d]``: the prompt ``[P, d]``, and the tokens where no embeddings are given."""
    embeds: Tensor | None = given.get("inputs_embeds")
    if embeds is None:
        table, ids = stack.get_input_embeddings(), given["input_ids"]
        if _only_looks_up(table, ids):
            return prompt_embedding(vectors, ids, table.weight)
        embeds = table(ids)
        assert embeds is not None
    return torch.cat([vectors.to(embeds.dtype).expand(embeds.shape[0], -1, -1), embeds], 1)


def _chosen(stack: Any, pool: PooledPrompts, given: dict[str, Any]) -> Tensor:
    """``[B, k·L + T, d]``: of each sample the prompts that it chose, and its tokens."""
    embeds: Tensor | None = given.get("inputs_embeds")
    if embeds is None:
        embeds = stack.get_input_embeddings()(given["input_ids"])
        assert embeds is not None
    query = query_of(pool, stack, embeds, given, stack.names, stack.base_forward)
    return torch.cat([pool(query).to(embeds.dtype), embeds], 1)


def _only_looks_up(table: Any, ids: Tensor) -> bool:
    """Whether a call of ``table`` reads rows of a frozen weight and nobody looks on."""
    if type(table) is not nn.Embedding or table.max_norm is not None or ids.dim() != 2:
        return False
    if table._forward_pre_hooks or table._forward_hooks or "forward" in table.__dict__:
        return False
    if table._backward_pre_hooks or table._backward_hooks:
        return False
    weight = table._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.device != ids.device:
        return False
    return not (weight.requires_grad and torch.is_grad_enabled())


def _tokens(given: dict[str, Any]) -> int:
    """How many there are."""
    embeds: Tensor | None = given.get("inputs_embeds")
    return int((given["input_ids"] if embeds is None else embeds).shape[1])


def _lengthen(given: dict[str, Any], length: int, begins: bool) -> None:
    """Make mask, positions and token types those of prompt and tokens."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            found = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ShapeError(
                f"prompt: attention_mask must be [B, T], of tokens, got {found}. What is made for "
                "every pair of tokens has no place for a prompt: pass the mask of the tokens."
            )
        given["attention_mask"] = _with_ones(mask, length)
    elif positions is not None and begins and given.get("past_key_values") is None:
        _refuse_packed(positions)
    for name in ("position_ids", "cache_position"):
        places = given.get(name)
        if places is not None:
            given[name] = places + length
            if begins:
                first = torch.arange(length, dtype=places.dtype, device=places.device)
                first = first.expand(*places.shape[:-1], length)
                given[name] = torch.cat([first, given[name]], -1)
    types = given.get("token_type_ids")
    if types is not None and begins:
        given["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], length), types], 1)


def _with_ones(mask: Tensor, count: int) -> Tensor:
    return torch.cat([mask.new_ones(mask.shape[0], count), mask], 1)


def _refuse_packed(positions: Tensor) -> None:
    """transformers reads positions that start anew as several sequences in one row."""
    if positions.dim() != 2 or torch.compiler.is_compiling():
        return  # of images there are three to a token, which do not rise
    if bool((positions.diff(dim=-1) > 0).all()):
        return
    raise ShapeError(
        "prompt: position_ids must rise along each row, and start anew: sequences packed into one "
        "row would need a prompt each. Put every sequence into a row of its own."
    )


# ------------------------------------------------------------------------------- what comes out


def _cut(found: Any, length: int) -> Any:
    """``found`` without the first ``length`` positions of its hidden states."""
    found.last_hidden_state = found.last_hidden_state[:, length:]
    states = getattr(found, "hidden_states", None)
    if states is not None:
        found.hidden_states = tuple(h if h is None else h[:, length:] for h in states)
    return found


class _TokenCache:
    """Mixin of a cache outside of the stack that filled it: the prompt in it is not counted."""

    base_class: type[Any]
    mixin: type[_TokenCache]
    prompt_length: int

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens it holds."""
        held: int = super().get_seq_length(layer_idx)  # type: ignore[misc]  # the cache's own
        return max(held - self.prompt_length, 0)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """As :meth:`_Swapped.__reduce_ex__`."""
        return _blank, (self.mixin, self.base_class), self.__dict__


def _cover(cache: Any, length: int) -> None:
    cache.prompt_length = length
    cache.__class__ = _over(_TokenCache, type(cache))


def _uncovered(cache: Any) -> Any:
    """How many positions ``cache`` holds, which is itself again."""
    if cache is None:
        return 0
    if getattr(cache, "is_compileable", False):
        raise ShapeError(
            f"prompt: past_key_values must be a cache that grows, got a {type(cache).__name__}, "
            "made with its mask for the tokens alone. Use a DynamicCache, or generate with "
            'cache_implementation="dynamic".'
        )
    if isinstance(cache, _TokenCache):
        cache.__class__ = cache.base_class
    return cache.get_seq_length()


# ------------------------------------------------------------------------------------- classes

_classes: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def _over(mixin: type[Any], base: type[Any]) -> type[Any]:
    """``mixin`` over exactly ``base``; the same class each time, and called as ``base`` is.

    transformers finds what a class records, and what it writes into configs, by these names.
    """
    key = (mixin, base)
    if key not in _classes:
        attributes: dict[str, Any] = {
            "__module__": base.__module__, "__qualname__": base.__qualname__,
            "base_class": base, "mixin": mixin,
        }  # fmt: skip
        if issubclass(mixin, _Swapped):
            attributes["names"] = names = tuple(signature(base.forward).parameters)[1:]
            attributes["forward"] = _forward(base, names)
        _classes.setdefault(key, type(base.__name__, (mixin, base), attributes))
    return _classes[key]


def _forward(base: type[Any], names: tuple[str, ...]) -> Callable[..., Any]:
    @wraps(base.forward)
    def forward(self: _Swapped, *args: Any, **kwargs: Any) -> Any:
        return self.run(dict(zip(names, args, strict=False)) | kwargs)

    return forward


def _blank(mixin: type[Any], base: type[Any]) -> Any:
    kind: Any = _over(mixin, base)
    return kind.__new__(kind)
