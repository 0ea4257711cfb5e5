"""Spaces: what they draw, what they refuse before a trial, and starts inside of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltaops import LoRA
from deltaops.errors import ConfigError
from deltaops.methods import Combined
from deltaops.search.builtin import SPACES
from deltaops.search.ranges import Range
from deltaops.search.space import load_space, read_space
from deltaops.search.starts import params_of
from deltaops.testing.architectures import BLOCKS, build

LORA = {"r": [4, 8], "lr": 1e-3}


def space(**options: Any) -> dict[str, Any]:
    return {"deltas": {"lora": LORA | options}}


def last(name: str, allowed: Range) -> Any:
    return list(allowed.ends())[-1]


def test_a_candidate_has_what_the_space_says() -> None:
    found = read_space(
        space(alpha={"choices": [1, 2], "of": "r"}, dropout={"low": 0.0, "high": 0.2})
        | {"batch_size": [8, 16], "schedule": ["linear", "cosine"]}
    ).draw(last)
    assert found.delta == LoRA(r=8, alpha=16, dropout=0.2)
    assert (found.rates, found.batch_size, found.schedule) == ((("", 1e-3),), 16, "cosine")


def test_parts_of_a_combination_have_their_own_rates_and_options() -> None:
    found = read_space(
        {"deltas": {"lora+bitfit": {"lora.r": [4], "lora.lr": 1e-3, "bitfit.lr": 4e-3}}}
    ).draw(last)
    assert isinstance(found.delta, Combined)
    assert found.delta.by_name["lora"] == LoRA(r=4)
    assert found.paces() == {"lora": 0.25, "bitfit": 1.0}


def test_an_option_with_a_condition_is_drawn_where_that_holds() -> None:
    text = space(dropout={"choices": [0.1, 0.3], "when": {"r": [4]}})
    asked: list[str] = []

    def first(name: str, allowed: Range) -> Any:
        asked.append(name)
        return next(iter(allowed.ends()))

    assert read_space(text).draw(first).delta == LoRA(r=4, dropout=0.1)
    assert asked == ["lora/r", "lora/dropout"]
    assert read_space(text).draw(last).delta == LoRA(r=8)


def test_a_subset_of_the_layers_is_never_empty() -> None:
    found = read_space(space(layers_to_transform={"subset": "layers"})).resolved(build("bert"))
    none = found.draw(lambda name, allowed: next(iter(allowed.ends())))
    assert none.delta == LoRA(r=4, layers_to_transform=[BLOCKS - 1])
    assert found.draw(last).delta == LoRA(r=8, layers_to_transform=list(range(BLOCKS)))


@pytest.mark.parametrize("name", SPACES)
def test_built_in_spaces_fit_a_model(name: str) -> None:
    load_space(name).resolved(build("bert", hidden_size=96, intermediate_size=192))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("smal", r"no 'smal' \(did you mean small\?\)"),
        ({"delta": {}}, r"no 'delta' \(did you mean deltas\?\)"),
        ({"deltas": {}}, "one delta or more"),
        ({"deltas": {"lorra": {"lr": 1e-3}}}, r"no method 'lorra' \(did you mean lora"),
        (space(rank=[4]), "lora: no 'rank'"),
        (space(dropuot=[0.1]), r"did you mean dropout"),
        ({"deltas": {"lora": {"r": 4}}}, "no learning rate"),
        ({"deltas": {"lora+bitfit": {"lora.lr": 1e-3}}}, "no learning rate for bitfit"),
        (space(lr="1e-3"), "YAML wants"),
        (space(lr=-1.0), "positive number"),
        (space(dropout={"low": 0.3, "high": 0.1}), "low must be at most high"),
        (space(dropout={"low": 0.0, "high": 0.1, "log": True}), "log needs low above 0"),
        (space(dropout={"low": 0.0, "hihg": 0.1}), r"no 'hihg' \(did you mean high"),
        (space(dropout={"low": 0.0}), "high must be a number"),
        (space(dropout=[0.1, 0.1]), "a choice twice"),
        (space(dropout=[]), "one value or more"),
        (space(dropout={"choices": [0.1], "when": {"alpha": [1]}}), "before it: no 'alpha'"),
        (space(dropout={"choices": [0.1], "when": {"r": [5]}}), "when r is 5: it is 4 | 8 only"),
        (space(alpha={"choices": [1], "of": "target_modules"}) , "before it"),
        (space(use_dora=[True, False], alpha={"choices": [1], "of": "use_dora"}), "needs numbers"),
        (space(alpha={"choices": [8, 16], "when": {"r": [4]}},
               dropout={"low": 0.01, "high": 0.02, "of": "alpha"}), "not always there"),
        (space(dropout={"low": 0.0, "high": 0.5, "step": 0.2}), "whole steps"),
        (space(layers_to_transform={"subset": [[0]]}), "names or indices"),
        (space() | {"schedule": ["linaer"]}, "did you mean linear"),
        (space() | {"batch_size": [0]}, "batch_size must be an integer of 1"),
        (space() | {"warmup": 2.0}, "part of the steps"),
    ],
)  # fmt: skip
def test_bad_spaces_are_refused(text: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_space(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": [4, 0]}, "space: lora: r = 0: LoRA: r must be"),
        ({"dropout": {"low": 0.0, "high": 1.0}}, "space: lora: dropout = 1.0"),
        ({"target_modules": ["all-linear", "q_porj"]}, "space: lora: target_modules = q_porj"),
        ({"dropout": {"choices": [0.1, 1.5], "when": {"r": [8]}}}, "space: lora: dropout = 1.5"),
    ],
)
def test_impossible_ranges_are_refused_on_the_model(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_space(space(**options)).resolved(build("bert"))


def test_yaml_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("deltas:\n  lora: {r: [4, 8], lr: 1.0e-3}\n")
    assert load_space(path).draw(last) == read_space(space()).draw(last)
    path.write_text("deltas: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_space(path)


def test_a_start_is_found_in_the_space() -> None:
    wide = load_space("wide")
    start = "lora:r=8,alpha=16,target_modules=key-value; lr=0.002, batch_size=16, schedule=cosine"
    params = params_of(wide, start)
    found = wide.draw(lambda name, allowed: params[name])
    assert found.delta == LoRA(r=8, alpha=16, target_modules="key-value")
    assert (found.rates, found.batch_size, found.schedule) == ((("", 0.002),), 16, "cosine")


def test_a_start_beside_its_conditions_is_refused() -> None:
    wide = load_space("wide")
    with pytest.raises(ConfigError, match="dropout is not chosen beside such a use_dora"):
        params_of(wide, "lora:r=8,use_dora=true,dropout=0.1; lr=0.002")
    both = {"deltas": {"lora+parallel": {"layers_to_transform": [[0], [1]], "lr": 1e-3}}}
    start = "lora:layers_to_transform=0+parallel:layers_to_transform=1"
    with pytest.raises(ConfigError, match="layers_to_transform is the same in all parts"):
        params_of(read_space(both), start)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("lora:r=5", "lora/r must be 4 | 8, got 5"),
        ("lora:r=4,dropout=0.5", "dropout is 0.0 there"),
        ("bitfit", "the space has lora"),
        ("lora:r=4; batch=3", "no 'batch'"),
        ("lora:r=4; lr", "expected name=value"),
    ],
)
def test_a_start_outside_is_refused(start: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        params_of(read_space(space()), start)
