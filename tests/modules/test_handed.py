"""What is seen of a program that turns queries and keys and attends."""

# ruff: noqa: F821  # the globals of programs that are read, and never run

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("kind", "straight"),
    [
        (Plain, True),
        (Scales, False),
        (Shows, False),
        (AnotherAttends, False),
        (OtherwiseCached, False),
        (NoCache, False),
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
