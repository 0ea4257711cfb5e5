"""Which models a part of the benchmark is of, and what its files are called."""

from __future__ import annotations

from typing import Any

import pytest

from deltaops.cli.bench import _part, _settings
from deltaops.errors import ConfigError


def settings(only: str | None, models: str | None) -> Any:
    return _settings(False, only, None, None, models, None, None, None, None)


@pytest.mark.parametrize(
    ("only", "models", "steps", "readers"),
    [
        (None, None, ("bert", "llama", "gpt2", "vit"), ("bert", "llama")),
        ("steps", "gpt2,bert", ("gpt2", "bert"), ("bert",)),
        ("stacks", "bert-base", (), ("bert-base",)),
        ("methods", "llama,bert-base", ("llama",), ("llama", "bert-base")),
    ],
)
def test_a_name_is_of_the_steps_of_the_methods_or_of_both(
    only: str | None, models: str | None, steps: tuple[str, ...], readers: tuple[str, ...]
) -> None:
    found = settings(only, models)
    assert (found.workloads, found.readers) == (steps, readers)


@pytest.mark.parametrize(
    ("only", "models", "says"),
    [
        ("steps", "bertt", "--models knows bert, llama, gpt2, vit, bert-base, got 'bertt'"),
        ("steps", "bert-base", "--models bert-base: whole steps are of bert, llama, gpt2, vit"),
        ("stacks", "gpt2", "--models gpt2: methods are timed on bert, llama, bert-base"),
        ("stacks", "bert,bert-base", "--models bert,bert-base: stacks are of one model a run"),
    ],
)
def test_a_model_that_has_no_part_is_refused(only: str, models: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settings(only, models)


@pytest.mark.parametrize(
    ("quick", "only", "models", "part"),
    [
        (False, None, None, ""),
        (False, "goals", None, ""),
        (False, "stacks", None, "-stacks"),
        (False, "stacks", "bert-base", "-stacks-bert-base"),
        (False, "steps", "bert,vit", "-only-steps-bert-vit"),
        (True, None, "llama", "-quick-llama"),
    ],
)
def test_files_of_a_part_stay_beside_those_of_the_whole(
    quick: bool, only: str | None, models: str | None, part: str
) -> None:
    assert _part(quick, only, models) == part
