"""Checks of interpreted.py: several layers of one x together, against float64 and each alone, the
lengths that DoRA gives to rows, and quantised weights."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rows import BRAIN, FULL, HALF, Modelled, bordered, far, hold
from torch import Tensor

from deltaops.backends.base import GroupMember
from deltaops.backends.plain import PlainPlan
from deltaops.backends.triton import TritonBackend, planner
from deltaops.backends.triton.group import TritonDeltaLinear
from deltaops.ops import (
    Branch,
    Layer,
    QuantizedWeight,
    delta_linear,
    delta_linear_group,
    quantized_linear,
)
from deltaops.reference import delta_linear as reference
from deltaops.reference import dora_norm
from deltaops.reference.quantized import dequantize, quantize_int8, quantize_nf4
from deltaops.testing import DeltaLinearCase
from deltaops.testing.cases import DeltaLinearTensors

RUN = TritonBackend()


@dataclass(frozen=True)
class Group:
    """Layers of one x ``[m, k]``: the rows, ranks and dropout of each."""

    m: int
    k: int
    rows: tuple[int, ...]
    ranks: tuple[tuple[int, ...], ...]
    dropout: tuple[tuple[float, ...], ...] = ()
    dtype: torch.dtype = FULL
    adapter: torch.dtype = FULL
    plan: str = "fused"
    routed: str = ""
    activation: tuple[tuple[str, ...], ...] = ()
    """Of parallel adapters, which have an inner bias too; of each layer."""

    def layers(self) -> list[DeltaLinearTensors]:
        """Of one x, between borders; the weight of every second one is that of a Conv1D."""
        made = []
        for i, (n, ranks) in enumerate(zip(self.rows, self.ranks, strict=True)):
            layout = "col" if i % 2 else "row"
            dropout = self.dropout[i] if self.dropout else ()
            kinds = self.activation[i] if self.activation else ()
            case = DeltaLinearCase(
                self.m, n, self.k, ranks, dropout, i != 1, layout, routed=self.routed,
                activation=kinds, branch_bias=tuple(k != "identity" for k in kinds),
            )  # fmt: skip
            t = case.tensors(self.dtype, adapter_dtype=self.adapter, seed=i)
            x = made[0].x if made else bordered(t.x)
            a, b = [bordered(u) for u in t.a], [bordered(u) for u in t.b]
            made.append(replace(t, x=x, weight=bordered(t.weight), a=a, b=b))
        return made


GROUPS = (
    # pieces of K and of M, two branches of one layer, none of another
    Group(40, 80, (17, 20, 9), ((3,), (16, 5), ()), ((0.3,), (0.0, 0.2), ())),
    Group(35, 144, (48, 33), ((40,), (24,)), ((0.25,), (0.5,)), BRAIN, BRAIN),
    # more lanes than one program has, and ranks that are several programs
    Group(20, 64, (16, 32, 16), ((100,), (64,), (70,)), (), HALF, HALF),
    Group(20, 40, (16, 32), ((20,), (3,)), (), BRAIN, FULL),
    Group(18, 48, (20, 36), ((4,), (8,)), ((0.1,), (0.1,)), plan="split"),
    Group(9, 40, (0, 12), ((4,), (3,))),
    Group(9, 40, (8, 12), ((), ())),
    # each row has one of a layer's branches
    Group(30, 40, (8, 12), ((4, 3), (3, 5, 2)), routed="mixed"),
    Group(0, 40, (8, 12), ((4,), (3,))),
    # parallel adapters beside LoRA
    Group(30, 40, (8, 12, 9), ((4, 3), (5,), (2,)), ((0.2, 0.0), (0.0,), (0.3,)), BRAIN, BRAIN,
          activation=(("identity", "gelu"), ("relu",), ("identity",))),
)  # fmt: skip


def check_group(number: int, as_modelled: Modelled) -> None:
    """Outputs, S and every gradient; all but dx have the bits that their layer alone gives."""
    group = GROUPS[number]
    layers = group.layers()
    grads = []
    for i, n in enumerate(group.rows):
        case = DeltaLinearCase(group.m, n, group.k, ())
        grads.append(case.grad_y(group.dtype, seed=50 + i))
    members = []
    for t in layers:
        plan = RUN.prepare(t.weight, t.a, t.b, t.branch_bias, t.scaling, t.dropout, t.activation)
        seed = t.seed if any(t.dropout) else None
        operands = [*t.a, *t.b, *t.branch_bias]
        members.append(GroupMember(plan, t.weight, t.bias, operands, seed, t.adapter))
    needs = [t.all_needed() for t in layers]

    def results() -> list[Tensor]:
        found = members[0].plan.forward_group(layers[0].x, members, True)
        ys, ss = [y for y, _ in found], [s for _, s in found]
        (grad_x, *first), *rest = members[0].plan.backward_group(
            [bordered(g) for g in grads], layers[0].x, members, ss, needs
        )
        return [grad_x, *ys, *ss, *(g for mine in (first, *rest) for g in mine)]

    plain = reference.forward, reference.backward
    wide, wide_grads = [t.to(torch.float64) for t in layers], [g.double() for g in grads]
    with planner.forced(group.plan, group.plan):
        what = f"{group}"
        oracle = _alone(*plain, wide, wide_grads)
        hold(what, results, oracle, _alone(*plain, layers, grads), as_modelled)
        together, alone = results(), _alone(RUN.forward, RUN.backward, layers, grads)
    count = len(layers)
    for i, (got, want) in enumerate(zip(together[1:], alone[1:], strict=True)):
        if count <= i < 2 * count and not group.rows[i - count]:
            continue  # S without outputs: alone, nobody writes it
        assert torch.equal(got, want), f"{what}: result {1 + i} has other bits alone"


def check_op(_number: int, _as_modelled: Modelled) -> None:
    """The public function takes the group's way, forward and backward."""
    layers = GROUPS[0].layers()
    x = layers[0].x.clone().requires_grad_()
    given = []
    for t in layers:
        a, b = ([u.clone().requires_grad_() for u in some] for some in (t.a, t.b))
        branches = [Branch(*each) for each in zip(a, b, t.scaling, t.dropout, strict=True)]
        given.append(Layer(t.weight, t.bias, branches))
    leaves = [x, *(u for layer in given for r in layer.branches for u in (r.a, r.b))]
    results = []
    for run in (delta_linear_group, _layer_after_layer):
        torch.manual_seed(3)
        with pytest.MonkeyPatch.context() as patch:
            if run is delta_linear_group:
                patch.delattr(PlainPlan, "forward")
                patch.delattr(PlainPlan, "backward")
            ys = run(x, given, backend="triton")
            results.append(
                [*ys, *torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])]
            )
    together, alone = results
    place = len(layers)
    torch.testing.assert_close(together.pop(place), alone.pop(place))
    assert all(torch.equal(got, want) for got, want in zip(together, alone, strict=True))


def _layer_after_layer(x: Tensor, layers: Sequence[Layer], *, backend: str) -> list[Tensor]:
    return [delta_linear(x, *layer, backend=backend) for layer in layers]


def _alone(
    forward: Any, backward: Any, layers: Sequence[DeltaLinearTensors], grads: Sequence[Tensor]
) -> list[Tensor]:
    """As check_group orders them; the gradients of x are added up."""
    ys, ss, rest, total = [], [], [], []
    for t, grad in zip(layers, grads, strict=True):
        y, s = forward(*t.forward_arguments())
        grad_x, *others = backward(*t.backward_arguments(grad, s), t.all_needed(), *t.by_row())
        ys.append(y)
        ss.append(s)
        rest += others
        total.append(grad_x)
    return [torch.stack(total).sum(0), *ys, *ss, *rest]


def check_no_columns(_number: int, _as_modelled: Modelled) -> None:
    """K = 0: sums of nothing."""
    x, weight, a = torch.ones(5, 0), torch.ones(8, 0), torch.ones(3, 0)
    layer = Layer(weight, torch.ones(8), [Branch(a, torch.ones(8, 3))])
    ys = delta_linear_group(x, [layer, layer], backend="triton")
    ys.append(delta_linear(x, *layer, backend="triton"))
    assert all(torch.equal(y, torch.ones(5, 8)) for y in ys)
    assert RUN.dora_norm(weight, a, torch.ones(8, 3), 1.0).tolist() == [0.0] * 8


NORMS = (
    # N, K, R; W as Conv1D has it; dtypes of W and of A and B
    (40, 300, 3, False, FULL, FULL),
    (33, 71, 20, True, FULL, FULL),
    (50, 144, 40, False, BRAIN, FULL),
    (35, 136, 24, True, HALF, HALF),
)


def check_dora_norm(number: int, as_modelled: Modelled) -> None:
    """Pieces of K and of the ranks; a row of W that B A takes away, and a NaN, which stays one."""
    n, k, r, columns, dtype, adapter = NORMS[number]
    t = DeltaLinearCase(1, n, k, (r,), layout="col" if columns else "row").tensors(
        dtype, adapter_dtype=adapter
    )
    given = t.weight, t.a[0], t.b[0]
    weight, a, b = (bordered(u) for u in given)
    plain, wide = (dora_norm.forward(*some, 0.7) for some in (given, [u.double() for u in given]))
    hold(f"dora_norm {NORMS[number]}", lambda: [RUN.dora_norm(weight, a, b, 0.7)], [wide], [plain],
         as_modelled)  # fmt: skip
    weight[2] = float("nan")
    assert RUN.dora_norm(weight, a, b, 0.7).isnan().nonzero().flatten().tolist() == [2]
    if k < 100:
        return
    b[3], a[1:] = 0.0, 0.0
    b[3, 0], weight[3] = -1.0, 0.5 * a[0].to(dtype)
    a[0] = weight[3]
    # the squares cancel, up to rounding: never the root of a negative number
    assert 0.0 <= float(RUN.dora_norm(weight, a, b, 1.0)[3]) < 1e-2


QUANTIZED = (
    # M, N, K, activation by rank; what quantises; dtypes of x and of A and B
    (5, 40, 70, {3: "identity"}, quantize_int8, FULL, FULL),
    (70, 40, 71, {}, quantize_int8, BRAIN, BRAIN),
    (20, 70, 128, {5: "gelu", 20: "identity"}, quantize_nf4, BRAIN, FULL),
    (3, 40, 128, {4: "identity"}, quantize_nf4, HALF, HALF),
    # blocks that end within a row, and a byte that ends the weight half full: W is made
    (9, 33, 47, {4: "identity"}, quantize_nf4, FULL, FULL),
)


def check_quantized(number: int, as_modelled: Modelled) -> None:
    """W has the reference's bits; forward and every gradient, by the public function too."""
    m, n, k, kinds, quantize, dtype, adapter = QUANTIZED[number]
    case = DeltaLinearCase(
        m, n, k, tuple(kinds), (0.25,) * len(kinds), activation=tuple(kinds.values()),
        branch_bias=tuple(kind != "identity" for kind in kinds.values()),
    )  # fmt: skip
    t, grad_y = case.tensors(dtype, adapter_dtype=adapter), case.grad_y(dtype)
    weight = quantize(t.weight)
    weight = weight._replace(codes=apart(weight.codes), scales=apart(weight.scales))
    plan = RUN.prepare(t.weight, t.a, t.b, t.branch_bias, t.scaling, t.dropout, t.activation)
    dense = dequantize(weight, dtype)
    assert plan.fuses(m, weight) == (number != 4)
    x, operands = bordered(t.x), [*map(bordered, t.a), *map(bordered, t.b), *t.branch_bias]
    needs = t.all_needed()

    def run() -> list[Tensor]:
        made = plan.dequantize(weight, dtype)
        if plan.fuses(m, weight):
            y, s = plan.forward_quantized(x, weight, bordered(t.bias), operands, t.seed)
            grads = plan.backward_quantized(grad_y, x, weight, operands, s, t.seed, needs)
        else:
            y, s = plan.forward(x, made, t.bias, operands, t.seed, True)
            grads = plan.backward(grad_y, x, made, operands, s, t.seed, needs)
        return [made, y, s, *t.joined(grads)]

    def in_torch(t: DeltaLinearTensors, grad_y: Tensor) -> list[Tensor]:
        y, s = reference.forward(*t.forward_arguments())
        grads = reference.backward(*t.backward_arguments(grad_y, s), needs)
        return [t.weight, y, s, *t.joined(grads)]

    low = replace(t, weight=dense)
    what = f"quantised {QUANTIZED[number]}"
    hold(what, run, in_torch(low.to(torch.float64), grad_y.double()), in_torch(low, grad_y),
         as_modelled)  # fmt: skip
    assert torch.equal(plan.dequantize(weight, dtype), dense), what
    branches = [
        Branch(a, b, scaling, 0.0, kind, inner)
        for a, b, scaling, kind, inner in zip(
            t.a, t.b, t.scaling, t.activation, t.branch_bias, strict=True
        )
    ]
    with torch.no_grad():
        y, _ = run_without_mask(plan, weight, t)
        assert torch.equal(quantized_linear(t.x, weight, t.bias, branches, backend="triton"), y)


def run_without_mask(
    plan: TritonDeltaLinear, weight: QuantizedWeight, t: DeltaLinearTensors
) -> tuple[Tensor, Tensor | None]:
    """The way that :func:`quantized_linear` must go in evaluation."""
    still = [0.0] * len(t.a)
    made = RUN.prepare(t.weight, t.a, t.b, t.branch_bias, t.scaling, still, t.activation)
    operands = [*t.a, *t.b, *t.branch_bias]
    if plan.fuses(len(t.x), weight):
        return made.forward_quantized(t.x, weight, t.bias, operands, None)
    dense = made.dequantize(weight, t.x.dtype)
    return made.forward(t.x, dense, t.bias, operands, None, True)


def apart(t: Tensor) -> Tensor:
    """The same numbers in the middle of a larger tensor, of 0x7F in each byte."""
    room = torch.full((t.numel() * t.element_size() + 128,), 0x7F, dtype=torch.uint8)
    return room[64:-64].view(t.dtype).view(t.shape).copy_(t)


FAR = DeltaLinearCase(5, 6, 24, (4, 3), (0.3, 0.0))


def check_far(_number: int, _as_modelled: Modelled) -> None:
    """Rows so far apart that their offsets need 64 bits, of what is read and of what is written:
    the same bits as beside each other."""
    t, grad_y = FAR.tensors(HALF), FAR.grad_y(HALF)
    columns = far(t.weight.t().contiguous()).t()
    a, b = [*map(far, t.a)], [*map(far, t.b)]
    away = [replace(t, x=far(t.x), weight=w, a=a, b=b) for w in (far(t.weight), columns)]

    def layer(t: DeltaLinearTensors, grad_y: Tensor) -> list[Tensor]:
        y, s = RUN.forward(*t.forward_arguments())
        return [y, s, *RUN.backward(*t.backward_arguments(grad_y, s), t.all_needed())]

    def group(t: DeltaLinearTensors, grad_y: Tensor) -> list[Tensor]:
        plan = RUN.prepare(t.weight, t.a, t.b, t.branch_bias, t.scaling, t.dropout, t.activation)
        one = GroupMember(plan, t.weight, t.bias, [*t.a, *t.b, *t.branch_bias], t.seed, None)
        ys, ss = zip(*plan.forward_group(t.x, [one, one], True), strict=True)
        lists = plan.backward_group([grad_y] * 2, t.x, [one, one], ss, [t.all_needed()] * 2)
        return [*ys, *ss, *lists[0], *lists[1]]

    for plan, results in itertools.product(("fused", "split"), (layer, group)):
        with planner.forced(plan, plan):
            near = results(t, grad_y)
            for other in away:
                with far_outputs((FAR.m, FAR.n), (FAR.m, FAR.k)):
                    found = results(other, far(grad_y))
                for i, (got, want) in enumerate(zip(found, near, strict=True)):
                    assert torch.equal(got, want), f"{plan} {results.__name__}: result {i}"
    weight = quantize_int8(t.weight)
    plan, operands = RUN.prepare(*t.forward_arguments()[1:2], t.a, t.b, t.branch_bias, t.scaling,
                                 t.dropout, t.activation), [*t.a, *t.b, None, None]  # fmt: skip
    got, want = (
        plan.forward_quantized(x, weight, None, operands, t.seed) for x in (away[0].x, t.x)
    )
    assert all(map(torch.equal, got, want))
    got, want = (
        plan.backward_quantized(g, None, weight, operands, want[1], t.seed, [True, *[False] * 7])
        for g in (far(grad_y), grad_y)
    )
    assert torch.equal(*got, *want)
    norms = [RUN.dora_norm(u.weight, u.a[0], u.b[0], 0.7) for u in (t, *away)]
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


@contextlib.contextmanager
def far_outputs(*shapes: tuple[int, int]) -> Iterator[None]:
    """Matrices of these shapes are allocated with their rows far apart."""
    empty = torch.empty

    def spread(*shape: Any, **kwargs: Any) -> Tensor:
        made = empty(*shape, **kwargs)
        return far(made) if tuple(made.shape) in shapes else made

    torch.empty = spread  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = empty


CHECKS = [
    (check_far, 0),
    *((check_quantized, i) for i in range(len(QUANTIZED))),
    *((check_group, i) for i in range(len(GROUPS))),
    (check_op, 0),
    (check_no_columns, 0),
    *((check_dora_norm, i) for i in range(len(NORMS))),
]


def check_share(which: str, as_modelled: Modelled) -> None:
    """``"i/n"``: every n-th check from the i-th on."""
    first, step = map(int, which.split("/"))
    for check, number in CHECKS[first::step]:
        check(number, as_modelled)
