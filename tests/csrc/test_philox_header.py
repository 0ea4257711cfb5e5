"""csrc/include/philox.h, compiled by the host compiler, makes the published Philox stream."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"

# Random123's kat_vectors, "philox4x32 7": counter, key, output.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "5f6fb709 0d893f64 4f121f81 4f730a48",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "5207ddc2 45165e59 4d8ee751 8c52f662",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "4dfccaba 190a87f0 c47362ba b6b5242a",
    ),
]

PROGRAM = r"""
#include <cstdio>
#include <cinttypes>
#include "philox.h"
int main() {
  char what;
  while (scanf(" %c", &what) == 1) {
    if (what == 'b') {
      uint32_t c[4]; uint64_t seed;
      if (scanf("%x %x %x %x %" SCNu64, c, c + 1, c + 2, c + 3, &seed) != 5) return 1;
      deltaops_philox(c, seed);
      printf("%08x %08x %08x %08x\n", c[0], c[1], c[2], c[3]);
    } else {
      int64_t k, m; uint32_t stream; uint64_t seed;
      if (scanf("%" SCNd64 "%" SCNd64 "%" SCNu32 "%" SCNu64, &k, &m, &stream, &seed) != 4) return 1;
      printf("%u\n", deltaops_draw(k, m, stream, seed));
    }
  }
}
"""


def blocks(counter: np.ndarray, seed: int) -> np.ndarray:
    """Philox4x32-7 of each column of ``counter`` [4, n], from the paper's round function."""
    low = np.uint64(0xFFFFFFFF)
    c = counter.astype(np.uint64)
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        left, right = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        k0, k1 = np.uint64(key[0]), np.uint64(key[1])
        c = np.stack(
            [
                (right >> np.uint64(32)) ^ c[1] ^ k0,
                right & low,
                (left >> np.uint64(32)) ^ c[3] ^ k1,
                left & low,
            ]
        )
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler here: {compiler[0]}")
    folder = tmp_path_factory.mktemp("philox")
    source, target = folder / "philox.cpp", folder / "philox"
    source.write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{INCLUDE}"]
    subprocess.run([*compiler, *flags, str(source), "-o", str(target)], check=True)
    return target


def answers(program: Path, questions: list[str]) -> list[str]:
    run = subprocess.run(
        [program], input="\n".join(questions), capture_output=True, text=True, check=True
    )
    return run.stdout.splitlines()


def seed_of(key: str) -> int:
    low, high = (int(word, 16) for word in key.split())
    return low | high << 32


def test_header_gives_the_published_vectors(program: Path) -> None:
    asked = [f"b {counter} {seed_of(key)}" for counter, key, _ in KNOWN]
    assert answers(program, asked) == [output for _, _, output in KNOWN]


def test_independent_numpy_gives_the_published_vectors() -> None:
    for counter, key, output in KNOWN:
        words = np.array([[int(word, 16)] for word in counter.split()], dtype=np.uint64)
        assert " ".join(f"{int(w):08x}" for w in blocks(words, seed_of(key))[:, 0]) == output


def test_draws_are_where_the_header_says(program: Path) -> None:
    """Words, halves and the row's upper 32 bits, against numpy."""
    rng = np.random.default_rng(0)
    k = np.concatenate([np.arange(17), rng.integers(0, 2**35, 200)])
    m = np.concatenate([np.full(17, 3), rng.integers(0, 2**40, 200)])
    stream, seed = 5, 0xFEDCBA9876543210
    counter = np.stack([k >> 3, m & 0xFFFFFFFF, m >> 32, np.full_like(k, stream)])
    words = blocks(counter, seed)[(k & 7) >> 1, np.arange(k.size)]
    expected = (words >> (16 * (k & 1)).astype(np.uint64)) & np.uint64(0xFFFF)
    asked = [f"d {a} {b} {stream} {seed}" for a, b in zip(k, m, strict=True)]
    assert [int(line) for line in answers(program, asked)] == expected.tolist()
