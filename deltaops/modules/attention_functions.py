"""Functions that transformers' attention modules call, and ours in their place.

Each of ours takes what theirs takes. It runs our op where that computes the same, and theirs
everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaops.backends import AttentionCall, RotaryCall
from deltaops.ops import attention, rotary
from deltaops.reference import attention as attention_reference
from deltaops.reference import rotary as rotary_reference

from .block import plain, takes
from .program import Program, program_of

ROTARY = "apply_rotary_pos_emb"
"""Global of transformers' files: ``(q, k, cos, sin, unsqueeze_dim=1)`` → both turned."""
TABLE = "ALL_ATTENTION_FUNCTIONS"
"""Global of transformers' files: implementation → ``(module, q, k, v, mask, **settings)`` → y in
``[B, Lq, H, D]``, and the weights or None."""
SDPA = "sdpa"
"""The implementation that runs torch's scaled_dot_product_attention."""
BIAS = "position_bias"
"""What T5 hands on to be added to the scores; ``prefix_attention`` alone takes one."""


def stand_ins(function: Any, backend: str, strict: bool) -> dict[str, Any]:
    """Name of a global → what is to stand under it, as far as ``function`` reads it and we know it.

    Args:
        function: an attention module's ``forward``.
        backend: passed to the ops.
        strict: passed to the ops.
    """
    if type(function) is not FunctionType:
        return {}
    code, there = function.__code__, function.__globals__
    ours: dict[str, Any] = {}
    if ROTARY in code.co_names and _is_rotary(there.get(ROTARY)):
        ours[ROTARY] = partial(rotate, there[ROTARY], backend, strict)
    if TABLE in code.co_names and _is_table(there.get(TABLE)):
        ours[TABLE] = AttentionTable(there[TABLE], backend, strict)
    return ours


def stand_ins_in_one(ours: dict[str, Any]) -> dict[str, Any]:
    """Those that turn where they attend: for a program that hands over what is turned.

    Args:
        ours: from :func:`stand_ins`, both.
    """
    return {ROTARY: partial(hold, ours[ROTARY]), TABLE: TurningTable(ours[TABLE])}


# ------------------------------------------------------------------------------------- rotary


def rotate(
    theirs: Any,
    backend: str,
    strict: bool,
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
    **named: Any,
) -> tuple[Tensor, Tensor]:
    """``theirs(q, k, cos, sin)``, by :func:`deltaops.ops.rotary` where that computes the same.

    Args:
        theirs: transformers' function, for all other calls.
        backend: passed to the op.
        strict: passed to the op.
        q: queries ``[B, H, L, D]``.
        k: keys; of fewer heads where they are shared.
        cos: ``[B or 1, L, D]``.
        sin: as ``cos``.
        *rest: asks for another layout.
        **named: as ``rest``.
    """
    if rest or named or not (_turns(q, cos, sin) and _turns(k, cos, sin)):
        out: tuple[Tensor, Tensor] = theirs(q, k, cos, sin, *rest, **named)
        return out
    call = RotaryCall("cpu" if q.is_cpu else q.device.type, q.dtype, cos.dtype, *q.shape)
    if not takes(call, backend, strict):
        out = theirs(q, k, cos, sin)
        return out
    turned = [rotary(x, cos, sin, backend=backend, strict=strict) for x in (q, k)]
    return turned[0], turned[1]


class Unturned(NamedTuple):
    """Queries or keys on the way to what attends, which turns them."""

    x: Tensor
    tables: tuple[Tensor, Tensor]
    turn: Callable[..., tuple[Tensor, Tensor]]
    """Turns both, as it is done elsewhere: ``turn(q, k, cos, sin)``."""


def hold(
    turn: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **named: Any
) -> tuple[Any, Any]:
    """``turn(q, k, cos, sin)``, but what our op would turn is left to what attends.

    Args:
        turn: :func:`rotate` in the place of transformers' function.
        q: see :func:`rotate`; so the rest.
        k: as ``q``.
        cos: as ``q``.
        sin: as ``q``.
        *rest: as ``q``.
        **named: as ``q``.
    """
    if rest or named or not (_turns(q, cos, sin) and _turns(k, cos, sin)):
        return turn(q, k, cos, sin, *rest, **named)  # type: ignore[no-any-return]  # a partial
    return Unturned(q, (cos, sin), turn), Unturned(k, (cos, sin), turn)


def turned(query: Tensor | Unturned, key: Tensor | Unturned) -> tuple[Tensor, Tensor]:
    """Both as scores are made of them."""
    if isinstance(query, Unturned) and isinstance(key, Unturned):
        return query.turn(query.x, key.x, *query.tables)
    assert not isinstance(query, Unturned)
    assert not isinstance(key, Unturned)
    return query, key


def _turns(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the op takes these; of two dtypes transformers' result has the wider one."""
    if not plain(x, cos, sin) or x.dim() != 4 or cos.dim() != 3:
        return False
    if cos.dtype is not x.dtype or sin.shape != cos.shape:
        return False
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return False
    batch, _, length, width = x.shape
    return width % 2 == 0 and cos.shape[0] in (1, batch) and cos.shape[1:] == (length, width)


def _is_rotary(function: Any) -> bool:
    found = _rotary_program(function)
    return found is not None and found == known_rotary()


def _rotary_program(function: Any) -> Program | None:
    """That of transformers' function, and of the one that it calls."""
    own = program_of(function)
    return own and (own, program_of(function.__globals__.get("rotate_half")))


@cache
def known_rotary() -> Program | None:
    """Llama's program, if it computes our op in this version of transformers."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q, k, cos, sin = torch.randn(4, 2, 3, 5, 6, dtype=torch.float32)
        cos, sin = cos[:, 0], sin[:, 0]
        theirs = apply_rotary_pos_emb(q, k, cos, sin)
        ours = [rotary_reference.forward(x, cos, sin, False) for x in (q, k)]
    same = torch.allclose(torch.cat(theirs), torch.cat(ours), atol=1e-6)
    return _rotary_program(apply_rotary_pos_emb) if same else None


# ---------------------------------------------------------------------------------- attention


class AttentionTable:
    """transformers' table of attention functions, with ours where it has the one that we know."""

    def __init__(self, theirs: Any, backend: str, strict: bool) -> None:
        self._theirs = theirs
        self._settings = backend, strict

    def get_interface(self, name: Any, default: Any) -> Any:
        """The function of the implementation ``name``; theirs raises for an unknown one."""
        return self._ours(self._theirs.get_interface(name, default))

    def get(self, name: Any, default: Any = None) -> Any:
        """As a dictionary has it."""
        return self._ours(self._theirs.get(name, default))

    def __getitem__(self, name: Any) -> Any:
        return self._ours(self._theirs[name])

    def __contains__(self, name: object) -> bool:
        return name in self._theirs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)

    def _ours(self, function: Any) -> Any:
        if function is None or function is not known_sdpa():
            return function
        return partial(attend, function, *self._settings)


class TurningTable(AttentionTable):
    """One for a program that hands over what :func:`hold` gave."""

    def __init__(self, table: AttentionTable) -> None:
        super().__init__(table._theirs, *table._settings)

    def _ours(self, function: Any) -> Any:
        ours = super()._ours(function)
        return partial(_turn_first, function) if ours is function is not None else ours


def _turn_first(function: Any, module: Any, query: Any, key: Any, *rest: Any, **named: Any) -> Any:
    return function(module, *turned(query, key), *rest, **named)


def attend(
    theirs: Any,
    backend: str,
    strict: bool,
    module: Any,
    query: Tensor | Unturned,
    key: Tensor | Unturned,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """``theirs(module, …)``, by :func:`deltaops.ops.attention` where that computes the same.

    Args:
        theirs: transformers' function, for all other calls.
        backend: passed to the op.
        strict: passed to the op.
        module: the attention; whether it is causal, and how many queries share a key.
        query: ``[B, H, Lq, D]``.
        key: ``[B, Hkv, Lk, D]``; on the way as ``query`` is.
        value: as ``key``.
        attention_mask: ``[B or 1, H or 1, Lq, Lk]``.
        dropout: of the weights.
        scaling: of the scores; ``D ** -0.5`` where None.
        is_causal: instead of the module's own.
        **named: for other implementations, unless ``theirs`` reads it.
    Returns: y ``[B, Lq, H, D]``, and None for the weights, as ``theirs``.
    """
    q, tables = (query.x, query.tables) if isinstance(query, Unturned) else (query, None)
    k = key.x if isinstance(key, Unturned) else key
    k, v, causal = visible(module, q, k, value, attention_mask, is_causal)
    groups = max(getattr(module, "num_key_value_groups", 1), 1)
    fits = (
        not (dropout or asks(theirs, named))
        and attends(q, k, v, attention_mask, groups, causal)
        and takes(AttentionCall.of(q, k, attention_mask, causal), backend, strict)
    )
    if not fits:
        out: tuple[Tensor, Tensor | None] = theirs(
            module, *turned(query, key), value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **named,
        )  # fmt: skip
        return out
    y = attention(
        q, k, v, tables=tables, mask=attention_mask, causal=causal, scale=scaling,
        backend=backend, strict=strict,
    )  # fmt: skip
    return y.transpose(1, 2).contiguous(), None  # no copy: this is how it lies


def visible(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None,
) -> tuple[Tensor, Tensor, bool]:
    """The keys and values that are looked at, and whether causality hides some, as "sdpa" has it.

    A mask says all, one query sees all keys, and where keys are ahead (of a cache that is larger
    than what it holds), the first ones are those of the queries.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    causal = bool(causal) and length > 1 and attention_mask is None
    if causal and key.shape[2] > length:
        return key[:, :, :length], value[:, :, :length], causal
    return key, value, causal


def asks(theirs: Any, named: dict[str, Any]) -> bool:
    """Whether one of the settings is on that their program has a word for."""
    known = words(theirs.__code__)
    return any([x is not None and x is not False for name, x in named.items() if name in known])


def attends(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: int, causal: bool
) -> bool:
    """Whether the op takes these; a mask of numbers is added to the scores, which it cannot do."""
    if not plain(q, k, v) or not q.dim() == k.dim() == 4 or k.shape != v.shape:
        return False
    if not q.dtype is k.dtype is v.dtype or not q.is_floating_point():
        return False
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is not q.dtype:
        return False  # torch's would compute in that dtype
    (b, h, l_q, d), (b_kv, h_kv, l_kv, d_kv) = q.shape, k.shape
    if (b, d) != (b_kv, d_kv) or h_kv < 1 or h != h_kv * groups or (causal and l_q != l_kv):
        return False
    if mask is None:
        return True
    if not plain(mask) or mask.dtype is not torch.bool or mask.dim() != 4:
        return False
    full = zip(mask.shape, (b, h, l_q, l_kv), strict=True)
    return all([size in (1, whole) for size, whole in full])


def _is_table(found: Any) -> bool:
    from transformers.modeling_utils import AttentionInterface

    return isinstance(found, AttentionInterface) and known_sdpa() is not None


@cache
def known_sdpa() -> Any:
    """transformers' function for "sdpa", if it computes our op in this version; None otherwise."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as theirs

    if program_of(theirs) is None:
        return None
    with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        k, v = torch.randn(2, 2, 2, 5, 6, dtype=torch.float32)
        mask = torch.rand(2, 1, 5, 5) < 0.5
        mask[:, :, 3] = False  # a query that sees nothing
        for groups in (1, 2):
            module: Any = SimpleNamespace(is_causal=True, num_key_value_groups=groups)
            q = torch.randn(2, 2 * groups, 5, 6, dtype=torch.float32)
            for seen, causal in ((None, True), (None, False), (mask, True)):
                got, _ = theirs(module, q, k, v, seen, scaling=0.3, is_causal=causal)
                want, _ = attention_reference.forward(q, k, v, seen, 0.3, causal and seen is None)
                if not torch.allclose(got, want.transpose(1, 2), atol=1e-6):
                    return None
    return theirs


@cache
def words(code: CodeType) -> frozenset[str]:
    """Names of variables and texts of a program, those of its keyword arguments among them."""
    words = set(code.co_varnames)
    waiting: list[Any] = list(code.co_consts)
    while waiting:
        constant = waiting.pop()
        if isinstance(constant, str):
            words.add(constant)
        elif isinstance(constant, tuple):
            waiting.extend(constant)
    return frozenset(words)
