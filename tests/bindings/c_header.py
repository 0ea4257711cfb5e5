"""``deltaops.h`` itself as ctypes: its structs are read off the header, and none is written twice.

    header = Header(Path(deltaops.get_include(), "deltaops.h"), deltaops.get_library())
    header.call("gated_forward", gate=matrix, up=matrix, y=matrix, activation=4)

Holds what that header writes: typedefs of structs of scalars, pointers, arrays and earlier structs.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

SCALARS = {
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
}
STRUCT = re.compile(r"typedef struct \{(.*?)\} (\w+);", re.DOTALL)
COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


def structs(text: str) -> dict[str, type[ctypes.Structure]]:
    """The header's structs by name."""
    found: dict[str, type[ctypes.Structure]] = {}
    for body, name in STRUCT.findall(COMMENT.sub("", text)):
        fields = []
        for declaration in filter(None, (part.strip() for part in body.split(";"))):
            base, names = re.fullmatch(r"(?:const )?(\w+)\s+(.*)", declaration, re.DOTALL).groups()
            for one in names.split(","):
                star, field, count = re.fullmatch(r"(\*?)\s*(\w+)(?:\[(\d+)\])?",
                                                  one.strip()).groups()  # fmt: skip
                kind: Any = ctypes.c_void_p if star else SCALARS.get(base) or found[base]
                fields.append((field, kind * int(count) if count else kind))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


class Header:
    """The library, called by the names of the header's structs."""

    def __init__(self, header: Path, library: str) -> None:
        self.structs = structs(header.read_text(encoding="utf-8"))
        self.library = ctypes.CDLL(library)
        self.library.deltaops_last_error.restype = ctypes.c_char_p

    def arguments(self, function: str, **fields: Any) -> ctypes.Structure:
        """``deltaops_FUNCTION_args``, zero but for its size and these fields."""
        made = self.structs[f"deltaops_{function}_args"]()
        made.struct_size = ctypes.sizeof(made)
        for name, value in fields.items():
            kind = dict(made._fields_)[name]
            if isinstance(value, tuple):
                value = kind(*value)
            setattr(made, name, value)
        return made

    def run(self, function: str, arguments: ctypes.Structure) -> tuple[int, str]:
        """The status and, where it is not 0, the sentence."""
        call = getattr(self.library, f"deltaops_cpu_{function}")
        status = call(ctypes.byref(arguments))
        return status, self.library.deltaops_last_error().decode() if status else ""

    def call(self, function: str, *, struct: str | None = None, **fields: Any) -> None:
        """Run it on these fields. Raises: AssertionError with the library's sentence."""
        status, said = self.run(function, self.arguments(struct or function, **fields))
        assert status == 0, said
