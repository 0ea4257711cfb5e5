"""Text that every Python ships: English documentation, and the standard library's sources."""

from __future__ import annotations

import sysconfig
from pathlib import Path

CODE_CHARACTERS = 400_000


def english() -> str:
    """The help topics of ``pydoc`` (about 465 KB of English)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def python_sources(characters: int = CODE_CHARACTERS) -> str:
    """The standard library's own modules, in the order of their names, up to ``characters``."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8") + "\n\n"
        if len(text) >= characters:
            break
    return text[:characters]
