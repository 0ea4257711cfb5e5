"""Adapters by row, in every backend that takes them: against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaops.backends import DeltaLinearCall, registered
from deltaops.reference import delta_linear as reference
from deltaops.testing import ROUTED_CASES, DeltaLinearCase, assert_accurate

F32, BF16 = torch.float32, torch.bfloat16
CALL = DeltaLinearCall("cpu", F32, (F32,), 1, 1, 1, (1,), False, "row", routed=True)
BACKENDS = [
    name
    for name, backend in registered().items()
    if name != "reference" and not backend.unsupported(CALL) and not backend.unavailable()
]
every = pytest.mark.parametrize("backend", BACKENDS)
case = pytest.mark.parametrize("case", ROUTED_CASES, ids=str)


def test_the_native_core_takes_them() -> None:
    assert "cpu" in BACKENDS


@every
@case
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_results_match_the_fp64_reference(
    backend: str, case: DeltaLinearCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    t = case.tensors(dtypes[0], adapter_dtype=dtypes[1])
    grad_y, wide, run = case.grad_y(dtypes[0]), t.to(torch.float64), registered()[backend]
    results = []
    for each, by, dy in (
        (run, t, grad_y),
        (reference, wide, grad_y.double()),
        (reference, t, grad_y),
    ):
        y, s = each.forward(*by.forward_arguments())
        grads = each.backward(*by.backward_arguments(dy, s), t.all_needed(), *by.by_row())
        results.append([y, s, *grads])
    assert len(results[0]) == 2 + sum(t.all_needed())
    for i, (got, oracle, baseline) in enumerate(zip(*results, strict=True)):
        assert_accurate(got, oracle, baseline, f"result {i}")


@every
@case
def test_same_bits_again_with_any_number_of_threads(backend: str, case: DeltaLinearCase) -> None:
    t, run, grad_y = case.tensors(F32), registered()[backend], case.grad_y(F32)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads, 1):
            torch.set_num_threads(count)
            y, s = run.forward(*t.forward_arguments())
            grads = run.backward(*t.backward_arguments(grad_y, s), t.all_needed(), *t.by_row())
            results.append([y, s, *grads])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*results, strict=True):
        assert all(torch.equal(first, other) for other in others)


@every
@pytest.mark.parametrize("number", [0, 6, 10])
def test_every_element_is_written(
    backend: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, run = ROUTED_CASES[number].tensors(F32), registered()[backend]
    original = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        out = original(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    y, s = run.forward(*t.forward_arguments())
    grads = run.backward(
        *t.backward_arguments(ROUTED_CASES[number].grad_y(F32), s), t.all_needed(), *t.by_row()
    )
    for tensor in (y, s, *grads):
        assert not tensor.isnan().any()


@every
@pytest.mark.parametrize("wanted", range(8))
def test_each_gradient_alone(backend: str, wanted: int) -> None:
    case = DeltaLinearCase(
        131, 37, 53, (4, 9), dropout=(0.3, 0.0), activation=("silu", "identity"),
        branch_bias=(True, True), routed="mixed",
    )  # fmt: skip
    t, run = case.tensors(F32), registered()[backend]
    grad_y, s = case.grad_y(F32), run.forward(*t.forward_arguments())[1]
    arguments = list(t.backward_arguments(grad_y, s))
    alone = [i == wanted for i in range(8)]
    if not any(alone[2:4]):
        arguments[1] = None  # x is saved for grad_a only
    everything = run.backward(*t.backward_arguments(grad_y, s), [True] * 8, *t.by_row())
    (got,) = run.backward(*arguments, alone, *t.by_row())
    torch.testing.assert_close(got, everything[wanted])


@every
def test_what_is_not_a_number_in_a_row_stays_there(backend: str) -> None:
    t = DeltaLinearCase(40, 33, 24, (4, 4), routed="mixed").tensors(F32)
    t.x[3, 5] = t.x[17, 2] = float("nan")
    run, grad_y = registered()[backend], torch.ones(40, 33)
    y, s = run.forward(*t.forward_arguments())
    needs = [True, False, True, True, True, True, False, False]
    grad_x, *_ = run.backward(*t.backward_arguments(grad_y, s), needs, *t.by_row())
    clean = [i for i in range(40) if i not in (3, 17)]
    assert y[[3, 17]].isnan().all()
    assert y[clean].isfinite().all()
    assert grad_x.isfinite().all()


def test_what_is_not_a_number_in_an_adapter_stays_in_its_rows() -> None:
    """Of the native core alone: products by zero would carry it on."""
    t = DeltaLinearCase(131, 33, 24, (4, 4), dropout=(0.0, 0.2), routed="mixed").tensors(F32)
    t.a[0][1, 2] = t.b[0][5, 1] = float("nan")
    run, grad_y = registered()["cpu"], torch.ones(131, 33)
    y, s = run.forward(*t.forward_arguments())
    needs = [True, True, True, True, True, True, False, False]
    grads = run.backward(*t.backward_arguments(grad_y, s), needs, *t.by_row())
    grad_x, grad_bias, _, grad_a, _, grad_b = grads
    own = t.adapter == 0
    assert y[own].isnan().any(1).all()
    assert grad_x[own].isnan().any(1).all()
    assert all(u.isfinite().all() for u in (y[~own], grad_x[~own], grad_bias, grad_a, grad_b))
