"""A prompt before embeddings: torch's bits, an ordered sum, every way in, and clear errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from deltaops.errors import DeviceError, DtypeError, GradientError, NoBackendError, ShapeError
from deltaops.ops import prompt_embedding

Made = tuple[Tensor, Tensor, Tensor]
SIZES = [(3, 4, 5, 7, 6), (1, 1, 0, 2, 1), (0, 4, 5, 7, 6), (2, 0, 3, 5, 4)]
"""B, P, T, V, D."""


def make(
    b: int = 3,
    p: int = 4,
    t: int = 5,
    v: int = 7,
    d: int = 6,
    dtype: torch.dtype = torch.float32,
    prompt_dtype: torch.dtype = torch.float32,
) -> Made:
    torch.manual_seed(0)
    prompt = torch.randn(p, d).to(prompt_dtype).requires_grad_()
    return prompt, torch.randint(v, (b, t)), torch.randn(v, d).to(dtype)


def in_torch(prompt: Tensor, ids: Tensor, table: Tensor) -> Tensor:
    before = prompt.to(table.dtype).expand(len(ids), -1, -1)
    return torch.cat([before, embedding(ids, table)], 1)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "prompt_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_torchs_bits_and_an_ordered_sum(
    sizes: tuple[int, ...], dtype: torch.dtype, prompt_dtype: torch.dtype
) -> None:
    prompt, ids, table = make(*sizes, dtype=dtype, prompt_dtype=prompt_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = prompt_embedding(prompt, ids, table)
    assert torch.equal(y, in_torch(prompt, ids, table))
    assert torch.equal(y, prompt_embedding(prompt, ids.int(), table))
    dy = torch.randn(y.shape).to(dtype)
    (grad,) = torch.autograd.grad(y, [prompt], dy)
    assert grad.dtype == prompt_dtype
    total = torch.zeros(prompt.shape, dtype=torch.promote_types(dtype, torch.float32))
    for sequence in dy:
        total += sequence[: len(prompt)]
    assert torch.equal(grad, total.to(prompt_dtype))


def test_strides_do_not_matter() -> None:
    prompt, ids, table = make()
    y = prompt_embedding(prompt, ids, table)
    apart = table.t().contiguous().t()
    assert torch.equal(prompt_embedding(prompt, ids.t().contiguous().t(), apart), y)
    dy = torch.randn(6, 9, 3).permute(2, 1, 0)
    (grad,) = torch.autograd.grad(y, [prompt], dy)
    torch.testing.assert_close(grad, dy[:, :4].sum(0))


def test_compiled_transformed_and_faked_calls_agree() -> None:
    prompt, ids, table = make()
    y = prompt_embedding(prompt, ids, table)
    (grad,) = torch.autograd.grad(y.square().sum(), [prompt])
    compiled = torch.compile(prompt_embedding, backend="aot_eager", fullgraph=True)
    again = compiled(prompt, ids, table)
    assert torch.equal(again, y)
    assert torch.equal(torch.autograd.grad(again.square().sum(), [prompt])[0], grad)

    def loss(prompt: Tensor) -> Tensor:
        return prompt_embedding(prompt, ids, table).square().sum()

    torch.testing.assert_close(torch.func.grad(loss)(prompt), grad)
    assert prompt_embedding(*(u.to("meta") for u in (prompt, ids, table))).shape == y.shape
    op = torch.ops.deltaops.prompt_embedding.default
    torch.library.opcheck(op, (prompt, ids, table, "auto"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p, i, t: (p, i, t[0]), ShapeError, r"table must be \[V, D\]"),
        (lambda p, i, t: (p[:, :3], i, t), ShapeError, r"prompt must be \[P, 6\]"),
        (lambda p, i, t: (p, i[0], t), ShapeError, r"ids must be \[B, T\]"),
        (lambda p, i, t: (p, i.float(), t), DtypeError, "ids must be int64 or int32"),
        (lambda p, i, t: (p, i, t.long()), DtypeError, "table must be floating point"),
        (lambda p, i, t: (p, i.to("meta"), t), DeviceError, "ids must be on the device of table"),
        (lambda p, i, t: (p, i, t.requires_grad_()), GradientError, "table is frozen"),
        (lambda p, i, t: (p, i + 7, t), IndexError, "index out of range"),
    ],
)
def test_errors_say_what_is_wrong(change: object, error: type[Exception], message: str) -> None:
    assert callable(change)
    with pytest.raises(error, match=message):
        prompt_embedding(*change(*make()))


def test_a_named_backend_runs_or_raises() -> None:
    with pytest.raises(NoBackendError, match="has no kernel for prompt_embedding"):
        prompt_embedding(*make(), backend="cpu")
    with pytest.raises(NoBackendError, match="strict"):
        prompt_embedding(*make(), strict=True)
