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
optuna = pytest.importorskip("optuna")


def test_a_trainer_searches_over_deltas_and_keeps_the_best_of_each(tmp_path: Path) -> None:
    """A rate so high that what was best lies before the end; each run's folder has its delta."""
    from safetensors.torch import load_model
    from transformers import Trainer, TrainingArguments

    ranks: list[int] = []
    models: list[Any] = []

    def model(trial: Any) -> Any:
        made = build("gpt2", head="LMHeadModel")
        if trial is not None:  # the Trainer makes one before the first trial
            ranks.append(trial.suggest_categorical("r", [1, 2, 4]))
            deltaops.attach(made, deltaops.LoRA(r=ranks[-1], alpha=8))
            models.append(made)
        return made

    rows = [{"input_ids": [s + i for i in range(8)], "labels": [s + i for i in range(8)]}
            for s in range(8)]  # fmt: skip
    trainer = Trainer(
        model_init=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, lr_scheduler_type="constant",
            per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
            save_strategy="steps", save_steps=1, save_only_model=True,
            eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
    )  # fmt: skip
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {
            "learning_rate": trial.suggest_float("learning_rate", 0.5, 2.0, log=True)
        },
        backend="optuna", direction="minimize", n_trials=2,
        sampler=optuna.samplers.RandomSampler(seed=0),
    )  # fmt: skip
    assert best.hyperparameters.keys() == {"r", "learning_rate"}
    assert best.hyperparameters["r"] in ranks
    assert len(ranks) >= 2

    def loss(of: Any) -> float:
        return float(Trainer(of, trainer.args, eval_dataset=rows).evaluate()["eval_loss"])

    made = build("gpt2", head="LMHeadModel")
    handle = deltaops.attach(made, deltaops.LoRA(r=ranks[-1], alpha=8))
    losses = []
    for step in (1, 2):
        load_model(made, tmp_path / "run-1" / f"checkpoint-{step}" / "model.safetensors")
        assert all(tensor.any() for tensor in handle.state().values()), "B has not left zero"
        losses.append(loss(made))
    assert losses[0] < losses[1], "what is loaded at the end must not be the last"
    assert loss(models[-1]) == pytest.approx(losses[0], rel=1e-6)
