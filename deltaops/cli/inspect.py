"""``deltaops inspect``: a model's tree and where a delta would bind, or an adapter's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from deltaops.errors import CheckpointError


def inspect(
    model: str = typer.Argument(help="A model's folder or hub id, or an adapter's folder."),
    delta: str = typer.Option(
        "lora",
        help="Which delta to try, as for tune: lora:r=8,target_modules=q_proj, lora+bitfit, MAM.",
    ),
) -> None:
    """Draw a model's tree with parameter counts and where a delta would bind; or show an adapter.

    Reads a model's config only: no weights are loaded.

    Example:  deltaops inspect path/to/model --delta lora:r=8

    Example:  deltaops inspect path/to/model --delta adapter:style=pfeiffer

    Example:  deltaops inspect my-adapter
    """
    console = Console()
    folder = Path(model).expanduser()
    if any((folder / name).is_file() for name in ("adapter_config.json", "deltaops.json")):
        _show_adapter(console, folder)
    else:
        _show_model(console, model, delta)


def _show_adapter(console: Console, folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    from deltaops.surgery.files import files_in, read_config

    files = files_in(folder)
    config = read_config(folder, files)
    try:
        with safe_open(folder / files.weights, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{folder}: the adapter cannot be read ({error}). It needs {files.config} and "
            f"{files.weights}, both whole."
        ) from error
    shown = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout")
    facts = {key: config[key] for key in (*shown, "method", "base_model") if key in config}
    facts |= _settings(config, f"{folder}: {files.config}")
    for key, value in facts.items():
        console.print(f"{key:<26}{value}", highlight=False, markup=False)
    table = Table("tensor", "shape", box=None, pad_edge=False, header_style="bold")
    total = 0
    for name, shape in shapes.items():
        table.add_row(name, "×".join(map(str, shape)))
        count = 1
        for size in shape:
            count *= size
        total += count
    console.print(table)
    console.print(f"{len(shapes)} tensors, {total:,} parameters")


def _settings(config: dict[str, Any], subject: str) -> dict[str, Any]:
    """What our manifest says of a delta, or of each part of several."""
    try:
        found = dict(config.get("settings", {}))
        for part in config.get("parts", ()):
            found[f"part {part['name']}"] = f"{part['method']} {part['settings']}"
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{subject} must have an object of settings, or a list of parts, each with name, "
            f"method and settings ({type(error).__name__}: {error}). Save the adapter again."
        ) from error
    gated = {"gated": True} if config.get("gated") else {}
    return found | gated


def _show_model(console: Console, name: str, spec: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import deltaops.surgery as surgery
    from deltaops.tuning.spec import parse_delta

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: neither an adapter nor a model that transformers can read ({error}). "
            "Give a folder with config.json, or a hub id."
        ) from error
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        try:
            model = auto.from_config(config)
        except ValueError:  # no language model of this kind: the bare one has the same layers
            from transformers import AutoModel

            plain: Any = AutoModel
            model = plain.from_config(config)
    plan = surgery.plan(model, parse_delta(spec))
    total = sum(p.numel() for p in model.parameters())
    tree = Tree(f"[bold]{type(model).__name__}[/]  {total:,} parameters")
    _grow(tree, model)
    console.print(tree)
    console.print(str(plan), highlight=False, markup=False)


def _grow(tree: Tree, module: Any) -> None:
    """Children, those that are alike and in a row shown once."""
    children = list(module.named_children())
    i = 0
    while i < len(children):
        name, child = children[i]
        same = i
        while same + 1 < len(children) and str(children[same + 1][1]) == str(child):
            same += 1
        label = name if same == i else f"{name}…{children[same][0]}"
        count = sum(p.numel() for p in child.parameters())
        branch = tree.add(f"{label}  [dim]{type(child).__name__}  {count:,}[/]")
        _grow(branch, child)
        i = same + 1
