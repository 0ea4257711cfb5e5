"""Whether an attention's program hands its turned queries and keys straight to what attends.

Then they need not be there in between, and one op turns and attends. Read from the source: what is
not plain to see there is no.
"""

from __future__ import annotations

import ast
import linecache
import warnings
from functools import cache
from types import CodeType, FunctionType
from typing import Any

CACHE = "past_key_values"
"""The parameter that keys are kept in: looked at under ``if past_key_values is not None`` alone."""


@cache
def hands_over(function: Any, rotary: str, table: str) -> bool:
    """Whether without a cache the results of ``rotary`` are query and key of a function of
    ``table``, and nothing else.

    Args:
        function: an attention's ``forward``.
        rotary: global that is called once, for both.
        table: global whose results are called: ``(module, query, key, …)``.
    """
    body = _body(function)
    known = [node for step in body for node in ast.walk(step) if isinstance(node, ast.Name)]
    if [node.id for node in known].count(rotary) != 1:
        return False
    if any([node.id == CACHE and not isinstance(node.ctx, ast.Load) for node in known]):
        return False  # a cache that was not given
    turns = [at for at, step in enumerate(body) if _results(step, rotary)]
    if len(turns) != 1:
        return False
    after = body[turns[0] + 1 :]
    names = _results(body[turns[0]], rotary)
    allowed: set[int] = set()
    for step in after:
        allowed |= _under_cache(step)
        for node in ast.walk(step):
            if isinstance(node, ast.Call) and _is_attend(node.func, body, table):
                allowed |= _both(node, names)
    uses = [node for step in after for node in ast.walk(step) if _is_name(node, names)]
    return bool(uses) and all([id(use) in allowed for use in uses])


def given_cache(function: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of the method ``function`` with these arguments may have a cache."""
    place = function.__code__.co_varnames.index(CACHE) - 1  # after self
    return len(args) > place or kwargs.get(CACHE) is not None


def _body(function: Any) -> list[ast.stmt]:
    """The statements of a plain function; none where its source is not what runs."""
    if type(function) is not FunctionType or hasattr(function, "__wrapped__"):
        return []
    code = function.__code__
    if CACHE not in code.co_varnames[: code.co_argcount]:
        return []
    # the whole file: what a file imports decides how a call is compiled
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the file: they came when it was imported
            tree = ast.parse(source)
            whole = compile(tree, code.co_filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):  # changed since, or a notebook's
        return []
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and (node.name, _first_line(node)) == (code.co_name, code.co_firstlineno)
    ]
    same = [_words(each) == _words(code) for each in _inside(whole)
            if (each.co_name, each.co_firstlineno)
            == (code.co_name, code.co_firstlineno)]  # fmt: skip
    return found[0].body if len(found) == 1 and same == [True] else []


def _words(code: CodeType) -> tuple[Any, ...]:
    """All that the source says in it."""
    return code.co_code, code.co_names, code.co_varnames, code.co_consts


def _first_line(function: ast.FunctionDef) -> int:
    return min([function.lineno, *[each.lineno for each in function.decorator_list]])


def _inside(code: CodeType) -> list[CodeType]:
    """``code`` and all that is defined in it."""
    nested = [each for each in code.co_consts if isinstance(each, CodeType)]
    return [code, *[inner for each in nested for inner in _inside(each)]]


def _results(step: ast.stmt, rotary: str) -> tuple[str, ...]:
    """The names of ``q, k = rotary(…)``; none for another statement."""
    if not (isinstance(step, ast.Assign) and isinstance(step.value, ast.Call)):
        return ()
    if not _is_name(step.value.func, (rotary,)) or len(step.targets) != 1:
        return ()
    target = step.targets[0]
    if not isinstance(target, ast.Tuple):
        return ()
    names = tuple([each.id for each in target.elts if isinstance(each, ast.Name)])
    return names if len(names) == len(target.elts) == 2 else ()


def _under_cache(step: ast.stmt) -> set[int]:
    """The nodes of ``if past_key_values is not None: …``."""
    if not isinstance(step, ast.If) or step.orelse:
        return set()
    test = step.test
    known = (
        isinstance(test, ast.Compare)
        and _is_name(test.left, (CACHE,))
        and [type(op) for op in test.ops] == [ast.IsNot]
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value is None
    )
    return {id(node) for inside in step.body for node in ast.walk(inside)} if known else set()


def _both(call: ast.Call, names: tuple[str, ...]) -> set[int]:
    """The nodes of query and key in ``(module, query, key, …)``, where they are ``names``."""
    pair = call.args[1:3]
    straight = len(pair) == 2 and all(map(_is_name, pair, [(name,) for name in names]))
    return {id(node) for node in pair} if straight else set()


def _is_attend(function: ast.expr, body: list[ast.stmt], table: str) -> bool:
    """Whether this is a variable that only ever holds what a method of ``table`` gave."""
    if not isinstance(function, ast.Name):
        return False
    stores = [
        node
        for step in body
        for node in ast.walk(step)
        if isinstance(node, ast.Name)
        and node.id == function.id
        and not isinstance(node.ctx, ast.Load)
    ]
    sources = [step for step in body if isinstance(step, ast.Assign | ast.AnnAssign)]
    found = [
        step
        for step in sources
        if any(target in stores for target in _targets(step)) and _is_from(step.value, table)
    ]
    return len(stores) == len(found) == 1


def _targets(step: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return step.targets if isinstance(step, ast.Assign) else [step.target]


def _is_from(value: ast.expr | None, table: str) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and _is_name(value.func.value, (table,))
    )


def _is_name(node: ast.AST, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Name) and node.id in names
