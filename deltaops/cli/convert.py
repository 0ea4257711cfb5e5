"""``deltaops convert``: an adapter of OpenDelta or PEFT, as files that deltaops and PEFT read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from deltaops.errors import CheckpointError

from .quiet import quiet_transformers

_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
"""Of which the first size is the number of labels."""


def convert(
    source: Path = typer.Argument(help="A folder that OpenDelta or PEFT saved."),
    out: Path = typer.Argument(help="Folder for the converted adapter."),
    model: str | None = typer.Option(
        None, help="OpenDelta: the backbone's folder or hub id; its weights are read."
    ),
    model_class: str | None = typer.Option(
        None, help="Its class in transformers, where OpenDelta's config.json names none."
    ),
) -> None:
    """Convert an adapter to PEFT's format, or to ours where PEFT has none.

    Reads OpenDelta's LoRA, adapters (parallel ones too), Compacter, BitFit, soft prompts and
    prefixes, and PEFT's adapters that are still pickles. A pickle (.bin) is looked at, never run:
    anything in it beside tensors is refused. OUT is written whole or left as it was.

    Example:  deltaops convert delta_checkpoints/t5-lora my-adapter --model path/to/t5-base

    Example:  deltaops convert old-peft-adapter my-adapter
    """
    from deltaops.surgery.files import CONFIG, MANIFEST
    from deltaops.surgery.opendelta import from_opendelta, is_opendelta, read_opendelta

    console = Console()
    folder, out = source.expanduser(), out.expanduser()
    if (folder / CONFIG).is_file():
        count = _from_peft(folder, out)
    elif (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder} holds {MANIFEST}: it is in deltaops' format already. Load it with "
            'deltaops.load; handle.save(path, part=NAME, format="peft") writes what PEFT has.'
        )
    elif not is_opendelta(folder):
        raise CheckpointError(
            f"{folder} holds neither {CONFIG} (PEFT) nor config.json with pytorch_model.bin "
            "(OpenDelta). Name the folder that one of them saved."
        )
    else:
        if model is None:
            raise CheckpointError(
                f"{folder} is OpenDelta's, which says little about its places: pass the backbone "
                "that it was trained on as --model."
            )
        quiet_transformers()
        config, tensors = read_opendelta(folder)
        handle = from_opendelta(_backbone(model, model_class, config, tensors), config, tensors)
        handle.save(out)
        count = len(handle.state())
    form = "deltaops'" if (out / MANIFEST).is_file() else "PEFT's"
    for line in (
        f"{out}: {count} tensors, in {form} format",
        f'load it:  deltaops.load(model, "{out}")',
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _from_peft(folder: Path, out: Path) -> int:
    """PEFT's own files once more, as safetensors. Raises: CheckpointError."""
    from deltaops.methods import METHODS
    from deltaops.surgery.files import PEFT, PICKLE, read_config, read_weights, write_adapter
    from deltaops.surgery.torch_file import read_torch_file

    config = read_config(folder, PEFT)
    known = {m.peft_type: m for m in METHODS.values() if m.peft_type is not None}
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            f"{folder} has peft_type={kind!r}; deltaops reads {', '.join(known)}. Load it with "
            "peft, which needs no conversion."
        )
    known[kind].from_peft(config)  # raises what deltaops does not express
    if (folder / PEFT.weights).is_file() or not (folder / PICKLE).is_file():
        tensors = read_weights(folder, PEFT)
    else:
        tensors = read_torch_file(folder / PICKLE)
    write_adapter(out, config, tensors, PEFT)
    return len(tensors)


def _backbone(
    name: str, given: str | None, config: Mapping[str, Any], tensors: Mapping[str, Any]
) -> Any:
    """The model that the delta was trained on, with as many labels as its head has."""
    import torch
    import transformers

    called = given or config.get("backbone_class")
    kind: Any = getattr(transformers, called, None) if isinstance(called, str) else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise CheckpointError(
            f"OpenDelta's config.json has backbone_class={called!r}, which is no model of "
            "transformers. Name it: --model-class T5ForConditionalGeneration."
        )
    # an empty matrix can have any number of rows
    heads = [t for t in map(tensors.get, _HEADS) if t is not None and t.dim() == 2 and t.numel()]
    head = {"num_labels": heads[0].shape[0]} if heads else {}
    loader: Any = kind
    try:
        return loader.from_pretrained(name, dtype=torch.float32, **head)
    except (OSError, ValueError, RuntimeError) as error:  # the last: weights of another shape
        raise CheckpointError(
            f"--model {name} cannot be loaded: {error}. Give the folder or hub id of the backbone "
            "that it was trained on."
        ) from error
