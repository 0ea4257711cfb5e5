"""A prefix of trained keys and values on an attention module of transformers.

transformers looks the function that attends up by a name in the config. Under :data:`NAME` stands
one that reads a prefix from the module: parameters of its own, or rows of an encoder's result
(:mod:`.prefix_encoder`). What makes masks under that name is what makes them for "sdpa". So masks
and caches are those of the model without a prefix: every query sees it, and it is no token. So are
positions, unless :mod:`.prefix_positions` moves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltaops.backends import PrefixAttentionCall
from deltaops.dispatch import LAST_RESORT, explain_call
from deltaops.errors import ConfigError, NoBackendError
from deltaops.ops import prefix_attention
from deltaops.reference.prefix_attention import join, mask_of_both

from .around import Relay
from .attention_functions import BIAS, SDPA, attend, attends, known_sdpa, visible, words
from .gate import GATES, Gate, add_gate
from .prefix_bias import TABLE, makes_zeros, tables_of, trains, without_unread_gradient
from .prefix_encoder import PrefixEncoder
from .prefix_pool import PooledPrefixes
from .rows import Rows, rows_of

NAME = "deltaops"
"""The implementation, as transformers' configs have it."""
KEYS, VALUES = "prefix_k", "prefix_v"
"""Names of the parameters ``[Hkv, P, D]`` on an attention module."""
GATED = "a gate, by which each sample has a prefix of its own"
WANTS_GRADIENT = "a bias that wants a gradient"
_HELD = "_deltaops_prefix"
_settings: dict[str, frozenset[str]] = {}
"""Words of transformers' function for "sdpa", where we know it; a compiler follows no cache."""


def register() -> None:
    """Make :data:`NAME` known to transformers; again changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    theirs = known_sdpa()
    if theirs is not None:
        _settings[SDPA] = words(theirs.__code__)
    AttentionInterface.register(NAME, attend_with_prefix)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Encoded(NamedTuple):
    """A prefix that an encoder computes."""

    rows: Rows
    """Of the stack that the attention is in."""
    first: int
    """Row of the first feature of the keys; the values follow."""
    heads: int
    width: int
    """Of a head."""

    def both(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[Hkv, P, D]``, views of what the encoder computed."""
        size = self.heads * self.width
        found = self.rows.current(self.first, 2 * size)
        k, v = found.view(-1, 2, self.heads, self.width).permute(1, 2, 0, 3)
        return k, v


class Held:
    """How one attention reads its prefix: on the module, so that copies and pickles have it."""

    def __init__(self, backend: str, strict: bool, encoded: Encoded | None) -> None:
        self.backend = backend
        self.strict = strict
        self.encoded = encoded
        """None where the prefix is parameters of the module."""
        self.pool: PooledPrefixes | None = None
        """Chooses which parts of the prefix each sample sees; None where it sees all."""
        self.gate: Relay | None = None
        """Carries what the prefix's gate says of this call, where it has one."""
        self.active = True
        self.tables: tuple[nn.Module, ...] = ()
        """See :func:`know_tables`."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model may be unpickled in a process that has not heard of :data:`NAME`."""
        self.__dict__.update(state)
        register()


def add_prefix(
    module: nn.Module,
    keys: Tensor,
    values: Tensor,
    *,
    pool: PooledPrefixes | None = None,
    backend: str = "auto",
    strict: bool = False,
) -> None:
    """Give an attention module a prefix.

    Args:
        module: an attention of a model that attends by :data:`NAME`, or will.
        keys: ``[Hkv, P, D]``, which become a parameter.
        values: as ``keys``.
        pool: of the stack around it, where they are all that this has.
        backend: passed to the op.
        strict: passed to the op.
    Raises: ConfigError where it has one, or these are not two of one shape.
    """
    if keys.dim() != 3 or keys.shape != values.shape:
        raise ConfigError(
            f"prefix: keys and values must both be [Hkv, P, D], got {list(keys.shape)} and "
            f"{list(values.shape)}."
        )
    held = Held(backend, strict, None)
    held.pool = pool
    _hold(module, held)
    module.register_parameter(KEYS, nn.Parameter(keys))
    module.register_parameter(VALUES, nn.Parameter(values))


def join_encoder(
    encoder: PrefixEncoder,
    modules: Mapping[str, nn.Module],
    path: str,
    heads: int,
    width: int,
    *,
    backend: str = "auto",
    strict: bool = False,
) -> tuple[slice, slice]:
    """Give an attention the next rows of an encoder as its prefix; otherwise as :func:`add_prefix`.

    Args:
        encoder: of the model.
        modules: of the model, by path.
        path: of the attention; those of one stack come one after the other.
        heads: Hkv.
        width: D.
        backend: passed to the op.
        strict: passed to the op.
    Returns: which of the encoder's rows are its keys, and which its values.
    Raises: ConfigError where it has a prefix.
    """
    rows, size = rows_of(encoder, modules, path), heads * width
    first = rows.join(2 * size)
    _hold(modules[path], Held(backend, strict, Encoded(rows, first, heads, width)))
    middle = rows.stop - size
    return slice(middle - size, middle), slice(middle, rows.stop)


def know_tables(modules: Mapping[str, nn.Module], path: str) -> None:
    """Let the attention at ``path``, which has a prefix, know what makes T5's bias, if anything."""
    modules[path].__dict__[_HELD].tables = tables_of(modules, path)


def remove_prefix(module: nn.Module) -> None:
    """Take it away again; nothing where there is none."""
    if module.__dict__.pop(_HELD, None) is not None:
        for name in (KEYS, VALUES):
            module._parameters.pop(name, None)
        module._modules.pop(GATES, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Opens):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


class _Opens:
    """The hook before an attention whose prefix has a gate: the gate reads what it reads."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(self, module: Any, args: Any, named: dict[str, Any]) -> None:
        held = _active(module)
        if held is not None and held.gate is not None:
            held.gate.leave(self.gate(args[0] if args else named["hidden_states"]))


def gate_prefix(module: nn.Module, name: str, gate: Gate) -> None:
    """Multiply the prefix of ``module``, keys and values, by a gate: each sample has its own.

    Args:
        module: an attention with a prefix.
        name: of the adapter.
        gate: of the attention's hidden states.
    """
    add_gate(module, name, gate)
    module.__dict__[_HELD].gate = Relay()
    module.register_forward_pre_hook(_Opens(gate), with_kwargs=True)


def activate_prefix(module: nn.Module, active: bool) -> None:
    """Have an attention module read its prefix, or attend as if it had none."""
    module.__dict__[_HELD].active = active


def has_prefix(module: nn.Module) -> bool:
    """Whether ``module`` is an attention with a prefix, active or not."""
    return _HELD in module.__dict__


def _hold(module: nn.Module, held: Held) -> None:
    if has_prefix(module):
        raise ConfigError(
            f"prefix: {type(module).__name__} must have no prefix yet, and has one. Remove it "
            "first."
        )
    module.__dict__[_HELD] = held


def _active(module: Any) -> Held | None:
    held: Held | None = module.__dict__.get(_HELD)
    if held is None or not held.active or (held.pool is not None and held.pool.asleep):
        return None
    return held


def _both(module: Any, held: Held) -> tuple[Tensor, Tensor]:
    if held.encoded is not None:
        return held.encoded.both()
    return getattr(module, KEYS), getattr(module, VALUES)


# -------------------------------------------------------------------------------- attending


def attend_with_prefix(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls: :func:`deltaops.ops.prefix_attention` where that computes it.

    Dropout, a mask of numbers and a bias that is trained are none of the op's. There transformers'
    function for "sdpa" runs on copies of keys and values with the prefix before them. A module
    without a prefix has what it had: :func:`~.attention_functions.attend` in a block of ours, else
    transformers'.

    Args:
        module: the attention; its prefix, whether it is causal, how many queries share a key.
        query: ``[B, H, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``.
        value: as ``key``.
        attention_mask: ``[B or 1, H or 1, Lq, Lk]``, without the prefix.
        dropout: of the weights.
        scaling: of the scores; ``D ** -0.5`` where None.
        is_causal: instead of the module's own.
        **named: for "sdpa". A bias of P + Lk columns has those of the prefix first.
    Returns: y ``[B, Lq, H, D]``, and None for the weights.
    Raises: NoBackendError where strictness or a named backend was asked for and the op cannot.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as theirs

    bias: Tensor | None = named.get(BIAS)
    held = _active(module)
    if held is None:
        if bias is not None:
            named[BIAS] = bias[..., bias.shape[-1] - key.shape[2] :]
        settings = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **named}
        given = module, query, key, value, attention_mask
        backend = module.__dict__.get("backend")
        if backend is None or torch.compiler.is_compiling():  # as a block of ours has it then
            out: tuple[Tensor, Tensor | None] = theirs(*given, **settings)
            return out
        return attend(theirs, backend, module.__dict__.get("strict", False), *given, **settings)
    prefix_k, prefix_v = _both(module, held)
    k, v, causal = visible(module, query, key, value, attention_mask, is_causal)
    hidden = key.shape[2] - k.shape[2]
    if bias is not None:
        bias = named[BIAS] = without_unread_gradient(bias, module, held.tables)
    if bias is not None and hidden and bias.shape[-1] >= key.shape[2]:  # as the keys are cut
        bias = named[BIAS] = bias[..., : bias.shape[-1] - hidden]
    groups = max(getattr(module, "num_key_value_groups", 1), 1)
    reason = _beyond(dropout, named) or _unfit(module, bias, query, k, prefix_k)
    own_k, own_v = prefix_k, prefix_v
    seen = None if held.pool is None else held.pool.seen(query.shape[0])
    if held.gate is not None:
        reason = GATED
        opened = held.gate.take()[..., None]  # [B, 1, 1, 1]
        own_k, own_v = opened * prefix_k, opened * prefix_v
    if reason is None and not attends(query, k, v, attention_mask, groups, causal):
        reason = "these tensors, or their mask of numbers"
    if reason is None:
        if seen is not None:
            bias = _hiding(seen, k, bias)
        y = prefix_attention(
            query, k, v, prefix_k, prefix_v, mask=attention_mask, causal=causal,
            bias=bias, scale=scaling, backend=held.backend, strict=held.strict,
        )  # fmt: skip
        return y.transpose(1, 2).contiguous(), None  # no copy: this is how it lies
    if held.strict or held.backend != "auto":
        asked = "strict=True" if held.backend == "auto" else f"backend={held.backend!r}"
        raise NoBackendError(
            f"prefix: {type(module).__name__} must run by one of deltaops' backends ({asked}), and "
            f"prefix_attention does not take {reason}. Attach with backend='auto', strict=False."
        )
    mask = attention_mask
    if mask is None or mask.dtype is torch.bool:
        mask = mask_of_both(query, k, prefix_k, mask, causal)
    else:
        mask = _grown(mask, prefix_k)
    if seen is not None:
        mask = _narrowed(mask, seen, k)
    if bias is not None and bias.shape[-1] == k.shape[2]:
        named[BIAS] = _grown(bias, prefix_k)
    out = theirs(
        module, query, join(own_k, k), join(own_v, v), mask,
        dropout=dropout, scaling=scaling, is_causal=False, **named,
    )  # fmt: skip
    return out


def _beyond(dropout: float, named: dict[str, Any]) -> str | None:
    """What is asked for that is none of the op's; None where nothing is."""
    if dropout:
        return "dropout of the weights"
    if SDPA not in _settings:
        return "what 'sdpa' computes in this version of transformers"
    known = _settings[SDPA]
    asked = [
        n for n, x in named.items() if n in known and n != BIAS and x is not None and x is not False
    ]
    return f"{asked[0]!r}, a setting of 'sdpa'" if asked else None


def _unfit(module: Any, bias: Tensor | None, q: Tensor, k: Tensor, prefix: Tensor) -> str | None:
    """What of a bias is none of the op's; None where it takes it."""
    if bias is None:
        return None
    # not by the grad mode: a block that is run again for its gradients takes the same way
    if bias.requires_grad or (module.training and trains(module)):
        return WANTS_GRADIENT
    sizes = (k.shape[2], prefix.shape[1] + k.shape[2])
    if bias.dim() != 4 or bias.shape[3] not in sizes or bias.dtype not in (q.dtype, torch.float32):
        return f"a bias {list(bias.shape)} of {bias.dtype}"
    return None


def _grown(added: Tensor, prefix: Tensor) -> Tensor:
    """Numbers that are added to scores, and nothing added to those of a prefix."""
    return torch.cat([added.new_zeros((*added.shape[:3], prefix.shape[1])), added], 3)


def _hiding(seen: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The bias ``[B, …, P + Lk]`` that leaves a sample those of the prefix that it chose."""
    hidden = torch.zeros(seen.shape, dtype=k.dtype, device=k.device).masked_fill(~seen, -torch.inf)
    hidden = torch.cat([hidden, hidden.new_zeros(*seen.shape[:3], k.shape[2])], 3)
    if bias is None:
        return hidden
    if bias.shape[3] == k.shape[2]:
        bias = torch.cat([bias.new_zeros(*bias.shape[:3], seen.shape[3]), bias], 3)
    return bias + hidden


def _narrowed(mask: Tensor | None, seen: Tensor, k: Tensor) -> Tensor:
    """``mask``, of P + Lk columns, without those of the prefix that a sample did not choose."""
    own = torch.cat([seen, seen.new_ones(*seen.shape[:3], k.shape[2])], 3)
    if mask is None:
        return own
    return mask & own if mask.dtype is torch.bool else mask.masked_fill(~own, -torch.inf)


# ---------------------------------------------------------------------------------- reporting


def reads_prefix(module: Any) -> bool:
    """Whether ``module`` is an attention with a prefix that it reads as things are now."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return _active(module) is not None and implementation == NAME


def told_of_prefix(module: Any, tokens: int) -> tuple[str, str]:
    """What runs an attention with a prefix, "torch" or a backend, and why; for the report.

    Args:
        module: an attention with a prefix.
        tokens: of one sequence.
    """
    held: Held = module.__dict__[_HELD]
    if not reads_prefix(module):
        return "torch", "by transformers: the prefix is disabled"
    if held.gate is not None:
        return "torch", f"prefix_attention does not take {GATED}"
    with torch.no_grad():
        prefix, _ = _both(module, held)
    query = next(p for child in module.children() for p in child.parameters())
    base = getattr(type(module), "base_class", type(module))
    biased = BIAS in words(unwrap(base.forward).__code__)
    pooled = held.pool is not None  # whose choice is a bias
    if biased and trains(module):
        return "torch", f"prefix_attention does not take {WANTS_GRADIENT}: its {TABLE} is trained"
    h_kv, length, width = prefix.shape
    call = PrefixAttentionCall(
        prefix.device.type, query.dtype, prefix.dtype, 1, max(heads_of(module), h_kv), h_kv, tokens,
        tokens, length, width, False, bool(getattr(module, "is_causal", True)), biased or pooled,
    )  # fmt: skip
    explanation = explain_call(call, held.backend)
    eager = explanation.chosen == LAST_RESORT and held.backend != LAST_RESORT
    reason = explanation.reason
    if biased and not eager and not hasattr(module, TABLE) and not makes_zeros(module):
        reason += "; torch where a bias that its stack's first layer makes is trained"
    return "torch" if eager else explanation.chosen or "none", reason


def heads_of(module: Any) -> int:
    """Heads of an attention's queries; 1 where it does not say."""
    found = number(module, "num_heads", "num_attention_heads", "n_heads")
    return found or number(getattr(module, "config", None), "num_attention_heads") or 1


def head_width(module: nn.Module) -> int | None:
    """The features of a head, by the names that transformers' attentions have for it."""
    return number(module, "head_dim", "attention_head_size", "head_size", "key_value_proj_dim")


def number(holder: Any, *names: str) -> int | None:
    """The first of these attributes that is a number."""
    return next((n for name in names if isinstance(n := getattr(holder, name, None), int)), None)
