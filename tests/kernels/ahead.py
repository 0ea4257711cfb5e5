"""The kernels compiled for GPUs that are not here; test_ahead_of_time.py runs this, a process each.

Usage: python ahead.py TARGET [SABOTAGE]        TARGET: sm_90, gfx942, …

The launchers themselves run, on meta tensors: what is compiled is what they would launch, with
their own configurations, signatures and specialization. Prints a JSON list, one entry a kernel.
A new op is one more entry of ``calls``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from deltaops.kernels import configs
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from deltaops.backends.calls import PrefixAttentionCall
from deltaops.backends.triton import (
    TritonBackend,
    core,
    library_attention,
    planner,
    prefix_attention,
)
from deltaops.backends.triton.targets import TARGETS, Target

sys.path.append(str(Path(__file__).parent))  # which -P takes off
import linears_ahead
import rows_ahead

SPILL = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# The metadata of an AMD kernel (LLVM, User Guide for AMDGPU Backend): bytes of scratch memory, and
# vector registers that went there. Scalars that spill go to lanes of vector registers instead.
SCRATCH = re.compile(r"^ *\.(?:private_segment_fixed_size|vgpr_spill_count): *(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Setting:
    """A call of the backend, forward and backward."""

    m: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    adapter: torch.dtype = torch.bfloat16
    dropout: float = 0.0
    n: int = 4096
    k: int = 4096
    conv1d: bool = False
    bias: bool = False
    routed: bool = False
    wanted: str = "xab"
    """Gradients: of x, of each A, of each B."""
    activation: str = "identity"
    """Of parallel adapters, which have an inner bias too."""
    scaling: float = 2.0


HALF, FULL = torch.bfloat16, torch.float32

SETTINGS = (
    # every row of each GEMM table and every count of rank lanes, with the mask: the most registers
    Setting(8, (8,), dropout=0.1),
    Setting(64, (32,), dropout=0.1),
    Setting(512, (64,), dropout=0.1),
    Setting(8192, (16,), dropout=0.1),
    Setting(8192, (128,), dropout=0.1, bias=True),
    # PEFT's default: float32 adapters on a half model
    Setting(8, (16,), HALF, FULL, dropout=0.1),
    Setting(8192, (128,), HALF, FULL, dropout=0.1),
    Setting(8, (16,), FULL, FULL, dropout=0.1),
    Setting(8192, (64,), FULL, FULL, dropout=0.1),
    # few columns: dS and dB come of one pass over dy, with the most lanes
    Setting(512, (64,), dropout=0.1, n=96),
    # nothing divides by 16, and two branches
    Setting(1001, (3, 100), n=1003, k=4001, dropout=0.1, bias=True),
    # parallel adapters, alone and where a batch mixes them; their GEMMs are those of above
    Setting(8192, (16,), dropout=0.1, activation="gelu_tanh"),
    Setting(8, (16,), HALF, FULL, dropout=0.1, routed=True, activation="gelu"),
    # a batch that mixes adapters: its mask beside the most lanes, in both makers of dS
    Setting(512, (64,), dropout=0.1, routed=True),
    Setting(512, (64,), dropout=0.1, n=96, routed=True),
)
# Variations that change no configuration: one architecture shows them.
VARIATIONS = (
    Setting(8192, (16,), torch.float16, torch.float16),
    Setting(8192, (8,), conv1d=True),
    Setting(1001, (3, 100), dropout=0.1),
    Setting(8192, (), bias=True),
)
# The GEMM kernels without their long loop: less than what is compiled above, so some show it.
SPLIT = (SETTINGS[3], SETTINGS[6])
# The persistent GEMMs: every row of their table, with and without a mask and a bias.
PERSISTENT = (Setting(8192, (16,), bias=True), Setting(512, (64,), dropout=0.1))
# Decoding, with S made within each program and beside; nothing aligned, and float32.
DECODE = (
    Setting(8, (16,), bias=True),
    Setting(16, (64,), n=14336),
    Setting(8, (3,), n=1003, k=4001),
    Setting(8, (64,), FULL, FULL),
)
# dB alone, with the most lanes: what spilled on sm_100 with the warps of dS and dB together.
ALONE = Setting(8192, (64,), wanted="b")
# One variant of these says all.
SIMPLE = {"_sum_partials_kernel"}


@dataclass(frozen=True)
class Attention:
    """A call of prefix_attention, forward and backward."""

    d: int
    dtype: torch.dtype = torch.bfloat16
    prefix: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (32, 8)
    length: int = 1024
    causal: bool = True
    masked: bool = False
    scale: float = 0.125
    keys: int = 20
    """Of the prefix."""

    def supported(self) -> bool:
        """Whether the backend takes it."""
        dtypes, lengths = (self.dtype, self.prefix), (self.length, self.length, self.keys)
        call = PrefixAttentionCall(
            "cuda", *dtypes, 2, *self.heads, *lengths, self.d, self.masked, self.causal
        )
        return prefix_attention.unsupported(call) is None


ATTENTIONS = (
    # every row of the tables, the widest head of each; PEFT trains a prefix in float32
    Attention(64),
    Attention(128),
    Attention(256, causal=False),
    Attention(64, HALF, FULL, masked=True),
    Attention(128, HALF, FULL, masked=True),
)
MERGED = (
    # the prefix whole in a program, and walked over
    Attention(128, keys=32),
    Attention(128, keys=100),
    Attention(256, keys=16, causal=False),
    Attention(64, HALF, FULL),
)
# GPUs with 99 KB of shared memory: their own rows of the tables, and the largest of the others.
NARROW = (SETTINGS[0], SETTINGS[3], SETTINGS[4])
NARROW_ATTENTIONS = (Attention(128), Attention(256, causal=False))
# The same rows with other types and strides; not for AMD, whose compiler is the slowest.
MORE_ATTENTIONS = (
    Attention(64, FULL, FULL, masked=True),
    # a mask, and rows that cannot be read in pieces, of the heads with the largest tiles otherwise
    Attention(60, length=1001, heads=(6, 3), masked=True),
    Attention(64, length=1001, heads=(6, 3), masked=True),
    # lanes are empty, and 16 divides the strides; nothing of the one behind it
    Attention(80, HALF, FULL, length=1001, heads=(6, 3), masked=True),
    Attention(100, length=1001, heads=(6, 3), masked=True),
    # rows that cannot be read in pieces beside float32 products
    Attention(100, HALF, FULL, length=1001, heads=(6, 3), masked=True),
    Attention(32, HALF, FULL, masked=True),
)


class Recorder:
    """Stands in for ``JITFunction.run``: compiles what would be launched, each thing once."""

    def __init__(self, target: Target) -> None:
        self.only: str | tuple[str, ...] = ""  # how the names of those begin that are compiled
        if target.amd:
            self.target = GPUTarget("hip", target.name, 64)
        else:
            self.target = GPUTarget("cuda", target.capability, 32)
        self.backend = make_backend(self.target)
        self.binders: dict[JITFunction[Any], Any] = {}
        self.found: dict[str, dict[str, Any]] = {}

    def run(self, fn: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        if fn not in self.binders:
            self.binders[fn] = create_function_from_signature(fn.signature, fn.params, self.backend)
        bound, specialization, options = self.binders[fn](*args, **kwargs)
        options, signature, constexprs, attrs = fn._pack_args(
            self.backend, kwargs, bound, specialization, options
        )
        if not fn.__name__.startswith(self.only):
            return
        key = fn.__name__
        if key in SIMPLE:
            pass
        elif self.target.backend == "hip":
            key += f" {self.configuration(bound)} {options}"
        else:
            key += f" {signature} {constexprs} {attrs} {options}"
        if key not in self.found:
            source = ASTSource(fn, signature, constexprs, attrs)
            self.found[key] = self.compile(source, options, bound)

    def compile(self, source: ASTSource, options: Any, bound: dict[str, Any]) -> dict[str, Any]:
        """What the compiler makes of it."""
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source, target=self.target, options=options.__dict__)
        return self.entry(source.fn.__name__, bound, kernel, log.getvalue())

    @staticmethod
    def configuration(bound: dict[str, Any]) -> str:
        """What is compiled once for AMD, whose compiler is the slowest: tiles and settings, types,
        and whether rows are read in pieces of 16 bytes; not what a number happens to divide by."""
        settings = {k: v for k, v in bound.items() if len(k) > 1 and k.isupper() and k != "RANKS"}
        matrices = [v for v in bound.values() if isinstance(v, Tensor) and v.dim() == 2]
        dtypes = [t.dtype for t in matrices]
        return f"{settings} {dtypes} {configs.is_aligned(*matrices)}"

    def entry(self, name: str, bound: dict[str, Any], kernel: Any, log: str) -> dict[str, Any]:
        tiles = {k: v for k, v in bound.items() if k.startswith("BLOCK_")}
        tensors = [getattr(v, "base", v) for v in bound.values()]  # of a descriptor
        dtype = next(str(t.dtype) for t in tensors if isinstance(t, Tensor))
        found = {
            "kernel": name,
            "tiles": tiles,
            "dtype": dtype,
            "dropout": str(bound.get("DROPOUT")),
            "work": str(bound.get("WORK")),
            "specialise": bound.get("SPECIALISE", False),
            "shared": kernel.metadata.shared,
        }
        return found | (
            self.amd(kernel) if self.target.backend == "hip" else self.nvidia(kernel, log)
        )

    @staticmethod
    def nvidia(kernel: Any, log: str) -> dict[str, Any]:
        spills = SPILL.findall(log)
        # no line about spills would look like no spills
        assert spills, f"{kernel.name}: the assembler did not report spills: {log!r}"
        return {
            "image": len(kernel.asm["cubin"]),
            "spills": sum(int(stores) + int(loads) for stores, loads in spills),
            "matrix_cores": "wgmma.mma_async" in kernel.asm["ptx"],
            "bulk": "cp.async.bulk.tensor" in kernel.asm["ptx"],
            "specialised": "setmaxnreg" in kernel.asm["ptx"],
        }

    @staticmethod
    def amd(kernel: Any) -> dict[str, Any]:
        text = kernel.asm["amdgcn"]
        scratch = SCRATCH.findall(text)
        assert len(scratch) == 2, f"{kernel.name}: the assembler did not report scratch memory"
        return {
            "image": len(kernel.asm["hsaco"]),
            "spills": sum(map(int, scratch)),
            "matrix_cores": "v_mfma_" in text,
        }


def launch(setting: Setting) -> None:
    """Forward and backward of one call, on tensors that have shapes and no memory."""

    def empty(*shape: int, dtype: torch.dtype = setting.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight = empty(setting.m, setting.k), empty(setting.n, setting.k)
    if setting.conv1d:
        weight = empty(setting.k, setting.n).t()
    bias = empty(setting.n) if setting.bias else None
    a = [empty(r, setting.k, dtype=setting.adapter) for r in setting.ranks]
    b = [empty(setting.n, r, dtype=setting.adapter) for r in setting.ranks]
    scaling, dropout = [setting.scaling] * len(a), [setting.dropout] * len(a)
    seed = empty(1, dtype=torch.int64)
    by_row = (empty(setting.m, dtype=torch.int32),) if setting.routed else ()
    run = TritonBackend()
    inner: list[Tensor | None] = [None] * len(a)
    if setting.activation != "identity":
        inner = [empty(r, dtype=setting.adapter) for r in setting.ranks]
    settings = scaling, dropout, [setting.activation] * len(a), seed
    y, s = run.forward(x, weight, bias, a, b, inner, *settings, *by_row)
    of_x, of_a, of_b = (name in setting.wanted for name in "xab")
    needs = [of_x, setting.bias, *[of_a] * len(a), *[of_b] * len(b), *[False] * len(a)]
    run.backward(y, x, weight, a, b, s, *settings, needs, *by_row)


def launch_attention(setting: Attention) -> None:
    """As :func:`launch`."""
    assert setting.supported(), setting
    (heads, h_kv), length = setting.heads, setting.length

    def empty(*shape: int, dtype: torch.dtype = setting.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    q = empty(2, length, heads, setting.d).transpose(1, 2)
    k, v = (empty(2, length, h_kv, setting.d).transpose(1, 2) for _ in range(2))
    prefix = [empty(h_kv, setting.keys, setting.d, dtype=setting.prefix) for _ in range(2)]
    mask = None
    if setting.masked:
        mask = empty(2, 1, length, length, dtype=torch.bool).expand(-1, heads, -1, -1)
    run, rest = TritonBackend(), (mask, setting.scale, setting.causal)
    y, lse = run.prefix_attention_forward(q, k, v, *prefix, *rest)
    run.prefix_attention_backward(y, q, k, v, *prefix, y, lse, *rest, [True] * 5)


def launch_merged(setting: Attention) -> None:
    """As :func:`launch_attention`, the prefix merged into torch's attention."""
    with library_attention.forced(library_attention.FLASH):
        launch_attention(setting)


def calls(target: Target) -> Iterator[Callable[[], None]]:
    """All calls whose configurations are compiled."""
    if target.name == "sm_89":
        yield from (partial(launch, setting) for setting in NARROW)
        yield from (partial(launch_attention, attention) for attention in NARROW_ATTENTIONS)
        yield from rows_ahead.NARROW
        yield from linears_ahead.NARROW
        return
    for setting in SETTINGS + (VARIATIONS if target.name == "sm_90" else ()):
        yield partial(launch, setting)
    for attention in ATTENTIONS + (() if target.amd else MORE_ATTENTIONS):
        yield partial(launch_attention, attention)
    for attention in MERGED if target.name == "sm_90" else ():
        yield partial(launch_merged, attention)
    yield from rows_ahead.calls(target)
    yield from linears_ahead.calls(target)


@contextlib.contextmanager
def compiling(recorder: Recorder, target: Target, plan: str) -> Iterator[None]:
    """Launches go to the recorder, and the backend takes the target for the device."""
    run, back = JITFunction.run, "fused" if plan == "decode" else plan
    plan = "persistent" if plan == "beside" else plan  # of y that would be of the CUDA library
    JITFunction.run = lambda fn, *args, **kwargs: recorder.run(fn, *args, **kwargs)
    try:
        with core.standing_in(target), planner.forced(plan, back):
            yield
    finally:
        JITFunction.run = run


def sabotage(how: str, amd: bool) -> None:
    """Make the large GEMM tile one that a gate must refuse, by registers, stages or warps."""
    name = "_GEMM_AMD" if amd else "_GEMM_WGMMA"
    rows = getattr(configs, name)
    bound, good = rows[-1]
    change = {
        "registers": {"warps": 1 if amd else 4},
        "stages": {"stages": 8},
        # two warps are half of what a wgmma takes
        "warps": {"rows": 64, "cols": 64, "warps": 2},
    }[how]
    setattr(configs, name, (*rows[:-1], (bound, dataclasses.replace(good, **change))))


def main(name: str, how: str | None = None) -> None:
    knobs.nvidia.dump_ptxas_log = True
    target = TARGETS[name]
    recorder = Recorder(target)
    if how is not None:  # it is of one configuration, so one call shows it
        sabotage(how, target.amd)
        recorder.only = "_forward_kernel"
        with compiling(recorder, target, "fused"):
            launch(Setting(8192, (16,)))
    else:
        with compiling(recorder, target, "fused"):
            for call in calls(target):
                call()
        if name == "sm_90":
            with compiling(recorder, target, "split"):
                for setting in SPLIT:
                    launch(setting)
        if name in ("sm_90", "gfx942"):
            recorder.only = "_decode"
            with compiling(recorder, target, "decode"):
                for setting in DECODE:
                    launch(setting)
        if target.capability in configs.PERSISTENT and not target.amd:
            recorder.only = "_grad_up"
            with compiling(recorder, target, "fused"):
                launch(ALONE)
            recorder.only = "_persistent"
            with compiling(recorder, target, "persistent"):
                for setting in PERSISTENT:
                    launch(setting)
        if name == "sm_90":
            recorder.only = "_beside"
            with compiling(recorder, target, "persistent"), planner.forced("persistent", "beside"):
                for rank in (16, 64, 128):
                    launch(Setting(4096, (rank,)))
    print(json.dumps(list(recorder.found.values())))


if __name__ == "__main__":
    main(*sys.argv[1:])
