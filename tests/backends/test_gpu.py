"""The Triton backend on a real GPU, against the float64 reference. `make gpu` runs these."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltaops.backends import PrefixAttentionCall
from deltaops.backends.triton import TritonBackend, core, cuda, planner
from deltaops.backends.triton.tables import PLANS
from deltaops.reference import delta_linear as reference
from deltaops.reference import prefix_attention as prefix_reference
from deltaops.testing import (
    DELTA_LINEAR_CASES,
    PREFIX_ATTENTION_CASES,
    ROUTED_CASES,
    AttentionCase,
    DeltaLinearCase,
    DeltaLinearTensors,
    PrefixAttentionCase,
    assert_accurate,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here"),
]


@pytest.mark.parametrize("case", DELTA_LINEAR_CASES + ROUTED_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS[:3])
def test_forward_and_gradients_match_fp64_and_repeat(
    case: DeltaLinearCase, dtype: torch.dtype, plan: str
) -> None:
    t, grad_y = case.tensors(dtype, device="cuda"), case.grad_y(dtype, device="cuda")
    if reason := TritonBackend().unsupported(t.call()):
        pytest.skip(reason)
    # the library makes no mask
    back = "split" if plan == "torch" and any(case.dropout) else plan
    check_plans(t, grad_y, plan, back)


def need(plan: str) -> None:
    """Skips where this GPU cannot run it."""
    if plan == "persistent" and not core.persists("cuda"):
        pytest.skip("needs tensor descriptors: sm_90 or sm_100")
    if plan == "beside" and not core.has_room_beside("cuda"):
        pytest.skip("needs sm_90")
    if plan in cuda.PLANS and not cuda.runs_on("cuda", plan):
        pytest.skip(f"needs another GPU or CUDA library: {cuda.state()}")


# Ragged in every length; M past one tile a multiprocessor; a rank of two steps; a mask.
PERSISTENT = (
    DeltaLinearCase(300, 280, 136, (72,), padding=8),
    DeltaLinearCase(257, 136, 200, (8,), (0.3,), bias=False),
    DeltaLinearCase(5000, 1032, 520, (16,)),
    DeltaLinearCase(5000, 1032, 520, (64,), (0.1,)),
)


BESIDE = (
    DeltaLinearCase(300, 280, 136, (72,), bias=False, padding=8),
    DeltaLinearCase(5000, 1032, 520, (16,)),
    DeltaLinearCase(4096, 2048, 1024, (128,), bias=False),
)


@pytest.mark.parametrize("case", PERSISTENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_persistent_plan_matches_fp64_and_repeats(
    case: DeltaLinearCase, dtype: torch.dtype
) -> None:
    need("persistent")
    t, grad_y = case.tensors(dtype, device="cuda"), case.grad_y(dtype, device="cuda")
    check_plans(t, grad_y, "persistent", "persistent")


@pytest.mark.parametrize("case", BESIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_pass_beside_dx_matches_fp64_and_repeats(
    case: DeltaLinearCase, dtype: torch.dtype
) -> None:
    need("beside")
    t, grad_y = case.tensors(dtype, device="cuda"), case.grad_y(dtype, device="cuda")
    check_plans(t, grad_y, "persistent", "beside")


S_BESIDE = (
    DeltaLinearCase(300, 280, 136, (24,), padding=8),
    DeltaLinearCase(5000, 1032, 520, (16,), bias=False),
    DeltaLinearCase(4096, 4096, 1024, (64,)),
)


@pytest.mark.parametrize("case", S_BESIDE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_s_beside_y_matches_fp64_and_repeats(case: DeltaLinearCase, dtype: torch.dtype) -> None:
    need("cuda")
    t, grad_y = case.tensors(dtype, device="cuda"), case.grad_y(dtype, device="cuda")
    check_plans(t, grad_y, "beside", "cuda")
    check_s(t, "beside", "cuda")


@pytest.mark.parametrize("case", PERSISTENT, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_cuda_plan_matches_fp64_and_repeats(case: DeltaLinearCase, dtype: torch.dtype) -> None:
    need("cuda")
    t, grad_y = case.tensors(dtype, device="cuda"), case.grad_y(dtype, device="cuda")
    check_plans(t, grad_y, "cuda", "cuda")


DECODE = (
    DeltaLinearCase(1, 4096, 512, (16,)),
    DeltaLinearCase(7, 8320, 256, (8,), bias=False),
    DeltaLinearCase(16, 1000, 4096, (64,)),
    DeltaLinearCase(16, 130, 300, (24,), padding=3),
    DeltaLinearCase(13, 40, 530, (40,), layout="col"),
)


@pytest.mark.parametrize("case", DECODE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_decode_plan_matches_fp64_and_repeats(
    case: DeltaLinearCase, dtype: torch.dtype
) -> None:
    t, grad_y = case.tensors(dtype, device="cuda"), case.grad_y(dtype, device="cuda")
    check_plans(t, grad_y, "decode", "fused")
    check_s(t, "decode", "fused")


def check_plans(t: DeltaLinearTensors, grad_y: torch.Tensor, plan: str, back: str) -> None:
    """y and every gradient against float64, twice, forward by ``plan`` and backward by ``back``."""
    needs, wide = t.all_needed(), t.to(torch.float64)
    y64, s64 = reference.forward(*wide.forward_arguments())
    low, s_low = reference.forward(*t.forward_arguments())
    rest = needs, *t.by_row()
    oracle = t.joined(reference.backward(*wide.backward_arguments(grad_y.double(), s64), *rest))
    baseline = t.joined(reference.backward(*t.backward_arguments(grad_y, s_low), *rest))
    run, results = TritonBackend(), []
    with planner.forced(plan, back):
        for _ in range(2):
            y, s = run.forward(*t.forward_arguments())
            grads = run.backward(*t.backward_arguments(grad_y, s), *rest)
            results.append([y, *t.joined(grads)])
    for i, (got, again, want, eager) in enumerate(
        zip(*results, [y64, *oracle], [low, *baseline], strict=True)
    ):
        assert_accurate(got, want, eager, f"result {i}")
        assert torch.equal(got, again)


def check_s(t: DeltaLinearTensors, plan: str, back: str) -> None:
    """S of a plan that makes it together with y, against float64."""
    with planner.forced(plan, back):
        s = TritonBackend().forward(*t.forward_arguments())[1]
    low = reference.forward(*t.forward_arguments())[1]
    assert_accurate(s, reference.forward(*t.to(torch.float64).forward_arguments())[1], low, "S")


def of_lse(lse: torch.Tensor) -> torch.Tensor:
    """Without those of queries that see nothing, which are infinite."""
    return torch.where(lse.isfinite(), lse, 0.0)


@pytest.mark.parametrize("case", PREFIX_ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_kernel_of_prefix_attention_matches_fp64_and_repeats(
    case: PrefixAttentionCase, dtype: torch.dtype
) -> None:
    t, run, needs = case.tensors(dtype), TritonBackend(), [True] * 5
    *given, mask, scale, causal = (
        a.cuda() if isinstance(a, torch.Tensor) else a for a in t.forward_arguments()
    )
    grad_y = case.grad_y(dtype).cuda()
    call = PrefixAttentionCall.of(given[0], given[1], given[3], mask, causal)
    if reason := run.unsupported(call):
        pytest.skip(reason)
    rest = mask, scale, causal
    results = []
    with sdpa_kernel([SDPBackend.MATH]):  # else some are merged into torch's attention: see below
        for _ in range(2):
            y, lse = run.prefix_attention_forward(*given, *rest)
            grads = run.prefix_attention_backward(grad_y, *given, y, lse, *rest, needs)
            results.append([y, of_lse(lse), *grads])
    plain = []
    for one, g in ((given, grad_y), ([a.double() for a in given], grad_y.double())):
        y, lse = prefix_reference.forward(*one, *rest)
        grads = prefix_reference.backward(g, *one, y, lse, *rest, needs)
        plain.append([y, of_lse(lse), *grads])
    for i, (got, again, eager, want) in enumerate(zip(*results, *plain, strict=True)):
        assert_accurate(got, want, eager, f"result {i}")
        assert torch.equal(got, again)


MERGED = (
    # one tile of the prefix, half of one, and several; a head in all of its lanes and in some
    PrefixAttentionCase(32, AttentionCase(2, 8, 517, 128, h_kv=2, causal=True)),
    PrefixAttentionCase(1, AttentionCase(2, 4, 301, 64, causal=True)),
    PrefixAttentionCase(100, AttentionCase(1, 6, 333, 96, h_kv=3, causal=True), wide=True),
    PrefixAttentionCase(20, AttentionCase(2, 8, 1, 128, h_kv=2, l_kv=200)),
    PrefixAttentionCase(100, AttentionCase(1, 8, 77, 128, h_kv=8, l_kv=300)),
    PrefixAttentionCase(12, AttentionCase(2, 4, 130, 72, h_kv=2, layout="dense", causal=True)),
    PrefixAttentionCase(12, AttentionCase(2, 4, 130, 128, h_kv=2, layout="merged"), wide=True),
    PrefixAttentionCase(16, AttentionCase(1, 2, 200, 256, causal=True)),
)


@pytest.mark.parametrize("case", MERGED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["as torch chooses", "flash", "deterministic"])
def test_a_prefix_merged_into_torchs_attention_matches_fp64(
    case: PrefixAttentionCase, dtype: torch.dtype, way: str
) -> None:
    t, run, needs = case.tensors(dtype), TritonBackend(), [True] * 5
    *given, mask, scale, causal = (
        a.cuda() if isinstance(a, torch.Tensor) else a for a in t.forward_arguments()
    )
    grad_y, rest = case.grad_y(dtype).cuda(), (mask, scale, causal)
    flash = [SDPBackend.FLASH_ATTENTION]
    allowed = nullcontext() if way == "as torch chooses" else sdpa_kernel(flash)
    torch.use_deterministic_algorithms(way == "deterministic")
    try:
        with allowed:
            said = run.planned(PrefixAttentionCall.of(*given[:2], given[3], mask, causal))
            assert said is not None
            assert said.startswith("merged"), said
            assert ("flash" in said) or way == "as torch chooses"
            found = []
            for _ in range(2):
                y, lse = run.prefix_attention_forward(*given, *rest)
                grads = run.prefix_attention_backward(grad_y, *given, y, lse, *rest, needs)
                found.append([y, lse, *grads])
    finally:
        torch.use_deterministic_algorithms(False)
    plain = []
    for one, g in ((given, grad_y), ([a.double() for a in given], grad_y.double())):
        y, lse = prefix_reference.forward(*one, *rest)
        grads = prefix_reference.backward(g, *one, y, lse, *rest, needs)
        plain.append([y, lse, *grads])
    for i, (got, again, eager, want) in enumerate(zip(*found, *plain, strict=True)):
        # torch's own lse sets the error, which float32 results show
        assert_accurate(got.to(dtype), want, eager.to(dtype), f"{said}: result {i}")
        if i < 2 or way == "deterministic":
            assert torch.equal(got, again), f"{said}: result {i} changed its bits"


ALONE = tuple(plan for plan in PLANS if plan != "produced")
"""Plans of one call: S that is made where x is takes two."""


def case_of(plan: str) -> DeltaLinearCase:
    """Which ``plan`` takes: of few rows the one that has a second launch beside the first."""
    shape = (16, 96, 4096, (64,)) if plan == "decode" else (300, 96, 128, (16,))
    return DeltaLinearCase(*shape)


def results(device: str, plan: str) -> tuple[DeltaLinearTensors, list[torch.Tensor]]:
    """Arguments of a call, and y and every gradient."""
    case = case_of(plan)
    t = case.tensors(torch.bfloat16, device=device)
    return t, call(t, case.grad_y(torch.bfloat16, device=device), plan)


def call(t: DeltaLinearTensors, grad_y: torch.Tensor, plan: str) -> list[torch.Tensor]:
    """As :func:`results`."""
    others = {"beside": ("persistent", "beside"), "decode": ("decode", "fused")}
    with planner.forced(*others.get(plan, (plan, plan))):
        y, s = TritonBackend().forward(*t.forward_arguments())
        given = t.backward_arguments(grad_y, s)
        return [y, *TritonBackend().backward(*given, t.all_needed())]


@pytest.mark.parametrize("plan", ALONE)
def test_a_captured_call_has_the_same_bits(plan: str) -> None:
    need(plan)
    t, wanted = results("cuda", plan)
    grad_y = case_of(plan).grad_y(torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(t, grad_y, plan)
    for out in found:
        out.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("plan", ALONE)
def test_a_call_waits_for_its_own_stream_alone(plan: str) -> None:
    need(plan)
    t, wanted = results("cuda", plan)
    grad_y = case_of(plan).grad_y(torch.bfloat16, device="cuda")
    right, side = t.x.clone(), torch.cuda.Stream()
    t.x.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)  # a call on another stream would read NaN
        t.x.copy_(right)
        found = call(t, grad_y, plan)
    side.synchronize()
    assert all(map(torch.equal, found, wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds no second GPU here")
@pytest.mark.parametrize("plan", ALONE)
def test_a_call_runs_on_the_gpu_of_its_tensors(plan: str) -> None:
    need(plan)
    here, there = results("cuda:0", plan)[1], results("cuda:1", plan)[1]
    assert {out.device.index for out in there} == {1}
    assert all(torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True))
