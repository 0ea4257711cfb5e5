"""What a function does, whatever it is called: classes of transformers are recognized by this."""

from __future__ import annotations

from types import FunctionType
from typing import Any, TypeAlias

Program: TypeAlias = tuple[Any, ...]


def program_of(function: Any) -> Program | None:
    """What a plain function does, whatever it, its file and its variables are called.

    None for anything but a function written in Python, and for one inside a decorator.
    """
    if type(function) is not FunctionType or hasattr(function, "__wrapped__"):
        return None
    code = function.__code__
    constants = tuple(c for c in code.co_consts if not (c is not None and c == function.__doc__))
    return (code.co_code, code.co_names, constants, code.co_argcount, function.__defaults__)
