"""The lengths of an adapted weight's rows: against the weight itself, in every dtype and way in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaops.errors import DeviceError, DtypeError, NoBackendError, ShapeError
from deltaops.ops import dora_norm
from deltaops.testing import bound, relative_error

Made = tuple[Tensor, Tensor, Tensor]


def make(n: int = 23, k: int = 37, r: int = 4, dtype: torch.dtype = torch.float32) -> Made:
    torch.manual_seed(0)
    return torch.randn(n, k).to(dtype), torch.randn(r, k), torch.randn(n, r)


def formed(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return (weight.double() + scaling * (b.double() @ a.double())).norm(dim=1)


@pytest.mark.parametrize("columns", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_norms_are_those_of_the_weight_that_is_not_formed(
    dtype: torch.dtype, columns: bool
) -> None:
    weight, a, b = make(dtype=dtype)
    weight = weight.t().contiguous().t() if columns else weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = dora_norm(weight, a, b, 0.7)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(norms, formed(weight, a, b, 0.7)) < 8 * bound(0.0, dtype)
    assert torch.equal(norms, dora_norm(weight, a, b, 0.7))


def test_no_rows_and_no_columns() -> None:
    assert dora_norm(*make(n=0)).shape == (0,)
    assert dora_norm(*make(k=0)).tolist() == [0.0] * 23


def test_autograd_takes_them_for_constants() -> None:
    weight, a, b = make()
    a.requires_grad_()
    b.requires_grad_()
    assert not dora_norm(weight, a, b).requires_grad
    (grad,) = torch.autograd.grad((dora_norm(weight, a, b) * a.sum()).sum(), [a])
    torch.testing.assert_close(grad, dora_norm(weight, a, b).sum().expand_as(a))
    assert not torch.ops.deltaops.dora_norm(weight, a, b, 1.0, "auto").requires_grad


def test_compiled_transformed_and_faked_calls_agree() -> None:
    given = make()
    eager = dora_norm(*given, 0.7)
    compiled = torch.compile(dora_norm, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given, 0.7), eager)
    mapped = torch.vmap(lambda b: dora_norm(given[0], given[1], b, 0.7))(given[2][None])
    torch.testing.assert_close(mapped[0], eager)
    assert dora_norm(*(t.to("meta") for t in given)).shape == eager.shape
    torch.library.opcheck(torch.ops.deltaops.dora_norm.default, (*given, 0.7, "auto"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w, a, b: (w[0], a, b), ShapeError, r"weight must be \[N, K\]"),
        (lambda w, a, b: (w, b, a), ShapeError, r"a must be \[R, 37\]"),
        (lambda w, a, b: (w, a, b[:, :3]), ShapeError, r"b must be \[23, 4\]"),
        (lambda w, a, b: (w.long(), a, b), DtypeError, "weight must be floating point"),
        (lambda w, a, b: (w, a, b.double()), DtypeError, "a and b must share a dtype"),
        (lambda w, a, b: (w, a, b.to("meta")), DeviceError, "b must be on the device of weight"),
    ],
)
def test_errors_say_what_is_wrong(change: object, error: type[Exception], message: str) -> None:
    assert callable(change)
    with pytest.raises(error, match=message):
        dora_norm(*change(*make()))


def test_a_named_backend_runs_or_raises() -> None:
    with pytest.raises(NoBackendError, match="has no kernel for dora_norm"):
        dora_norm(*make(), backend="cpu")
    with pytest.raises(NoBackendError, match="strict"):
        dora_norm(*make(), strict=True)
