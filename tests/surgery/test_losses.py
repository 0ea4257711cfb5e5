"""``loss=True``: the same number from the op, on models whose loss is transformers' own."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.surgery import losses

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def masked() -> nn.Module:
    """A masked language model; for BERT's, which computes its loss itself, see test_own_loss."""
    from transformers import EuroBertConfig, EuroBertForMaskedLM

    config = EuroBertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        mask_token_id=3,
    )
    return EuroBertForMaskedLM(config)


def decoder() -> nn.Module:
    """BERT as a causal language model."""
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        is_decoder=True,
    )
    return BertLMHeadModel(config)


OTHERS = {"bert-decoder": decoder, "eurobert": masked}


def peft_llama(tiny: Callable[..., Any]) -> Any:
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(tiny("llama").model, config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """dtypes of the logits that reached the op."""
    seen: list[torch.dtype] = []
    real = losses.cross_entropy

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits.dtype)
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(losses, "cross_entropy", counted)
    return seen


def batch(ignored: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ignored:
        labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: nn.Module, **settings: Any) -> list[Tensor]:
    model.zero_grad()
    loss = model(**batch(), **settings).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def loss_row(model: nn.Module) -> Any:
    (row,) = [r for r in deltaops.report(model).rows if r.path.endswith("loss_function")]
    return row


SETTINGS: dict[str, dict[str, Any]] = {
    "mean": {},
    "items": {"num_items_in_batch": 13},
    "items-tensor": {"num_items_in_batch": torch.tensor(13)},
    "shifted": {"shift_labels": torch.arange(18).reshape(2, 9)},
    "ignore-index": {"ignore_index": 7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("theirs", ["ForCausalLMLoss", "ForMaskedLMLoss"])
def test_each_loss_is_transformers_number(
    theirs: str, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    from transformers.loss import loss_utils

    ours = losses.causal_lm_loss if theirs == "ForCausalLMLoss" else losses.masked_lm_loss
    labels = batch(ignored=settings.get("ignore_index") is None)["labels"]
    logits = (torch.randn(2, 9, 60) * 3).to(dtype).requires_grad_()
    results = []
    for loss in (ours, getattr(loss_utils, theirs)):
        value = loss(logits, labels, vocab_size=60, unused=1, **settings)
        results.append((value, *torch.autograd.grad(value, logits)))
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("kind", ["llama", "gpt2", *OTHERS])
def test_models_give_the_same_loss_and_gradients(
    tiny: Callable[..., Any],
    shake: Callable[[nn.Module], None],
    kind: str,
    calls: list[torch.dtype],
) -> None:
    model = OTHERS[kind]() if kind in OTHERS else tiny(kind).model
    deltaops.attach(model, LoRA(r=4), loss=True)
    shake(model)
    fused = [loss_and_gradients(model, **s) for s in ({}, {"num_items_in_batch": 11})]
    assert calls == [torch.float32] * 2
    losses.restore_losses(model)
    want = [loss_and_gradients(model, **s) for s in ({}, {"num_items_in_batch": 11})]
    assert len(calls) == 2
    assert len(want[0]) > 2
    torch.testing.assert_close(fused, want)


def test_a_peft_model_there_and_back(tiny: Callable[..., Any], calls: list[torch.dtype]) -> None:
    model = peft_llama(tiny)
    inner = model.base_model.model
    want = loss_and_gradients(model)
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    report = deltaops.accelerate(model, loss=True)
    torch.testing.assert_close(loss_and_gradients(model), want)
    assert len(calls) == 1
    row = loss_row(model)
    assert row.path == "base_model.model.loss_function"
    assert (row.kind, row.backend, row.reason) == ("loss", "cpu", "fused by cpu")
    assert f"{report.fused} of {len(report.rows)}" in str(report)
    deltaops.accelerate(model)  # says nothing about the loss, and leaves it
    assert loss_row(model).kind == "loss"
    report.revert()
    assert {name: dict(vars(m)).keys() for name, m in model.named_modules()} == {
        name: kept.keys() for name, kept in before.items()
    }
    from transformers.loss.loss_utils import ForCausalLMLoss

    assert inner.loss_function is ForCausalLMLoss
    loss_and_gradients(model)
    assert len(calls) == 1


def test_bfloat16_logits_are_not_converted(
    tiny: Callable[..., Any], calls: list[torch.dtype]
) -> None:
    model = tiny("llama").model.to(torch.bfloat16)
    want = loss_and_gradients(model)[0]
    deltaops.attach(model, LoRA(r=4), loss=True, blocks=False)
    torch.testing.assert_close(loss_and_gradients(model)[0], want)
    assert calls == [torch.bfloat16]


def test_copies_and_pickles_keep_it(tiny: Callable[..., Any], calls: list[torch.dtype]) -> None:
    model = peft_llama(tiny)
    deltaops.accelerate(model, loss=True, backend="cpu")
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    want = loss_and_gradients(model)[0]
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert torch.equal(loss_and_gradients(twin)[0], want)
        assert loss_row(twin).kind == "loss"
        deltaops.accelerate(twin, revert=True)
        assert "_loss_function" not in vars(twin.base_model.model)
    assert len(calls) == 3
    assert loss_row(model).kind == "loss"


@pytest.mark.parametrize("ending", ["revert", "merge_and_unload"])
def test_the_end_of_a_handle_gives_the_loss_back(tiny: Callable[..., Any], ending: str) -> None:
    model = tiny("gpt2").model
    before = set(vars(model))
    handle = deltaops.attach(model, LoRA(r=4), loss=True)
    assert loss_row(model).kind == "loss"
    getattr(handle, ending)()
    assert set(vars(model)) == before


def test_a_loss_that_was_set_by_hand_comes_back(tiny: Callable[..., Any]) -> None:
    from transformers.loss.loss_utils import ForMaskedLMLoss

    model = tiny("llama").model
    model.loss_function = ForMaskedLMLoss
    handle = deltaops.attach(model, LoRA(r=4), loss=True)
    assert model.loss_function.func is losses.masked_lm_loss
    handle.revert()
    assert model.loss_function is ForMaskedLMLoss


def my_loss(logits: Tensor, labels: Tensor, **rest: Any) -> Tensor:
    return logits.float().sum() * 0 + 3


def test_a_users_loss_is_left_alone(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").model
    model.loss_function = my_loss
    handle = deltaops.attach(model, LoRA(r=4), loss=True)
    assert model.loss_function is my_loss
    assert (loss_row(model).kind, loss_row(model).backend) == ("left alone", "torch")
    assert (
        loss_row(model).reason == "its loss is my_loss, not transformers' own of a language model"
    )
    handle.revert()
    assert not deltaops.report(model).rows
    assert model.loss_function is my_loss


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "BertForSequenceClassification.forward computes its loss itself"),
        ("vit", "its loss is ForSequenceClassificationLoss, not transformers' own of a language"),
    ],
)
def test_other_losses_are_left_alone_and_reported(
    tiny: Callable[..., Any], kind: str, reason: str
) -> None:
    case = tiny(kind)
    want = case.loss()
    deltaops.attach(case.model, LoRA(r=4, modules_to_save=list(case.head)), loss=True)
    torch.testing.assert_close(case.loss(), want)
    assert loss_row(case.model).kind == "left alone"
    assert reason in loss_row(case.model).reason


def test_a_model_of_plain_torch_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    deltaops.attach(model, LoRA(r=2), loss=True)
    assert loss_row(model).reason == "it holds no model of transformers"


def test_what_no_fused_backend_takes_runs_torchs_own(
    tiny: Callable[..., Any], calls: list[torch.dtype]
) -> None:
    model = tiny("llama").model.double()
    want = loss_and_gradients(model)[0]
    deltaops.attach(model, LoRA(r=4), loss=True)
    loss = loss_and_gradients(model)[0]
    assert loss.dtype == torch.float64
    assert not calls
    torch.testing.assert_close(loss, want.double())
    assert loss_row(model).backend == "torch"
    assert "not torch.float64" in loss_row(model).reason


def test_strict_and_a_named_backend_are_the_ops(tiny: Callable[..., Any]) -> None:
    from deltaops.errors import NoBackendError

    model = tiny("llama").model.double()
    deltaops.attach(model, LoRA(r=4), loss=True, backend="reference")
    assert loss_row(model).backend == "reference"
    model(**batch()).loss.backward()
    losses.swap_losses(model, "auto", True)
    with pytest.raises(NoBackendError, match=r"cross_entropy: .*strict=True"):
        model(**batch())


def test_three_steps_of_trainer(tiny: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [[(start + i) % 60 for i in range(9)] for start in range(24)]
    examples = [{"input_ids": row, "labels": row} for row in rows]
    curves = []
    for loss in (False, True):
        model = peft_llama(tiny)
        deltaops.accelerate(model, loss=loss)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=examples)
        trainer.train()
        curves.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_whole_model_compiles(tiny: Callable[..., Any]) -> None:
    model = tiny("llama").model
    deltaops.attach(model, LoRA(r=4), loss=True)
    want = model(**batch()).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch()).loss, want)
