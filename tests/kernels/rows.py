"""Checks of interpreted.py: adapters, norms, gated products, rotations, prompts, against float64.

Each call runs twice, on tensors that lie strided in borders of NaN, and what it allocates is NaN
between borders too, which must stay as they are.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from deltaops.kernels import configs
from torch import Tensor

from deltaops.backends.triton import TritonBackend
from deltaops.reference import bottleneck, gated, norm_bias, prompt_embedding, rotary
from deltaops.testing import (
    BOTTLENECK_CASES,
    GATED_CASES,
    NORM_BIAS_CASES,
    ROTARY_CASES,
    BottleneckCase,
    BottleneckTensors,
    NormBiasCase,
    assert_accurate,
)

FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
RUN = TritonBackend()

# What takes long to interpret is left to a GPU's tests; several tiles of ranks, rows and columns,
# and dtypes beside the plain one, in few programs.
BOTTLENECKS: tuple[tuple[BottleneckCase, torch.dtype, torch.dtype], ...] = (
    *((c, FULL, FULL) for c in BOTTLENECK_CASES if c.m * c.r < 1000 and c.k < 100),
    (BottleneckCase(17, 140, 40, "gelu", "layer"), FULL, FULL),
    (BottleneckCase(18, 80, 128, "gelu", "layer"), BRAIN, BRAIN),
    (BottleneckCase(9, 150, 9, "silu", "rms", "other", padding=3), HALF, HALF),
    (BottleneckCase(20, 150, 16, "gelu_tanh", "layer"), BRAIN, FULL),
    (BottleneckCase(40, 48, 16, "gelu", "layer"), HALF, HALF),
)
TALL = len(BOTTLENECKS) - 1
"""The one of which a program takes 32 rows."""
NORMS: tuple[tuple[NormBiasCase, torch.dtype, torch.dtype], ...] = (
    *((c, FULL, FULL) for c in NORM_BIAS_CASES if c.m * c.k < 9000),
    (NormBiasCase(9, 1030, "layer", offset=30.0), FULL, FULL),
    (NormBiasCase(3, 8200, "layer", offset=30.0), FULL, FULL),
    (NormBiasCase(2, 8200, "rms", padding=3), BRAIN, FULL),
    (NormBiasCase(50, 70), HALF, HALF),
    (NormBiasCase(50, 70, "layer", offset=3.0), BRAIN, BRAIN),
    (NormBiasCase(3, 8200, "none", padding=3), BRAIN, FULL),
    (NormBiasCase(50, 70, "none", bias=False), HALF, HALF),
)
GATEDS = tuple(c for c in GATED_CASES if c.m * c.k < 9000)
ROTARIES = tuple(c for c in ROTARY_CASES if c.l < 50)


def mend_bfloat16() -> None:
    """The interpreter keeps bfloat16 as integers, which it multiplies as such, and truncates."""
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            wide = torch.from_numpy(np.ascontiguousarray(data))
            return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode).reshape(data.shape)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def product(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    interpreter._convert_float = converted
    interpreter.InterpreterBuilder.create_dot = product


# ------------------------------------------------------------------------------------- borders


def bordered(t: Any) -> Any:
    """The same values between NaN, a vector's between each two as well; the rows of a matrix lie
    further apart than they are long, by a number that leaves those aligned that would be."""
    if not isinstance(t, Tensor):
        return t
    if t.dim() == 1:
        padded = torch.full((2 * t.numel() + 6,), float("nan"), dtype=t.dtype)
        inner = padded[3:-3:2]
    elif t.dim() != 2:
        padded = torch.full((t.numel() + 6,), float("nan"), dtype=t.dtype)
        inner = padded[3:-3].view(t.shape)
    elif t.stride(1) == 1 or t.shape[1] == 1:
        inner = torch.full((t.shape[0] + 2, t.shape[1] + 16), float("nan"), dtype=t.dtype)
        inner = inner[1:-1, 2:-14]
    else:
        inner = torch.full((t.shape[1] + 2, t.shape[0] + 16), float("nan"), dtype=t.dtype)
        inner = inner[1:-1, 2:-14].t()
    return inner.copy_(t)


def mapped(size: int) -> mmap.mmap:
    """So many bytes of zeros, of which only those are there that are touched."""
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python 3.11 does not name
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve)


def far(t: Tensor) -> Tensor:
    """The same values in rows of which each lies 2³⁰ elements behind the one before: from the third
    on an offset needs 64 bits."""
    apart, rows = 1 << 30, t.numel() // t.shape[-1]
    room = mapped(rows * apart * t.element_size())
    strides = [s // t.shape[-1] * apart for s in t.contiguous().stride()[:-1]]
    return torch.frombuffer(room, dtype=t.dtype).as_strided(t.shape, (*strides, 1)).copy_(t)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """What is allocated lies between 64 elements of NaN, which must be NaN at the end."""
    empty, like, borders = torch.empty, torch.empty_like, []

    def between(*shape: Any, **kwargs: Any) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = int(np.prod(size))
        room = empty(count + 128, **kwargs).fill_(float("nan"))
        borders.append((room[:64], room[64 + count :]))
        return room[64 : 64 + count].view(tuple(size))

    def between_like(t: Tensor) -> Tensor:
        return between(t.shape, dtype=t.dtype, device=t.device)

    torch.empty, torch.empty_like = between, between_like  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, like
    for border in borders:
        assert all(b.isnan().all() for b in border), "something was written beyond a tensor"


Run = Callable[[], list[Tensor]]
Modelled = Callable[[Run, str], list[Tensor]]


def hold(what: str, run: Run, oracle: Any, low: Any, as_modelled: Modelled) -> None:
    """``run()`` twice against ``oracle``, with the error of ``low``; once counted."""
    with guarded():
        found, again = as_modelled(run, what), run()
    for i, (got, same, want, plain) in enumerate(zip(found, again, oracle, low, strict=True)):
        assert_accurate(got, want, plain, f"{what}: result {i}")
        assert torch.equal(got, same), f"{what}: result {i} changed its bits"


# -------------------------------------------------------------------------------------- checks


def check_bottleneck(number: int, as_modelled: Modelled) -> None:
    """In one program for the rows, and in two."""
    case, dtype, parameters = BOTTLENECKS[number]
    t = case.tensors(dtype, parameter_dtype=parameters)
    wide, grad_y, needs = t.to(torch.float64), case.grad_y(dtype), t.needs()
    oracle, low = (bottleneck.forward(*u.forward_arguments()) for u in (wide, t))
    # one state for all: a ReLU flips where h rounds across 0, and that is not backward's error
    state = [s.float() for s in oracle[1:]]
    wide_state = grad_y.double(), *(s.double() for s in state)
    oracle_grads = bottleneck.backward(*wide.backward_arguments(*wide_state), needs)
    low_grads = bottleneck.backward(*t.backward_arguments(grad_y, *state), needs)
    given = _between_borders(t)
    backward = given.backward_arguments(bordered(grad_y), *map(bordered, state))

    def run() -> list[Tensor]:
        forward = RUN.bottleneck_forward(*given.forward_arguments())
        return [*forward, *RUN.bottleneck_backward(*backward, needs)]

    fewest, tall = configs.FEWEST, configs.TALL
    configs.TALL = 0 if number == TALL else tall
    # in one program only where a block of lanes holds the rank
    both = (True,) if number == TALL else (False, True)
    for fused in both if case.r <= 16 or case.r == 128 else (False,):
        configs.FEWEST = 1 if fused else 1 << 30
        if number == TALL and fused:
            assert configs.bottleneck_grad(case.m, case.r, False, True).rows == 32
        hold(f"{case} {dtype} {parameters} {fused}", run, [*oracle, *oracle_grads],
             [*low, *low_grads], as_modelled)  # fmt: skip
        if number == 0:
            _check_each_alone(given, backward, run()[3:], fused)
    configs.FEWEST, configs.TALL = fewest, tall


def _between_borders(t: BottleneckTensors) -> BottleneckTensors:
    names = ("residual", "gamma", "beta", "down", "down_bias", "up", "up_bias")
    x = bordered(t.x)
    rest = {name: bordered(getattr(t, name)) for name in names}
    rest["residual"] = x if t.residual is t.x else rest["residual"]
    return replace(t, x=x, **rest)


def _check_each_alone(
    t: BottleneckTensors, given: Any, everything: list[Tensor], fused: bool
) -> None:
    """Every gradient alone has the bits that it has among all; x is read for that of down only."""
    present, wants = iter(everything), t.needs()
    for i in range(7):
        if wants[i]:
            arguments = [*given]
            arguments[1] = arguments[1] if i == 3 else None
            (got,) = RUN.bottleneck_backward(*arguments, [i == j for j in range(7)])
            assert torch.equal(got, next(present)), f"gradient {i} alone, {fused}"


def check_norm(number: int, as_modelled: Modelled) -> None:
    """Forward and every gradient."""
    case, dtype, parameters = NORMS[number]
    x, gamma, bias = case.tensors(dtype, parameter_dtype=parameters)
    grad_y, needs = case.grad_y(dtype), [True, case.gamma, case.bias]

    def results(forward: Any, backward: Any, kind: torch.dtype, *given: Any) -> list[Tensor]:
        grad, x, gamma, bias = given
        y, stats = forward(x, gamma, bias, 1e-5, case.norm)
        return [y, stats, *backward(grad, x, stats, gamma, kind, case.norm, needs)]

    given = grad_y, x, gamma, bias
    plain = norm_bias.forward, norm_bias.backward
    wide = [None if t is None else t.double() for t in given]
    ours, borders = (RUN.norm_bias_forward, RUN.norm_bias_backward), [bordered(t) for t in given]
    hold(f"{case} {dtype} {parameters}", lambda: results(*ours, parameters, *borders),
         results(*plain, torch.float64, *wide), results(*plain, parameters, *given),
         as_modelled)  # fmt: skip


def check_gated(number: int, as_modelled: Modelled) -> None:
    """Forward and both gradients, each dtype."""
    case = GATEDS[number]
    for dtype in (FULL, BRAIN) if case.k < 64 else (FULL,):
        given = case.grad_y(dtype), *case.tensors(dtype)

        def results(forward: Any, backward: Any, *given: Tensor) -> list[Tensor]:
            kind = case.activation
            return [forward(*given[1:], kind), *backward(*given, kind, [True, True])]

        ours, borders = (RUN.gated_forward, RUN.gated_backward), [bordered(t) for t in given]
        plain = gated.forward, gated.backward
        hold(f"{case} {dtype}", lambda: results(*ours, *borders),  # noqa: B023  # called at once
             results(*plain, *(t.double() for t in given)), results(*plain, *given),
             as_modelled)  # fmt: skip


def check_rotary(number: int, as_modelled: Modelled) -> None:
    """Both ways, each dtype."""
    case = ROTARIES[number]
    for dtype in (FULL, HALF):
        x, *tables = case.tensors(dtype)
        grad_y, first = case.grad_y(dtype), case.layout in ("attention", "merged")

        def results(module: Any, x: Tensor, grad_y: Tensor, *tables: Tensor) -> list[Tensor]:
            backward = getattr(module, "rotary_backward", None) or module.backward
            forward = getattr(module, "rotary_forward", None) or module.forward
            return [forward(x, *tables, first), backward(grad_y, *tables, first)]  # noqa: B023

        given = x, grad_y, *tables
        borders = x, grad_y, *map(bordered, tables)
        hold(f"{case} {dtype}", lambda: results(RUN, *borders),  # noqa: B023  # called at once
             results(rotary, *(t.double() for t in given)), results(rotary, *given),
             as_modelled)  # fmt: skip


PROMPTS = (
    # B, P, T, D; dtypes of the table and of the prompt
    (3, 5, 7, 40, FULL, FULL),
    (2, 3, 0, 17, BRAIN, FULL),
    (4, 1, 9, 1050, HALF, HALF),
)


def check_prompt(number: int, as_modelled: Modelled) -> None:
    """The bits of the reference both ways, since both copy, and sum in one order."""
    *sizes, dtype, narrow = PROMPTS[number]
    b, length, tokens, d = sizes
    torch.manual_seed(number)
    prompt, table = torch.randn(length, d).to(narrow), torch.randn(11, d).to(dtype)
    ids = torch.randint(11, (tokens, b)).t()
    grad_y = torch.randn(b, length + tokens, d).to(dtype)
    given = bordered(prompt), ids, bordered(table)
    apart = bordered(grad_y.reshape(-1, d)).view(grad_y.shape)

    def run() -> list[Tensor]:
        return [
            RUN.prompt_embedding_forward(*given),
            RUN.prompt_embedding_backward(apart, length, narrow),
        ]

    want = [
        prompt_embedding.forward(prompt, ids, table),
        prompt_embedding.backward(grad_y, length, narrow),
    ]
    hold(f"prompt_embedding {PROMPTS[number]}", run, want, want, as_modelled)
    assert all(torch.equal(got, same) for got, same in zip(run(), want, strict=True))
    if tokens:
        wrong = ids.clone()
        wrong[1, 2], wrong[0, 0] = 11, -1
        found = RUN.prompt_embedding_forward(given[0], wrong, given[2]).isnan()
        assert found.all(2).nonzero().tolist() == [[0, length], [1, length + 2]]
        assert int(found.sum()) == 2 * d


def check_far(number: int, as_modelled: Modelled) -> None:
    """Rows, and halves of a head, so far apart that their offsets need 64 bits: the same bits as
    beside each other."""
    rows, apart, halves = 34, 1 << 26, 1 << 30  # elements
    room = mapped(2 * max(rows * apart, 3 * halves + rows))
    t = BottleneckCase(rows, 16, 4, "silu", "layer").tensors(BRAIN)
    far = torch.frombuffer(room, dtype=BRAIN).as_strided(t.x.shape, (apart, 1)).copy_(t.x)
    turn = [torch.rand(1, rows, 16) for _ in range(2)]

    def results(x: Tensor) -> list[Tensor]:
        u = replace(t, x=x, residual=x)
        y, h, stats = RUN.bottleneck_forward(*u.forward_arguments())
        heads = x.view(1, 1, rows, 16)
        return [
            y,
            *RUN.bottleneck_backward(*u.backward_arguments(x, h, stats), u.needs()),
            *RUN.norm_bias_backward(x, x, stats, None, FULL, "layer", [True, True, True]),
            *RUN.gated_backward(x, x, x, "silu", [True, True]),
            RUN.rotary_forward(heads, *turn, False),
        ]

    for i, (got, want) in enumerate(zip(results(far), results(t.x), strict=True)):
        assert torch.equal(got, want), f"result {i} hangs on where the rows are"
    narrow, (cos, sin) = t.x[None, None, :, :4], (u[:, :, :4] for u in turn)
    far = torch.frombuffer(room, dtype=BRAIN).as_strided(narrow.shape, (1, 1, 1, halves))
    got, want = (RUN.rotary_forward(x, cos, sin, False) for x in (far.copy_(narrow), narrow))
    assert torch.equal(got, want), "a rotation hangs on where the halves of a head are"


CHECKS = [
    (check_far, 0),
    *((check_bottleneck, i) for i in range(len(BOTTLENECKS))),
    *((check_norm, i) for i in range(len(NORMS))),
    *((check_gated, i) for i in range(len(GATEDS))),
    *((check_rotary, i) for i in range(len(ROTARIES))),
    *((check_prompt, i) for i in range(len(PROMPTS))),
]


def check_share(which: str, as_modelled: Modelled) -> None:
    """``"i/n"``: every n-th check from the i-th on."""
    first, step = map(int, which.split("/"))
    for check, number in CHECKS[first::step]:
        check(number, as_modelled)
