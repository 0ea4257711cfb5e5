"""Run by test_interpreted.py in a process of its own: the kernels in Triton's interpreter.

Usage: TRITON_INTERPRET=1 python interpreted.py CASE_NUMBER prefix:CASE_NUMBER … rows:SHARE/SHARES
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import triton.runtime.interpreter as interpreter

from deltaops.backends.triton import TritonBackend
from deltaops.reference import delta_linear as reference
from deltaops.reference import prefix_attention as prefix_reference
from deltaops.reference.philox import draws
from deltaops.testing import DELTA_LINEAR_CASES, PREFIX_ATTENTION_CASES, assert_accurate

sys.path.append(str(Path(__file__).parent))  # which -P takes off
import rows


def mend_interpreter() -> None:
    """NumPy ≥ 2.4 refuses int() of Triton's one-element arrays, which `range` in a kernel needs.

    And a function that a kernel calls replaces Triton's language once more, each time: a launch has
    done so for what kernels see of it, and once is enough for what Triton's own functions see.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    known: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in known:
            interpreter._patch_lang(self.fn)
            known.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


def check_case(number: int) -> None:
    """Forward and every gradient against float64, twice, into poisoned memory."""
    case, run = DELTA_LINEAR_CASES[number], TritonBackend()
    t = case.tensors(torch.float32)
    wide, grad_y = t.to(torch.float64), case.grad_y(torch.float32)
    needs = t.all_needed()
    y64, s64 = reference.forward(*wide.forward_arguments())
    y32, s32 = reference.forward(*t.forward_arguments())
    oracle = [
        y64,
        s64,
        *reference.backward(*wide.backward_arguments(grad_y.double(), s64), needs),
    ]
    baseline = [y32, s32, *reference.backward(*t.backward_arguments(grad_y, s32), needs)]
    results = []
    for _ in range(2):
        y, s = run.forward(*t.forward_arguments())
        results.append([y, s, *run.backward(*t.backward_arguments(grad_y, s), needs)])
    for i, (got, again, want, low) in enumerate(zip(*results, oracle, baseline, strict=True)):
        assert_accurate(got, want, low, f"{case}: result {i}")
        assert torch.equal(got, again), f"{case}: result {i} changed its bits"


def check_prefix_attention(number: int) -> None:
    """As :func:`check_case`, of the other table."""
    case, run = PREFIX_ATTENTION_CASES[number], TritonBackend()
    t, grad_y = case.tensors(torch.float32), case.grad_y(torch.float32)

    def results(forward: Any, backward: Any, t: Any, grad_y: torch.Tensor) -> list[torch.Tensor]:
        y, lse = forward(*t.forward_arguments())
        *grads, of_k, of_v = backward(*t.backward_arguments(grad_y, y, lse), [True] * 5)
        # exp: a query that sees nothing has an infinite lse. Both together: the gradient of a
        # single key is so few numbers that their error is luck
        return [y, torch.exp(-lse), *grads, torch.cat([of_k, of_v])]

    kernels = run.prefix_attention_forward, run.prefix_attention_backward
    plain = prefix_reference.forward, prefix_reference.backward
    found, again = results(*kernels, t, grad_y), results(*kernels, t, grad_y)
    oracle = results(*plain, t.to(torch.float64), grad_y.double())
    for i, (got, same, want, low) in enumerate(
        zip(found, again, oracle, results(*plain, t, grad_y), strict=True)
    ):
        assert_accurate(got, want, low, f"{case}: result {i}")
        assert torch.equal(got, same), f"{case}: result {i} changed its bits"


def check_mask() -> None:
    """The mask is that of the reference, element by element."""
    from deltaops.kernels.dropout import dropout_mask

    seed = torch.tensor([-0x1234_5678_9ABC_DEF0])
    for stream in (0, 3):
        got = dropout_mask(37, 101, seed, stream, 20_000)
        assert torch.equal(got.bool(), draws(37, 101, seed, stream) >= 20_000)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before Triton is imported"
    torch.set_num_threads(1)
    mend_interpreter()
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    torch.empty = poisoned
    check_mask()
    for argument in sys.argv[1:]:
        kind, _, number = argument.rpartition(":")
        if kind == "rows":
            rows.check_share(number)
        else:
            (check_prefix_attention if kind else check_case)(int(number))
