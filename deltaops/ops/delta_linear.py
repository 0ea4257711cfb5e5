"""A frozen linear layer and all its deltas, as one op.

    y = x Wᵀ + bias + Σᵢ sᵢ · φᵢ(dropᵢ(x) Aᵢᵀ + aᵢ) Bᵢᵀ

With ``adapter``, a batch mixes adapters: each row has one branch or none instead of the sum.

Two ways in, one answer. Eager calls on plain tensors go straight to an ``autograd.Function``
(a registered op costs about 0.2 ms more a layer); everything else (torch.compile, tensor
subclasses) takes the registered op ``deltaops::delta_linear``; torch.func transforms take the
reference, which they can see through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from deltaops.backends import DeltaLinearCall, GivenPlan
from deltaops.backends.cpu import native
from deltaops.dispatch import LAST_RESORT, Explanation, explain_call, select
from deltaops.errors import (
    ConfigError,
    DeviceError,
    DtypeError,
    GradientError,
    NoBackendError,
    ShapeError,
)
from deltaops.packing import PACKING, Layout
from deltaops.reference import delta_linear as reference
from deltaops.reference.activation import ACTIVATIONS

from .delta_linear_autograd import DeltaLinearFunction, row_ids, run_forward
from .made import SLOT, WithS, claim
from .paths import PLAIN, takes_bypass
from .plans import PLANS, Known, look, make_plan


class Branch(NamedTuple):
    """A branch ``scaling · φ(drop(x) aᵀ + bias) bᵀ``: LoRA, or a parallel adapter.

    Attributes:
        a: down-projection ``[R, K]``.
        b: up-projection ``[N, R]``, dtype of ``a``.
        scaling: dimensionless; LoRA uses ``alpha / R``.
        dropout: probability with which an element of x is dropped before ``a``; 0 in evaluation.
        activation: φ: "identity" (LoRA), "relu", "gelu" (by erf), "gelu_tanh" or "silu".
        bias: ``[R]`` or None, dtype of ``a``; what is added before φ. An adapter's bias after ``b``
            belongs into the layer's own ``bias``.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    dropout: float = 0.0
    activation: str = "identity"
    bias: Tensor | None = None


def delta_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    branches: Sequence[Branch] = (),
    adapter: Tensor | None = None,
    *,
    backend: str = "auto",
    strict: bool = False,
) -> Tensor:
    """Apply a frozen linear layer together with its branches: LoRA, parallel adapters, any stack.

    Args:
        x: activations ``[..., K]``, floating point.
        weight: frozen ``[N, K]``, dtype of ``x``; ``conv1d.weight.T`` is taken as it lies.
        bias: ``[N]`` or None, dtype of ``x``; may be trainable.
        branches: any number of :class:`Branch`; their dtype may be wider than that of ``x``.
        adapter: int32 or int64 ``[...]``, one number for each row of ``x``, in any order: the row
            gets this one of ``branches`` and no other, none for -1. None: every row gets all.
            Ranks and settings may differ. What the backward pass keeps grows with the sum of the
            ranks; on the CPU the work does not, and a NaN in a branch stays in its rows, while
            Triton's products by zero carry it into the others.
        backend: "auto", or the name of one in ``deltaops.backends()``, which then runs or raises.
        strict: with "auto", raise instead of ending in eager torch.
    Returns: ``[..., N]`` in the dtype of ``x`` (under autocast, in autocast's dtype).
    Raises: ShapeError, DtypeError, DeviceError, ConfigError, GradientError, NoBackendError.
    Gradients: ``x``, ``bias`` and each branch's ``a``, ``b`` and ``bias``; first order.
    Randomness: with dropout, one int64 drawn from torch's generator for the device of ``x``.
    Source: Hu et al. 2021 (arXiv 2106.09685), eq. 3; He et al. 2021 (arXiv 2110.04366), table 1.
    """
    device = "cpu" if x.is_cpu else x.device.type
    if torch.is_autocast_enabled(device):
        target = torch.get_autocast_dtype(device)
        if x.dtype != torch.float64 and x.is_floating_point():
            x = x.to(target)
            weight, bias, branches = cast_layer(weight, bias, branches, target)
        with torch.autocast(device, enabled=False):
            return _run(x, weight, bias, branches, adapter, backend, strict)
    return _run(x, weight, bias, branches, adapter, backend, strict)


def cast_layer(
    weight: Tensor, bias: Tensor | None, branches: Sequence[Branch], target: torch.dtype
) -> tuple[Tensor, Tensor | None, Sequence[Branch]]:
    """A layer in autocast's dtype."""
    cast = [
        r._replace(
            a=r.a.to(target),
            b=r.b.to(target),
            bias=None if r.bias is None else r.bias.to(target),
        )
        for r in branches
    ]
    return _converted(weight, target), None if bias is None else bias.to(target), cast


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in autocast's dtype. A frozen one is converted once where the CPU core can tell
    that it is still the same: torch keeps only the conversions of weights that are trained."""
    if (
        weight.dtype == torch.float32 != dtype
        and weight.dim() == 2
        and takes_bypass(weight)
        and not torch._C._are_functorch_transforms_active()
        and weight.is_cpu
        and not weight.requires_grad
        and 1 in weight.stride()
    ):
        core = native()
        if not isinstance(core, str):
            return PACKING.converted(core, weight, Layout.of(weight, 0), dtype)
    return weight.to(dtype)


def explain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    branches: Sequence[Branch] = (),
    adapter: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Explanation:
    """Which backend ``delta_linear`` would take for these arguments, and why not the others.

    Raises: ShapeError, DtypeError, DeviceError as the call itself; NoBackendError for a name
        that is no backend's.
    """
    _check(x, weight, bias, branches)
    check_adapter(adapter, x)
    call = DeltaLinearCall.of(
        x,
        weight,
        [r.a for r in branches],
        [r.bias for r in branches],
        [r.dropout for r in branches],
        [r.activation for r in branches],
        adapter is not None,
    )
    return explain_call(call, backend)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    adapter: Tensor | None,
    backend: str,
    strict: bool,
) -> Tensor:
    if watched():
        return _run_watched(x, weight, bias, branches, adapter, backend, strict)
    prepared = prepare(x, weight, bias, branches, adapter, backend, strict)
    if prepared is None:
        return _run_watched(x, weight, bias, branches, adapter, backend, strict)
    (plan, random), operands, ids = prepared
    made = None if SLOT.waiting is None or ids is not None else claim(x, plan, operands)
    if made is not None:
        plan, seed = WithS(cast(GivenPlan, plan), made.s), made.seed
    else:
        seed = draw_seed(x.device) if random else None
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (bias is not None and bias.requires_grad)
        or any([t is not None and t.requires_grad for t in operands])
    ):
        y = DeltaLinearFunction.apply(x, weight, bias, seed, ids, plan, *operands)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
        return y  # type: ignore[no-any-return]  # Function.apply again
    return run_forward(x, weight, bias, operands, seed, plan, False, ids)[0]


def watched() -> bool:
    """Whether a compiler, a transform or a mode looks on, which must see the registered op."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def prepare(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    adapter: Tensor | None,
    backend: str,
    strict: bool,
    like: Callable[[], Tensor] | None = None,
) -> tuple[Known, list[Tensor | None], Tensor | None] | None:
    """What is known of an eager call, checked, the branches' tensors, a… b… bias…, and the rows'
    numbers as backends take them; None where a tensor is of another class.

    like: makes the weight of a call that is not known yet, where ``weight`` only has its shape.
    """
    seen = look(x, weight, bias, branches, backend, strict)
    if seen is None or x.is_meta:
        return None
    key, operands = seen
    routed = adapter is not None
    if routed:
        if type(adapter) not in PLAIN:
            return None
        key = key, routed
    if like is not None:
        key = key, "weight apart"
    known = PLANS.get(key)
    if known is None or (weight.requires_grad and torch.is_grad_enabled()):
        weight = weight if like is None else like()
        _check(x, weight, bias, branches)
        known = _learn(x, weight, branches, routed, backend, strict)
        PLANS.keep(key, known)
    if adapter is None:  # asked here: two calls less of a small layer
        return known, operands, None
    check_adapter(adapter, x)
    return known, operands, row_ids(adapter, len(branches))


def _learn(
    x: Tensor,
    weight: Tensor,
    branches: Sequence[Branch],
    routed: bool,
    backend: str,
    strict: bool,
) -> Known:
    a = [r.a for r in branches]
    b = [r.b for r in branches]
    branch_bias = [r.bias for r in branches]
    scaling = [float(r.scaling) for r in branches]
    dropout = [float(r.dropout) for r in branches]
    activation = [r.activation for r in branches]
    call = DeltaLinearCall.of(x, weight, a, branch_bias, dropout, activation, routed)
    runner = select(call, backend, strict)
    plan = make_plan(runner, weight, a, b, branch_bias, scaling, dropout, activation)
    return Known(plan, any(dropout))


def _run_watched(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    adapter: Tensor | None,
    backend: str,
    strict: bool,
) -> Tensor:
    """Where somebody looks on: a compiler, a transform, a mode, or a tensor of another class."""
    _check(x, weight, bias, branches)
    check_adapter(adapter, x)
    a = [r.a for r in branches]
    b = [r.b for r in branches]
    branch_bias = [r.bias for r in branches]
    scaling = [float(r.scaling) for r in branches]
    dropout = [float(r.dropout) for r in branches]
    activation = [r.activation for r in branches]
    seed = draw_seed(x.device) if any(dropout) else None
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        _check_transformed(backend, strict)
        flat = x.reshape(-1, x.shape[-1])
        ids = None if adapter is None else adapter.reshape(-1)  # a transform hides the numbers
        y, _ = reference.forward(
            flat, weight, bias, a, b, branch_bias, scaling, dropout, activation, seed, ids
        )
        return y.reshape(*x.shape[:-1], weight.shape[0])
    if strict or not isinstance(backend, str):  # which select refuses in words
        routed = adapter is not None
        call = DeltaLinearCall.of(x, weight, a, branch_bias, dropout, activation, routed)
        backend = select(call, backend, strict).name
    # torch's autograd of registered ops sees into a list only where all of it is tensors
    present = [t for t in branch_bias if t is not None]
    biased = [t is not None for t in branch_bias]
    out, _ = torch.ops.deltaops.delta_linear(
        x, weight, bias, a, b, present, biased, scaling, dropout, activation, seed, adapter, backend
    )
    return out  # type: ignore[no-any-return]  # torch.ops has no types


def _check_transformed(backend: str, strict: bool) -> None:
    """Under torch.func (vmap, grad, jvp): the reference, which every transform understands."""
    if strict or backend not in ("auto", LAST_RESORT):
        raise NoBackendError(
            "delta_linear: under torch.func transforms only the reference runs, and "
            f"backend={backend!r}, strict={strict} was asked for. "
            "Pass backend='auto' and strict=False, or leave the transform."
        )


def draw_seed(device: torch.device) -> Tensor:
    """What decides a call's dropout, from torch's generator for ``device``."""
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


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


def check_adapter(adapter: Tensor | None, x: Tensor) -> None:
    """Raise unless ``adapter`` has an integer for each row of x; the numbers are checked later."""
    if adapter is None:
        return
    if adapter.dtype not in (torch.int32, torch.int64):
        raise DtypeError(
            f"delta_linear: adapter must be int32 or int64, got {adapter.dtype}. It holds the "
            "number of a branch for each row of x, or -1."
        )
    if adapter.shape != x.shape[:-1]:
        raise ShapeError(
            f"delta_linear: adapter must be {list(x.shape[:-1])}, one number for each row of x, "
            f"got {list(adapter.shape)}. Repeat a sample's number for all of its tokens."
        )
    if adapter.device != x.device:
        raise DeviceError(_device_message("adapter", adapter, x))


def _check_branch(i: int, branch: Branch, x: Tensor, n: int, k: int) -> None:
    a, b, _scaling, dropout, activation, bias = branch
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
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"delta_linear: branch {i}: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}. Check the spelling."
        )
    if bias is not None:
        _check_branch_bias(i, bias, a, x)


def _check_branch_bias(i: int, bias: Tensor, a: Tensor, x: Tensor) -> None:
    rank = a.shape[0]
    if bias.shape != (rank,):
        raise ShapeError(
            f"delta_linear: branch {i}: bias must be [{rank}] (R from a), "
            f"got {list(bias.shape)}. It is added before the activation, not after b."
        )
    if bias.dtype != a.dtype:
        raise DtypeError(
            f"delta_linear: branch {i}: bias must have the dtype of a, {a.dtype}, "
            f"got {bias.dtype}. Convert one of them."
        )
    if bias.device != x.device:
        raise DeviceError(_device_message(f"branch {i}: bias", bias, x))


def _device_message(name: str, tensor: Tensor, x: Tensor) -> str:
    return (
        f"delta_linear: {name} must be on the device of x, {x.device}, got {tensor.device}. "
        "Move the model or the input."
    )
