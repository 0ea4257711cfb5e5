"""The C ABI of the CUDA library on a real GPU, against float64. `make gpu` runs these."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops.reference import philox, quantized

from . import ampere, emulated, hopper
from .ampere import GemmArgs, Term, random
from .emulated import Bordered

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda"
STREAM, THRESHOLD = 3, 13107
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]
Given = dict[str, Tensor | int | float | None]
DTYPES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    path = Path(deltaops.__file__).with_name("libdeltaops_cuda.so")
    if not path.exists():
        pytest.skip(f"{path} was not built")
    found = ctypes.CDLL(str(path))
    found.deltaops_cuda_last_error.restype = ctypes.c_char_p
    return found


def seed() -> Tensor:
    return torch.tensor([0x1234_5678_9ABC_DEF0], device=DEVICE)


def on_gpu(one: Bordered) -> Bordered:
    return Bordered(one.t.to(DEVICE), one.t.stride(0) - one.t.shape[1])


def check(lib: ctypes.CDLL, status: int, pairs: Sequence[tuple[Bordered, Tensor]]) -> list[Tensor]:
    """Within the rounding of the output and of sums in float32, and nothing around it written."""
    assert status == 0, lib.deltaops_cuda_last_error().decode()
    for out, expected in pairs:
        bound = expected.abs() * torch.finfo(out.t.dtype).eps + 2e-5 * expected.abs().max()
        assert bool(((out.t.double() - expected).abs() <= bound).all())
        assert out.intact()
    return [out.t.clone() for out, _ in pairs]


def dropped(x: Tensor, threshold: int) -> Tensor:
    kept = philox.draws(x.shape[0], x.shape[1], seed(), STREAM) >= threshold
    return torch.where(kept, x.double() * philox.keep_scale(threshold), 0.0)


@DTYPES
@pytest.mark.parametrize("across", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("m", [1, 16, 300, 4099])
@pytest.mark.parametrize(("n", "k", "rank"), [(520, 1096, 16), (1030, 333, 5)])
def test_products(
    lib: ctypes.CDLL, m: int, n: int, k: int, rank: int, across: bool, dtype: torch.dtype
) -> None:
    def right(length: int, seed: int) -> Tensor:
        t = random(n, length, dtype=dtype, seed=seed).to(DEVICE)
        return t.t().contiguous().t() if across else t

    x, s = (random(m, c, dtype=dtype, seed=c).to(DEVICE) for c in (k, rank))
    terms = [Term(x, right(k, 2)), Term(s, right(rank, 3), across * THRESHOLD, STREAM)]
    bias = None if across else random(n, dtype=dtype, seed=4).to(DEVICE)
    expected = x.double() @ terms[0].right.double().t()
    expected += dropped(s.double() @ terms[1].right.double().t(), terms[1].threshold)
    expected += 0.0 if bias is None else bias.double()
    found: list[Tensor] = []
    for _ in range(2):
        out = Bordered(torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE), 2)
        status = ampere.gemm(lib, terms, bias, out.t, seed())
        found += check(lib, status, [(out, expected)])
    assert torch.equal(*found)


@DTYPES
@pytest.mark.parametrize(("m", "k", "rank"), [(7, 1101, 20), (4099, 520, 16), (500, 264, 100)])
def test_passes(lib: ctypes.CDLL, m: int, k: int, rank: int, dtype: torch.dtype) -> None:
    x, s = (random(m, c, dtype=dtype, seed=c).to(DEVICE) for c in (k, rank))
    a = random(rank, k, dtype=dtype, seed=3).to(DEVICE)
    b = a.t().contiguous()
    draw: Given = {"drop_threshold": THRESHOLD, "branch_stream": STREAM, "seed": seed()}
    wide = dropped(x, THRESHOLD)
    calls: dict[str, tuple[Given, dict[str, Tensor]]] = {
        "project": (
            {"x": x, "a": a, "scaling": 0.5, **draw},
            {"s_narrow": 0.5 * wide @ a.double().t()},
        ),
        "grad_up": (
            {"grad_y": x, "b": b, "s_narrow": s, "scaling": 0.5},
            {
                "grad_s": 0.5 * x.double() @ b.double(),
                "grad_b": x.double().t() @ s.double(),
                "grad_bias": x.double().sum(0, keepdim=True),
            },
        ),
        "grad_down": ({"x": x, "grad_s_narrow": s, **draw}, {"grad_a": s.double().t() @ wide}),
    }
    for name, (given, wanted) in calls.items():
        found = []
        for _ in range(2):
            outs = {
                key: Bordered(
                    torch.full_like(t, float("nan"), dtype=F32 if key == "grad_s" else dtype)
                )
                for key, t in wanted.items()
            }
            space = on_gpu(ampere.workspace(lib, name, m, k, rank))
            fields: Given = {**given, **{key: out.t for key, out in outs.items()}}
            status = ampere.run_pass(lib, name, space, fields)
            found.append(check(lib, status, [(outs[key], t) for key, t in wanted.items()]))
            assert space.intact()
        assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize(("kind", "m", "k"), [("rms_norm", 500, 4096), ("swiglu", 37, 9001)])
def test_producers(lib: ctypes.CDLL, kind: str, m: int, k: int, dtype: torch.dtype) -> None:
    names = {"rms_norm": ("x", "gamma"), "swiglu": ("gate", "up")}[kind]
    one = random(m, k, dtype=dtype, seed=1).to(DEVICE)
    other = random(1 if kind == "rms_norm" else m, k, dtype=dtype, seed=2).to(DEVICE)
    wide, by = one.double(), other.double()
    if kind == "rms_norm":
        wide = wide * (wide.square().mean(1, keepdim=True) + 1e-5).rsqrt() * by
    else:
        wide = wide * wide.sigmoid() * by
    a = [random(rank, k, dtype=dtype, seed=3).to(DEVICE) for rank in (16, 72)]
    drop, found = seed(), []
    for _ in range(2):
        y = Bordered(torch.full((m, k), float("nan"), dtype=dtype, device=DEVICE))
        s = [Bordered(torch.full((m, len(t)), float("nan"), device=DEVICE)) for t in a]
        branches = [
            ampere.Branch(
                *map(emulated.view, (t, out.t, None)), 0.5, i * THRESHOLD, STREAM, 0,
                drop.data_ptr(),
            )
            for i, (t, out) in enumerate(zip(a, s, strict=True))
        ]  # fmt: skip
        rows = dict(zip(names, (one, other), strict=True)) | {"y": y.t}
        status = ampere.produce(lib, kind, rows, branches, 1e-5)
        found.append(check(lib, status, [(y, wide)]))
        expected = [0.5 * dropped(y.t, i * THRESHOLD) @ t.double().t() for i, t in enumerate(a)]
        found[-1] += check(lib, status, list(zip(s, expected, strict=True)))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 520, 4096), (16, 333, 1001)])
def test_decoding_with_codes(
    lib: ctypes.CDLL, kind: str, m: int, n: int, k: int, dtype: torch.dtype
) -> None:
    make = quantized.quantize_nf4 if kind == "nf4" else quantized.quantize_int8
    weight = make(random(n, k, dtype=F32, seed=1))
    weight = weight._replace(codes=weight.codes.to(DEVICE), scales=weight.scales.to(DEVICE))
    x, s = (random(m, c, dtype=dtype, seed=2).to(DEVICE) for c in (k, 16))
    b = random(n, 16, dtype=dtype, seed=3).to(DEVICE)
    expected = x.double() @ quantized.dequantize(weight, dtype).double().t()
    expected += s.double() @ b.double().t()
    found: list[Tensor] = []
    for _ in range(2):
        out = Bordered(torch.full((m, n), float("nan"), dtype=dtype, device=DEVICE), 2)
        described = ampere.Quantized.of(weight, weight.codes)
        status = ampere.quantized_gemv(lib, x, described, [Term(s, b)], None, out.t)
        found += check(lib, status, [(out, expected)])
    assert torch.equal(*found)


def call_hopper(lib: ctypes.CDLL, outputs: Sequence[hopper.Output]) -> None:
    found = []
    for _ in range(2):
        given = [
            hopper.Output(
                [
                    hopper.Term(on_gpu(t.left), on_gpu(t.right), t.threshold, t.stream)
                    for t in one.terms
                ],
                on_gpu(one.out),
                None if one.bias is None else on_gpu(one.bias),
                one.across,
                seed(),
            )
            for one in outputs
        ]
        args = (GemmArgs * len(given))(*(one.args() for one in given))
        status = lib.deltaops_cuda_hopper_gemm(args, len(given))
        found.append(check(lib, status, [(one.out, one.wide()) for one in given]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@DTYPES
@pytest.mark.parametrize("m", [1, 130, 5000])
def test_hopper_products(lib: ctypes.CDLL, m: int, dtype: torch.dtype) -> None:
    """A group of outputs in one launch; their gradient in one accumulator; a mask."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper")
    call_hopper(lib, hopper.forward(m, 328, [1032, 136, 72], [8, 24, 0], dtype))
    call_hopper(lib, [hopper.gradient(m, 1032, [136, 72, 65], [8, 24, 0], dtype)])
    call_hopper(lib, [hopper.gradient(m, 520, [328], [24], dtype, THRESHOLD, STREAM)])


@DTYPES
@pytest.mark.parametrize(("m", "rank"), [(1, 1), (300, 24), (2170, 64), (5000, 16)])
def test_s_beside_y(lib: ctypes.CDLL, m: int, rank: int, dtype: torch.dtype) -> None:
    """Some blocks make S while others begin with x Wᵀ: few, many, as many as are left over."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper")
    x, weight, a, b, bias = (
        on_gpu(hopper.matrix(*shape, dtype, i))
        for i, shape in enumerate(((m, 776), (1032, 776), (rank, 776), (1032, rank), (1, 1032)))
    )
    base = x.t.double() @ weight.t.double().t() + bias.t.double()
    stream, found = torch.cuda.current_stream().cuda_stream, []
    for blocks in (0, 2, 16, 0):
        s, narrow, out = (
            on_gpu(Bordered.empty(m, cols, kind, -cols % 8))
            for cols, kind in ((rank, F32), (rank, dtype), (1032, dtype))
        )
        tensors = (one.t for one in (x, weight, a, b, bias, s, narrow, out))
        flags = hopper.flags_of(m, DEVICE)
        args = hopper.project_args(*tensors, 0.75, blocks, flags, stream)
        status = lib.deltaops_cuda_hopper_project_gemm(ctypes.byref(args))
        check(lib, status, [(s, 0.75 * (x.t.double() @ a.t.double().t()))])
        found.append(check(lib, status, [(out, base + narrow.t.double() @ b.t.double().t())]))
        found[-1] += [s.t.clone(), narrow.t.clone()]
        assert torch.equal(narrow.t, s.t.to(dtype))
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
