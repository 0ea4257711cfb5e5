"""What the modules of a transformer are for, read off the tree by rules instead of a table.

    block          a member of an outermost ModuleList that holds an attention, or of one in there
                   all of whose members do (Swin's stages hold blocks)
    attention      the outermost submodules of a block whose class is called so, two linears or more
    its output     the attention's last linear that is not called a query, key or value
    key, value     its linears by the parts of their names; a fused projection counts for all three
    feed-forward   the block's linears outside attention: the last that returns the hidden size is
                   its output, those before it that lead from the hidden size to it are its inputs
    experts        a module with a matrix for each expert in 3-D parameters
    stack          the innermost module around a list of blocks that takes ``inputs_embeds``

Registration order follows the data in every family of transformers, and shapes check it. So
BERT's ``attention.output.dense`` and T5's cross attention are found as well as Llama's ``o_proj``.
Whatever does not fit is left out with a reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn

from deltaops.errors import TargetError
from deltaops.methods.base import ATTENTION, STACK
from deltaops.methods.targets import (
    ALL_LINEAR,
    ALL_NORM,
    ATTENTION_OUTPUT,
    ATTENTIONS,
    DECODER_ATTENTIONS,
    EXPERTS,
    FEED_FORWARD,
    FEED_FORWARD_OUTPUT,
    KEY_VALUE,
    STACKS,
)
from deltaops.modules import head_width, holds_experts, is_conv1d, is_norm

_QUERY, _KEY, _VALUE = ({"q", "query"}, {"k", "key"}, {"v", "value"})
_FUSED = ({"qkv"}, {"wqkv"}, {"c", "attn"}, {"query", "key", "value"}, {"w", "pack"})
"""Parts of the name of a projection to all three: qkv_proj, c_attn, query_key_value, W_pack."""


@dataclass(frozen=True)
class Attention:
    """Paths of one attention's projections."""

    path: str
    query: str | None
    key: str | None
    value: str | None
    fused: str | None
    """To query, key and value at once."""
    output: str

    @property
    def core(self) -> str:
        """Path of the module that attends: the one that has the projections of what it reads."""
        return (self.key or self.fused or self.output).rpartition(".")[0]


@dataclass(frozen=True)
class FeedForward:
    """Paths of the linears at both ends of a feed-forward."""

    inputs: tuple[str, ...]
    """One, or two where it is gated; all of them read its input."""
    output: str


@dataclass(frozen=True)
class Anatomy:
    """The parts of one block."""

    path: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None
    norms: tuple[str, ...]
    missing: str
    """Why there is no feed-forward, or what an attention lacks; empty where all was found."""


@dataclass(frozen=True)
class Whole:
    """A module that a delta binds to as a whole."""

    place: str
    """ATTENTION or STACK."""
    in_features: int
    """The hidden size."""
    out_features: int
    """Of an attention that of its keys, all heads together; of a stack the hidden size."""
    heads: int = 0
    """Of an attention's keys; 0 where it does not say how wide they are."""


@dataclass(frozen=True)
class Found:
    """A module that a role stands for."""

    role: str
    entry: str = ""


def anatomy(model: nn.Module) -> tuple[Anatomy, ...]:
    """The blocks of ``model`` in order; empty where nothing looks like a transformer."""
    return tuple(_block(path, block) for path, block in _blocks(model))


def resolve(model: nn.Module, roles: Iterable[str], *, lenient: bool = False) -> dict[str, Found]:
    """Path → what it was found as, for every module that one of ``roles`` stands for.

    Args:
        model: any.
        roles: of ``deltaops.methods.targets``.
        lenient: a role may stand for nothing.
    Raises: TargetError where one does and may not, with what was found instead.
    """
    found: dict[str, Found] = {}
    blocks: tuple[Anatomy, ...] | None = None
    for role in roles:
        if role == ALL_LINEAR:
            hits = [(p, "") for p, m in model.named_modules() if p and is_linear(m)]
        elif role == ALL_NORM:
            hits = [(p, "") for p, m in model.named_modules() if is_norm(m)]
        elif role == EXPERTS and (
            stacked := [p for p, m in model.named_modules() if holds_experts(m)]
        ):
            hits = [(p, "") for p in stacked]
        else:
            blocks = anatomy(model) if blocks is None else blocks
            if role == STACKS:
                hits = [(path, "") for path in _stacks(model, blocks)]
            elif role == DECODER_ATTENTIONS:
                hits = [(path, "") for path in _decoder_attentions(blocks)]
            else:
                hits = [hit for block in blocks for hit in _hits(block, role)]
            if not hits and not lenient:
                raise TargetError(_nothing_found(model, role, blocks))
        for path, entry in hits:
            found.setdefault(path, Found(role, entry))
    return found


def wholes(model: nn.Module, places: Iterable[str]) -> dict[str, Whole]:
    """Path → what it is, for every attention and stack of ``model``, if ``places`` has such."""
    wished = {ATTENTION, STACK}.intersection(places)
    blocks = anatomy(model) if wished else ()
    found: dict[str, Whole] = {}
    if ATTENTION in wished:
        for attention in (a for block in blocks for a in block.attentions):
            found[attention.core] = _whole(model, attention)
    if STACK in wished:
        for path, hidden in _stacks(model, blocks).items():
            found[path] = Whole(STACK, hidden, hidden)
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer of any subclass, with or without a delta."""
    kind = getattr(type(module), "base_class", type(module))
    return isinstance(module, nn.Linear) or is_conv1d(kind)


def _size(layer: Any) -> tuple[int, int]:
    """``(in, out)``, by the attributes: the weight of a quantized layer has other shapes."""
    return (layer.nx, layer.nf) if hasattr(layer, "nf") else (layer.in_features, layer.out_features)


# ------------------------------------------------------------------------------------- the rules


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    lists: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{p}.") for p in lists):
            continue
        members = [(f"{path}.{i}", m) for i, m in module.named_children()]
        holders = [member for member in members if next(_attentions(*member), None)]
        if holders and not any(_lists_blocks(m) for _, m in members):
            lists.append(path)
            yield from members


def _lists_blocks(module: nn.Module) -> bool:
    """Whether ``module`` holds a list of blocks; T5's block, a list of sub-layers, does not."""
    return any(
        isinstance(m, nn.ModuleList) and len(m) and all(next(_attentions("", c), None) for c in m)
        for m in module.modules()
    )


def _attentions(path: str, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The outermost ones below ``block``."""
    for name, child in block.named_children():
        where = f"{path}.{name}"
        kind = type(child).__name__.lower()
        if ("attention" in kind or "attn" in kind) and len(_linears(where, child)) > 1:
            yield where, child
        else:
            yield from _attentions(where, child)


def _linears(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{path}.{p}", m) for p, m in module.named_modules() if p and is_linear(m)]


def _block(path: str, block: nn.Module) -> Anatomy:
    inside = list(_attentions(path, block))
    attentions = tuple(_attention(*pair) for pair in inside)
    norms = tuple(f"{path}.{p}" for p, m in block.named_modules() if is_norm(m))
    if not inside:
        return Anatomy(path, (), None, norms, "no attention")
    outside = [
        pair
        for pair in _linears(path, block)
        if not any(pair[0].startswith(f"{where}.") for where, _ in inside)
    ]
    hidden = _size(block.get_submodule(attentions[0].output[len(path) + 1 :]))[1]
    feed_forward, missing = _feed_forward(path, block, outside, hidden)
    return Anatomy(path, attentions, feed_forward, norms, missing)


def _attention(path: str, module: nn.Module) -> Attention:
    linears = [where for where, _ in _linears(path, module)]
    named: dict[str, str] = {}
    unnamed: list[str] = []
    for where in linears:
        parts = set(where.rpartition(".")[2].lower().split("_"))
        if any(parts >= fused for fused in _FUSED):
            named.setdefault("fused", where)
            continue
        roles = [
            what
            for what, words in (("query", _QUERY), ("key", _KEY), ("value", _VALUE))
            if parts & words
        ]
        for what in roles:
            named.setdefault(what, where)
        if not roles:
            unnamed.append(where)
    output = (unnamed or linears)[-1]
    return Attention(
        path, named.get("query"), named.get("key"), named.get("value"), named.get("fused"), output
    )


def _feed_forward(
    path: str, block: nn.Module, linears: list[tuple[str, nn.Module]], hidden: int
) -> tuple[FeedForward | None, str]:
    """The feed-forward, or None and why not."""
    experts = _experts(path, block)
    if experts is not None:
        return None, f"{experts} holds experts: a token passes only some of them"
    output: tuple[str, nn.Module] | None = None
    for where, layer in linears:
        if _size(layer)[1] == hidden:
            output = where, layer
    if output is None:
        return None, f"no linear layer outside attention returns the {hidden} hidden features"
    before = linears[: [where for where, _ in linears].index(output[0])]
    width = _size(output[1])[0]
    inputs = tuple(
        where for where, m in before if _size(m) in ((hidden, width), (hidden, 2 * width))
    )
    if not inputs:
        return None, f"nothing leads from the {hidden} hidden features to {output[0]}"
    return FeedForward(inputs, output[0]), ""


def _experts(path: str, block: nn.Module) -> str | None:
    """Path of a mixture, of which a sub-layer is no part.

    A list of alike modules with linears, or a module with one matrix for each expert in a tensor.
    """
    for name, module in block.named_modules():
        if holds_experts(module):
            return f"{path}.{name}"
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            kinds = {type(m) for m in module}
            if len(kinds) == 1 and _linears("", module[0]):
                return f"{path}.{name}"
    return None


def _whole(model: nn.Module, attention: Attention) -> Whole:
    inner, hidden = _size(model.get_submodule(attention.output))
    size = inner
    if attention.key is not None:
        size = _size(model.get_submodule(attention.key))[1]
    elif attention.fused is not None:  # queries as wide as what the output reads, then keys, values
        size = (_size(model.get_submodule(attention.fused))[1] - inner) // 2
    width = head_width(model.get_submodule(attention.core))
    return Whole(ATTENTION, hidden, size, 0 if width is None else size // width)


def _decoder_attentions(blocks: tuple[Anatomy, ...]) -> Iterator[str]:
    """A decoder's blocks attend to its own tokens first, then to the encoder's."""
    decoders = [block for block in blocks if len(block.attentions) > 1]
    yield from (block.attentions[0].core for block in decoders or blocks if block.attentions)


def _stacks(model: nn.Module, blocks: Iterable[Anatomy]) -> dict[str, int]:
    """Path → hidden size."""
    modules = dict(model.named_modules())
    found: dict[str, int] = {}
    for block in blocks:
        if not block.attentions:
            continue
        above = block.path
        while above:
            above = above.rpartition(".")[0]
            if "inputs_embeds" in signature(type(modules[above]).forward).parameters:
                hidden = _size(modules[block.attentions[0].output])[1]
                found.setdefault(above, hidden)
                break
    return found


# --------------------------------------------------------------------------------------- answers


def misses(model: nn.Module, roles: Iterable[str]) -> dict[str, str]:
    """Path of a block in which one of ``roles`` stands for nothing → why."""
    everywhere = (ALL_LINEAR, ALL_NORM, STACKS, DECODER_ATTENTIONS, EXPERTS)
    sought = [role for role in roles if role not in everywhere]
    found: dict[str, str] = {}
    for block in anatomy(model) if sought else ():
        for role in sought:
            if not any(_hits(block, role)):
                found.setdefault(block.path, f"no {role}: {_why(block, role)}")
    return found


def _why(block: Anatomy, role: str) -> str:
    """Why ``role`` stands for nothing in ``block``."""
    if role == STACKS:
        return "no module around them takes inputs_embeds"
    if role in (ATTENTIONS, DECODER_ATTENTIONS):
        return "no attention"
    if role == EXPERTS:
        return "no experts in 3-D parameters"
    named = role in (ATTENTION_OUTPUT, KEY_VALUE) and block.attentions
    return "its projections have other names" if named else block.missing


def _hits(block: Anatomy, role: str) -> Iterator[tuple[str, str]]:
    """``(path, entry)`` of what ``role`` stands for in ``block``."""
    if role == ATTENTION_OUTPUT:
        yield from ((a.output, "") for a in block.attentions)
    elif role == ATTENTIONS:
        yield from ((a.core, "") for a in block.attentions)
    elif role == KEY_VALUE:
        for a in block.attentions:
            both = (a.key, a.value) if a.key and a.value else (a.fused,)
            yield from ((path, "") for path in both if path)
    elif block.feed_forward is not None and role == FEED_FORWARD_OUTPUT:
        yield block.feed_forward.output, ""
    elif block.feed_forward is not None and role == FEED_FORWARD:
        yield block.feed_forward.output, block.feed_forward.inputs[0]


def _nothing_found(model: nn.Module, role: str, blocks: tuple[Anatomy, ...]) -> str:
    head = f"target_modules={role!r} stands for no module of this {type(model).__name__}"
    advice = "Name the layers in target_modules instead."
    if blocks:
        reasons = dict.fromkeys(_why(block, role) for block in blocks)
        example = blocks[0]
        shown = [f"blocks such as {example.path!r}"]
        shown += [f"an attention at {a.path!r}" for a in example.attentions]
        return f"{head}. Found: {', '.join(shown)}; {'; '.join(reasons)}. {advice}"
    kinds = sorted({type(m).__name__ for m in model.modules() if list(m.children())})
    linears = sum(is_linear(m) for m in model.modules())
    listed = ", ".join(kinds[:8]) + (", …" if len(kinds) > 8 else "") or "nothing"
    return (
        f"{head}: it has no list of blocks with an attention. Found: {listed}, with "
        f"{linears} linear layers. {advice}"
    )
