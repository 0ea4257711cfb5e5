"""What is seen of a program that turns queries and keys and attends."""

# ruff: noqa: F821  # the globals of programs that are read, and never run

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from deltaops.modules.handed import given_cache, hands_over


class Plain:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k, v = self.q(x), self.k(x), self.v(x)
        q, k = rotate(q, k, self.cos, self.sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, v, None, scaling=self.scale)


class Scales:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        q = q * self.scale
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, self.v(x), None)


class Shows:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, self.v(x), None), k


class AnotherAttends:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        function = eager
        if self.fast:
            function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, self.v(x), None)


class OtherwiseCached:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        if past_key_values is None:
            k = k.contiguous()
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, self.v(x), None)


class NoCache:
    def forward(self, x: Any) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, self.v(x), None)


class TurnsTwice:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        beside = rotate(self.q(x), self.k(x), self.sin, self.cos)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, self.v(x), beside)


class MakesACache:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        past_key_values = past_key_values or self.kept
        if past_key_values is not None:
            k, v = past_key_values.update(k, self.v(x), 0)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, v, None)


class KeysAsValues:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, k = rotate(self.q(x), self.k(x), self.cos, self.sin)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, k, k, None)


class OtherKeys:
    def forward(self, x: Any, past_key_values: Any = None) -> Any:
        q, _ = rotate(self.q(x), self.k(x), self.cos, self.sin)
        function = TABLE.get_interface("sdpa", eager)
        return function(self, q, self.k(x), self.v(x), None)


@pytest.mark.parametrize(
    ("kind", "straight"),
    [
        (Plain, True),
        (Scales, False),
        (Shows, False),
        (AnotherAttends, False),
        (OtherwiseCached, False),
        (NoCache, False),
        (TurnsTwice, False),
        (MakesACache, False),
        (KeysAsValues, False),
        (OtherKeys, False),
    ],
)
def test_straight_is_what_uses_them_for_attending_alone(kind: Any, straight: bool) -> None:
    assert hands_over(kind.forward, "rotate", "TABLE") is straight


def test_what_has_no_source_is_not_known() -> None:
    there: dict[str, Any] = {}
    exec("def forward(self, x, past_key_values=None):\n    q, k = rotate(x, x)\n", there)
    assert not hands_over(there["forward"], "rotate", "TABLE")
    assert not hands_over(len, "rotate", "TABLE")


def test_a_cache_may_come_by_name_or_place() -> None:
    program: Any = Plain.forward
    assert not given_cache(program, (1,), {"past_key_values": None})
    assert given_cache(program, (), {"past_key_values": {}})
    assert given_cache(program, (1, None), {})


PROGRAM = """
def forward(self, x, past_key_values=None, mask=None):
    q, k = rotate(x, x)
    if past_key_values is not None:
        k = past_key_values.update(k)
    function = TABLE.get("sdpa")
    return function(self, q, k, x, mask)
"""


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ""),
        ("past_key_values=None, mask=None", "mask=None, past_key_values=None"),
        ('"sdpa"', '"eager"'),
        ("(self, q, k, x, mask)", "(self, q"),
    ],
    ids=["as it was", "names moved", "another word", "no program"],
)
def test_a_file_that_changed_since_is_not_what_runs(
    before: str, after: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.py"
    there: dict[str, Any] = {}
    exec(compile(PROGRAM, str(file), "exec", dont_inherit=True), there)
    file.write_text(PROGRAM.replace(before, after, 1), encoding="utf-8")
    assert hands_over(there["forward"], "rotate", "TABLE") is (before == after)


def test_a_decorated_program_is_not_plain() -> None:
    @functools.wraps(Plain.forward)
    def outside(self: Any, x: Any, past_key_values: Any = None) -> Any:
        return Plain.forward(self, x, past_key_values)

    assert not hands_over(outside, "rotate", "TABLE")
