"""Every backend that is ready here, against the float64 reference: forward and each gradient."""

from __future__ import annotations

import pytest
import torch

from deltaops.backends import DeltaLinearCall, registered
from deltaops.reference import delta_linear as reference
from deltaops.reference.activation import ACTIVATIONS
from deltaops.testing import DELTA_LINEAR_CASES, DeltaLinearCase, assert_accurate

ON_CPU = DeltaLinearCall("cpu", torch.float32, (), 1, 1, 1, (), False, "row")
BACKENDS = [
    name
    for name, backend in registered().items()
    if name != "reference" and not backend.unsupported(ON_CPU) and not backend.unavailable()
]
DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-f32adapters": (torch.bfloat16, torch.float32),
}
every = pytest.mark.parametrize("backend", BACKENDS)
case = pytest.mark.parametrize("case", DELTA_LINEAR_CASES, ids=str)
dtypes = pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)


def test_the_native_core_is_here() -> None:
    assert "cpu" in BACKENDS, registered()["cpu"].unavailable()


@every
@case
@dtypes
def test_forward_matches_fp64_reference(
    backend: str, case: DeltaLinearCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    t = case.tensors(dtypes[0], adapter_dtype=dtypes[1])
    y, s = registered()[backend].forward(*t.forward_arguments())
    oracle = reference.forward(*t.to(torch.float64).forward_arguments())
    baseline = reference.forward(*t.forward_arguments())
    assert_accurate(y, oracle[0], baseline[0], "y")
    assert_accurate(s, oracle[1], baseline[1], "s")


@every
@case
@dtypes
def test_gradients_match_fp64_reference(
    backend: str, case: DeltaLinearCase, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    t = case.tensors(dtypes[0], adapter_dtype=dtypes[1])
    grad_y, wide = case.grad_y(dtypes[0]), t.to(torch.float64)
    needs = t.all_needed()
    s64 = reference.forward(*wide.forward_arguments())[1]
    oracle = reference.backward(*wide.backward_arguments(grad_y.double(), s64), needs)
    s_low = reference.forward(*t.forward_arguments())[1]
    baseline = reference.backward(*t.backward_arguments(grad_y, s_low), needs)
    run = registered()[backend]
    got = run.backward(*t.backward_arguments(grad_y, run.forward(*t.forward_arguments())[1]), needs)
    assert len(got) == sum(needs)
    for i, (actual, want, low) in enumerate(zip(got, oracle, baseline, strict=True)):
        assert_accurate(actual, want, low, f"gradient {i}")


@every
@case
def test_same_bits_again_and_inputs_unchanged(backend: str, case: DeltaLinearCase) -> None:
    t, run = case.tensors(torch.float32), registered()[backend]
    inputs = [u for u in (t.x, t.weight, *t.a, *t.b, *t.branch_bias) if u is not None]
    before = [u.clone() for u in inputs]
    grad_y = case.grad_y(torch.float32)
    results = []
    for _ in range(2):
        y, s = run.forward(*t.forward_arguments())
        results.append([y, s, *run.backward(*t.backward_arguments(grad_y, s), t.all_needed())])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
    for old, new in zip(before, inputs, strict=True):
        assert torch.equal(old, new)


@every
@case
def test_every_element_is_written(
    backend: str, case: DeltaLinearCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    t, run = case.tensors(torch.float32), registered()[backend]
    original = torch.empty

    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        out = original(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    y, s = run.forward(*t.forward_arguments())
    grads = run.backward(*t.backward_arguments(case.grad_y(torch.float32), s), t.all_needed())
    for tensor in (y, s, *grads):
        assert not tensor.isnan().any()


@every
@pytest.mark.parametrize("wanted", range(8))
@pytest.mark.parametrize("activation", [("identity", "identity"), ("silu", "identity")], ids=str)
def test_each_gradient_alone(backend: str, activation: tuple[str, str], wanted: int) -> None:
    case = DeltaLinearCase(
        50, 37, 53, (4, 9), dropout=(0.3, 0.0), activation=activation, branch_bias=(True, True)
    )
    t, run = case.tensors(torch.float32), registered()[backend]
    grad_y = case.grad_y(torch.float32)
    s = run.forward(*t.forward_arguments())[1]
    arguments = list(t.backward_arguments(grad_y, s))
    alone = [i == wanted for i in range(8)]
    if not any(alone[2:4]):
        arguments[1] = None  # x is saved for grad_a only
    everything = run.backward(*t.backward_arguments(grad_y, s), [True] * 8)
    (got,) = run.backward(*arguments, alone)
    torch.testing.assert_close(got, everything[wanted])


@every
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_passes_an_activation(backend: str, activation: str) -> None:
    t = DeltaLinearCase(20, 33, 40, (4,), activation=(activation,)).tensors(torch.float32)
    t.x[3, 5] = float("nan")
    run, grad_y = registered()[backend], torch.ones(20, 33)
    y, s = run.forward(*t.forward_arguments())
    (grad_x,) = run.backward(*t.backward_arguments(grad_y, s), [True, *[False] * 4])
    clean = [i for i in range(20) if i != 3]
    assert s[3].isnan().all()
    assert y[3].isnan().all()
    assert grad_x[3].isnan().all() == (activation not in ("identity", "relu"))
    assert y[clean].isfinite().all()
    assert grad_x[clean].isfinite().all()


@every
def test_not_a_number_propagates(backend: str) -> None:
    t = DeltaLinearCase(20, 33, 40, (4,)).tensors(torch.float32)
    t.x[3, 5] = float("nan")
    t.x[7, 2] = float("inf")
    y, _ = registered()[backend].forward(*t.forward_arguments())
    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    clean = [i for i in range(20) if i not in (3, 7)]
    assert y[clean].isfinite().all()


@every
@pytest.mark.parametrize("routed", ["", "mixed", "samples"])
@pytest.mark.parametrize("dropout", [(0.5, 0.0), (0.5, 0.25)], ids=str)
def test_what_is_dropped_is_gone_and_not_multiplied_by_zero(
    backend: str, dropout: tuple[float, ...], routed: str
) -> None:
    case = DeltaLinearCase(300, 70, 150, (4, 4), dropout=dropout, routed=routed)
    t, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)
    t.x[3, 5] = t.x[200, 140] = t.a[0][1, 7] = t.a[0][3, 149] = float("nan")
    results = []
    for run, by in ((registered()[backend], t), (reference, t.to(torch.float64))):
        y, s = run.forward(*by.forward_arguments())
        given = by.backward_arguments(grad_y.to(by.x.dtype), s)
        results.append([y, s, *run.backward(*given, t.all_needed(), *by.by_row())])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
    of_x = results[0][2].isnan()
    assert 0 < of_x[:, 7].sum() < 300
    assert not of_x[:, 8].any()
