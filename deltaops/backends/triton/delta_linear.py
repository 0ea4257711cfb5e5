"""``delta_linear``: two GEMMs with a rank part, one pass over dy, split-M sums in fixed order.

The GEMMs of y and dx go one of the ways of :mod:`planner`; the passes (:mod:`branches`) are kernels
always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deltaops.backends.calls import DeltaLinearCall
from deltaops.errors import DataError

from . import beside, branches, core, cuda, planner
from .planner import Choice

MOST_MIXED = 128
"""Ranks of all adapters that a batch may mix: beyond, products with zeros outweigh the others."""


def unsupported(call: DeltaLinearCall) -> str | None:
    """None, or what the kernels do not take."""
    for dtype in (call.dtype, *call.adapter_dtypes):
        if dtype not in core.DTYPES:
            return f"takes float32, float16 and bfloat16, not {dtype}"
    if len(set(call.adapter_dtypes)) > 1:
        return "the branches must share one dtype"
    if call.routed and call.rank > MOST_MIXED:
        return (
            f"mixes adapters of at most {MOST_MIXED} ranks together (each row multiplies by all of "
            f"them, most by zero), not of {call.rank}"
        )
    return None


def planned(call: DeltaLinearCall) -> str:
    """How the GEMMs of a call on the current GPU go, and why, or why none can be chosen. x and dy
    are taken to be contiguous, and so is a "strided" weight: the call does not say how it lies."""

    def matrix(rows: int, columns: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device="meta")

    m, n, k = call.m, call.n, call.k
    factors = list(zip(call.ranks, call.adapter_dtypes, strict=True))
    weight = matrix(k, n).t() if call.weight_layout == "col" else matrix(n, k)
    linear = not (call.activations or call.branch_bias or call.routed or call.dropout)
    try:
        y, dx = (
            _choice(
                direction, rows, weight, given, call.ranks, call.adapter_dtypes, call.dropout,
                call.device, linear,
            )
            for direction, rows, given in (
                ("forward", matrix(m, k), [matrix(n, r, dtype) for r, dtype in factors]),
                ("backward", matrix(m, n), [matrix(r, k, dtype) for r, dtype in factors]),
            )
        )  # fmt: skip
    except DataError as error:
        return f"no plan, a call would raise: {error}"
    return planner.text(y, dx)


def forward(
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
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    with core.device_of(x):
        if not y.numel():
            width = sum(t.shape[0] for t in a)
            return y, torch.empty((x.shape[0], width), dtype=torch.float32, device=x.device)
        linear = adapter is None and _is_linear(branch_bias, dropout, activation)
        plan = plan_of("forward", x, weight, a, b, dropout, linear)
        if plan == "decode":
            return y, _decode(y, x, weight, bias, a[0], b[0], scaling[0])
        if plan == "beside" and core.kernels("persistent").is_describable(a[0]):
            given = None if bias is None else bias.contiguous()
            return y, beside.forward(y, x, weight, given, a[0], b[0], scaling[0])
        s, u = branches.project(x, a, branch_bias, scaling, dropout, activation, seed, adapter)
        _write_outputs(plan, y, x, weight, bias, a, b, u)
    return y, s


def _is_linear(
    branch_bias: Sequence[Tensor | None], dropout: Sequence[float], activation: Sequence[str]
) -> bool:
    """Whether S = s · x Aᵀ is all that lies between x and B."""
    plain = all([kind == branches.LINEAR for kind in activation]) and not any(dropout)
    return plain and all([t is None for t in branch_bias])


def _decode(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """Write y; S ``[M, R]``."""
    s = torch.empty((x.shape[0], a.shape[0]), dtype=torch.float32, device=x.device)
    core.kernels("decode").decode(
        x, weight, None if bias is None else bias.contiguous(), a, b, s, y, scaling=scaling,
        precision=core.kernels("precision").rank_precision(x.dtype, [a]),
        capability=core.capability(x),
    )  # fmt: skip
    return s


def outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    dropout: Sequence[float],
) -> Tensor:
    """``y [M, N]`` where S is known, or U of parallel adapters; on the current GPU."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    if y.numel():
        plan = plan_of("forward", x, weight, a, b, dropout)
        _write_outputs(plan, y, x, weight, bias, a, b, s)
    return y


def _write_outputs(
    plan: str,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
) -> None:
    bias = None if bias is None else bias.contiguous()  # as the kernels read it
    if plan == "torch":
        _add_products(y, bias, s, [t.t() for t in b], x, weight.t())
        return
    if plan == "persistent":
        core.kernels("persistent_forward").persistent_forward(
            x, weight, bias, s, b[0], y,
            capability=core.capability(x), multiprocessors=core.multiprocessors(x.device),
        )  # fmt: skip
        return
    if plan in (*cuda.PLANS, "beside"):  # the latter where A lies otherwise
        plan = "cuda" if plan == "beside" else plan
        cuda.outputs(plan, y, x, weight, bias, s, b[0])
        return
    core.kernels("forward").forward_gemm(
        x, weight, bias, s, list(b), y,
        precision=core.kernels("precision").rank_precision(x.dtype, a),
        capability=core.capability(x), has_base=plan == "fused",
    )  # fmt: skip
    if plan == "split":
        y.addmm_(x, weight.t())


def backward(
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

    # one branch without a bias of its own, of which dx and dA are both wanted
    both = [needs[0], *needs[2:3], *needs[4:]] == [True, True, False]
    if x is not None and both and adapter is None and _is_linear((), dropout, activation):
        if plan_of("backward", grad_y, weight, a, a, dropout) == "beside":
            if core.kernels("persistent").is_describable(x):
                return beside.backward(grad_y, x, weight, a[0], b[0], s, scaling[0], needs)

    def write(grad_x: Tensor, grad_s: Tensor) -> None:
        _write_grad_input(grad_x, grad_y, weight, a, grad_s, dropout, seed)

    settings = scaling, dropout, activation
    return gradients(
        grad_y, x, weight.shape[1], a, b, s, *settings, seed, needs, adapter, write=write
    )


def gradients(
    grad_y: Tensor,
    x: Tensor | None,
    k: int,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scaling: Sequence[float],
    dropout: Sequence[float],
    activation: Sequence[str],
    seed: Tensor | None,
    needs: Sequence[bool],
    adapter: Tensor | None,
    *,
    write: Callable[[Tensor, Tensor], None],
) -> list[Tensor]:
    """The wanted gradients. What holds the weight, ``write``, writes that of x ``[M, K]`` for
    dS ``[M, ΣR]``."""
    count, device, dtype = len(a), grad_y.device, grad_y.dtype
    m, n = grad_y.shape
    grad_x = torch.empty((m, k), dtype=dtype, device=device) if needs[0] else None
    grad_bias = torch.empty(n, dtype=dtype, device=device) if needs[1] else None
    wanted = branches.wanted(a, b, needs[2:], device)
    grads = [g for g in (grad_x, grad_bias, *wanted) if g is not None]
    if not grad_y.numel():
        return [g.zero_() for g in grads]
    with core.device_of(grad_y):
        precision = core.kernels("precision").rank_precision(dtype, a)
        grad_s = torch.empty(s.shape, dtype=torch.float32, device=device)
        for i, piece in enumerate(branches.columns([t.shape[0] for t in a])):
            of_a, of_b, of_inner = wanted[i::count]
            of_s = needs[0] or of_a is not None or of_inner is not None
            branches.pass_over_dy(
                grad_y,
                b[i],
                s[:, piece],
                scaling=scaling[i],
                activation=activation[i],
                precision=precision,
                grad_s=grad_s[:, piece] if of_s else None,
                grad_b=of_b,
                grad_bias=grad_bias if i == 0 else None,
                adapter=adapter,
                number=i,
            )
            if of_inner is not None:
                of_inner.copy_(grad_s[:, piece].sum(0))
            if of_a is not None:
                core.kernels("grad_down").grad_down(
                    grad_s[:, piece],
                    x,
                    of_a,
                    precision=precision,
                    dropout=dropout[i],
                    seed=seed,
                    stream=i,
                )
        if grad_bias is not None and count == 0:
            torch.sum(grad_y, 0, out=grad_bias)
        if grad_x is not None and grad_x.numel():
            write(grad_x, grad_s)
    return grads


def _write_grad_input(
    grad_x: Tensor,
    grad_y: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    grad_s: Tensor,
    dropout: Sequence[float],
    seed: Tensor | None,
) -> None:
    plan = plan_of("backward", grad_y, weight, a, a, dropout)
    if plan == "torch":
        _add_products(grad_x, None, grad_s, a, grad_y, weight)
        return
    if plan in ("persistent", "beside"):  # the latter where nothing is wanted beside it
        core.kernels("persistent_grad_input").persistent_grad_input(
            grad_y, weight, grad_s, a[0], grad_x, dropout=dropout[0], seed=seed,
            capability=core.capability(grad_y),
            multiprocessors=core.multiprocessors(grad_y.device),
        )  # fmt: skip
        return
    if plan in cuda.PLANS:
        cuda.grad_input(plan, grad_x, grad_y, weight, grad_s, a[0], dropout[0], seed)
        return
    kernels = core.kernels("grad_input")
    kernels.grad_input_gemm(
        grad_y, weight, kernels.Downs.of_layer(grad_s, a, dropout, seed), grad_x,
        precision=core.kernels("precision").rank_precision(grad_y.dtype, a),
        capability=core.capability(grad_y), has_base=plan == "fused",
    )  # fmt: skip
    if plan == "split":
        grad_x.addmm_(grad_y, weight)


def described(
    direction: str,
    rows: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    ranks: Sequence[int],
    device: torch.device | str,
) -> bool:
    """Whether the persistent kernels take the GEMM of a direction on ``device``: of one branch in
    the model's dtype, and of matrices that tensor descriptors take, S and the output among them."""
    if len(ranks) != 1 or rows.shape[0] < core.kernels("configs").PERSISTENT_ROWS:
        return False
    columns = weight.shape[0 if direction == "forward" else 1]
    if ranks[0] == 0 or ranks[0] % 8 or columns % 8 or factors[0].dtype != rows.dtype:
        return False
    if not core.persists(device):
        return False
    taken: bool = core.kernels("persistent").is_describable(rows, weight, *factors)
    return taken


def decodes(rows: Tensor, factors: Sequence[Tensor], ranks: Sequence[int]) -> bool:
    """Whether y and S of x are made together: few rows, one branch in the model's dtype."""
    if len(ranks) != 1 or factors[0].dtype != rows.dtype:
        return False
    most: tuple[int, int] = core.kernels("configs").DECODED
    return 0 < rows.shape[0] <= most[0] and 0 < ranks[0] <= most[1]


def special(
    direction: str,
    rows: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    ranks: Sequence[int],
    device: torch.device | str,
    linear: bool,
) -> tuple[str, ...]:
    """The plans from ``persistent`` on that take the GEMM of a direction on ``device``.

    Args:
        linear: S is still to be made, and is s · x Aᵀ, without dropout or what a parallel adapter
            or a row's own has.
    """
    found: tuple[str, ...] = ()
    if described(direction, rows, weight, factors, ranks, device):
        found = ("persistent", "cuda") if cuda.runs_on(device, "cuda") else ("persistent",)
    if len(ranks) == 1 and cuda.takes(rows, weight, *factors) and cuda.runs_on(device, "ampere"):
        found += ("ampere",)
    if direction == "backward" and "persistent" in found:
        m, k = rows.shape[0], weight.shape[1]
        found += ("beside",) if beside.fits(m, k, ranks[0], device) else ()
    if linear and direction == "forward" and "cuda" in found:
        m, n = rows.shape[0], weight.shape[0]
        found += ("beside",) if beside.makes_s(m, n, ranks[0], device) else ()
    if linear and direction == "forward" and decodes(rows, factors, ranks):
        found += ("decode",)
    return found


def makes_s_before(
    x: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    branch_bias: Sequence[Tensor | None],
    dropout: Sequence[float],
    activation: Sequence[str],
) -> bool:
    """Whether S of a layer is to be made where its x is; ``x`` may be on "meta"."""
    ranks, dtypes = tuple([t.shape[0] for t in a]), tuple([t.dtype for t in a])
    linear = _is_linear(branch_bias, dropout, activation)
    device, more = weight.device, ("produced",)
    given = ranks, dtypes, any(dropout), device, linear
    return _choice("forward", x, weight, b, *given, more).plan == "produced"


def plan_of(
    direction: str,
    rows: Tensor,
    weight: Tensor,
    a: Sequence[Tensor],
    factors: Sequence[Tensor],
    dropout: Sequence[float],
    linear: bool = False,
) -> str:
    """How the GEMM of this direction goes; ``rows`` is x or dy, ``factors`` are B or A; ``linear``
    as in :func:`special`."""
    ranks, dtypes = tuple([t.shape[0] for t in a]), tuple([t.dtype for t in a])
    given = ranks, dtypes, any(dropout), rows.device, linear
    return _choice(direction, rows, weight, factors, *given).plan


def _choice(
    direction: str,
    rows: Tensor,
    weight: Tensor,
    factors: Sequence[Tensor],
    ranks: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    dropout: bool,
    device: torch.device | str,
    linear: bool,
    more: tuple[str, ...] = (),
) -> Choice:
    n, k = weight.shape
    setting = planner.setting_of(rows.dtype, dtypes, rows.shape[0], n, k, ranks, dropout)
    plain = core.kernels("configs").is_plain(rows, weight, ranks)
    able = special(direction, rows, weight, factors, ranks, device, linear) + more
    return planner.choose(setting, direction, device, plain, able)


def _add_products(
    out: Tensor,
    bias: Tensor | None,
    s: Tensor,
    factors: Sequence[Tensor],
    left: Tensor,
    right: Tensor,
) -> None:
    """``out = bias + Σᵢ sᵢ factorsᵢ + left right``, each product added onto what is there, rounded
    between them. In place and into ``out``, which autocast leaves alone."""
    narrow, column, begun = s.to(out.dtype), 0, False
    pieces = []
    for factor in factors:  # of the dtype of ``out``, or narrower
        pieces.append((narrow[:, column : column + factor.shape[0]], factor.to(out.dtype)))
        column += factor.shape[0]
    for one, other in (*pieces, (left, right)):  # the large one last: small sums lose less
        if begun:
            out.addmm_(one, other)
        elif bias is not None:
            torch.addmm(bias, one, other, out=out)
        else:
            torch.mm(one, other, out=out)
        begun = True
