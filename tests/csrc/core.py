"""The native core built from ``csrc`` with g++, and its C ABI through ctypes and numpy alone.

``native`` has every instruction set as it ships; ``emulated`` compiles the 64-byte bodies for AVX2,
so that their logic is tested on a CPU without AVX-512 (``csrc/cpu/flags.json``). That is logic
alone: at -O1, since -O3 would take three times as long to compile sixty-four bytes out of two
halves.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from ctypes import POINTER, c_char_p, c_float, c_int32, c_int64, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
FLAGS = json.loads((CPU / "flags.json").read_text(encoding="utf-8"))
F32, BF16 = 0, 1
ENVIRONMENT = dict(os.environ)  # what tests change of it does not reach the compilers
SHIPPED = """
from buildtools import recipe, toolchain
for unit in recipe.cpu_units(toolchain.find_compiler()):
    print(unit.source.name, unit.object(recipe.ROOT / "build" / "objects"), sep="\\t")
"""


def compiler() -> str | None:
    """g++, or None where there is none."""
    return shutil.which("g++")


def shipped_objects() -> dict[str, Path]:
    """Source -> its object, where setup.py has compiled that very source for this checkout."""
    ours = ENVIRONMENT | {"CXX": "g++"}  # objects of two compilers may want two OpenMPs
    run = subprocess.run([sys.executable, "-c", SHIPPED], cwd=ROOT, env=ours,
                         check=True, capture_output=True, text=True)  # fmt: skip
    found = dict(line.split("\t") for line in run.stdout.splitlines())
    return {name: Path(path) for name, path in found.items() if Path(path).exists()}


def compile_objects(folder: Path, native: list[Path] | None = None) -> list[Path]:
    """Compiles every file of flags.json for x86-64 into ``folder``.

    With the objects of a native build, makes the emulated one: what it changes is compiled again.
    """
    special = FLAGS["emulated"]["files"] if native else {}
    common = list(FLAGS["common"])
    if native:
        common = ["-O1" if flag == "-O3" else flag for flag in common]
        common += FLAGS["emulated"]["common"]
    changed = {*special, "dispatch.cpp"}
    kept = {path.name: path for path in native or []}
    shipped = {} if native else shipped_objects()

    def one(name: str) -> Path:
        if native and name not in changed:
            return kept[f"{name}.o"]
        out = folder / f"{name}.o"
        if name in shipped:
            shutil.copy2(shipped[name], out)
            return out
        flags = special.get(name, FLAGS["files"][name])
        includes = [f"-I{CPU / path}" for path in FLAGS["include"]]
        command = ["g++", *common, *flags, *includes]
        command += ["-c", str(CPU / name), "-o", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, env=ENVIRONMENT)
        return out

    with ThreadPool(2) as pool:
        return pool.map(one, FLAGS["machines"]["x86_64"], chunksize=1)


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("rows", "cols", "row_stride", "col_stride")),
        ("dtype", c_int32),
        ("reserved", c_int32),
    ]


class Branch(ctypes.Structure):
    _fields_ = [
        ("a", Matrix),
        ("b", Matrix),
        ("bias", Matrix),
        ("scaling", c_float),
        *((name, c_uint32) for name in ("drop_threshold", "stream")),
        ("activation", c_int32),
    ]


class Forward(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("num_threads", c_int32),
        *((name, Matrix) for name in ("x", "weight", "bias", "y", "s")),
        ("branches", POINTER(Branch)),
        ("num_branches", c_int32),
        ("reserved", c_int32),
        ("seed", c_uint64),
        ("packed_weight", c_void_p),
        ("packed_bytes", c_int64),
        ("adapter", c_void_p),
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32),
        ("num_threads", c_int32),
        *((name, Matrix) for name in ("grad_y", "x", "weight", "s")),
        ("branches", POINTER(Branch)),
        ("num_branches", c_int32),
        ("reserved", c_int32),
        ("seed", c_uint64),
        ("grad_x", Matrix),
        ("grad_bias", Matrix),
        ("grad_a", POINTER(Matrix)),
        ("grad_b", POINTER(Matrix)),
        ("grad_branch_bias", POINTER(Matrix)),
        ("packed_weight", c_void_p),
        ("packed_bytes", c_int64),
        ("adapter", c_void_p),
    ]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 bits, to nearest even."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def to_f64(x: np.ndarray) -> np.ndarray:
    """float32, or bfloat16 bits, to float64."""
    if x.dtype == np.uint16:
        x = (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)


def matrix(x: np.ndarray | None) -> Matrix:
    """A view of a 2-D array of float32 or of bfloat16 bits; absent for None."""
    if x is None:
        return Matrix()
    rows, cols = x.shape
    strides = (s // x.itemsize for s in x.strides)
    return Matrix(x.ctypes.data, rows, cols, *strides, BF16 if x.dtype == np.uint16 else F32, 0)


class Adapter(NamedTuple):
    """One branch."""

    a: np.ndarray
    b: np.ndarray
    scaling: float
    threshold: int
    activation: int = 0
    bias: np.ndarray | None = None


@dataclass
class Layer:
    """Arrays of one call."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    adapters: list[Adapter]
    seed: int = 0x1234_5678_9ABC_DEF0

    def branches(self) -> ctypes.Array[Branch]:
        """The branches as the ABI takes them; stream = the branch's number."""
        return (Branch * max(1, len(self.adapters)))(
            *(
                Branch(
                    matrix(d.a),
                    matrix(d.b),
                    matrix(d.bias),
                    d.scaling,
                    d.threshold,
                    i,
                    d.activation,
                )
                for i, d in enumerate(self.adapters)
            )
        )


class Core:
    """The library, with its functions typed."""

    def __init__(self, path: Path) -> None:
        self.lib = ctypes.CDLL(str(path))
        self.lib.deltaops_last_error.restype = c_char_p
        self.lib.deltaops_cpu_isa.restype = c_char_p
        self.lib.deltaops_cpu_isa_name.restype = c_char_p

    def error(self) -> str:
        return self.lib.deltaops_last_error().decode()

    def isas(self) -> list[tuple[str, bool]]:
        names = [
            self.lib.deltaops_cpu_isa_name(i) for i in range(self.lib.deltaops_cpu_isa_count())
        ]
        return [(n.decode(), bool(self.lib.deltaops_cpu_isa_runs(n))) for n in names]

    def set_isa(self, name: str) -> int:
        return self.lib.deltaops_cpu_set_isa(name.encode())

    def mask(self, m: int, k: int, seed: int, stream: int, threshold: int) -> np.ndarray:
        keep = np.full((m, k), 7, np.uint8)
        args = (c_int64(m), c_int64(k), c_uint64(seed), c_uint32(stream), c_uint32(threshold))
        assert self.lib.deltaops_cpu_dropout_mask(c_void_p(keep.ctypes.data), *args) == 0
        return keep

    def pack(self, weight: np.ndarray, threads: int = 2) -> np.ndarray:
        """The packed weight, NaN-poisoned before."""
        size, view = c_int64(), matrix(weight)
        assert self.lib.deltaops_cpu_packed_bytes(ctypes.byref(view), ctypes.byref(size)) == 0
        packed = np.full(size.value, 0xFF, np.uint8)
        status = self.lib.deltaops_cpu_pack_weight(
            ctypes.byref(view), c_void_p(packed.ctypes.data), size, c_int32(threads)
        )
        assert status == 0, self.error()
        return packed

    def forward(
        self,
        layer: Layer,
        y: np.ndarray,
        s: np.ndarray | None,
        threads: int = 2,
        changes: dict[str, object] | None = None,
    ) -> int:
        branches = layer.branches()
        args = Forward(
            ctypes.sizeof(Forward), threads, matrix(layer.x), matrix(layer.weight),
            matrix(layer.bias), matrix(y), matrix(s), branches, len(layer.adapters), 0, layer.seed,
        )  # fmt: skip
        for name, value in (changes or {}).items():
            setattr(args, name, value)
        return self.lib.deltaops_cpu_delta_linear_forward(ctypes.byref(args))

    def backward(
        self,
        layer: Layer,
        grad_y: np.ndarray,
        s: np.ndarray | None,
        grad_x: np.ndarray | None,
        grad_bias: np.ndarray | None,
        grad_a: list[np.ndarray | None],
        grad_b: list[np.ndarray | None],
        grad_branch_bias: list[np.ndarray | None] | None = None,
        threads: int = 2,
        changes: dict[str, object] | None = None,
    ) -> int:
        branches, count = layer.branches(), len(layer.adapters)
        lists = [
            (Matrix * max(1, count))(*map(matrix, grads))
            for grads in (grad_a, grad_b, grad_branch_bias or [])
        ]
        args = Backward(
            ctypes.sizeof(Backward), threads, matrix(grad_y), matrix(layer.x),
            matrix(layer.weight), matrix(s), branches, count, 0, layer.seed, matrix(grad_x),
            matrix(grad_bias), *lists,
        )  # fmt: skip
        for name, value in (changes or {}).items():
            setattr(args, name, value)
        return self.lib.deltaops_cpu_delta_linear_backward(ctypes.byref(args))


def philox_keep(m: int, k: int, seed: int, stream: int, threshold: int) -> np.ndarray:
    """csrc/include/philox.h once more, in numpy: the keep mask [m, k]."""
    groups = -(-k // 8)
    c = [
        np.broadcast_to(np.arange(groups, dtype=np.uint64), (m, groups)),
        np.broadcast_to(np.arange(m, dtype=np.uint64)[:, None], (m, groups)),
        np.zeros((m, groups), np.uint64),
        np.full((m, groups), stream, np.uint64),
    ]
    low, key = np.uint64(0xFFFFFFFF), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [
            (p1 >> shift) ^ c[1] ^ np.uint64(key[0]),
            p1 & low,
            (p0 >> shift) ^ c[3] ^ np.uint64(key[1]),
            p0 & low,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    draws = np.stack([w >> np.uint64(h) & np.uint64(0xFFFF) for w in c for h in (0, 16)], -1)
    return (draws.reshape(m, 8 * groups)[:, :k] >= threshold).astype(np.uint8)
