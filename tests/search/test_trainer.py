"""``Trainer.hyperparameter_search`` of transformers, with a delta for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import deltaops
from deltaops.testing.architectures import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
pytest.importorskip("accelerate")


def test_a_trainer_searches_over_deltas(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    ranks: list[int] = []

    def model(trial: Any) -> Any:
        made = build("gpt2", head="LMHeadModel")
        if trial is not None:  # the Trainer makes one before the first trial
            ranks.append(trial.suggest_categorical("r", [1, 2, 4]))
            deltaops.attach(made, deltaops.LoRA(r=ranks[-1], alpha=8))
        return made

    rows = [{"input_ids": [s + i for i in range(8)], "labels": [s + i for i in range(8)]}
            for s in range(8)]  # fmt: skip
    trainer = Trainer(
        model_init=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[],
            disable_tqdm=True, use_cpu=True, save_strategy="no", eval_strategy="no",
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True)
        },
        backend="optuna", direction="minimize", n_trials=2,
    )  # fmt: skip
    assert best.hyperparameters.keys() == {"r", "learning_rate"}
    assert best.hyperparameters["r"] in ranks
    assert len(ranks) >= 2
