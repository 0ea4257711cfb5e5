"""transformers' Trainer on a method: with gradient checkpointing, stopped, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaops
from deltaops.testing.architectures import build

from .test_contract import METHODS

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
pytest.importorskip("accelerate")


def train(delta: Any, folder: Path, *, checkpointing: bool = True, resume: str = "") -> Any:
    """Three steps, a checkpoint after two; what the delta holds then."""
    from transformers import Trainer, TrainingArguments

    model = build("llama", head="ForCausalLM")
    torch.manual_seed(0)
    handle = deltaops.attach(model, delta)
    rows = [[(start + i) % 57 + 3 for i in range(8)] for start in range(16)]
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
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=data).train(
        resume_from_checkpoint=resume or None
    )
    return {key: tensor.detach().clone() for key, tensor in handle.state().items()}


@pytest.mark.parametrize("method", METHODS)
def test_trainer_resumes_with_the_same_bits(method: str, tmp_path: Path) -> None:
    delta = METHODS[method]()
    straight: dict[str, Tensor] = train(delta, tmp_path / "straight")
    resumed = train(delta, tmp_path / "resumed", resume=str(tmp_path / "straight" / "checkpoint-2"))
    start = deltaops.attach(build("llama", head="ForCausalLM"), delta).state()
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
    assert all(not torch.equal(straight[key], start[key]) for key in straight)


@pytest.mark.parametrize("method", ["parallel", "bitfit"])
def test_trainer_gives_the_same_bits_without_checkpointing(method: str, tmp_path: Path) -> None:
    delta = METHODS[method]()
    straight, plainly = (
        train(delta, tmp_path / str(flag), checkpointing=flag) for flag in (True, False)
    )
    assert all(torch.equal(straight[key], plainly[key]) for key in straight)
