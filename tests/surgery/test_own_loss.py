"""Language models that compute their loss inside ``forward``: the same number from the op."""

from __future__ import annotations

import copy
import inspect
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA, Prompt
from deltaops.modules import own_loss
from deltaops.surgery import losses

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

SIZES = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert(**more: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(**SIZES, intermediate_size=40, **none, **more))


def two_losses() -> nn.Module:
    """Its second loss has two classes, and is torch's."""
    from transformers import BertForPreTraining

    return BertForPreTraining(bert().config)


def distilbert() -> nn.Module:
    """Its loss is a module of its own."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    none = {"dropout": 0.0, "attention_dropout": 0.0}
    return DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=60, dim=24, n_layers=1, n_heads=2, hidden_dim=40, **none)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60, d_model=24, d_kv=12, d_ff=40, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


MODELS = {"bert": bert, "two-losses": two_losses, "distilbert": distilbert, "t5": t5}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """dtypes of the logits that reached the op."""
    seen: list[torch.dtype] = []
    real = own_loss.cross_entropy

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(logits.dtype)
        return real(logits, *args, **kwargs)

    monkeypatch.setattr(own_loss, "cross_entropy", counted)
    return seen


def batch(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :4] = -100
    more = {}
    if "ForPreTraining" in type(model).__name__:
        more["next_sentence_label"] = torch.tensor([0, 1])
    return {"input_ids": ids, "labels": labels, **more}


def loss_and_gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    out = model(**batch(model))
    out.loss.backward()
    return [out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def loss_row(model: nn.Module) -> Any:
    (row,) = [r for r in deltaops.report(model).rows if r.path.endswith("loss_function")]
    return row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_loss_and_gradients_and_all_given_back(
    kind: str, dtype: torch.dtype, shake: Callable[[nn.Module], None], calls: list[torch.dtype]
) -> None:
    model = MODELS[kind]().to(dtype)
    was, before = type(model), set(vars(model))
    handle = deltaops.attach(model, LoRA(r=2), loss=True)
    shake(model)
    row = loss_row(model)
    assert (row.kind, row.backend, row.reason) == ("loss", "cpu", "fused by cpu")
    fused = loss_and_gradients(model)
    assert calls == [dtype]
    losses.restore_losses(model)
    assert type(model) is was
    want = loss_and_gradients(model)
    assert len(calls) == 1
    assert fused[0].dtype == want[0].dtype
    bound = 1e-5 if dtype == torch.float32 else 0.03  # torch's log-softmax is rounded to bfloat16
    for ours, theirs in zip(fused, want, strict=True):
        assert (ours - theirs).norm() <= bound * theirs.norm() + 1e-7
    losses.swap_losses(model, "auto", False)
    handle.revert()
    assert type(model) is was
    assert set(vars(model)) == before


def test_labels_by_position_and_no_labels(calls: list[torch.dtype]) -> None:
    model = bert()
    deltaops.attach(model, LoRA(r=4))
    given = batch(model)
    ids, labels = given["input_ids"], given["labels"]
    want = model(**given).loss
    place = list(inspect.signature(model.forward).parameters).index("labels")
    out = model(ids, *[None] * (place - 1), labels)
    assert torch.equal(out.loss, want)
    assert len(calls) == 2
    assert model(ids).loss is None
    tuples = model(ids, labels=labels, return_dict=False)
    assert torch.equal(tuples[0], want)
    assert not model.get_output_embeddings()._forward_hooks


def test_only_the_loss_of_the_head_is_answered() -> None:
    mode = own_loss.AnsweredLoss(5, "auto", False)
    logits, target = torch.randn(4, 5), torch.tensor([0, 1, -100, 4])
    want = nn.functional.cross_entropy
    weight, odd = torch.rand(5), torch.randn(4, 5, 3)
    cases: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((logits, target), {}),
        ((logits, target.clamp(min=0)), {"reduction": "sum", "ignore_index": 4}),
        ((logits, target), {"reduction": "none"}),
        ((logits, target, weight), {}),
        ((logits, target), {"label_smoothing": 0.1}),
        ((logits[:, :4], target.clamp(max=3)), {}),
        ((logits, logits.softmax(1)), {}),
        ((odd, torch.zeros(4, 3, dtype=torch.int64)), {}),
    ]
    for args, kwargs in cases:
        with mode:
            got = nn.functional.cross_entropy(*args, **kwargs)
        torch.testing.assert_close(got, want(*args, **kwargs))


def test_an_error_in_forward_leaves_nothing_behind() -> None:
    model = bert()
    deltaops.attach(model, LoRA(r=4))
    given = batch(model)
    given["labels"] = given["labels"].clone().fill_(77)
    with pytest.raises(ValueError, match="77"):
        model(**given)
    assert not model.get_output_embeddings()._forward_hooks
    assert not torch.overrides._get_current_function_mode_stack()
    model(**batch(model)).loss.backward()


def test_threads_do_not_meet() -> None:
    model = bert()
    deltaops.attach(model, LoRA(r=4))
    want, got = model(**batch(model)).loss, []

    def run() -> None:
        for _ in range(20):
            got.append(model(**batch(model)).loss.detach())
            assert not torch.overrides._get_current_function_mode_stack()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 80
    assert all(torch.equal(one, want) for one in got)


def test_copies_pickles_and_files_are_the_models_own(
    tmp_path: Path, calls: list[torch.dtype]
) -> None:
    from transformers import BertForMaskedLM

    model = bert()
    handle = deltaops.attach(model, LoRA(r=4))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    want = loss_and_gradients(model)[0]
    for twin in (copy.deepcopy(model), torch.load(stored, weights_only=False)):
        assert isinstance(twin, BertForMaskedLM)
        assert torch.equal(loss_and_gradients(twin)[0], want)
        assert loss_row(twin).kind == "loss"
    assert len(calls) == 3
    assert inspect.signature(model.forward) == inspect.signature(bert().forward)
    handle.merge()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "BertForMaskedLM"
    ]


def test_strict_doubles_and_compiled() -> None:
    from deltaops.errors import NoBackendError

    model = bert().double()
    want = model(**batch(model)).loss
    deltaops.attach(model, LoRA(r=4), loss=True)
    torch.testing.assert_close(model(**batch(model)).loss, want)
    assert loss_row(model).backend == "torch"
    losses.swap_losses(model, "auto", True)
    with pytest.raises(NoBackendError, match=r"cross_entropy: .*strict=True"):
        model(**batch(model))
    losses.swap_losses(model, "auto", False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch(model)).loss, want)


def test_beside_a_prompt_and_in_a_model_of_pefts(calls: list[torch.dtype]) -> None:
    import peft

    model = bert()
    deltaops.attach(model, Prompt(num_virtual_tokens=3))
    given = batch(model)
    model(**given).loss.backward()
    assert len(calls) == 1
    base = bert()
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    want = wrapped(**given).loss
    report = deltaops.accelerate(wrapped)
    torch.testing.assert_close(wrapped(**given).loss, want)
    assert len(calls) == 2
    report.revert()
    assert type(base).__mro__[0] is type(bert())
    wrapped(**given)
    assert len(calls) == 2


def test_under_autocast_the_loss_is_float32_as_torchs(calls: list[torch.dtype]) -> None:
    model = bert()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(**batch(model)).loss
        deltaops.attach(model, LoRA(r=4))
        got = model(**batch(model)).loss
    assert calls == [torch.bfloat16]
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-2, atol=0)


def test_a_forward_that_the_instance_keeps(calls: list[torch.dtype]) -> None:
    model = bert()
    given = batch(model)
    want = model(**given).loss
    handle = deltaops.attach(model, LoRA(r=4))
    model.forward = model.forward  # as accelerate does in mixed precision, and leaves it
    torch.testing.assert_close(model(**given).loss, want)
    assert len(calls) == 1
    handle.revert()
    assert torch.equal(model(**given).loss, want)
    deltaops.attach(model, LoRA(r=4), loss=True)
    torch.testing.assert_close(model(**given).loss, want)
    assert len(calls) == 1
    row = loss_row(model)
    assert (row.kind, row.reason) == ("left alone", "its forward was replaced on the instance")


def test_a_head_that_is_only_read_is_told() -> None:
    from transformers import MobileBertConfig, MobileBertForMaskedLM

    model = MobileBertForMaskedLM(
        MobileBertConfig(**SIZES, intermediate_size=40, embedding_size=16, intra_bottleneck_size=24)
    ).eval()
    given = batch(model)
    want = model(**given).loss
    handle = deltaops.attach(model, LoRA(r=4), loss=True)
    torch.testing.assert_close(model(**given).loss, want)
    row = loss_row(model)
    assert row.backend == "torch"
    assert row.reason == "its forward computes no loss for the op from what its head returns"
    before = set(vars(model))
    handle.revert()
    assert before - set(vars(model)) >= {"backend", "strict", "met"}
