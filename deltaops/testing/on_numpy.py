"""``deltaops.numpy`` as a backend, so that the conformance checks can hold it to the reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaops.backends import Call, DoraNormCall, GroupMember, PromptEmbeddingCall
from deltaops.backends.plain import thirds
from deltaops.bindings import numpy as on_numpy

from .grouped import Grouping

Array = np.ndarray[Any, np.dtype[Any]]


def refusal(call: Call) -> str | None:
    """None, or what the native core on arrays does not take; JAX's is the same."""
    if isinstance(call, DoraNormCall | PromptEmbeddingCall):
        return f"has no {call.op}"
    known = (torch.float32, torch.bfloat16)
    return None if call.dtype in known else f"takes float32 and bfloat16, not {call.dtype}"


def array(t: Tensor | None) -> Any:
    """The same memory as a NumPy array; None for None."""
    if t is None or t.dtype != torch.bfloat16:
        return None if t is None else t.detach().numpy()
    import ml_dtypes

    return t.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def tensor(a: Array) -> Tensor:
    """The same memory as a tensor."""
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def pairs(mask: Tensor | None) -> Any:
    """A mask or a bias (in float32) without what it repeats, contiguous."""
    if mask is None:
        return None
    once = mask[tuple(slice(None if step else 1) for step in mask.stride())]
    once = once if once.dtype == torch.bool else once.float()
    return once.contiguous().numpy()


def adjacent(t: Tensor) -> Tensor:
    """With adjacent elements in the last axis."""
    return t if t.stride(-1) == 1 else t.contiguous()


class NumpyBackend(Grouping):
    """Each call through NumPy arrays over the tensors' memory, with torch's thread count."""

    name = "numpy"

    def unavailable(self) -> str | None:
        """None, or what is missing."""
        found = importlib.util.find_spec("ml_dtypes")
        return None if found else "bfloat16 needs ml_dtypes: pip install ml_dtypes"

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
        branches = self._branches(a, b, branch_bias, scaling, dropout, activation)
        y, s = on_numpy.delta_linear_forward(
            array(x),
            array(weight),
            array(bias),
            branches,
            seed=0 if seed is None else int(seed),
            adapter=array(adapter),
            num_threads=torch.get_num_threads(),
        )
        return tensor(y), tensor(s)

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
        count = len(a)
        names = ["x", "bias", *(f"{kind}.{i}" for kind in ("a", "b", "bias") for i in range(count))]
        # the values of a branch's bias are not read
        biases = [
            t.new_empty(t.shape[0]) if need else None
            for t, need in zip(a, needs[2 + 2 * count :], strict=True)
        ]
        found = on_numpy.delta_linear_backward(
            array(grad_y),
            array(x),
            on_numpy.PackedWeight(array(weight), num_threads=torch.get_num_threads()),
            array(s),
            self._branches(a, b, biases, scaling, dropout, activation),
            seed=0 if seed is None else int(seed),
            adapter=array(adapter),
            wanted=[name for name, need in zip(names, needs, strict=True) if need],
            num_threads=torch.get_num_threads(),
        )
        return [tensor(grad) for grad in found.values()]

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember]
    ) -> list[tuple[Tensor, Tensor]]:
        """See :class:`.grouped.GroupedPlan`."""
        layers = [self._member(m, m.operands) for m in members]
        threads = torch.get_num_threads()
        found = on_numpy.delta_linear_group_forward(array(x), layers, num_threads=threads)
        return [(tensor(y), tensor(s)) for y, s in found]

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """See :class:`.grouped.GroupedPlan`."""
        layers, names = [], []
        for i, (member, need) in enumerate(zip(members, needs, strict=True)):
            a, b, _ = thirds(member.operands)
            # as in backward
            biases = [
                t.new_empty(t.shape[0]) if there else None
                for t, there in zip(a, need[2 + 2 * len(a) :], strict=True)
            ]
            layers.append(self._member(member, [*a, *b, *biases]))
            parts = [f"{kind}.{j}" for kind in ("a", "b", "bias") for j in range(len(a))]
            own = [f"{i}.{name}" for name in ("bias", *parts)]
            wanted = [name for name, there in zip(own, need[1:], strict=True) if there]
            names.append(["x", *wanted] if i == 0 and need[0] else wanted)
        found = on_numpy.delta_linear_group_backward(
            [array(grad) for grad in grad_y],
            array(x),
            layers,
            [array(state) for state in s],
            wanted=[name for mine in names for name in mine],
            num_threads=torch.get_num_threads(),
        )
        return [[tensor(found[name]) for name in mine] for mine in names]

    def _member(self, member: GroupMember, operands: Sequence[Tensor | None]) -> on_numpy.Layer:
        plan: Any = member.plan
        settings = plan.scaling, plan.dropout, plan.activation
        branches = self._branches(*thirds(operands), *settings)
        seed = 0 if member.seed is None else int(member.seed)
        arrays = array(member.weight), array(member.bias)
        return on_numpy.Layer(*arrays, branches, seed, array(member.adapter))

    @staticmethod
    def _branches(*parts: Sequence[Any]) -> list[on_numpy.Branch]:
        a, b, bias, *settings = parts
        return [
            on_numpy.Branch(array(a_i), array(b_i), scale, drop, name, array(bias_i))
            for a_i, b_i, bias_i, scale, drop, name in zip(a, b, bias, *settings, strict=True)
        ]

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
        y, h, stats = on_numpy.bottleneck_forward(
            *map(array, (x, down, up, down_bias, up_bias)),
            residual=array(residual),
            scaling=scaling,
            activation=activation,
            norm=norm,
            gamma=array(gamma),
            beta=array(beta),
            eps=eps,
            num_threads=torch.get_num_threads(),
        )
        return tensor(y), tensor(h), tensor(stats)

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
        names = ("x", "gamma", "beta", "down", "down_bias", "up", "up_bias")
        found = on_numpy.bottleneck_backward(
            array(grad_y),
            array(x),
            array(h),
            array(stats),
            array(down),
            array(up),
            # their values are not read
            array(down.new_empty(down.shape[0])),
            array(up.new_empty(up.shape[0])),
            residual_is_x=residual_is_x,
            scaling=scaling,
            activation=activation,
            norm=norm,
            gamma=array(gamma),
            beta=array(beta),
            wanted=[name for name, need in zip(names, needs, strict=True) if need],
            num_threads=torch.get_num_threads(),
        )
        return [tensor(grad) for grad in found.values()]

    def norm_bias_forward(
        self, x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AdapterBackend`."""
        threads = torch.get_num_threads()
        y, stats = on_numpy.norm_bias_forward(
            *map(array, (x, gamma, bias)), norm=norm, eps=eps, num_threads=threads
        )
        return tensor(y), tensor(stats)

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
        like = array(grad_y.new_empty(grad_y.shape[1], dtype=dtype))  # its values are not read
        found = on_numpy.norm_bias_backward(
            array(grad_y),
            array(x),
            array(stats),
            array(gamma),
            like,
            norm=norm,
            wanted=[n for n, need in zip(("x", "gamma", "bias"), needs, strict=True) if need],
            num_threads=torch.get_num_threads(),
        )
        return [tensor(grad) for grad in found.values()]

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
        y, lse = on_numpy.attention_forward(
            *[array(adjacent(t)) for t in (q, k, v)],
            scale=scale,
            causal=causal,
            mask=pairs(mask),
            prefix=(array(prefix_k.contiguous()), array(prefix_v.contiguous())),
            bias=pairs(bias),
            num_threads=torch.get_num_threads(),
        )
        return tensor(y), tensor(lse)

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
        names = ("q", "k", "v", "prefix_k", "prefix_v")
        found = on_numpy.attention_backward(
            array(adjacent(grad_y)),
            array(adjacent(q)),
            array(adjacent(k)),
            array(adjacent(v)),
            array(adjacent(y)),
            array(lse),
            scale=scale,
            causal=causal,
            mask=pairs(mask),
            prefix=(array(prefix_k.contiguous()), array(prefix_v.contiguous())),
            bias=pairs(bias),
            wanted=[name for name, need in zip(names, needs, strict=True) if need],
            num_threads=torch.get_num_threads(),
        )
        return [tensor(grad) for grad in found.values()]

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AttentionBackend`."""
        y, lse = on_numpy.attention_forward(
            *[array(adjacent(t)) for t in (q, k, v)],
            scale=scale,
            causal=causal,
            mask=pairs(mask),
            num_threads=torch.get_num_threads(),
        )
        return tensor(y), tensor(lse)

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
        found = on_numpy.attention_backward(
            array(adjacent(grad_y)),
            array(adjacent(q)),
            array(adjacent(k)),
            array(adjacent(v)),
            array(adjacent(y)),
            array(lse),
            scale=scale,
            causal=causal,
            mask=pairs(mask),
            wanted=[name for name, need in zip("qkv", needs, strict=True) if need],
            num_threads=torch.get_num_threads(),
        )
        return [tensor(grad) for grad in found.values()]

    def gated_forward(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """See :class:`deltaops.backends.base.GatedBackend`."""
        given = [array(adjacent(t)) for t in (gate, up)]
        threads = torch.get_num_threads()
        return tensor(on_numpy.gated(*given, activation=activation, num_threads=threads))

    def gated_backward(
        self,
        grad_y: Tensor,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.GatedBackend`."""
        found = on_numpy.gated_backward(
            array(adjacent(grad_y)),
            array(adjacent(gate)),
            None if up is None else array(adjacent(up)),
            activation=activation,
            wanted=[name for name, need in zip(("gate", "up"), needs, strict=True) if need],
            num_threads=torch.get_num_threads(),
        )
        return [tensor(grad) for grad in found.values()]

    def rotary_forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
        """See :class:`deltaops.backends.base.RotaryBackend`; the memory is ``[B, H, L, D]``."""
        return self._rotary(x, cos, sin, False)

    def rotary_backward(
        self, grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool
    ) -> Tensor:
        """See :class:`deltaops.backends.base.RotaryBackend`; so too."""
        return self._rotary(grad_y, cos, sin, True)

    @staticmethod
    def _rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
        given = [array(adjacent(x)), array(cos.contiguous()), array(sin.contiguous())]
        threads = torch.get_num_threads()
        return tensor(on_numpy.rotary(*given, backward=backward, num_threads=threads))

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.CrossEntropyBackend`."""
        loss, state = on_numpy.cross_entropy_forward(
            array(adjacent(logits)),
            array(target.contiguous()),
            ignore_index=ignore_index,
            reduction="mean" if mean else "sum",
            num_threads=torch.get_num_threads(),
        )
        return torch.tensor(loss, dtype=torch.float32), tensor(state)

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
        grad = on_numpy.cross_entropy_backward(
            array(adjacent(logits)),
            array(target.contiguous()),
            array(state),
            grad_loss=float(grad_loss),
            ignore_index=ignore_index,
            reduction="mean" if mean else "sum",
            num_threads=torch.get_num_threads(),
        )
        return tensor(grad)
