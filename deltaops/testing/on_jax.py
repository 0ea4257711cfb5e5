"""``deltaops.jax`` as a backend, so that the conformance checks can hold it to the reference.

Calls go where JAX's differentiable functions go: through XLA, compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from deltaops.backends import Call, GroupMember
from deltaops.backends.plain import thirds
from deltaops.bindings.jax import adapters, elementwise, group, heads, layers, linear
from deltaops.bindings.jax.autodiff import Op
from deltaops.bindings.settings import drop_threshold
from deltaops.native import ACTIVATIONS, NORMS, REDUCTIONS

from .grouped import Grouping
from .on_numpy import array, pairs, refusal, tensor


def _operands(**named: Any) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in named.items() if a is not None}


def _tensor(a: jax.Array) -> Tensor:
    return tensor(np.array(a))


@partial(jax.jit, static_argnums=(0, 1))
def _forward(op: Op, settings: Any, operands: dict[str, jax.Array]) -> Any:
    return op.forward(settings, operands, True)


@partial(jax.jit, static_argnums=(0, 1, 4))
def _backward(
    op: Op,
    settings: Any,
    operands: dict[str, jax.Array],
    grad_y: jax.Array,
    wanted: tuple[str, ...],
) -> Any:
    return op.backward(settings, operands, grad_y, wanted)


def _gradients(
    op: Op,
    settings: Any,
    operands: dict[str, jax.Array],
    grad_y: Any,
    names: Sequence[str],
    needs: Sequence[bool],
) -> list[Tensor]:
    wanted = tuple(name for name, need in zip(names, needs, strict=True) if need)
    found = _backward(op, settings, operands, jax.tree.map(jnp.asarray, grad_y), wanted)
    return [_tensor(found[name]) for name in wanted]


class JaxBackend(Grouping):
    """Each call through a compiled XLA program, with torch's thread count."""

    name = "jax"

    def unavailable(self) -> str | None:
        """None: where JAX is missing this file cannot be imported."""
        return None

    def unsupported(self, call: Call) -> str | None:
        """None, or what it does not take."""
        return refusal(call)

    def outrun(self, call: Call) -> str | None:
        """Never."""
        return None

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
        seed: Tensor | None,
        adapter: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.Backend`."""
        settings = self._settings(weight, scaling, dropout, activation)
        operands = self._layer(weight, a, b, seed, adapter, settings)
        operands |= _operands(x=array(x), bias=array(bias))
        operands |= _operands(**{f"bias.{i}": array(t) for i, t in enumerate(branch_bias)})
        y, kept = _forward(linear.DELTA_LINEAR, settings, operands)
        return _tensor(y), _tensor(kept["s"])

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        s: Tensor,
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
        seed: Tensor | None,
        needs: Sequence[bool],
        adapter: Tensor | None = None,
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.Backend`."""
        settings = self._settings(weight, scaling, dropout, activation)
        operands = self._layer(weight, a, b, seed, adapter, settings)
        operands |= _operands(x=array(x), s=array(s))
        names = ["x", "bias", *(n for kind in ("a", "b", "bias") for n in settings.names(kind))]
        return _gradients(linear.DELTA_LINEAR, settings, operands, array(grad_y), names, needs)

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember]
    ) -> list[tuple[Tensor, Tensor]]:
        """See :class:`.grouped.GroupedPlan`."""
        settings, operands = self._group(members)
        for i, m in enumerate(members):
            inner = thirds(m.operands)[2]
            named = {f"{i}.bias": array(m.bias)}
            named |= {f"{i}.bias.{j}": array(t) for j, t in enumerate(inner)}
            operands |= _operands(**named)
        operands |= _operands(x=array(x))
        y, kept = _forward(group.DELTA_LINEAR_GROUP, settings, operands)
        return [(_tensor(one), _tensor(kept[f"{i}.s"])) for i, one in enumerate(y)]

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """See :class:`.grouped.GroupedPlan`."""
        settings, operands = self._group(members)
        operands |= _operands(x=array(x), **{f"{i}.s": array(one) for i, one in enumerate(s)})
        names, flags = ["x"], [needs[0][0]]
        for i, (mine, need) in enumerate(zip(settings, needs, strict=True)):
            own = ("bias", *(n for kind in ("a", "b", "bias") for n in mine.names(kind)))
            names += [f"{i}.{name}" for name in own]
            flags += need[1:]
        grads = tuple(map(array, grad_y))
        found = _gradients(group.DELTA_LINEAR_GROUP, settings, operands, grads, names, flags)
        left = iter(found)
        counts = [sum(need) - (i > 0 and need[0]) for i, need in enumerate(needs)]
        return [[next(left) for _ in range(count)] for count in counts]

    def _group(
        self, members: Sequence[GroupMember]
    ) -> tuple[tuple[layers.Settings, ...], dict[str, jax.Array]]:
        made = []
        operands: dict[str, jax.Array] = {}
        for i, m in enumerate(members):
            plan: Any = m.plan
            settings = self._settings(m.weight, plan.scaling, plan.dropout, plan.activation)
            a, b, _ = thirds(m.operands)
            own = self._layer(m.weight, a, b, m.seed, m.adapter, settings)
            made.append(settings)
            operands |= {f"{i}.{name}": value for name, value in own.items()}
        return tuple(made), operands

    @staticmethod
    def _settings(
        weight: Tensor,
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> layers.Settings:
        return layers.Settings(
            tuple(scaling),
            tuple(drop_threshold("delta_linear", p) for p in dropout),
            tuple(ACTIVATIONS[name] for name in activation),
            weight.stride(1) != 1,
            torch.get_num_threads(),
        )

    @staticmethod
    def _layer(
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        seed: Tensor | None,
        adapter: Tensor | None,
        settings: layers.Settings,
    ) -> dict[str, jax.Array]:
        whole = int(seed) & 0xFFFFFFFFFFFFFFFF if seed is not None else 0
        return _operands(
            weight=array(weight.t() if settings.transposed else weight),
            seed=np.array([whole & 0xFFFFFFFF, whole >> 32], np.uint32),
            adapter=array(adapter),
            **{f"a.{i}": array(t) for i, t in enumerate(a)},
            **{f"b.{i}": array(t) for i, t in enumerate(b)},
        )

    def bottleneck_forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        scaling: float,
        eps: float,
        activation: str,
        norm: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AdapterBackend`."""
        settings = self._bottleneck(residual is x, scaling, eps, activation, norm)
        operands = _operands(
            x=array(x),
            residual=None if residual is x else array(residual),
            gamma=array(gamma),
            beta=array(beta),
            down=array(down),
            down_bias=array(down_bias),
            up=array(up),
            up_bias=array(up_bias),
        )
        y, kept = _forward(adapters.BOTTLENECK, settings, operands)
        none = torch.empty((0, 2))
        return _tensor(y), _tensor(kept["h"]), _tensor(kept["stats"]) if "stats" in kept else none

    def bottleneck_backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        h: Tensor,
        stats: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        activation: str,
        norm: str,
        residual_is_x: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.AdapterBackend`."""
        settings = self._bottleneck(residual_is_x, scaling, 0.0, activation, norm)
        operands = _operands(
            x=array(x),
            h=array(h),
            stats=None if norm == "none" else array(stats),
            gamma=array(gamma),
            beta=array(beta),
            down=array(down),
            up=array(up),
            # their values are not read
            down_bias=array(down.new_zeros(down.shape[0])),
            up_bias=array(up.new_zeros(up.shape[0])),
        )
        names = ("x", "gamma", "beta", "down", "down_bias", "up", "up_bias")
        op = adapters.BOTTLENECK
        return _gradients(op, settings, operands, array(grad_y), names, needs)

    @staticmethod
    def _bottleneck(
        own: bool, scaling: float, eps: float, activation: str, norm: str
    ) -> adapters.Bottleneck:
        threads = torch.get_num_threads()
        return adapters.Bottleneck(own, scaling, eps, ACTIVATIONS[activation], NORMS[norm], threads)

    def norm_bias_forward(
        self, x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AdapterBackend`."""
        settings = adapters.NormBias(eps, NORMS[norm], torch.get_num_threads())
        operands = _operands(x=array(x), gamma=array(gamma), bias=array(bias))
        y, kept = _forward(adapters.NORM_BIAS, settings, operands)
        return _tensor(y), _tensor(kept["stats"]) if "stats" in kept else torch.empty(0, 2)

    def norm_bias_backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        stats: Tensor,
        gamma: Tensor | None,
        dtype: torch.dtype,
        norm: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.AdapterBackend`."""
        settings = adapters.NormBias(0.0, NORMS[norm], torch.get_num_threads())
        bias = array(grad_y.new_zeros(grad_y.shape[1], dtype=dtype))  # its values are not read
        operands = _operands(
            x=array(x),
            stats=None if norm == "none" else array(stats),
            gamma=array(gamma),
            bias=bias,
        )
        names = ("x", "gamma", "bias")
        return _gradients(adapters.NORM_BIAS, settings, operands, array(grad_y), names, needs)

    def prefix_attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.PrefixAttentionBackend`."""
        settings = self._attention(scale, causal, k, prefix_k, bias)
        operands = self._heads(mask, bias, q, k, v, prefix_k, prefix_v)
        y, kept = _forward(heads.PREFIX_ATTENTION, settings, operands)
        return _tensor(y), _tensor(kept["lse"])

    def prefix_attention_backward(
        self,
        grad_y: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prefix_k: Tensor,
        prefix_v: Tensor,
        y: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        needs: Sequence[bool],
        bias: Tensor | None = None,
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.PrefixAttentionBackend`."""
        settings = self._attention(scale, causal, k, prefix_k, bias)
        operands = self._heads(mask, bias, q, k, v, prefix_k, prefix_v)
        operands |= _operands(y=array(y), lse=array(lse))
        names = heads.TRAINED
        op = heads.PREFIX_ATTENTION
        return _gradients(op, settings, operands, array(grad_y), names, needs)

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AttentionBackend`."""
        settings = heads.Attention(scale, causal, torch.get_num_threads())
        operands = self._heads(mask, None, q, k, v)
        y, kept = _forward(heads.ATTENTION, settings, operands)
        return _tensor(y), _tensor(kept["lse"])

    def attention_backward(
        self,
        grad_y: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        y: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        scale: float,
        causal: bool,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.AttentionBackend`."""
        settings = heads.Attention(scale, causal, torch.get_num_threads())
        operands = self._heads(mask, None, q, k, v) | _operands(y=array(y), lse=array(lse))
        return _gradients(heads.ATTENTION, settings, operands, array(grad_y), "qkv", needs)

    @staticmethod
    def _attention(
        scale: float, causal: bool, k: Tensor, prefix: Tensor, bias: Tensor | None
    ) -> heads.Attention:
        start = -1 if bias is None else prefix.shape[1]
        if bias is not None and bias.shape[3] == prefix.shape[1] + k.shape[2]:
            start = 0
        return heads.Attention(scale, causal, torch.get_num_threads(), start)

    @staticmethod
    def _heads(mask: Tensor | None, bias: Tensor | None, *trained: Tensor) -> dict[str, jax.Array]:
        named = dict(zip(heads.TRAINED, map(array, trained), strict=False))
        return _operands(**named, mask=pairs(mask), bias=pairs(bias))

    def gated_forward(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """See :class:`deltaops.backends.base.GatedBackend`."""
        settings = elementwise.Gated(ACTIVATIONS[activation], torch.get_num_threads())
        operands = _operands(gate=array(gate), up=array(up))
        return _tensor(_forward(elementwise.GATED, settings, operands)[0])

    def gated_backward(
        self,
        grad_y: Tensor,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.GatedBackend`."""
        settings = elementwise.Gated(ACTIVATIONS[activation], torch.get_num_threads())
        operands = _operands(gate=array(gate), up=array(up))
        names = ("gate", "up")
        return _gradients(elementwise.GATED, settings, operands, array(grad_y), names, needs)

    def rotary_forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
        """See :class:`deltaops.backends.base.RotaryBackend`; the memory is ``[B, H, L, D]``."""
        settings = heads.Rotary(torch.get_num_threads())
        operands = _operands(x=array(x), cos=array(cos), sin=array(sin))
        return _tensor(_forward(heads.ROTARY, settings, operands)[0])

    def rotary_backward(
        self, grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool
    ) -> Tensor:
        """See :class:`deltaops.backends.base.RotaryBackend`; so too."""
        settings = heads.Rotary(torch.get_num_threads())
        operands = _operands(cos=array(cos), sin=array(sin))
        return _gradients(heads.ROTARY, settings, operands, array(grad_y), ["x"], [True])[0]

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.CrossEntropyBackend`."""
        operands = _operands(logits=array(logits), target=array(target))
        settings = self._cross_entropy(ignore_index, mean)
        loss, kept = _forward(elementwise.CROSS_ENTROPY, settings, operands)
        return _tensor(loss), _tensor(kept["state"])

    def cross_entropy_backward(
        self,
        grad_loss: Tensor,
        logits: Tensor,
        target: Tensor,
        state: Tensor,
        ignore_index: int,
        mean: bool,
    ) -> Tensor:
        """See :class:`deltaops.backends.base.CrossEntropyBackend`."""
        operands = _operands(logits=array(logits), target=array(target), state=array(state))
        settings = self._cross_entropy(ignore_index, mean)
        op, names = elementwise.CROSS_ENTROPY, ["logits"]
        return _gradients(op, settings, operands, array(grad_loss), names, [True])[0]

    @staticmethod
    def _cross_entropy(ignore_index: int, mean: bool) -> elementwise.CrossEntropy:
        mode = REDUCTIONS["mean" if mean else "sum"]
        return elementwise.CrossEntropy(ignore_index, mode, torch.get_num_threads())
