"""200 Trainer steps of PEFT, accelerated or not, and a checkpoint of either in the other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops import LoRA
from deltaops.testing import relative_error

pytestmark = [
    pytest.mark.slow,
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
pytest.importorskip("accelerate")

STEPS = 200


def examples() -> list[dict[str, list[int]]]:
    """Sequences that count upwards: something to learn."""
    rows = [[(start + i) % 60 for i in range(12)] for start in range(64)]
    return [{"input_ids": row, "labels": row} for row in rows]


def readable(model: nn.Module) -> nn.Module:
    """Scale the frozen random head up: behind the final norm its logits could not move the loss."""
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # type: ignore[operator, union-attr]
    return model


def train(model: nn.Module, folder: Path, **settings: Any) -> list[float]:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_curves_agree_and_checkpoints_cross(tiny: Callable[..., Any], tmp_path: Path) -> None:
    import peft

    base = readable(tiny("llama").model)
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules="all-linear")
    eager = peft.get_peft_model(copy.deepcopy(base), config)
    fast = copy.deepcopy(eager)
    deltaops.accelerate(fast)
    control = copy.deepcopy(eager)
    with torch.no_grad():
        for name, parameter in control.named_parameters():
            if "lora_A" in name:
                parameter.mul_(1 + torch.finfo(torch.float32).eps)
    named = {"eager": eager, "fast": fast, "control": control}
    curves = {name: torch.tensor(train(m, tmp_path / name)) for name, m in named.items()}
    assert curves["eager"].numel() == STEPS
    assert curves["fast"][-10:].mean() < 0.5 * curves["fast"][:10].mean(), "it must learn"
    # Training amplifies rounding. How much, PEFT itself says: the control starts one unit in the
    # last place off, and the accelerated model may stray a few times as far from PEFT's curve.
    strayed = relative_error(curves["fast"], curves["eager"])
    assert strayed < 8 * relative_error(curves["control"], curves["eager"])
    assert strayed < 1e-5
    # before anything is amplified: rounding and nothing else
    torch.testing.assert_close(curves["fast"][:10], curves["eager"][:10], rtol=1e-6, atol=0)

    eager.save_pretrained(tmp_path / "from_eager")
    fast.save_pretrained(tmp_path / "from_fast")
    ids = torch.tensor([examples()[0]["input_ids"]])
    with torch.no_grad():
        for trained, other in (("from_eager", fast), ("from_fast", eager)):
            source = eager if trained == "from_eager" else fast
            opened = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / trained).eval()
            if other is fast:
                deltaops.accelerate(opened)
            torch.testing.assert_close(opened(ids).logits, source.eval()(ids).logits)
            model = copy.deepcopy(base).eval()
            deltaops.load(model, tmp_path / trained)
            torch.testing.assert_close(model(ids).logits, source(ids).logits)


def test_attached_model_trains_with_checkpointing(tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = readable(tiny("gpt2").model)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    handle = deltaops.attach(model, LoRA(r=4, alpha=32, dropout=0.05))
    losses = train(model, tmp_path, gradient_checkpointing=True)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    handle.revert()
    assert all(torch.equal(base[k], v) for k, v in model.state_dict().items())
