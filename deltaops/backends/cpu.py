"""Backend ``cpu``: the native core (csrc/cpu), reached by raw pointers. float32 and bfloat16."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deltaops.memory import LEAST, large, start
from deltaops.packing import PACKING, SMALLEST, Layout
from deltaops.reference.heads import strides
from deltaops.reference.philox import drop_threshold

from .base import (
    AttentionCall,
    Call,
    CrossEntropyCall,
    DeltaLinearCall,
    GatedCall,
    GroupMember,
    RotaryCall,
)

# deltaops_dtype, deltaops_activation and deltaops_norm of csrc/include/deltaops.h
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVATIONS = {"identity": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_NORMS = {"none": 0, "layer": 1, "rms": 2}
ABI_VERSION = 5
SHORT = 48
"""Fewer queries of an attention fill no block of the core's: measured with AVX2 and two threads,
torch is faster below, and we are from there on. In bfloat16 torch's backward pass is so much slower
there that only where keys are few, too, it is ahead."""


@cache
def native() -> ModuleType | str:
    """The compiled module ``deltaops._cpu``, or why it is not there, in words."""
    try:
        module = importlib.import_module("deltaops._cpu")
    except ImportError as error:
        return (
            f"deltaops._cpu could not be imported ({error}); "
            "reinstall deltaops with a C++ compiler at hand"
        )
    if module.abi_version() != ABI_VERSION:
        return (
            f"deltaops._cpu has ABI {module.abi_version()}, this package needs {ABI_VERSION}; "
            "rebuild it (pip install --force-reinstall deltaops)"
        )
    start(module)
    return module


def _core() -> ModuleType:
    module = native()
    if isinstance(module, str):
        raise ImportError(module)
    return module


def _rows(x: Tensor) -> Tensor:
    """x with adjacent elements in a row, as the core wants it; a copy only where it must be."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty``, recycled where it is large."""
    if rows * columns < LEAST // 4:  # strides given: torch.empty takes a microsecond more
        return torch.empty_strided((rows, columns), (columns, 1), dtype=dtype)
    return large(rows, columns, dtype, _DTYPES[dtype])


def _seed(seed: Tensor) -> int:
    return int(seed) & 0xFFFFFFFFFFFFFFFF


_Prepared = tuple[Any, tuple[Any, ...]]
"""A call that was not made yet, and what must live until it is."""


class CpuDeltaLinear:
    """A ``delta_linear`` of known shapes and strides; see :class:`.base.DeltaLinearPlan`.

    A small layer takes less time than the conversion of its sizes, so that is done here, once.
    """

    def __init__(
        self,
        weight: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        branch_bias: Sequence[Tensor | None],
        scaling: Sequence[float],
        dropout: Sequence[float],
        activation: Sequence[str],
    ) -> None:
        self._shape = n, k = tuple(weight.shape)
        self._strides = row_stride, col_stride = weight.stride()
        self._packable = n * k >= SMALLEST
        ranks = [t.shape[0] for t in a]
        self._ranks = sum(ranks)
        # as the core takes them: nearly always as they are, and then no call looks again
        given = [*a, *b, *branch_bias]
        tidy = self._tidy(given)
        self._copies = any([p is not q for p, q in zip(given, tidy, strict=True)])
        a, b = tidy[: len(a)], tidy[len(a) : 2 * len(a)]
        self._grads = [
            *[((r, k), (k, 1), t.dtype) for t, r in zip(a, ranks, strict=True)],
            *[((n, r), (r, 1), t.dtype) for t, r in zip(a, ranks, strict=True)],
            *[((r,), (1,), t.dtype) for t, r in zip(a, ranks, strict=True)],
        ]
        self._core = _core()
        self._native = self._core.DeltaLinear(
            _DTYPES[weight.dtype],
            n,
            k,
            row_stride,
            col_stride,
            [
                (
                    *a_i.stride(),
                    *b_i.stride(),
                    a_i.shape[0],
                    _DTYPES[a_i.dtype],
                    scaling[i],
                    drop_threshold(dropout[i]),
                    _ACTIVATIONS[activation[i]],
                )
                for i, (a_i, b_i) in enumerate(zip(a, b, strict=True))
            ],
        )

    def forward(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Sequence[Tensor | None],
        seed: Tensor | None,
        keep: bool,
        group: list[_Prepared] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`deltaops.backends.base.DeltaLinearPlan`.

        group: where the call is put instead of being made.
        """
        x = _rows(x)
        if bias is not None:
            bias = bias.contiguous()
        if self._copies:
            operands = self._tidy(operands)
        m = x.shape[0]
        y = _empty(m, self._shape[0], x.dtype)
        s = _empty(m, self._ranks, torch.float32) if keep else None
        threads = torch.get_num_threads()
        packed = self._packed(weight, False, threads) if self._packable else None
        call = (self._native.forward if group is None else self._native.forward_call)(
            m,
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            y.data_ptr(),
            0 if s is None else s.data_ptr(),
            tuple([0 if t is None else t.data_ptr() for t in operands]),
            0 if seed is None else _seed(seed),
            threads,
            0 if packed is None else packed.data_ptr(),
            0 if packed is None else packed.numel(),
        )
        if group is not None:
            group.append((call, (bias, operands, packed)))
        return y, s

    def forward_group(
        self, x: Tensor, members: Sequence[GroupMember], keep: bool
    ) -> list[tuple[Tensor, Tensor | None]]:
        """See :class:`deltaops.backends.base.GroupingPlan`."""
        x = _rows(x)
        group: list[_Prepared] = []
        results = []
        for plan, weight, bias, operands, seed in members:
            assert isinstance(plan, CpuDeltaLinear)
            results.append(plan.forward(x, weight, bias, operands, seed, keep, group))
        self._core.delta_linear_group_forward([call for call, _ in group])
        return results

    def backward(
        self,
        grad_y: Tensor,
        x: Tensor | None,
        weight: Tensor,
        operands: Sequence[Tensor | None],
        s: Tensor,
        seed: Tensor | None,
        needs: Sequence[bool],
        group: list[_Prepared] | None = None,
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.DeltaLinearPlan`.

        group: where the call is put instead of being made; its first one gets the gradient of x.
        """
        grad_y, s = _rows(grad_y), s.contiguous()
        if x is not None:
            x = _rows(x)
        if self._copies:
            operands = self._tidy(operands)
        m, (n, k) = grad_y.shape[0], self._shape
        grad_x = _empty(m, k, grad_y.dtype) if needs[0] and not group else None
        grad_bias = torch.empty(n, dtype=grad_y.dtype) if needs[1] else None
        wanted = [
            torch.empty_strided(shape, strides, dtype=dtype) if need else None
            for need, (shape, strides, dtype) in zip(needs[2:], self._grads, strict=True)
        ]
        threads = torch.get_num_threads()
        packed = None
        if self._packable and needs[0]:
            packed = self._packed(weight, True, threads)
        call = (self._native.backward if group is None else self._native.backward_call)(
            m,
            grad_y.data_ptr(),
            grad_y.stride(0),
            0 if x is None else x.data_ptr(),
            0 if x is None else x.stride(0),
            weight.data_ptr(),
            s.data_ptr(),
            tuple([0 if t is None else t.data_ptr() for t in operands]),
            0 if seed is None else _seed(seed),
            threads,
            0 if grad_x is None else grad_x.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
            tuple([0 if t is None else t.data_ptr() for t in wanted]),
            0 if packed is None else packed.data_ptr(),
            0 if packed is None else packed.numel(),
        )
        if group is not None:
            group.append((call, (grad_y, s, operands, packed)))
        return [g for g in (grad_x, grad_bias, *wanted) if g is not None]

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor | None,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        """See :class:`deltaops.backends.base.GroupingPlan`."""
        if x is not None:
            x = _rows(x)
        group: list[_Prepared] = []
        results = []
        for grad, member, s_i, wanted in zip(grad_y, members, s, needs, strict=True):
            plan, weight, _bias, operands, seed = member
            assert isinstance(plan, CpuDeltaLinear)
            results.append(plan.backward(grad, x, weight, operands, s_i, seed, wanted, group))
        self._core.delta_linear_group_backward([call for call, _ in group])
        return results

    @staticmethod
    def _tidy(operands: Sequence[Tensor | None]) -> list[Any]:
        """Each as the core takes it: matrices with a unit stride, vectors of adjacent elements."""
        return [None if t is None else t if 1 in t.stride() else t.contiguous() for t in operands]

    def _packed(self, weight: Tensor, transposed: bool, threads: int) -> Tensor | None:
        (n, k), (row_stride, col_stride) = self._shape, self._strides
        layout = Layout(weight.data_ptr(), n, k, row_stride, col_stride, _DTYPES[weight.dtype])
        return PACKING.packed(self._core, weight, layout, transposed, threads)


class CpuBackend:
    """Fused forward and backward on the CPU, with torch's thread count."""

    name = "cpu"

    def unavailable(self) -> str | None:
        """None, or why the native core is not there."""
        module = native()
        return module if isinstance(module, str) else None

    def unsupported(self, call: Call) -> str | None:
        """None, or what the native core does not take."""
        if call.device != "cpu":
            return f"runs on the CPU, the tensors are on {call.device}"
        if call.dtype not in _DTYPES:
            return f"takes float32 and bfloat16, not {call.dtype}"
        if isinstance(call, AttentionCall | CrossEntropyCall | GatedCall | RotaryCall):
            return None
        if not isinstance(call, DeltaLinearCall):
            foreign = [t for t in call.parameter_dtypes if t not in _DTYPES]
            return f"takes float32 and bfloat16 parameters, not {foreign[0]}" if foreign else None
        foreign = [t for t in call.adapter_dtypes if t not in _DTYPES]
        if foreign:
            return f"takes float32 and bfloat16 adapters, not {foreign[0]}"
        if call.weight_layout == "strided":
            return "the weight needs rows or columns of adjacent elements"
        return None

    def outrun(self, call: Call) -> str | None:
        """None, or where torch's own attention is faster."""
        if not isinstance(call, AttentionCall):
            return None
        what, length = ("queries", call.l_q) if call.dtype == torch.float32 else ("keys", call.l_kv)
        if length >= SHORT:
            return None
        return f"torch's scaled_dot_product_attention is faster below {SHORT} {what}, here {length}"

    prepare = CpuDeltaLinear
    """See :class:`deltaops.backends.base.PreparingBackend`."""

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
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.Backend`."""
        plan = CpuDeltaLinear(weight, a, b, branch_bias, scaling, dropout, activation)
        y, s = plan.forward(x, weight, bias, [*a, *b, *branch_bias], seed, True)
        assert s is not None  # kept, as asked
        return y, s

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
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.Backend`."""
        absent = [None] * len(a)
        plan = CpuDeltaLinear(weight, a, b, absent, scaling, dropout, activation)
        return plan.backward(grad_y, x, weight, [*a, *b, *absent], s, seed, needs)

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
        x = _rows(x)
        if residual is not None:
            residual = _rows(residual)
        parameters = [_whole(t) for t in (gamma, beta, down, down_bias, up, up_bias)]
        (m, k), rank = x.shape, down.shape[0]
        y = _empty(m, k, x.dtype)
        h = torch.empty((m, rank), dtype=torch.float32)
        stats = torch.empty((0 if norm == "none" else m, 2), dtype=torch.float32)
        _core().bottleneck_forward(
            _DTYPES[x.dtype],
            m,
            k,
            rank,
            x.data_ptr(),
            x.stride(0),
            _pointer(residual),
            0 if residual is None else residual.stride(0),
            *[_parameter(t) for t in parameters],
            y.data_ptr(),
            h.data_ptr(),
            stats.data_ptr(),
            scaling,
            eps,
            _ACTIVATIONS[activation],
            _NORMS[norm],
            torch.get_num_threads(),
        )
        return y, h, stats

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
        grad_y, h, stats = _rows(grad_y), h.contiguous(), stats.contiguous()
        if x is not None:
            x = _rows(x)
        parameters = [_whole(t) for t in (gamma, beta, down, up)]
        (m, k), rank = grad_y.shape, down.shape[0]
        grad_x = _empty(m, k, grad_y.dtype) if needs[0] else None
        wanted = [
            torch.empty(shape, dtype=like.dtype) if need and like is not None else None
            for shape, like, need in zip(
                ((k,), (k,), (rank, k), (rank,), (k, rank), (k,)),
                (gamma, beta, down, down, up, up),
                needs[1:],
                strict=True,
            )
        ]
        _core().bottleneck_backward(
            _DTYPES[grad_y.dtype],
            m,
            k,
            rank,
            grad_y.data_ptr(),
            grad_y.stride(0),
            _pointer(x),
            0 if x is None else x.stride(0),
            h.data_ptr(),
            stats.data_ptr(),
            *[_parameter(t) for t in parameters],
            _pointer(grad_x),
            *[_parameter(t) for t in wanted],
            scaling,
            _ACTIVATIONS[activation],
            _NORMS[norm],
            residual_is_x,
            torch.get_num_threads(),
        )
        return [g for g in (grad_x, *wanted) if g is not None]

    def norm_bias_forward(
        self, x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, norm: str
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AdapterBackend`."""
        x, gamma, bias = _rows(x), _whole(gamma), _whole(bias)
        m, k = x.shape
        y = _empty(m, k, x.dtype)
        stats = torch.empty((m, 2), dtype=torch.float32)
        _core().norm_bias_forward(
            _DTYPES[x.dtype],
            m,
            k,
            x.data_ptr(),
            x.stride(0),
            _parameter(gamma),
            _parameter(bias),
            y.data_ptr(),
            stats.data_ptr(),
            eps,
            _NORMS[norm],
            torch.get_num_threads(),
        )
        return y, stats

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
        grad_y, stats, gamma = _rows(grad_y), stats.contiguous(), _whole(gamma)
        if x is not None:
            x = _rows(x)
        m, k = grad_y.shape
        grad_x = _empty(m, k, grad_y.dtype) if needs[0] else None
        grad_gamma = torch.empty(k, dtype=dtype) if needs[1] else None
        grad_bias = torch.empty(k, dtype=dtype) if needs[2] else None
        _core().norm_bias_backward(
            _DTYPES[grad_y.dtype],
            m,
            k,
            grad_y.data_ptr(),
            grad_y.stride(0),
            _pointer(x),
            0 if x is None else x.stride(0),
            stats.data_ptr(),
            _parameter(gamma),
            _pointer(grad_x),
            _parameter(grad_gamma),
            _parameter(grad_bias),
            _NORMS[norm],
            torch.get_num_threads(),
        )
        return [g for g in (grad_x, grad_gamma, grad_bias) if g is not None]

    # ------------------------------------------------------------------------- cross_entropy

    def cross_entropy_forward(
        self, logits: Tensor, target: Tensor, ignore_index: int, mean: bool
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.CrossEntropyBackend`."""
        logits, target = _rows(logits), target.contiguous()
        state = torch.empty((logits.shape[0], 2), dtype=torch.float32)
        loss = _core().cross_entropy_forward(
            _DTYPES[logits.dtype],
            *logits.shape,
            logits.data_ptr(),
            logits.stride(0),
            target.data_ptr(),
            ignore_index,
            mean,
            state.data_ptr(),
            torch.get_num_threads(),
        )
        return torch.tensor(loss, dtype=torch.float32), state

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
        logits, target, state = _rows(logits), target.contiguous(), state.contiguous()
        m, v = logits.shape
        grad = _empty(m, v, logits.dtype)
        _core().cross_entropy_backward(
            _DTYPES[logits.dtype],
            m,
            v,
            logits.data_ptr(),
            logits.stride(0),
            target.data_ptr(),
            ignore_index,
            mean,
            state.data_ptr(),
            float(grad_loss),
            grad.data_ptr(),
            torch.get_num_threads(),
        )
        return grad

    # --------------------------------------------------------------------------------- gated

    def gated_forward(self, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """See :class:`deltaops.backends.base.GatedBackend`."""
        gate, up = _rows(gate), _rows(up)
        m, k = gate.shape
        y = _empty(m, k, gate.dtype)
        _core().gated_forward(
            _DTYPES[gate.dtype],
            m,
            k,
            gate.data_ptr(),
            gate.stride(0),
            up.data_ptr(),
            up.stride(0),
            y.data_ptr(),
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
        return y

    def gated_backward(
        self,
        grad_y: Tensor,
        gate: Tensor,
        up: Tensor | None,
        activation: str,
        needs: Sequence[bool],
    ) -> list[Tensor]:
        """See :class:`deltaops.backends.base.GatedBackend`."""
        grad_y, gate = _rows(grad_y), _rows(gate)
        if up is not None:
            up = _rows(up)
        m, k = gate.shape
        wanted = [_empty(m, k, gate.dtype) if need else None for need in needs]
        _core().gated_backward(
            _DTYPES[gate.dtype],
            m,
            k,
            grad_y.data_ptr(),
            grad_y.stride(0),
            gate.data_ptr(),
            gate.stride(0),
            _pointer(up),
            0 if up is None else up.stride(0),
            *[_pointer(t) for t in wanted],
            _ACTIVATIONS[activation],
            torch.get_num_threads(),
        )
        return [g for g in wanted if g is not None]

    # -------------------------------------------------------------------------------- rotary

    def rotary_forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool) -> Tensor:
        """See :class:`deltaops.backends.base.RotaryBackend`."""
        return _rotary(x, cos, sin, tokens_first, backward=False)

    def rotary_backward(
        self, grad_y: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool
    ) -> Tensor:
        """See :class:`deltaops.backends.base.RotaryBackend`."""
        return _rotary(grad_y, cos, sin, tokens_first, backward=True)

    # ----------------------------------------------------------------------------- attention

    def attention_forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See :class:`deltaops.backends.base.AttentionBackend`."""
        q, k, v, mask = _heads(q), _heads(k), _heads(v), _bytes(mask)
        y = _empty_heads(q.shape, True, q.dtype)
        lse = torch.empty(q.shape[:3], dtype=torch.float32)
        _core().attention_forward(
            _DTYPES[q.dtype],
            (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:]),
            *_placed(q),
            *_placed(k),
            *_placed(v),
            *_placed_mask(mask),
            *_placed(y),
            lse.data_ptr(),
            scale,
            causal,
            torch.get_num_threads(),
        )
        return y, lse

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
        grad_y, q, k, v, y = [_heads(t) for t in (grad_y, q, k, v, y)]
        mask, lse = _bytes(mask), lse.contiguous()
        wanted = [
            _empty_heads(t.shape, True, t.dtype) if need else None
            for t, need in zip((q, k, v), needs, strict=True)
        ]
        _core().attention_backward(
            _DTYPES[q.dtype],
            (*q.shape[:2], k.shape[1], q.shape[2], *k.shape[2:]),
            *_placed(grad_y),
            *_placed(q),
            *_placed(k),
            *_placed(v),
            *_placed_mask(mask),
            *_placed(y),
            lse.data_ptr(),
            *_placed(wanted[0]),
            *_placed(wanted[1]),
            *_placed(wanted[2]),
            scale,
            causal,
            torch.get_num_threads(),
        )
        return [g for g in wanted if g is not None]


def _placed(t: Tensor | None) -> tuple[int, tuple[int, ...]]:
    """Address and strides of the batch, the head and the token, as the core takes heads."""
    return (0, (0, 0, 0)) if t is None else (t.data_ptr(), t.stride()[:3])


def _placed_mask(mask: Tensor | None) -> tuple[int, tuple[int, ...]]:
    return (0, (0, 0, 0, 0)) if mask is None else (mask.data_ptr(), mask.stride())


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, tokens_first: bool, *, backward: bool) -> Tensor:
    """Either way: backward turns the heads back."""
    x = _heads(x)
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    y = _empty_heads(x.shape, tokens_first, x.dtype)
    _core().rotary(
        _DTYPES[x.dtype],
        x.shape,
        x.data_ptr(),
        x.stride()[:3],
        y.data_ptr(),
        y.stride()[:3],
        _DTYPES[cos.dtype],
        cos.data_ptr(),
        sin.data_ptr(),
        (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1)),
        backward,
        torch.get_num_threads(),
    )
    return y


def _empty_heads(shape: Sequence[int], tokens_first: bool, dtype: torch.dtype) -> Tensor:
    """``[B, H, L, D]`` with :func:`strides`, recycled where it is large."""
    b, h, l, d = shape  # noqa: E741
    # In place: a view would refuse to be changed in place by whoever gets it from autograd.
    return _empty(b * h * l, d, dtype).as_strided_(shape, strides(shape, tokens_first))


def _heads(t: Tensor) -> Tensor:
    """``[B, H, L, D]`` with adjacent elements in a head; a copy only where it must be."""
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A mask whose keys lie side by side, or are all the same."""
    if mask is None or mask.stride(3) in (0, 1) or mask.shape[3] == 1:
        return mask
    single = mask[tuple([slice(None if step else 1) for step in mask.stride()])]
    return single.contiguous().expand(mask.shape)


def _whole(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _parameter(t: Tensor | None) -> tuple[int, int]:
    """Address and dtype, as the core takes contiguous parameters and their gradients."""
    return (0, 0) if t is None else (t.data_ptr(), _DTYPES[t.dtype])


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
