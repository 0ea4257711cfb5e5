"""A frozen linear layer and all its deltas, as one op.

    y = x Wᵀ + bias + Σᵢ sᵢ · dropᵢ(x) Aᵢᵀ Bᵢᵀ

Two ways in, one answer. Eager calls on plain tensors go straight to an ``autograd.Function``
(a registered op costs about 0.2 ms more a layer); everything else (torch.compile, tensor
subclasses) takes the registered op ``deltaops::delta_linear``; torch.func transforms take the
reference, which they can see through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from ..backends import DeltaLinearCall
from ..dispatch import LAST_RESORT, Explanation, explain_call, select
from ..errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from ..reference import delta_linear as reference


class Branch(NamedTuple):
    """A low-rank branch ``scaling · drop(x) aᵀ bᵀ``.

    Attributes:
        a: down-projection ``[R, K]``.
        b: up-projection ``[N, R]``, dtype of ``a``.
        scaling: dimensionless; LoRA uses ``alpha / R``.
        dropout: probability with which an element of x is dropped before ``a``; 0 in evaluation.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    dropout: float = 0.0


def delta_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    branches: Sequence[Branch] = (),
    *,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Apply a frozen linear layer together with its low-rank branches.

    Args:
        x: activations ``[..., K]``, floating point.
        weight: frozen ``[N, K]``, dtype of ``x``; ``conv1d.weight.T`` is taken as it lies.
        bias: ``[N]`` or None, dtype of ``x``; may be trainable.
        branches: any number of :class:`Branch`; their dtype may be wider than that of ``x``.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[..., N]`` in the dtype of ``x`` (under autocast, in autocast's dtype).
    Raises: ShapeError, DtypeError, DeviceError, GradientError, NoBackendError.
    Gradients: ``x``, ``bias`` and each branch's ``a`` and ``b``; first order.
    Randomness: with dropout, one int64 drawn from torch's generator for the device of ``x``.
    Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64 and x.is_floating_point():
            x, weight = x.to(target), weight.to(target)
            bias = None if bias is None else bias.to(target)
            branches = [Branch(r.a.to(target), r.b.to(target), *r[2:]) for r in branches]
        with torch.autocast(device, enabled=False):
            return _run(x, weight, bias, branches, backend, strict)
    return _run(x, weight, bias, branches, backend, strict)


def explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    branches: Sequence[Branch] = (),
    *,
    backend: str = "auto",
) -> Explanation:
    """Which backend ``delta_linear`` would take for these arguments, and why not the others.

    Raises: ShapeError, DtypeError, DeviceError as the call itself; NoBackendError for a name
        that is no backend's.
    """
    _check(x, weight, bias, branches)
    a, dropout = [r.a for r in branches], [r.dropout for r in branches]
    return explain_call(DeltaLinearCall.of(x, weight, a, dropout), backend)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    backend: str,
    strict: bool,
) -> Tensor:
    _check(x, weight, bias, branches)
    a = [r.a for r in branches]
    b = [r.b for r in branches]
    scaling = [float(r.scaling) for r in branches]
    dropout = [float(r.dropout) for r in branches]
    seed = _draw_seed(x.device) if any(dropout) else None
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _transformed(x, weight, bias, a, b, scaling, dropout, seed, backend, strict)
    if _takes_bypass(x, weight, bias, a, b):
        runner = select(DeltaLinearCall.of(x, weight, a, dropout), backend, strict)
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (bias is not None and bias.requires_grad)
            or any(t.requires_grad for t in a)
            or any(t.requires_grad for t in b)
        ):
            y: Tensor = _DeltaLinear.apply(x, weight, bias, scaling, dropout, seed, runner, *a, *b)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
            return y
        return _forward(x, weight, bias, a, b, scaling, dropout, seed, runner)[0]
    if strict:
        backend = select(DeltaLinearCall.of(x, weight, a, dropout), backend, strict).name
    out, _ = torch.ops.deltaops.delta_linear(x, weight, bias, a, b, scaling, dropout, seed, backend)
    return out  # type: ignore[no-any-return]  # torch.ops has no types


def _transformed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    backend: str,
    strict: bool,
) -> Tensor:
    """Under torch.func (vmap, grad, jvp): the reference, which every transform understands."""
    if strict or backend not in ("auto", LAST_RESORT):
        raise NoBackendError(
            "delta_linear: under torch.func transforms only the reference runs, and "
            f"backend={backend!r}, strict={strict} was asked for. "
            "Pass backend='auto' and strict=False, or leave the transform."
        )
    flat = x.reshape(-1, x.shape[-1])
    y, _ = reference.forward(flat, weight, bias, a, b, scaling, dropout, seed)
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _draw_seed(device: torch.device) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


_PLAIN = (Tensor, Parameter)


def _takes_bypass(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Sequence[Tensor], b: Sequence[Tensor]
) -> bool:
    """Whether the shortcut past the dispatcher gives the same: eager, and nobody is watching."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and (bias is None or type(bias) in _PLAIN)
        and all(type(t) in _PLAIN for t in a)
        and all(type(t) in _PLAIN for t in b)
        and x.device.type != "meta"
        and not torch._C._len_torch_dispatch_stack()
    )


# ---------------------------------------------------------------------------------------- checks


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch]) -> None:
    if weight.dim() != 2:
        raise ShapeError(
            f"delta_linear: weight must be [N, K], got {list(weight.shape)}. "
            "Pass nn.Linear.weight, or conv1d.weight.T."
        )
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(
            f"delta_linear: x must be [..., {k}] to go through weight [{n}, {k}], "
            f"got {list(x.shape)}. Is the weight transposed?"
        )
    if not x.is_floating_point():
        raise DtypeError(f"delta_linear: x must be floating point, got {x.dtype}. Convert it.")
    if weight.dtype != x.dtype:
        raise DtypeError(
            f"delta_linear: weight must have the dtype of x, {x.dtype}, got {weight.dtype}. "
            "Convert one of them, or run under torch.autocast."
        )
    if weight.requires_grad and torch.is_grad_enabled():
        raise GradientError(
            "delta_linear: weight is frozen, but it requires a gradient. Call "
            "weight.requires_grad_(False), or train it with torch.nn.functional.linear."
        )
    device = x.device
    if weight.device != device:
        raise DeviceError(_device_message("weight", weight, x))
    if bias is not None:
        if bias.shape != (n,):
            raise ShapeError(f"delta_linear: bias must be [{n}], got {list(bias.shape)}.")
        if bias.dtype != x.dtype:
            raise DtypeError(
                f"delta_linear: bias must have the dtype of x, {x.dtype}, got {bias.dtype}. "
                "Convert one of them."
            )
        if bias.device != device:
            raise DeviceError(_device_message("bias", bias, x))
    for i, branch in enumerate(branches):
        _check_branch(i, branch, x, n, k)


def _check_branch(i: int, branch: Branch, x: Tensor, n: int, k: int) -> None:
    a, b, scaling, dropout = branch
    if a.dim() != 2 or a.shape[1] != k or a.shape[0] < 1:
        raise ShapeError(
            f"delta_linear: branch {i}: a must be [R, {k}] with R ≥ 1 (K={k} from weight), "
            f"got {list(a.shape)}. Did you swap a and b?"
        )
    rank = a.shape[0]
    if b.shape != (n, rank):
        raise ShapeError(
            f"delta_linear: branch {i}: b must be [{n}, {rank}] (N from weight, R from a), "
            f"got {list(b.shape)}. Did you swap a and b, or change the rank of only one?"
        )
    if a.dtype != b.dtype or not a.is_floating_point():
        raise DtypeError(
            f"delta_linear: branch {i}: a and b must share a floating dtype, "
            f"got {a.dtype} and {b.dtype}. Convert one of them."
        )
    if a.device != x.device or b.device != x.device:
        name, tensor = ("a", a) if a.device != x.device else ("b", b)
        raise DeviceError(_device_message(f"branch {i}: {name}", tensor, x))
    if not 0.0 <= dropout <= 1.0:
        raise ConfigError(
            f"delta_linear: branch {i}: dropout is a probability from 0 to 1, got {dropout}."
        )


def _device_message(name: str, tensor: Tensor, x: Tensor) -> str:
    return (
        f"delta_linear: {name} must be on the device of x, {x.device}, got {tensor.device}. "
        "Move the model or the input."
    )


# -------------------------------------------------------------------------------------- autograd


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    runner: Any,
) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    flat = x if x.dim() == 2 else x.reshape(-1, k)
    y, s = runner.forward(flat, weight, bias, a, b, scaling, dropout, seed)
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], n)), s


def _backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
    runner: Any,
) -> list[Tensor]:
    n, k = weight.shape
    grad = grad_y if grad_y.dim() == 2 else grad_y.reshape(-1, n)
    flat = None if x is None else (x if x.dim() == 2 else x.reshape(-1, k))
    grads: list[Tensor] = runner.backward(
        grad, flat, weight, a, b, s, scaling, dropout, seed, needs
    )
    if needs[0] and grad_y.dim() != 2:
        grads[0] = grads[0].view(*grad_y.shape[:-1], k)
    return grads


class _DeltaLinear(torch.autograd.Function):
    """The eager path. Saves x (only for grad_a; it is held upstream anyway), S and the seed."""

    @staticmethod
    def forward(  # type: ignore[override]  # fixed arguments in place of *args
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scaling: list[float],
        dropout: list[float],
        seed: Tensor | None,
        runner: Any,
        *adapters: Tensor,
    ) -> Tensor:
        count = len(scaling)
        a, b = adapters[:count], adapters[count:]
        y, s = _forward(x, weight, bias, a, b, scaling, dropout, seed, runner)
        needs = ctx.needs_input_grad
        x_saved = x if any(needs[7 : 7 + count]) else None
        ctx.save_for_backward(x_saved, weight, s, seed, *adapters)
        ctx.settings = scaling, dropout, runner
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch has no types for it
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, s, seed, *adapters = ctx.saved_tensors
        scaling, dropout, runner = ctx.settings
        count = len(scaling)
        wants = ctx.needs_input_grad
        needs = [wants[0], wants[2], *wants[7:]]
        found = iter(
            _backward(
                grad_y,
                x,
                weight,
                adapters[:count],
                adapters[count:],
                s,
                scaling,
                dropout,
                seed,
                needs,
                runner,
            )
        )
        grads = [next(found) if need else None for need in needs]
        return (grads[0], None, grads[1], None, None, None, None, *grads[2:])


# --------------------------------------------------------------------------------- registered op

_library = torch.library.Library("deltaops", "FRAGMENT")
# No defaults: the dispatcher drops trailing ones, and needs_input_grad gets shorter.
_library.define(
    "delta_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] a, Tensor[] b, "
    "float[] scaling, float[] dropout, Tensor? seed, str backend) -> (Tensor y, Tensor s)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "delta_linear_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor[] a, Tensor[] b, "
    "Tensor s, float[] scaling, float[] dropout, Tensor? seed, bool[] needs, str backend) "
    "-> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _op_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    runner = select(DeltaLinearCall.of(x, weight, a, dropout), backend)
    return _forward(x, weight, bias, a, b, scaling, dropout, seed, runner)


def _op_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    # grad_y [..., N] stands for x [..., K]: the call differs in nothing that a backend looks at
    n, k = weight.shape
    call = DeltaLinearCall.of(grad_y, weight, a, dropout)
    runner = select(call._replace(m=grad_y.numel() // n if n else 0), backend)
    return _backward(grad_y, x, weight, a, b, s, scaling, dropout, seed, needs, runner)


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    dtype = torch.promote_types(x.dtype, torch.float32)
    return y, x.new_empty((m, sum(t.shape[0] for t in a)), dtype=dtype)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    s: Tensor,
    scaling: list[float],
    dropout: list[float],
    seed: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    n, k = weight.shape
    outputs = [
        grad_y.new_empty((*grad_y.shape[:-1], k)),
        grad_y.new_empty((n,)),
        *(t.new_empty(t.shape) for t in (*a, *b)),
    ]
    return [t for t, need in zip(outputs, needs, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _bias, a, b, scaling, dropout, seed, backend = inputs
    if weight.requires_grad:
        raise GradientError("deltaops::delta_linear: weight is frozen, but requires a gradient.")
    ctx.mark_non_differentiable(output[1])
    need_a = any(t.requires_grad for t in a)
    ctx.save_for_backward(x if need_a else None, weight, output[1], seed, *a, *b)
    ctx.settings = scaling, dropout, backend
    ctx.ranks = [t.requires_grad for t in a], [t.requires_grad for t in b]


def _op_autograd(ctx: Any, grad_y: Tensor, _grad_s: Tensor | None) -> tuple[Any, ...]:
    x, weight, s, seed, *adapters = ctx.saved_tensors
    scaling, dropout, backend = ctx.settings
    needs_a, needs_b = ctx.ranks
    count = len(needs_a)
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *needs_a, *needs_b]
    found = iter(
        torch.ops.deltaops.delta_linear_backward(
            grad_y,
            x,
            weight,
            adapters[:count],
            adapters[count:],
            s,
            scaling,
            dropout,
            seed,
            needs,
            backend,
        )
    )
    grads = [next(found) if need else None for need in needs]
    grad_a, grad_b = grads[2 : 2 + count], grads[2 + count :]
    return (grads[0], None, grads[1], grad_a, grad_b, None, None, None, None)


def _no_second_order(ctx: Any, *_grads: Any) -> tuple[Any, ...]:
    raise GradientError(
        "delta_linear: gradients are of first order only; a second backward pass went through "
        "them. Compute it with backend='reference' in eager torch functions instead."
    )


_library.impl("delta_linear", _op_forward, "CompositeExplicitAutograd")
_library.impl("delta_linear_backward", _op_backward, "CompositeExplicitAutograd")
torch.library.register_fake("deltaops::delta_linear", _fake_forward, lib=_library)
torch.library.register_fake("deltaops::delta_linear_backward", _fake_backward, lib=_library)
torch.library.register_autograd(
    "deltaops::delta_linear", _op_autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("deltaops::delta_linear_backward", _no_second_order, lib=_library)
