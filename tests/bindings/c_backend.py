"""``libdeltaops.so`` through ctypes and its header, as a backend for the conformance checks."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaops.backends import Call, DoraNormCall, GroupMember, PromptEmbeddingCall
from deltaops.backends.plain import thirds
from deltaops.native import ACTIVATIONS, NORMS, REDUCTIONS
from deltaops.reference.philox import drop_threshold
from deltaops.testing import Grouping

from .c_header import Header


def code(t: Tensor) -> int:
    return {torch.float32: 0, torch.bfloat16: 1}[t.dtype]


NOTHING = ctypes.create_string_buffer(64)


def address(t: Tensor) -> int:
    """An empty tensor has no memory, and null would say that it is absent."""
    return t.data_ptr() or ctypes.addressof(NOTHING)


def adjacent(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def lengths(t: Tensor) -> tuple[int, ...]:
    """Strides, 0 where one element serves all."""
    return tuple(0 if size == 1 else step for size, step in zip(t.shape, t.stride(), strict=True))


def settings(member: GroupMember) -> tuple[Any, ...]:
    plan: Any = member.plan
    return plan.scaling, plan.dropout, plan.activation


class CBackend(Grouping):
    """Every op through the structs of the header."""

    name = "c"

    def __init__(self, include: str, library: str) -> None:
        self.alive: list[Any] = []  # whose addresses the next call's structs hold
        self.header = Header(Path(include, "deltaops.h"), library)

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, call: Call) -> str | None:
        return f"has no {call.op}" if isinstance(call, DoraNormCall | PromptEmbeddingCall) else None

    def call(self, function: str, **fields: Any) -> None:
        self.header.call(function, num_threads=torch.get_num_threads(), **fields)
        self.alive.clear()

    def matrix(self, t: Tensor | None) -> Any:
        """A view; a vector is one row."""
        made = self.header.structs["deltaops_matrix"]
        if t is None:
            return made()
        self.alive.append(t)
        t = t[None] if t.dim() == 1 else t
        return made(address(t), *t.shape, *t.stride(), code(t), 0)

    def matrices(self, tensors: Sequence[Tensor | None]) -> Any:
        made = self.header.structs["deltaops_matrix"] * max(1, len(tensors))
        return made(*map(self.matrix, tensors))

    # ------------------------------------------------------------------------- delta_linear

    def forward(self, *given: Any) -> Any:
        y, s, layer = self._forward(*given)
        self.call("delta_linear_forward", **layer)
        return y, s

    def backward(self, *given: Any) -> list[Tensor]:
        grads, layer = self._backward(*given)
        self.call("delta_linear_backward", **layer)
        return grads

    def forward_group(self, x: Tensor, members: Sequence[GroupMember]) -> list[Any]:
        made = [
            self._forward(x, m.weight, m.bias, *thirds(m.operands), *settings(m), m.seed, m.adapter)
            for m in members
        ]
        self._group("forward", [layer for *_, layer in made])
        return [(y, s) for y, s, _ in made]

    def backward_group(
        self, grad_y: Any, x: Tensor, members: Sequence[GroupMember], s: Any, needs: Any
    ) -> list[list[Tensor]]:
        made = []
        for i, (m, grad, state, need) in enumerate(zip(members, grad_y, s, needs, strict=True)):
            given = grad, x, m.weight, *thirds(m.operands)[:2], state, *settings(m), m.seed
            # the sum over all layers is the first one's
            made.append(self._backward(*given, [need[0] and i == 0, *need[1:]], m.adapter))
        self._group("backward", [layer for _, layer in made])
        return [grads for grads, _ in made]

    def _group(self, direction: str, layers: Sequence[dict[str, Any]]) -> None:
        threads = torch.get_num_threads()
        structs = [
            self.header.arguments(f"delta_linear_{direction}", num_threads=threads, **layer)
            for layer in layers
        ]
        call = getattr(self.header.library, f"deltaops_cpu_delta_linear_group_{direction}")
        status = call((type(structs[0]) * len(structs))(*structs), len(structs))
        assert status == 0, self.header.library.deltaops_last_error().decode()
        self.alive.clear()

    def _forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        a, b, branch_bias, scaling, dropout, activation, seed, *adapter = rest
        y = x.new_empty((x.shape[0], weight.shape[0]))
        s = torch.empty((x.shape[0], sum(t.shape[0] for t in a)))
        layer = self._layer(a, b, branch_bias, scaling, dropout, activation, seed, *adapter)
        views = {"x": x, "weight": weight, "bias": bias, "y": y, "s": s}
        layer |= {name: self.matrix(t) for name, t in views.items()}
        return y, s, layer

    def _backward(self, grad_y: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> Any:
        a, b, s, scaling, dropout, activation, seed, needs, *adapter = rest
        none, n = [None] * len(a), len(a)
        layer = self._layer(a, b, none, scaling, dropout, activation, seed, *adapter)
        shapes = [x.shape, weight.shape[:1], *(t.shape for t in (*a, *b)),
                  *(t.shape[:1] for t in a)]  # fmt: skip
        like = [grad_y, grad_y, *a, *b, *a]
        grads = [
            t.new_empty(shape) if need else None
            for t, shape, need in zip(like, shapes, needs, strict=True)
        ]
        views = {"grad_y": grad_y, "x": x, "weight": weight, "s": s,
                 "grad_x": grads[0], "grad_bias": grads[1]}  # fmt: skip
        layer |= {name: self.matrix(t) for name, t in views.items()}
        parts = grads[2 : 2 + n], grads[2 + n : 2 + 2 * n], grads[2 + 2 * n :]
        lists = [self.matrices(part) for part in parts]
        self.alive += lists
        names = ("grad_a", "grad_b", "grad_branch_bias")
        layer |= {k: ctypes.addressof(v) for k, v in zip(names, lists, strict=True)}
        return [g for g in grads if g is not None], layer

    def _layer(self, a: Any, b: Any, bias: Any, *settings: Any) -> dict[str, Any]:
        scaling, dropout, activation, seed, *adapter = settings
        made = (self.header.structs["deltaops_branch"] * max(1, len(a)))(
            *(
                (self.matrix(a_i), self.matrix(b_i), self.matrix(bias_i), s,
                 drop_threshold(p), i, ACTIVATIONS[act])
                for i, (a_i, b_i, bias_i, s, p, act) in enumerate(
                    zip(a, b, bias, scaling, dropout, activation, strict=True)
                )
            )
        )  # fmt: skip
        self.alive.append(made)
        return {
            "branches": ctypes.addressof(made),
            "num_branches": len(a),
            "seed": 0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
            "adapter": address(adapter[0]) if adapter and adapter[0] is not None else None,
        }

    # ------------------------------------------------------------------------- rows

    def bottleneck_forward(self, x: Tensor, residual: Any, *rest: Any) -> Any:
        gamma, beta, down, down_bias, up, up_bias, scaling, eps, activation, norm = rest
        h = torch.empty((x.shape[0], down.shape[0]))
        y, stats = torch.empty_like(x, memory_format=torch.contiguous_format), self._stats(x, norm)
        views = {"x": x, "residual": residual, "gamma": gamma, "beta": beta, "down": down,
                 "down_bias": down_bias, "up": up, "up_bias": up_bias, "y": y, "h": h}  # fmt: skip
        views |= {"stats": stats if norm != "none" else None}
        self.call(
            "bottleneck_forward",
            **{name: self.matrix(t) for name, t in views.items()},
            scaling=scaling, eps=eps, activation=ACTIVATIONS[activation], norm=NORMS[norm],
        )  # fmt: skip
        return y, h, stats

    def bottleneck_backward(self, grad_y: Tensor, x: Any, h: Tensor, *rest: Any) -> list[Tensor]:
        stats, gamma, beta, down, up, scaling, activation, norm, residual_is_x, needs = rest
        like = [grad_y, gamma, beta, down, down[:, 0], up, up[:, 0]]
        grads = self._empty(like, needs)
        names = ("x", "gamma", "beta", "down", "down_bias", "up", "up_bias")
        views = {"grad_y": grad_y, "x": x, "h": h, "gamma": gamma, "beta": beta, "down": down,
                 "up": up, "stats": stats if norm != "none" else None}  # fmt: skip
        views |= {f"grad_{name}": g for name, g in zip(names, grads, strict=True)}
        self.call(
            "bottleneck_backward",
            **{name: self.matrix(t) for name, t in views.items()},
            scaling=scaling, activation=ACTIVATIONS[activation], norm=NORMS[norm],
            residual_is_x=residual_is_x,
        )  # fmt: skip
        return [g for g in grads if g is not None]

    def norm_bias_forward(self, x: Tensor, gamma: Any, bias: Any, eps: float, norm: str) -> Any:
        y, stats = torch.empty_like(x, memory_format=torch.contiguous_format), self._stats(x, norm)
        views = {"x": x, "gamma": gamma, "bias": bias, "y": y, "stats": stats}
        views = {name: self.matrix(t) for name, t in views.items()}
        self.call("norm_bias_forward", **views, eps=eps, norm=NORMS[norm])
        return y, stats

    def norm_bias_backward(self, grad_y: Tensor, x: Any, stats: Tensor, *rest: Any) -> list[Tensor]:
        gamma, dtype, norm, needs = rest
        vector = grad_y.new_empty(grad_y.shape[1], dtype=dtype)
        grads = self._empty([grad_y, vector, vector], needs)
        views = {"grad_y": grad_y, "x": x, "stats": stats, "gamma": gamma}
        names = ("grad_x", "grad_gamma", "grad_bias")
        views |= dict(zip(names, grads, strict=True))
        views = {name: self.matrix(t) for name, t in views.items()}
        self.call("norm_bias_backward", **views, norm=NORMS[norm])
        return [g for g in grads if g is not None]

    @staticmethod
    def _stats(x: Tensor, norm: str) -> Tensor:
        return torch.empty((x.shape[0] if norm != "none" else 0, 2))

    @staticmethod
    def _empty(like: Sequence[Any], needs: Sequence[bool]) -> list[Tensor | None]:
        dense = torch.contiguous_format
        return [
            torch.empty_like(t, memory_format=dense) if need else None
            for t, need in zip(like, needs, strict=True)
        ]

    def gated_forward(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        y = gate.new_empty(gate.shape)
        views = {"gate": adjacent(gate), "up": adjacent(up), "y": y}
        views = {name: self.matrix(t) for name, t in views.items()}
        self.call("gated_forward", **views, activation=ACTIVATIONS[activation])
        return y

    def gated_backward(self, grad_y: Tensor, gate: Tensor, up: Any, *rest: Any) -> list[Tensor]:
        activation, needs = rest
        grads = self._empty([grad_y, grad_y], needs)
        views = {"grad_y": grad_y, "gate": adjacent(gate), "up": adjacent(up)}
        views |= dict(zip(("grad_gate", "grad_up"), grads, strict=True))
        views = {name: self.matrix(t) for name, t in views.items()}
        self.call("gated_backward", **views, activation=ACTIVATIONS[activation])
        return [g for g in grads if g is not None]

    def cross_entropy_forward(self, logits: Tensor, *rest: Any) -> Any:
        loss, state = torch.empty(()), torch.empty((logits.shape[0], 2))
        logits, fields = self._cross_entropy(logits, *rest, state)
        self.call("cross_entropy_forward", **fields, loss=loss.data_ptr())
        return loss, state

    def cross_entropy_backward(self, grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
        target, state, *settings = rest
        logits, fields = self._cross_entropy(logits, target, *settings, state)
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        fields |= {"grad_loss": grad_loss.data_ptr(), "grad_logits": self.matrix(grad)}
        self.call("cross_entropy_backward", **fields)
        return grad

    def _cross_entropy(self, logits: Tensor, *rest: Any) -> tuple[Tensor, dict[str, Any]]:
        target, ignore_index, mean, state = rest
        logits = adjacent(logits)
        return logits, {
            "logits": self.matrix(logits),
            "target": address(target),
            "ignore_index": ignore_index,
            "reduction": REDUCTIONS["mean" if mean else "sum"],
            "state": self.matrix(state),
        }

    # ------------------------------------------------------------------------- heads

    def rotary_forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
        return self._rotary(x, cos, sin, 0)

    def rotary_backward(self, grad: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
        return self._rotary(grad, cos, sin, 1)

    def _rotary(self, x: Tensor, cos: Tensor, sin: Tensor, backward: int) -> Tensor:
        x, cos, sin = adjacent(x), cos.contiguous(), sin.contiguous()
        y = x.new_empty(x.shape)
        self.header.call(
            "rotary",
            num_threads=torch.get_num_threads(),
            sizes=tuple(x.shape), x=address(x), x_strides=x.stride()[:3],
            y=address(y), y_strides=y.stride()[:3], cos=address(cos), sin=address(sin),
            table_strides=lengths(cos)[:2], dtype=code(x), table_dtype=code(cos),
            backward=backward,
        )  # fmt: skip
        return y

    def attention_forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
        return self._attend(q, k, v, None, None, *rest)

    def prefix_attention_forward(self, *tensors: Any, bias: Any = None) -> Any:
        return self._attend(*tensors, bias)

    def _attend(self, *given: Any) -> tuple[Tensor, Tensor]:
        fields = self._attention(*given)
        q = given[0]
        y, lse = q.new_empty(q.shape), torch.empty(q.shape[:3])
        self.call("attention_forward", **fields, y=self._heads(y), lse=address(lse))
        return y, lse

    def attention_backward(self, grad_y: Tensor, q: Tensor, k: Tensor, *rest: Any) -> list[Tensor]:
        v, y, lse, mask, scale, causal, _ = rest
        fields = self._attention(q, k, v, None, None, mask, scale, causal)
        return self._attend_back(fields, grad_y, y, lse, dict(zip("qkv", (q, k, v), strict=True)))

    def prefix_attention_backward(
        self, grad_y: Tensor, q: Tensor, k: Tensor, *rest: Any, bias: Any = None
    ) -> list[Tensor]:
        v, prefix_k, prefix_v, y, lse, mask, scale, causal, _ = rest
        fields = self._attention(q, k, v, prefix_k, prefix_v, mask, scale, causal, bias)
        named = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
        return self._attend_back(fields, grad_y, y, lse, named)

    def _attend_back(
        self, fields: Any, grad_y: Tensor, y: Tensor, lse: Tensor, named: dict[str, Tensor]
    ) -> list[Tensor]:
        grads = {name: t.new_empty(t.shape) for name, t in named.items()}
        grad_y = adjacent(grad_y)
        fields |= {"grad_y": self._heads(grad_y), "y": self._heads(y), "lse": address(lse)}
        fields |= {f"grad_{name}": self._heads(g) for name, g in grads.items()}
        self.call("attention_backward", **fields)
        return list(grads.values())

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> dict[str, Any]:
        prefix_k, prefix_v, mask, scale, causal, *more = rest
        bias = more[0] if more else None
        q, k, v = adjacent(q), adjacent(k), adjacent(v)
        fields = {
            "sizes": (*q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3]),
            "q": self._heads(q), "k": self._heads(k), "v": self._heads(v),
            "scale": scale, "causal": causal, "dtype": code(q),
        }  # fmt: skip
        if prefix_k is not None:
            prefix_k, prefix_v = adjacent(prefix_k), adjacent(prefix_v)
            fields |= {
                "prefix_k": self._heads(prefix_k), "prefix_v": self._heads(prefix_v),
                "prefix_length": prefix_k.shape[1], "prefix_dtype": code(prefix_k),
            }  # fmt: skip
        if mask is not None:
            fields |= {"mask": address(mask), "mask_strides": mask.stride()}
            if mask.stride(3) > 1:
                raise NotImplementedError("masks of the cases have adjacent columns")
        if bias is not None:
            whole = bias.shape[3] == prefix_k.shape[1] + k.shape[2]
            once = bias[tuple(slice(None if step else 1) for step in bias.stride())]
            once = once.float().contiguous()
            self.alive.append(once)
            fields |= {
                "bias": address(once),
                "bias_strides": lengths(once),
                "bias_from": 0 if whole else prefix_k.shape[1],
            }
        return fields

    def _heads(self, t: Tensor) -> Any:
        """[B, H, L, D], or [H, L, D] of a prefix."""
        made = self.header.structs["deltaops_heads"]
        self.alive.append(t)
        steps = (0, *t.stride()[:2]) if t.dim() == 3 else t.stride()[:3]
        return made(address(t), (ctypes.c_int64 * 3)(*steps))
