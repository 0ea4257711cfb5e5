"""One list of checks for every implementation of the ops: ours, and any third backend.

    import pytest
    from deltaops.testing import conformance

    @pytest.mark.parametrize("check", conformance.checks(), ids=str)
    def test_conformance(check):
        check.run(MyBackend())  # or pytest.skip(reason), where check.refused(MyBackend()) has one

An implementation is a :class:`deltaops.backends.base.Backend`; ops that it has no methods for, and
calls that its ``unsupported`` refuses, are its own affair. Everything else must match the float64
reference within :mod:`deltaops.testing.tolerances`, forward and in every gradient, leave its inputs
alone and give the same bits again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaops.backends import (
    AttentionCall,
    BottleneckCall,
    Call,
    CrossEntropyCall,
    GatedCall,
    GroupMember,
    NormBiasCall,
    PrefixAttentionCall,
    RotaryCall,
)
from deltaops.reference import (
    attention,
    bottleneck,
    cross_entropy,
    delta_linear,
    gated,
    norm_bias,
    prefix_attention,
    rotary,
)

from .adapter_cases import BOTTLENECK_CASES, NORM_BIAS_CASES
from .attention_cases import ATTENTION_CASES
from .cases import DELTA_LINEAR_CASES, ROUTED_CASES
from .compare import assert_accurate
from .cross_entropy_cases import CROSS_ENTROPY_CASES
from .gated_cases import GATED_CASES
from .group_cases import GROUP_CASES
from .grouped import Grouping
from .prefix_attention_cases import BIASED_PREFIX_CASES, PREFIX_ATTENTION_CASES
from .rotary_cases import ROTARY_CASES

Results = dict[str, Tensor]
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32parameters": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Prepared:
    """One call on given tensors."""

    call: Call
    inputs: dict[str, Tensor | None]
    run: Callable[[Any, bool], Results]
    """(implementation, whether in float64) → forward results and gradients by name."""
    more: tuple[Call, ...] = ()
    """Calls of the other layers of a group."""
    plan: Callable[[Any], Any] | None = None
    """Implementation → a plan that has to know groups."""


@dataclass(frozen=True)
class Check:
    """A case of one op in one choice of dtypes; ``str`` is its test id."""

    op: str
    case: Any
    dtypes: str

    def __str__(self) -> str:
        return f"{self.op}-{self.case}-{self.dtypes}"

    def refused(self, backend: Any) -> str | None:
        """Why ``backend`` does not run it, in words; None where it does."""
        prepared = self._prepared()
        if not hasattr(backend, METHODS[self.op]):
            return f"{backend.name} has no {self.op}"
        asked = map(backend.unsupported, (prepared.call, *prepared.more))
        reason: str | None = next(filter(None, asked), None) or backend.unavailable()
        if reason or prepared.plan is None:
            return reason
        known = hasattr(prepared.plan(backend), "forward_group")
        return None if known else f"{backend.name} has no {self.op}"

    def results(self, backend: Any) -> Results:
        """What ``backend`` gives, forward and backward, by name."""
        return self._prepared().run(backend, False)

    def run(self, backend: Any) -> None:
        """Raises: AssertionError with what is off and by how much."""
        prepared = self._prepared()
        before = {n: t.clone() for n, t in prepared.inputs.items() if t is not None}
        got, again = prepared.run(backend, False), prepared.run(backend, False)
        for name, old in before.items():
            if not torch.equal(old, prepared.inputs[name]):  # type: ignore[arg-type]  # as before
                raise AssertionError(f"{self}: the input {name} was changed")
        oracle, low = prepared.run(_REFERENCE, True), prepared.run(_REFERENCE, False)
        for name, actual in got.items():
            assert_accurate(actual, oracle[name], low[name], f"{self}: {name}")
            if not torch.equal(actual, again[name]):
                raise AssertionError(f"{self}: {name} has other bits on a second run")

    def _prepared(self) -> Prepared:
        return _PREPARE[self.op](self.case, *DTYPES[self.dtypes])


def checks(ops: Iterable[str] | None = None) -> list[Check]:
    """All of them, or those of some ops, which :data:`METHODS` names."""
    return [
        Check(op, case, dtypes)
        for op in ops or _CASES
        for case in _CASES[op]
        for dtypes in (DTYPES if op in _WITH_PARAMETERS else ("f32", "bf16"))
    ]


# ------------------------------------------------------------------------------------ the ops


def _delta_linear(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    t = case.tensors(dtype, adapter_dtype=narrow)
    grad_y = case.grad_y(dtype)
    count = len(t.a)
    names = ["x", "bias", *(f"{kind}.{i}" for kind in ("a", "b", "bias") for i in range(count))]

    def run(backend: Any, widen: bool) -> Results:
        given, grad = (t.to(torch.float64), grad_y.double()) if widen else (t, grad_y)
        y, s = backend.forward(*given.forward_arguments())
        needs = given.all_needed()
        grads = backend.backward(*given.backward_arguments(grad, s), needs, *given.by_row())
        wanted = [name for name, need in zip(names, needs, strict=True) if need]
        return {"y": y, "s": s} | _named(wanted, grads)

    inputs = {"x": t.x, "weight": t.weight, "bias": t.bias, "grad_y": grad_y}
    inputs |= {f"a.{i}": a for i, a in enumerate(t.a)} | {f"b.{i}": b for i, b in enumerate(t.b)}
    inputs |= {f"bias.{i}": bias for i, bias in enumerate(t.branch_bias)}
    return Prepared(t.call(), inputs, run)


def _delta_linear_group(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    layers, grad_y = case.tensors(dtype, adapter_dtype=narrow), case.grad_y(dtype)

    def plan_of(backend: Any, t: Any) -> Any:
        settings = t.scaling, t.dropout, t.activation
        return backend.prepare(t.weight, t.a, t.b, t.branch_bias, *settings)

    def run(backend: Any, widen: bool) -> Results:
        given = [t.to(torch.float64) if widen else t for t in layers]
        grads = [grad.double() if widen else grad for grad in grad_y]
        members = [
            GroupMember(
                plan_of(backend, t), t.weight, t.bias, [*t.a, *t.b, *t.branch_bias], t.seed,
                t.adapter,
            )
            for t in given
        ]  # fmt: skip
        plan: Any = members[0].plan  # one that knows groups
        x, needs = given[0].x, [t.all_needed() for t in given]
        made = plan.forward_group(x, members, True)
        found = plan.backward_group(grads, x, members, [s for _, s in made], needs)
        results = {
            f"{kind}.{i}": made[i][j] for i in range(len(made)) for j, kind in enumerate("ys")
        }
        for i, (t, mine) in enumerate(zip(given, found, strict=True)):
            parts = [f"{kind}.{j}" for kind in ("a", "b", "bias") for j in range(len(t.a))]
            names = zip(["x", "bias", *parts], needs[i], strict=True)
            wanted = [n for n, need in names if need and (n != "x" or i == 0)]
            results |= _named([n if n == "x" else f"{i}.{n}" for n in wanted], mine)
        return results

    inputs: dict[str, Tensor | None] = {"x": layers[0].x}
    for i, t in enumerate(layers):
        inputs |= {f"{i}.weight": t.weight, f"{i}.bias": t.bias, f"{i}.grad_y": grad_y[i]}
        inputs |= {f"{i}.a.{j}": a for j, a in enumerate(t.a)}
        inputs |= {f"{i}.b.{j}": b for j, b in enumerate(t.b)}
    first, *more = [t.call() for t in layers]
    return Prepared(first, inputs, run, tuple(more), lambda backend: plan_of(backend, layers[0]))


def _bottleneck(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    t = case.tensors(dtype, parameter_dtype=narrow)
    grad_y = case.grad_y(dtype)

    def run(backend: Any, widen: bool) -> Results:
        given, grad = (t.to(torch.float64), grad_y.double()) if widen else (t, grad_y)
        y, h, stats = backend.bottleneck_forward(*given.forward_arguments())
        arguments = given.backward_arguments(grad, h, stats)
        grads = backend.bottleneck_backward(*arguments, given.needs())
        return {"y": y, "h": h, "stats": stats} | _named(given.leaves(), grads)

    parameters = tuple(p.dtype for p in (t.down, t.gamma, t.beta) if p is not None)
    call = BottleneckCall(
        "cpu", dtype, parameters, case.m, case.k, case.r, case.activation, case.norm
    )
    inputs = t.leaves() | {"residual": t.residual, "grad_y": grad_y}
    return Prepared(call, inputs, run)


def _norm_bias(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    x, gamma, bias = case.tensors(dtype, parameter_dtype=narrow)
    grad_y = case.grad_y(dtype)
    needs = (True, gamma is not None, bias is not None)

    def run(backend: Any, widen: bool) -> Results:
        given: list[Any] = [x, gamma, bias, grad_y]
        if widen:
            given = [None if t is None else t.double() for t in given]
        *rest, grad = given
        y, stats = backend.norm_bias_forward(*rest, 1e-5, case.norm)
        dtype_of = torch.float64 if widen else narrow
        grads = backend.norm_bias_backward(
            grad, given[0], stats, given[1], dtype_of, case.norm, needs
        )
        wanted = [n for n, need in zip(("x", "gamma", "bias"), needs, strict=True) if need]
        return {"y": y, "stats": stats} | _named(wanted, grads)

    parameters = tuple(p.dtype for p in (gamma, bias) if p is not None)
    call = NormBiasCall("cpu", dtype, parameters, case.m, case.k, case.norm)
    inputs = {"x": x, "gamma": gamma, "bias": bias, "grad_y": grad_y}
    return Prepared(call, inputs, run)


def _prefix_attention(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    t = case.tensors(dtype)
    grad_y = case.grad_y(dtype)
    names = ("q", "k", "v", "prefix_k", "prefix_v")

    def run(backend: Any, widen: bool) -> Results:
        given, grad = (t.to(torch.float64), grad_y.double()) if widen else (t, grad_y)
        y, lse = backend.prefix_attention_forward(*given.forward_arguments(), **given.more)
        arguments = given.backward_arguments(grad, y, lse)
        grads = backend.prefix_attention_backward(*arguments, (True,) * 5, **given.more)
        # infinite where a query sees no key, in each alike: the norms of differences want numbers
        return {"y": y, "lse": lse.masked_fill(lse.isinf(), 0.0)} | _named(names, grads)

    rest = t.rest
    call = PrefixAttentionCall.of(rest.q, rest.k, t.prefix_k, rest.mask, rest.causal, t.bias)
    inputs = dict(zip(names, t.inputs, strict=True))
    inputs |= {"mask": rest.mask, "bias": t.bias, "grad_y": grad_y}
    return Prepared(call, inputs, run)


def _attention(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    t, grad_y = case.tensors(dtype), case.grad_y(dtype)

    def run(backend: Any, widen: bool) -> Results:
        given, grad = (t.to(torch.float64), grad_y.double()) if widen else (t, grad_y)
        y, lse = backend.attention_forward(*given.forward_arguments())
        grads = backend.attention_backward(*given.backward_arguments(grad, y, lse), (True,) * 3)
        # infinite where a query sees no key, as above
        return {"y": y, "lse": lse.masked_fill(lse.isinf(), 0.0)} | _named("qkv", grads)

    inputs = {"q": t.q, "k": t.k, "v": t.v, "mask": t.mask, "grad_y": grad_y}
    return Prepared(AttentionCall.of(t.q, t.k, t.mask, t.causal), inputs, run)


def _gated(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    (gate, up), grad_y = case.tensors(dtype), case.grad_y(dtype)

    def run(backend: Any, widen: bool) -> Results:
        given = [t.double() if widen else t for t in (gate, up, grad_y)]
        y = backend.gated_forward(*given[:2], case.activation)
        grads = backend.gated_backward(given[2], *given[:2], case.activation, (True, True))
        return {"y": y} | _named(("gate", "up"), grads)

    call = GatedCall("cpu", dtype, case.m, case.k, case.activation)
    return Prepared(call, {"gate": gate, "up": up, "grad_y": grad_y}, run)


def _rotary(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    (x, cos, sin), grad_y = case.tensors(dtype), case.grad_y(dtype)

    def run(backend: Any, widen: bool) -> Results:
        given, grad, *tables = (t.double() if widen else t for t in (x, grad_y, cos, sin))
        y = backend.rotary_forward(given, *tables, False)
        return {"y": y, "grad of x": backend.rotary_backward(grad, *tables, False)}

    call = RotaryCall("cpu", dtype, cos.dtype, case.b, case.h, case.l, case.d)
    return Prepared(call, {"x": x, "cos": cos, "sin": sin, "grad_y": grad_y}, run)


def _cross_entropy(case: Any, dtype: torch.dtype, narrow: torch.dtype) -> Prepared:
    logits, target = case.tensors(dtype)
    settings = target, case.ignore_index, case.mean

    def run(backend: Any, widen: bool) -> Results:
        given = logits.double() if widen else logits
        loss, state = backend.cross_entropy_forward(given, *settings)
        grad_loss = torch.tensor(1.5, dtype=loss.dtype)
        arguments = (given, target, state, *settings[1:])
        grad = backend.cross_entropy_backward(grad_loss, *arguments)
        return {"loss": loss, "state": state, "grad of logits": grad}

    return Prepared(CrossEntropyCall.of(logits), {"logits": logits, "target": target}, run)


def _named(names: Iterable[str], grads: list[Tensor]) -> Results:
    return {f"grad of {name}": g for name, g in zip(names, grads, strict=True)}


class _Reference(Grouping):
    """The reference with the names of a backend's methods."""

    forward = staticmethod(delta_linear.forward)
    backward = staticmethod(delta_linear.backward)
    bottleneck_forward = staticmethod(bottleneck.forward)
    bottleneck_backward = staticmethod(bottleneck.backward)
    norm_bias_forward = staticmethod(norm_bias.forward)
    norm_bias_backward = staticmethod(norm_bias.backward)
    prefix_attention_forward = staticmethod(prefix_attention.forward)
    prefix_attention_backward = staticmethod(prefix_attention.backward)
    attention_forward = staticmethod(attention.forward)
    attention_backward = staticmethod(attention.backward)
    gated_forward = staticmethod(gated.forward)
    gated_backward = staticmethod(gated.backward)
    rotary_forward = staticmethod(rotary.forward)
    rotary_backward = staticmethod(rotary.backward)
    cross_entropy_forward = staticmethod(cross_entropy.forward)
    cross_entropy_backward = staticmethod(cross_entropy.backward)

    def forward_group(self, x: Tensor, members: Sequence[GroupMember]) -> list[Any]:
        return [
            m.plan.forward(x, m.weight, m.bias, m.operands, m.seed, True, m.adapter)
            for m in members
        ]

    def backward_group(
        self,
        grad_y: Sequence[Tensor],
        x: Tensor,
        members: Sequence[GroupMember],
        s: Sequence[Tensor],
        needs: Sequence[Sequence[bool]],
    ) -> list[list[Tensor]]:
        found = [
            m.plan.backward(grad, x, m.weight, m.operands, s_i, m.seed, need, m.adapter)
            for grad, m, s_i, need in zip(grad_y, members, s, needs, strict=True)
        ]
        found[0].insert(0, torch.stack([grads.pop(0) for grads in found]).sum(0))
        return found


_REFERENCE = _Reference()
METHODS = {
    "delta_linear": "forward",
    "delta_linear_group": "prepare",
    "bottleneck": "bottleneck_forward",
    "norm_bias": "norm_bias_forward",
    "prefix_attention": "prefix_attention_forward",
    "attention": "attention_forward",
    "gated": "gated_forward",
    "rotary": "rotary_forward",
    "cross_entropy": "cross_entropy_forward",
}
"""Op → the method that a backend has for it, beside its backward one; a group goes by the plans of
:class:`deltaops.backends.base.GroupingPlan`."""
_PREPARE: dict[str, Callable[..., Prepared]] = {
    "delta_linear": _delta_linear,
    "delta_linear_group": _delta_linear_group,
    "bottleneck": _bottleneck,
    "norm_bias": _norm_bias,
    "prefix_attention": _prefix_attention,
    "attention": _attention,
    "gated": _gated,
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
}
_CASES: dict[str, tuple[Any, ...]] = {
    "delta_linear": (*DELTA_LINEAR_CASES, *ROUTED_CASES),
    "delta_linear_group": GROUP_CASES,
    "bottleneck": BOTTLENECK_CASES,
    "norm_bias": NORM_BIAS_CASES,
    "prefix_attention": (*PREFIX_ATTENTION_CASES, *BIASED_PREFIX_CASES),
    "attention": ATTENTION_CASES,
    "gated": GATED_CASES,
    "rotary": ROTARY_CASES,
    "cross_entropy": CROSS_ENTROPY_CASES,
}
_WITH_PARAMETERS = (
    "delta_linear", "delta_linear_group", "bottleneck", "norm_bias", "prefix_attention",
)  # fmt: skip
"""Ops of which parameters may have a dtype of their own."""
