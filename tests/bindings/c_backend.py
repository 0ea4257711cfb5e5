"""``libdeltaops.so`` through ctypes alone, as a backend for the conformance checks.

The structs are those of tests/csrc/core.py.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltaops.backends import Call, DeltaLinearCall
from deltaops.native import ACTIVATIONS
from deltaops.reference.philox import drop_threshold


def _core() -> Any:
    name = "deltaops_tests_csrc_core"  # as tests/csrc/conftest.py has it
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[1] / "csrc" / "core.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def array(t: Tensor | None) -> Any:
    """The same memory; bfloat16 as its bits. A vector is one row."""
    if t is None:
        return None
    t = t[None] if t.dim() == 1 else t
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype == torch.bfloat16 else t.numpy()


class CBackend:
    """``delta_linear`` alone: every op goes the same way through the same header."""

    name = "c"

    def __init__(self, library: str) -> None:
        self.module = _core()
        self.core = self.module.Core(Path(library))

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, call: Call) -> str | None:
        if not isinstance(call, DeltaLinearCall):
            return f"has no {call.op} here"
        return "has no rows with a branch each here" if call.routed else None

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        a, b, branch_bias, scaling, dropout, activation, seed = rest
        layer = self._layer(x, weight, bias, a, b, branch_bias, scaling, dropout, activation, seed)
        y = x.new_empty((x.shape[0], weight.shape[0]))
        s = torch.empty((x.shape[0], sum(t.shape[0] for t in a)))
        threads = torch.get_num_threads()
        assert self.core.forward(layer, array(y), array(s), threads) == 0, self.core.error()
        return y, s

    def backward(self, grad_y: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
        a, b, s, scaling, dropout, activation, seed, needs = rest
        none = [None] * len(a)
        layer = self._layer(x, weight, None, a, b, none, scaling, dropout, activation, seed)
        shapes = [
            x.shape,
            weight.shape[:1],
            *(t.shape for t in (*a, *b)),
            *(t.shape[:1] for t in a),
        ]
        like = [grad_y, grad_y, *a, *b, *a]
        grads = [
            t.new_empty(shape) if need else None
            for t, shape, need in zip(like, shapes, needs, strict=True)
        ]
        views, n = [array(g) for g in grads], len(a)
        parts = views[2 : 2 + n], views[2 + n : 2 + 2 * n], views[2 + 2 * n :]
        threads = torch.get_num_threads()
        status = self.core.backward(
            layer, array(grad_y), array(s), views[0], views[1], *parts, threads
        )
        assert status == 0, self.core.error()
        return [g for g in grads if g is not None]

    def _layer(self, x: Tensor, weight: Tensor, bias: Tensor | None, *parts: Any) -> Any:
        *tensors, scaling, dropout, activation, seed = parts
        adapters: Sequence[Any] = [
            self.module.Adapter(
                array(a), array(b), s, drop_threshold(p), ACTIVATIONS[act], array(inner)
            )
            for a, b, inner, s, p, act in zip(*tensors, scaling, dropout, activation, strict=True)
        ]
        return self.module.Layer(array(x), array(weight), array(bias), list(adapters), int(seed))
