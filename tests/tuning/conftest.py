"""A base model that trains in a second: the demo's, barely trained, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltaops.cli.quiet import quiet_transformers


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deltaops.tuning import small_model

    quiet_transformers()
    folder = tmp_path_factory.mktemp("base") / "gpt2"
    small_model.build(folder, 1, lambda point: None)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("def area(width, height):\n    return width * height\n" * 200)
    return path
