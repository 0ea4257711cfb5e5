"""transformers' Trainer on a method: with gradient checkpointing, stopped, and resumed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops.surgery import Handle
from deltaops.testing.architectures import HEADS, build, labelled, new_head

from .test_contract import METHODS, UNREAD, on

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
pytest.importorskip("accelerate")


def attached(method: str, name: str) -> Handle:
    """The method at its start, on a model with a loss, beside a head that is new."""
    model: Any = build(name, head=HEADS[name])
    if name == "vit":  # with a delta or without, transformers 5.23 resumes by others than it saves
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    torch.manual_seed(0)
    return deltaops.attach(model, replace(METHODS[method](), modules_to_save=new_head(name)))


def train(
    method: str, name: str, folder: Path, *, checkpointing: bool = True, resume: str = ""
) -> dict[str, Tensor]:
    """Three steps, a checkpoint after two; what the delta holds then."""
    from transformers import Trainer, TrainingArguments

    handle = attached(method, name)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=checkpointing,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    texts = labelled(name, rows=16)
    data: Any = [{key: value[row] for key, value in texts.items()} for row in range(16)]
    Trainer(model=handle.model, args=arguments, train_dataset=data).train(
        resume_from_checkpoint=resume or None
    )
    return {key: tensor.detach().clone() for key, tensor in handle.state().items()}


@on("llama")
def test_trainer_resumes_with_the_same_bits(method: str, name: str, tmp_path: Path) -> None:
    straight = train(method, name, tmp_path / "straight")
    checkpoint = str(tmp_path / "straight" / "checkpoint-2")
    resumed = train(method, name, tmp_path / "resumed", resume=checkpoint)
    start = attached(method, name).state()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    stays = [key for key in straight if torch.equal(straight[key], start[key])]
    assert all(UNREAD[name] in key for key in stays), stays
    assert len(stays) < len(straight)


@pytest.mark.parametrize("method", ["parallel", "bitfit"])
def test_trainer_gives_the_same_bits_without_checkpointing(method: str, tmp_path: Path) -> None:
    straight, plainly = (
        train(method, "llama", tmp_path / str(flag), checkpointing=flag) for flag in (True, False)
    )
    assert all(torch.equal(straight[key], plainly[key]) for key in straight)
