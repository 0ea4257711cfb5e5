"""The CUDA library's GEMMs, hand-written: the plans ``cuda`` and ``ampere`` of :mod:`planner`.

``cuda`` takes what the persistent kernels take, of Hopper alone (csrc/cuda/hopper/gemm.h);
``ampere`` takes rows whose elements lie side by side, of any GPU from sm_80 on
(csrc/cuda/ampere/gemm.h, and of at most 16 rows gemv.h). S and dS are rounded to the model's dtype
by a kernel of torch, but for :func:`outputs_and_s`, which :mod:`beside` calls. They run only where
a table of :mod:`tables` has them fastest, or where they are forced.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaops.reference.philox import drop_threshold

from . import core

PLANS = ("cuda", "ampere")
HOPPER = "90a"
"""As the library names the architecture of the products of ``cuda``: no other runs them."""
AMPERE = 80
"""The oldest architecture of those of ``ampere``, as in sm_80."""
ABI_VERSION = 5
"""DELTAOPS_CUDA_ABI_VERSION of csrc/include/deltaops_cuda.h."""
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
"""deltaops_dtype of csrc/include/deltaops.h."""

Product = tuple[Tensor, Tensor, float]
"""left [M, L], right [N, L], and the dropout whose mask and scale it gets."""


def native() -> ModuleType | str:
    """The compiled module ``deltaops._cuda``, or why it cannot be used, in words."""
    try:
        module = importlib.import_module("deltaops._cuda")
    except ImportError as error:
        return (
            f"deltaops._cuda could not be imported ({error}); "
            "reinstall deltaops with nvcc on the PATH and DELTAOPS_CUDA=1"
        )
    if (found := module.abi_version()) != ABI_VERSION:
        return (
            f"deltaops._cuda is of another build (version {found} of its C ABI, not "
            f"{ABI_VERSION}); reinstall deltaops"
        )
    return module


def state() -> str:
    """What is built and when it is used, in words."""
    module = native()
    if isinstance(module, str):
        return module
    built = f"built for sm_{module.archs().replace(';', ', sm_')}"
    rest = "where `deltaops tune-kernels` found them fastest"
    if missing := _missing(module):
        return f"{built}; its products for sm_80 and later run {rest}; {missing}"
    return f"{built}; its products run {rest}"


def _missing(module: ModuleType) -> str | None:
    if HOPPER in module.archs().split(";"):
        return None
    return f"without sm_{HOPPER} it has none for Hopper; set DELTAOPS_CUDA_ARCHS and rebuild"


def runs_on(device: torch.device | str, plan: str) -> bool:
    """Whether the products of ``plan`` run there: the library was built for that GPU."""
    if core.standing_in_for() is not None:
        return False
    found = torch.device(device)
    if found.type != "cuda" or torch.version.hip is not None:
        return False
    major, minor = torch.cuda.get_device_capability(found)
    return _has(plan, 10 * major + minor)


@cache
def _has(plan: str, capability: int) -> bool:
    module = native()
    return not isinstance(module, str) and compiled_for(plan, capability, module.archs())


def compiled_for(plan: str, capability: int, archs: str) -> bool:
    """Whether a library of ``archs``, as in "80;90a;100", has ``plan`` for a GPU of ``capability``,
    as in 89: machine code for it, or PTX of an older one, which "90a" is for none."""
    built = archs.split(";")
    if plan == "cuda":
        return capability == int(HOPPER[:-1]) and HOPPER in built
    if capability < AMPERE:
        return False
    older = any(arch.isdecimal() and int(arch) <= capability for arch in built)
    return older or f"{capability}a" in built


def takes(*matrices: Tensor) -> bool:
    """Whether ``ampere`` takes these: of one half type, with the elements of a row side by side."""
    return all(
        t.dtype in DTYPES
        and t.dtype == matrices[0].dtype
        and t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.shape[1]
        for t in matrices
    )


def outputs(
    plan: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, s: Tensor, b: Tensor
) -> None:
    """Write ``y [M, N] = x Wᵀ + S Bᵀ + bias`` by ``plan``; S ``[M, R]`` in fp32."""
    _gemm(plan, y, bias, [(x, weight, 0.0), (s.to(x.dtype), b, 0.0)], None)


def outputs_and_s(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
) -> Tensor:
    """Write y by the plan ``cuda``, and make S ``[M, R]`` in fp32 in the same launch."""
    module, (device, stream) = _module(), _place(y)
    s = torch.empty((x.shape[0], a.shape[0]), dtype=torch.float32, device=y.device)
    narrow = torch.empty_like(s, dtype=x.dtype)
    size = module.hopper_project_gemm_workspace(x.shape[0])
    workspace = torch.empty(size, dtype=torch.uint8, device=y.device)
    given = None if bias is None else _view(bias.unsqueeze(0))
    module.hopper_project_gemm(
        device, DTYPES[x.dtype], (*map(_view, (x, weight, a, b)), given),
        _view(s), _view(narrow), _view(y), scaling, 0, workspace.data_ptr(), size, stream,
    )  # fmt: skip
    return s


def grad_input(
    plan: str,
    grad_x: Tensor,
    grad_y: Tensor,
    weight: Tensor,
    grad_s: Tensor,
    a: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Write ``grad_x [M, K] = dy W + mask ⊙ (dS A)`` by ``plan``; dS ``[M, R]`` in fp32."""
    narrow = grad_s.to(grad_y.dtype)
    _gemm(plan, grad_x, None, [(grad_y, weight.t(), 0.0), (narrow, a.t(), dropout)], seed)


def outputs_of_group(
    y: Sequence[Tensor],
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    s: Sequence[Tensor],
    b: Sequence[Tensor],
) -> None:
    """Write the y of several layers of one branch each, by the plan ``cuda``, in one launch."""
    rank_parts = [(one.to(x.dtype), up, 0.0) for one, up in zip(s, b, strict=True)]
    products = [[(x, w, 0.0), part] for w, part in zip(weight, rank_parts, strict=True)]
    _hopper(list(zip(y, bias, products, strict=True)), None)


def grad_input_of_group(
    grad_x: Tensor,
    grad_y: Sequence[Tensor],
    weight: Sequence[Tensor],
    grad_s: Sequence[Tensor],
    a: Sequence[Tensor],
    multiprocessors: int = 0,
) -> None:
    """Write ``grad_x = Σ dy W + Σ dS A`` of such layers, by the plan ``cuda``, in one accumulator,
    on so many ``multiprocessors``, 0: all; no dropout."""
    frozen = [(dy, w.t(), 0.0) for dy, w in zip(grad_y, weight, strict=True)]
    rank_parts = [(ds.to(grad_x.dtype), t.t(), 0.0) for ds, t in zip(grad_s, a, strict=True)]
    _hopper([(grad_x, None, [*frozen, *rank_parts])], None, multiprocessors)


class Down(NamedTuple):
    """A branch whose ``S [M, R] = scaling * drop(y) Aᵀ`` is made with y."""

    a: Tensor
    s: Tensor
    """Written, fp32."""
    scaling: float
    dropout: float
    stream: int
    seed: Tensor | None

    def described(self) -> tuple[Any, ...]:
        """For the library."""
        drawn = self.dropout > 0.0 and self.seed is not None
        return (
            _view(self.a), _view(self.s), self.scaling, drop_threshold(self.dropout), self.stream,
            self.seed.data_ptr() if drawn and self.seed is not None else 0,
        )  # fmt: skip


def rms_norm_and_s(
    y: Tensor, rstd: Tensor, x: Tensor, gamma: Tensor | None, eps: float, downs: Sequence[Down]
) -> None:
    """Write ``y [M, K]`` and ``rstd [M, 1]`` of an RMSNorm, and S of each of ``downs``."""
    module, (device, stream) = _module(), _place(y)
    given = None if gamma is None else _view(gamma.unsqueeze(0))
    branches = [down.described() for down in downs]
    module.rms_norm_project(
        device, DTYPES[y.dtype], _view(x), given, _view(y), _view(rstd), eps, branches, stream
    )


def swiglu_and_s(y: Tensor, gate: Tensor, up: Tensor, downs: Sequence[Down]) -> None:
    """Write ``y [M, K] = silu(gate) * up``, and S of each of ``downs``."""
    module, (device, stream) = _module(), _place(y)
    branches = [down.described() for down in downs]
    module.swiglu_project(
        device, DTYPES[y.dtype], _view(gate), _view(up), _view(y), branches, stream
    )


Output = tuple[Tensor, "Tensor | None", list[Product]]
"""out, a bias, and what is summed."""


def _gemm(
    plan: str, out: Tensor, bias: Tensor | None, products: list[Product], seed: Tensor | None
) -> None:
    if plan == "cuda":
        _hopper([(out, bias, products)], seed)
        return
    module, (device, stream) = _module(), _place(out)
    pointer = 0 if seed is None else seed.data_ptr()
    module.ampere_gemm(device, DTYPES[out.dtype], _described(out, bias, products), pointer, stream)


def _hopper(outputs: Sequence[Output], seed: Tensor | None, multiprocessors: int = 0) -> None:
    """One launch on so many ``multiprocessors``, 0: all; all outputs have the same rows."""
    out = outputs[0][0]
    module, (device, stream) = _module(), _place(out)
    wanted = [_described(*one) for one in outputs]
    pointer = 0 if seed is None else seed.data_ptr()
    module.hopper_gemm(device, DTYPES[out.dtype], wanted, pointer, stream, multiprocessors)


def _module() -> ModuleType:
    module = native()
    assert not isinstance(module, str)  # planned for where it is there
    return module


def _described(out: Tensor, bias: Tensor | None, products: list[Product]) -> tuple[Any, ...]:
    terms = [
        (_view(left), _view(right), drop_threshold(dropout)) for left, right, dropout in products
    ]
    return _view(out), None if bias is None else _view(bias.unsqueeze(0)), terms


def _place(t: Tensor) -> tuple[int, int]:
    """Number and current stream of its GPU."""
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def _view(t: Tensor) -> tuple[Any, ...]:
    return (t.data_ptr(), *t.shape, *t.stride())
