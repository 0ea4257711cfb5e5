"""One layer, forward and backward, and the frozen product alone, each beside its peers.

Peers that have dropout run at both settings in the same interleaved run, so that what dropout costs
is a ratio of neighbours, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltaops.ops import Branch, delta_linear

from . import cell as names
from .cases import DTYPES, SCALING, LayerCase, Tensors
from .cell import Cell
from .gate import hold_layer
from .interleave import interleaved
from .prepacked import Prepacked, PrepackedLora
from .saved import saved_bytes

Run = Callable[[], list[Tensor]]

PATIENCE = 10.0
"""Seconds that one call of a peer may be expected to take."""


class Pace:
    """Seconds a flop of each peer on the shapes before: whether the next is worth starting."""

    def __init__(self) -> None:
        """Nothing known: everything is tried."""
        self._known: dict[tuple[str, str], float] = {}

    def learn(self, peer: str, dtype: str, flops: float, seconds: float) -> None:
        """Keep what a call took."""
        self._known[peer, dtype] = seconds / flops

    def refuses(self, peer: str, dtype: str, flops: float) -> str | None:
        """Why a call would take too long, or None."""
        expected = self._known.get((peer, dtype), 0.0) * flops
        if expected <= PATIENCE:
            return None
        return f"one call would take about {expected:.0f} s here, the limit is {PATIENCE:.0f} s"


def measure_layer(
    op: str,
    shape: tuple[int, int, int],
    dtype: str,
    *,
    dropouts: tuple[float, ...] = (0.0,),
    rounds: int = 15,
    seconds: float = float("inf"),
    compiled: bool = False,
    pace: Pace | None = None,
) -> list[Cell]:
    """Gate, then time one op; a cell for each dropout. Raises: AssertionError from the gate.

    Args:
        op: a name of :data:`deltaops.measure.cases.OPS`.
        shape: M, N, K.
        dtype: "f32" or "bf16".
        dropouts: of the branch; peers without dropout are in every cell.
        rounds: at most.
        seconds: for the timing, all peers together.
        compiled: also PEFT and ours under torch.compile, without dropout.
        pace: what earlier shapes took.
    """
    pace = pace or Pace()
    case = LayerCase.of(op, shape, dtype)
    flops = 4.0 * shape[0] * shape[1] * shape[2]
    runs: dict[tuple[str, float], Run] = {}
    absent: dict[str, str] = {}
    for dropout in dropouts:
        found, missing = _delta_peers(case, dropout, compiled and not dropout)
        absent |= missing
        for name, run in found.items():
            late = pace.refuses(f"{op} {name}", dtype, flops) if name in _SLOW else None
            if late:
                absent[name] = late
            else:
                runs[name, dropout] = run
    for dropout in dropouts:
        here = {n: r for (n, p), r in runs.items() if p == dropout}
        ours = [here[n] for n in (names.OURS, names.OURS_COMPILED) if n in here]
        others = {n: r for n, r in here.items() if n in names.PEERS_OF_OTHERS and not dropout}
        hold_layer(case, dropout, ours, others)
    if 0.0 in dropouts:
        runs |= {(name, 0.0): run for name, run in _frozen(case, pace, absent).items()}
    saved = _saved(case, runs)
    timed = interleaved(
        {f"{name} {p}": run for (name, p), run in runs.items()}, rounds=rounds, seconds=seconds
    )
    for name, p in runs:
        pace.learn(f"{op} {name}", dtype, flops, timed[f"{name} {p}"].median)
    return [
        Cell(
            op, "×".join(map(str, shape)), dtype, dropout,
            {
                name: timed[f"{name} {p}"]
                for name, p in runs
                if p == dropout or name in (names.FROZEN, names.OWN_FROZEN)
            },
            absent,
            {name: size for (name, p), size in saved.items() if p == dropout},
            shape, case.op.rank,
        )
        for dropout in dropouts
    ]  # fmt: skip


def peers(case: LayerCase, dropout: float) -> tuple[dict[str, Run], dict[str, str]]:
    """Every eager peer of a case, and why the others are not there."""
    runs, absent = _delta_peers(case, dropout, False)
    return runs | _frozen(case, Pace(), absent), absent


# torch's own bfloat16 products can be a hundred times slower than ours where the CPU lacks BF16.
_SLOW = {names.FROZEN, names.PEFT, names.PEFT_NARROW, names.PEFT_COMPILED, names.EAGER}


def _delta_peers(
    case: LayerCase, dropout: float, compiled: bool
) -> tuple[dict[str, Run], dict[str, str]]:
    t, op = case.tensors, case.op
    runs: dict[str, Run] = {}
    absent: dict[str, str] = {}
    if op.missing:
        absent[names.OURS] = op.missing
    else:
        runs[names.OURS] = lambda: case.back(op.fused(t, dropout), t)
    if op.name != "lora":
        runs[names.EAGER] = lambda: case.back(op.formula(t, None), t)
        return runs, absent
    if compiled:  # each shape is a graph of its own, and the limit of torch is eight
        torch._dynamo.reset()
        ours = torch.compile(op.fused, dynamic=False, fullgraph=True)
        runs[names.OURS_COMPILED] = lambda: case.back(ours(t, dropout), t)
    for name, autocast in ((names.PEFT, True), (names.PEFT_NARROW, False)):
        if name == names.PEFT_NARROW and case.dtype == "f32":
            continue
        layer = peft_layer(case, dropout, autocast)
        if layer is None:
            absent[name] = "peft is not installed"
            continue
        runs[name] = _of_layer(case, layer, layer)
        if compiled and name == (names.PEFT if case.dtype == "f32" else names.PEFT_NARROW):
            # in bfloat16 the faster of PEFT's two forms
            fast: Any = torch.compile(layer, dynamic=False, fullgraph=True)
            runs[names.PEFT_COMPILED] = _of_layer(case, layer, fast)
    try:
        packed = Prepacked(t["weight"], t["bias"], case.shape[0])
    except RuntimeError as error:
        absent[names.PREPACKED] = str(error).splitlines()[0]
    else:
        narrow = case.cast("a", "b", dtype=t["x"].dtype)
        runs[names.PREPACKED] = lambda: case.back(_addmm(narrow, dropout, packed), narrow)
    return runs, absent


def _addmm(t: Tensors, dropout: float, packed: Prepacked) -> Tensor:
    y: Tensor = PrepackedLora.apply(t["x"], t["a"], t["b"], SCALING, dropout, packed)  # type: ignore[no-untyped-call]  # torch's Function.apply has no types
    return y


def _of_layer(case: LayerCase, layer: Any, call: Callable[[Tensor], Tensor]) -> Run:
    x = case.tensors["x"]
    t = {"x": x, "a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    return lambda: case.back(call(x), t)


def peft_layer(case: LayerCase, dropout: float, autocast: bool) -> Any:
    """PEFT's own LoRA layer with the case's values; None where PEFT is not installed."""
    try:
        import peft
    except ImportError:
        return None
    t = case.tensors
    n, k = t["weight"].shape
    holder = nn.Module()
    holder.lin = nn.Linear(k, n, dtype=t["x"].dtype)
    holder.lin.load_state_dict({"weight": t["weight"], "bias": t["bias"]})
    rank = case.op.rank
    config = peft.LoraConfig(
        r=rank, lora_alpha=int(SCALING * rank), lora_dropout=dropout, target_modules=["lin"]
    )
    peft.inject_adapter_in_model(config, holder)
    layer: Any = holder.lin
    width = torch.float32 if autocast else t["x"].dtype
    with torch.no_grad():
        for name, value in (("lora_A", t["a"]), ("lora_B", t["b"])):
            getattr(layer, name)["default"].to(width).weight.copy_(value)
    return layer


def _frozen(case: LayerCase, pace: Pace, absent: dict[str, str]) -> dict[str, Run]:
    """The frozen layer without a delta, torch's and ours: y and the gradient of x."""
    if case.op.name != "lora":
        return {}
    x, weight, bias = (case.tensors[n] for n in ("x", "weight", "bias"))

    def back(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, [x], case.grad)]

    runs = {
        names.FROZEN: lambda: back(functional.linear(x, weight, bias)),
        names.OWN_FROZEN: lambda: back(delta_linear(x, weight, bias)),
    }
    flops = 4.0 * case.shape[0] * case.shape[1] * case.shape[2]
    late = pace.refuses(f"{case.op.name} {names.FROZEN}", case.dtype, flops)
    if late:
        absent[names.FROZEN] = late
        del runs[names.FROZEN]
    return runs


def _saved(case: LayerCase, runs: dict[tuple[str, float], Run]) -> dict[tuple[str, float], int]:
    """Bytes held for the backward pass beyond x and the parameters, of the eager peers."""
    size = {}
    for (name, dropout), run in runs.items():
        if name in (names.OURS, names.PEFT, names.PEFT_NARROW, names.EAGER):
            known = [*case.tensors.values(), *_parameters(run)]
            size[name, dropout] = saved_bytes(run, known)
    return size


def _parameters(run: Run) -> list[Tensor]:
    """The parameters of the module that a peer runs, where it runs one."""
    cells = [c.cell_contents for c in run.__closure__ or ()]
    return [p for m in cells if isinstance(m, nn.Module) for p in m.parameters()]


def measure_product(
    shape: tuple[int, int, int], dtype: str, *, rounds: int = 15, seconds: float = float("inf")
) -> Cell:
    """The frozen product alone, without gradients: torch's, oneDNN's and ours."""
    m, n, k = shape
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    x, weight = torch.randn(m, k).to(kind), torch.randn(n, k).mul_(k**-0.5).to(kind)
    bias = torch.randn(n).to(kind)
    absent = {}
    runs: dict[str, Callable[[], object]] = {
        names.FROZEN: lambda: functional.linear(x, weight, bias),
        names.OURS: lambda: delta_linear(x, weight, bias),
    }
    try:
        packed = Prepacked(weight, bias, m)
    except RuntimeError as error:
        absent[names.PREPACKED] = str(error).splitlines()[0]
    else:
        runs[names.PREPACKED] = lambda: packed.forward(x)
    _hold_product(runs, x, weight, bias)
    rows = {
        name: _many(runs[peer], IN_A_ROW)
        for name, peer in ((names.OURS_AGAIN, names.OURS), (names.PREPACKED_AGAIN, names.PREPACKED))
        if peer in runs and m * n * k <= ROW_LIMIT
    }
    timed = interleaved(runs | rows, rounds=rounds, seconds=seconds)
    timed |= {name: timed[name].scaled(1 / IN_A_ROW) for name in rows}
    return Cell("gemm", "×".join(map(str, shape)), dtype, 0.0, timed, absent, {}, shape)


def _hold_product(
    runs: dict[str, Callable[[], object]], x: Tensor, weight: Tensor, bias: Tensor
) -> None:
    from deltaops.testing import assert_accurate

    exact = functional.linear(x.double(), weight.double(), bias.double())
    usual = functional.linear(x, weight, bias)
    for name, run in runs.items():
        y = run()
        assert isinstance(y, Tensor)
        assert_accurate(y, exact, usual, f"{name} {list(x.shape)}")


IN_A_ROW, ROW_LIMIT = 5, 1 << 31
"""Calls of a product that is timed again with warm caches, and the largest M·N·K of one."""
CALL_BATCH = 200
"""Calls in one timed round of the smallest layer: a clock's tick must not matter."""


def measure_call(*, rounds: int = 15, seconds: float = float("inf")) -> list[Cell]:
    """What the way to the core costs: 4×16, rank 4, µs that no arithmetic fills."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 16), torch.randn(16, 16), torch.randn(16)
    a, b = torch.randn(4, 16).requires_grad_(), torch.randn(16, 4).requires_grad_()
    leaf = torch.randn(4, 16, requires_grad=True)
    branch = [Branch(a, b, SCALING)]

    def plain() -> object:
        with torch.no_grad():
            return functional.linear(x, weight, bias)

    def ours() -> object:
        with torch.no_grad():
            return delta_linear(x, weight, bias, branch)

    trained = weight.clone().requires_grad_()
    grad = torch.ones(4, 16)
    with_grad: dict[str, Callable[[], object]] = {
        # plain training: gradients of x and of the weight
        names.FROZEN: lambda: torch.autograd.grad(
            functional.linear(leaf, trained, bias), [leaf, trained], grad
        ),
        names.OURS: lambda: torch.autograd.grad(
            delta_linear(leaf, weight, bias, branch), [leaf, a, b], grad
        ),
        # what of it is torch's way to a Function and back
        names.EMPTY_FUNCTION: lambda: torch.autograd.grad(
            _Empty.apply(leaf, weight, bias, a, b),  # type: ignore[no-untyped-call]  # as above
            [leaf, a, b], grad,
        ),
    }  # fmt: skip
    cells = []
    settings = (("no grad", {names.FROZEN: plain, names.OURS: ours}), ("grad", with_grad))
    for what, peers in settings:
        timed = interleaved(
            {name: _many(run, CALL_BATCH) for name, run in peers.items()},
            rounds=rounds,
            seconds=seconds,
        )
        per_call = {name: t.scaled(1 / CALL_BATCH) for name, t in timed.items()}
        cells.append(Cell("call", f"4×16×16 r=4, {what}", "f32", 0.0, per_call))
    return cells


class _Empty(torch.autograd.Function):
    """The shapes of a LoRA layer, and no arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Memory for y."""
        ctx.save_for_backward(x, weight, a, b)
        return torch.empty(x.shape[0], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Memory for the gradients."""
        x, _, a, b = ctx.saved_tensors
        return torch.empty_like(x), None, None, torch.empty_like(a), torch.empty_like(b)


def _many(run: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated
