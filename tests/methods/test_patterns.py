"""Patterns of ranks and alphas, against PEFT's own rule."""

from __future__ import annotations

import itertools

import pytest

from deltaops.methods.patterns import first

KEYS = (
    "0",
    r"1\.0",
    "1.0",
    "proj",
    "q_proj",
    "a.q_proj",
    r"a\.q_proj",
    r"[qk]_proj",
    "a.*",
    "layers",
)
PATHS = ("0", "1.0", "1x0", "10", "a.q_proj", "b.a.q_proj", "aq_proj", "q_proj.0", "", "layers.1.0")


def test_the_first_that_matches_counts_as_in_peft() -> None:
    other = pytest.importorskip("peft.utils.other")
    for keys in itertools.permutations(KEYS, 2):
        pattern = tuple((key, at) for at, key in enumerate(keys))
        for path in PATHS:
            key = other.get_pattern_key(keys, path)  # the path itself where none matches
            assert first(pattern, path, -1) == dict(pattern).get(key, -1), (keys, path)
