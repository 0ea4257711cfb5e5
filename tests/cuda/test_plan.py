"""The plans "cuda" and "ampere" of the Triton backend: who gets them, and what they give, on the
emulated grid."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from deltaops.backends.triton import beside, core, cuda, delta_linear, planner, tables, targets
from deltaops.reference import delta_linear as reference
from deltaops.testing import assert_accurate

from . import emulated, hopper

GPU = "sm_90"
PLANS = pytest.mark.parametrize("name", cuda.PLANS)
SETTING = tables.Setting(8192, 4096, 4096, 16, "bfloat16", "bfloat16", False)


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A GPU stands in, and its table lies there."""
    monkeypatch.setenv("DELTAOPS_CACHE", str(tmp_path))
    planner.forget()
    with core.standing_in(targets.TARGETS[GPU]):
        yield tables.own(GPU)
    planner.forget()


def plan(native: bool) -> str:
    special = ("persistent", *cuda.PLANS) if native else ("persistent",)
    return planner.choose(SETTING, "forward", "meta", special=special).plan


def test_no_gpu_gets_it_unmeasured(tuned: Path) -> None:
    assert set(cuda.PLANS) < set(planner.possible(SETTING, "forward", cuda.PLANS))
    assert plan(native=True) == plan(native=False)
    assert plan(native=True) not in cuda.PLANS


def test_what_ships_says_which_run_measured_it() -> None:
    found = []
    for path in tables.SHIPPED.glob("*.json"):
        gpu = json.loads(path.read_text(encoding="utf-8"))["gpu"]
        assert path.name == tables.file_name(gpu)
        for entry in tables.read(path, gpu).entries:
            for direction, seconds in entry.seconds.items():
                run = entry.measured[direction]
                assert run["date"]
                assert {"torch", "triton"} <= set(run["versions"])
                found += [name for name in cuda.PLANS if name in seconds]
    assert set(found) == set(cuda.PLANS)


@PLANS
def test_it_is_taken_where_it_was_measured_as_fastest(tuned: Path, name: str) -> None:
    timed = {"fused": 3.0, "split": 2.0, name: 1.0}
    tables.add(tuned, GPU, [tables.Entry(SETTING, {"forward": timed})], {"date": "a day"})
    assert plan(native=True) == name
    assert plan(native=False) == "split"


@PLANS
def test_forcing_it_where_it_cannot_run_raises(tuned: Path, name: str) -> None:
    with planner.forced(name, name):
        assert plan(native=True) == name
        with pytest.raises(ValueError, match=f"'{name}' is forced"):
            plan(native=False)


@PLANS
def test_it_runs_on_no_processor_and_for_no_stand_in(tuned: Path, name: str) -> None:
    assert not cuda.runs_on("cpu", name)
    assert not cuda.runs_on("cuda", name)


@pytest.mark.parametrize(
    ("plan", "archs", "runs"),
    [
        ("cuda", "80;90a;100", {90}),
        ("cuda", "80;90", set()),
        ("ampere", "80;90a;100", {80, 86, 89, 90, 100, 120}),
        ("ampere", "86", {86, 89, 90, 100, 120}),
        ("ampere", "90a;100", {90, 100, 120}),
        ("ampere", "90a", {90}),
    ],
)
def test_which_gpus_a_build_is_for(plan: str, archs: str, runs: set[int]) -> None:
    known = (70, 75, 80, 86, 89, 90, 100, 120)
    assert {gpu for gpu in known if cuda.compiled_for(plan, gpu, archs)} == runs


def test_which_matrices_ampere_takes() -> None:
    t = torch.empty(6, 9, dtype=torch.float16)
    assert cuda.takes(t, t[:, 1:8])
    assert not cuda.takes(t, t.t())
    assert not cuda.takes(t, t.bfloat16())
    assert not cuda.takes(t.float())
    assert not cuda.takes(t[:0])
    assert not cuda.takes(t[:1].expand(6, 9))


@pytest.fixture(params=cuda.PLANS)
def emulated_plan(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Calls on the processor go to the emulated library, by one plan or the other."""
    monkeypatch.setattr(cuda, "native", hopper.Module)
    monkeypatch.setattr(cuda, "_place", lambda t: (0, 0))
    monkeypatch.setattr(cuda, "runs_on", lambda device, plan: True)
    monkeypatch.setattr(delta_linear, "described", lambda *args: True)
    with planner.forced(request.param, request.param):
        yield


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.usefixtures("emulated_plan")
def test_y_and_dx_match_float64(dtype: torch.dtype, dropout: float) -> None:
    m, n, k, rank = 140, 136, 72, 16
    x, weight, bias = (normal(*shape, dtype=dtype, seed=1) for shape in ((m, k), (n, k), (n,)))
    a, b = normal(rank, k, dtype=dtype, seed=2), normal(n, rank, dtype=dtype, seed=3)
    seed, settings = torch.tensor([2**50 + 7]), ([0.5], [dropout], ["identity"])

    def forward(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = [t.to(dtype) for t in (x, weight, bias, a, b)]
        y, s = reference.forward(*given[:3], [given[3]], [given[4]], [None], *settings, seed)
        return y, s

    y64, _ = forward(torch.float64)
    y, s = forward(dtype)
    got = delta_linear.outputs(x, weight, bias, [a], [b], s.float(), [dropout])
    assert_accurate(got, y64, y, "y")

    def backward(dtype: torch.dtype) -> Tensor:
        given = [t.to(dtype) for t in (grad_y, x, weight, a, b)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        needs = [True, False, False, False, False]
        found = reference.backward(
            *given[:3], [given[3]], [given[4]], s.to(wide), *settings, seed, needs
        )
        return found[0]

    grad_y, grad_x = normal(m, n, dtype=dtype, seed=4), torch.empty_like(x)
    grad_s = 0.5 * (grad_y.float() @ b.float())
    delta_linear._write_grad_input(grad_x, grad_y, weight, [a], grad_s, [dropout], seed)
    assert_accurate(grad_x, backward(torch.float64), backward(dtype), "grad x")


def test_s_is_made_beside_y(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "native", hopper.Module)
    monkeypatch.setattr(cuda, "_place", lambda t: (0, 0))
    m, n, k, rank, dtype = 140, 136, 72, 16, torch.bfloat16
    x, weight, bias = (normal(*shape, dtype=dtype, seed=1) for shape in ((m, k), (n, k), (n,)))
    a, b = normal(rank, k, dtype=dtype, seed=2), normal(n, rank, dtype=dtype, seed=3)

    def forward(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = [t.to(dtype) for t in (x, weight, bias, a, b)]
        rest = [None], [0.5], [0.0], ["identity"], None
        return reference.forward(*given[:3], [given[3]], [given[4]], *rest)

    y = torch.empty(m, n, dtype=dtype)
    s = cuda.outputs_and_s(y, x, weight, bias, a, b, 0.5)
    (y64, s64), (low, s_low) = forward(torch.float64), forward(dtype)
    assert_accurate(y, y64, low, "y")
    assert s.dtype == torch.float32
    assert_accurate(s, s64, s_low.float(), "S")


@pytest.mark.parametrize(
    ("m", "n", "rank", "makes"),
    [
        (8192, 4096, 16, True),  # 512 pairs of tiles in 8 rounds on 64 of 66 pairs
        (8192, 4096, 72, False),
        (66 * 256, 256, 16, False),  # one round on all
        (300, 512, 16, True),
    ],
)
def test_where_s_is_made_beside_y(
    m: int, n: int, rank: int, makes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(core, "persists", lambda device: True)
    monkeypatch.setattr(cuda, "runs_on", lambda device, plan: plan == "cuda")
    x, weight, b = (
        torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        for shape in ((m, 64), (n, 64), (n, rank))
    )
    for linear in (True, False):
        found = delta_linear.special("forward", x, weight, [b], [rank], "meta", linear)
        assert ("beside" in found) == (makes and linear)


@pytest.mark.parametrize(
    ("m", "n", "k", "rank", "beside_dx"),
    [
        (8192, 14336, 4096, 16, True),
        (8192, 4096, 14336, 64, True),
        (8192, 14336, 4096, 72, False),
        (8192, 4096, 4096, 16, False),  # dx is over before four have read x and dy
        (512, 14336, 4096, 16, False),
        (32768, 4096, 14336, 16, False),  # its tiles leave none over
    ],
)
def test_where_grad_b_is_made_beside_dx(
    m: int, n: int, k: int, rank: int, beside_dx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "multiprocessors", lambda device: 132)
    x, grad_y = (torch.empty(m, c, dtype=torch.bfloat16, device="meta") for c in (k, n))
    assert beside.reads_dy(x, grad_y, rank) == beside_dx
    assert not beside.reads_dy(x, grad_y.t().contiguous().t(), rank)  # rows that lie otherwise


@pytest.mark.usefixtures("emulated_plan")
def test_a_group_s_dx_leaves_multiprocessors_to_grad_a(monkeypatch: pytest.MonkeyPatch) -> None:
    m, k, widths, ranks, dtype = 140, 328, (72, 40), (16, 8), torch.bfloat16
    x = normal(m, k, dtype=dtype, seed=1)
    grad_y = [normal(m, n, dtype=dtype, seed=n) for n in widths]
    weight = [normal(n, k, dtype=dtype, seed=n + 1) for n in widths]
    a = [normal(r, k, dtype=dtype, seed=r) for r in ranks]
    grad_s = normal(m, sum(ranks), dtype=dtype, seed=2)
    of_layers = list(grad_s.split(ranks, 1))  # type: ignore[no-untyped-call]  # torch's own has no types
    left, kernels = [], core.kernels

    def instead(grad_s: Tensor, x: Tensor, grad_a: Tensor, *, programs: int) -> None:
        left.append(programs)
        grad_a.copy_(grad_s.float().T @ x.float())

    there = types.SimpleNamespace(beside=instead)
    monkeypatch.setattr(core, "kernels", lambda n: there if n == "beside" else kernels(n))
    monkeypatch.setattr(core, "multiprocessors", lambda device: 4)
    grad_x = torch.empty_like(x)
    grad_a = beside.backward_group(grad_x, grad_y, x, weight, a, grad_s, of_layers)
    assert left == [1]  # six tiles take two rounds on three
    wide = [dy.double() @ w.double() for dy, w in zip(grad_y, weight, strict=True)]
    oracle = sum(wide, grad_s.double() @ torch.cat(a).double())
    assert_accurate(grad_x, oracle, oracle.to(dtype), "grad x")
    oracle = grad_s.double().T @ x.double()
    assert_accurate(grad_a, oracle, oracle.to(dtype), "grad a")


@pytest.mark.usefixtures("emulated_plan")
def test_what_the_library_refuses_is_an_error() -> None:
    x = normal(8, 9, dtype=torch.bfloat16, seed=1)
    with pytest.raises(RuntimeError, match="must have rows on 16 bytes"):
        cuda.outputs(
            "cuda", torch.empty(8, 8, dtype=x.dtype), x, x[:, :9], None, x[:, :8].float(), x
        )


@pytest.mark.parametrize(
    ("archs", "says"),
    [
        ("80;90a", "built for sm_80, sm_90a; its products run where `deltaops tune-kernels` found"),
        ("80;100", "built for sm_80, sm_100; its products for sm_80 and later run where"),
    ],
)
def test_what_doctor_says(archs: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper.Module, "archs", staticmethod(lambda: archs))
    monkeypatch.setattr(cuda, "native", hopper.Module)
    assert cuda.state().startswith(says)


def test_a_module_of_another_build_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    stale = types.SimpleNamespace(abi_version=lambda: 1)
    monkeypatch.setitem(sys.modules, "deltaops._cuda", stale)
    assert cuda.state() == (
        "deltaops._cuda is of another build (version 1 of its C ABI, not "
        f"{cuda.ABI_VERSION}); reinstall deltaops"
    )


def test_its_version_is_the_header_s() -> None:
    header = emulated.ROOT / "csrc" / "include" / "deltaops_cuda.h"
    line = f"#define DELTAOPS_CUDA_ABI_VERSION {cuda.ABI_VERSION}"
    assert line in header.read_text(encoding="utf-8").splitlines()


# -------------------------------------------------------------------------- the module as it ships


def test_the_module_checks_before_it_looks_for_a_gpu() -> None:
    module = cuda.native()
    if isinstance(module, str):
        pytest.skip(module)
    t = torch.zeros(8, 16, dtype=torch.bfloat16)
    view, other = cuda._view(t), cuda._view(t[:, :8])
    with pytest.raises(ValueError, match=r"right of product 0 of out 0 must be \[16, 16\]"):
        module.hopper_gemm(0, 1, [(view, None, [(view, view, 0)])], 0, 0)
    layer = (view, view, other, other, None)
    with pytest.raises(ValueError, match=r"hopper_project_gemm: a must be \[8, 16\] of dtype 1"):
        module.hopper_project_gemm(0, 1, layer, None, other, other, 1.0, 0, 0, 0, 0)
    assert module.hopper_project_gemm_workspace(129) == 8
    branch = [(view, view, 1.0, 0, 0, 0)]
    with pytest.raises(ValueError, match=r"rms_norm_project: s of branch 0 must be \[8, 8\]"):
        module.rms_norm_project(0, 1, view, None, view, None, 1e-5, branch, 0)
    with pytest.raises(ValueError, match=r"swiglu_project: up must be \[8, 16\]"):
        module.swiglu_project(0, 1, view, other, view, branch, 0)
    with pytest.raises(ValueError, match=r"ampere_gemm: right of product 0 must be \[16, 16\]"):
        module.ampere_gemm(0, 1, (view, None, [(view, view, 0)]), 0, 0)
    with pytest.raises(ValueError, match="takes 1 to 4 outputs, got 0"):
        module.hopper_gemm(0, 1, [], 0, 0)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"no NVIDIA driver|no GPU"):
            module.hopper_gemm(0, 1, [(other, None, [(view, view, 0)])], 0, 0)
