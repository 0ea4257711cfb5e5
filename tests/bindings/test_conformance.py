"""The same cases through torch, NumPy, JAX and C: one native core, so the same bits.

Torch's results are held to the float64 reference in tests/backends, which the others inherit by
their bits; the shipped checks, with their own tolerances, run here on a few cases each.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops.backends import registered
from deltaops.testing import conformance
from deltaops.testing.on_numpy import NumpyBackend

from .c_backend import CBackend

LARGE = 2_000_000
"""Multiply-adds: beyond, a case says nothing about a binding."""


def jax_backend() -> Any:
    pytest.importorskip("jax")
    if importlib.util.find_spec("deltaops._xla") is None:
        pytest.skip("deltaops was built without jax")
    from deltaops.testing.on_jax import JaxBackend

    return JaxBackend()


MAKERS = {
    "numpy": NumpyBackend,
    "jax": jax_backend,
    "c": lambda: CBackend(deltaops.get_include(), deltaops.get_library()),
}


def work(check: conformance.Check) -> int:
    sizes = [getattr(check.case, name, 1) for name in ("m", "n", "k", "r")]
    return int(torch.tensor(sizes).prod())


SMALL = [
    check
    for check in conformance.checks()
    if work(check) < LARGE and check.dtypes != "bf16-f32parameters"
]
EVERY = {"numpy": 5, "jax": 13, "c": 5}
"""Of the small cases, which go to whom: each one that JAX gets is compiled."""
SAMPLE = SMALL[::37]


def accepted(check: conformance.Check, backend: Any) -> Any:
    reason = backend.unavailable() or check.refused(backend)
    if reason:
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("op", conformance.METHODS)
def test_results_have_the_bits_of_torch(op: str, name: str) -> None:
    backend = MAKERS[name]()
    compared = 0
    for check in [check for check in SMALL if check.op == op][:: EVERY[name]]:
        if check.refused(backend):
            continue
        expected, got = check.results(registered()["cpu"]), check.results(backend)
        assert list(got) == list(expected)
        for key, want in expected.items():
            assert got[key].dtype == want.dtype, (check, key)
            assert torch.equal(got[key], want), (check, key)
        compared += 1
    assert compared > 0


@pytest.mark.parametrize("name", ["torch", *MAKERS])
@pytest.mark.parametrize("check", SAMPLE, ids=str)
def test_the_shipped_checks_pass(check: conformance.Check, name: str) -> None:
    backend = registered()["cpu"] if name == "torch" else MAKERS[name]()
    check.run(accepted(check, backend))


class _Wrong:
    """The native core, and one result a little off."""

    def __getattr__(self, name: str) -> Any:
        return getattr(registered()["cpu"], name)

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        y, s = registered()["cpu"].forward(*arguments)
        return y * 1.001, s


class _Careless(_Wrong):
    """One that writes into its input."""

    def forward(self, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        found = registered()["cpu"].forward(x, *arguments)
        x += 1
        return found


@pytest.mark.parametrize(
    ("backend", "message"),
    [(_Wrong(), "y: relative error"), (_Careless(), "x was changed")],
    ids=str,
)
def test_the_checks_can_fail(backend: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        conformance.checks(["delta_linear"])[0].run(backend)
