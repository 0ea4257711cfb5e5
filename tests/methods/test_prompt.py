"""Prompts: PEFT computes the same; labels, poolings and ``generate`` know of tokens only."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import Prompt
from deltaops.errors import CheckpointError, ConfigError, ShapeError, TargetError
from deltaops.surgery import Handle
from deltaops.surgery.files import CONFIG, WEIGHTS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import HIDDEN, answer, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]

LENGTH = 4
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 7, dtype=torch.int64).index_put(
    (torch.tensor([1, 1]), torch.tensor([5, 6])), torch.tensor(0)
)
"""The second row ends with two pads."""


def prompted(model: nn.Module, **settings: Any) -> Handle:
    """A prompt far from its start."""
    handle = deltaops.attach(model, Prompt(num_virtual_tokens=LENGTH, **settings))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return handle


def result(model: Any, **inputs: Any) -> Tensor:
    """What the model's head returns, or the last hidden states."""
    out = model(**inputs)
    found: Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


# ------------------------------------------------------------------------------- PEFT as oracle

TASKS = [
    ("bert", "ForSequenceClassification", "SEQ_CLS"),
    ("roberta", "ForSequenceClassification", "SEQ_CLS"),
    ("distilbert", "ForSequenceClassification", "SEQ_CLS"),
    ("llama", "ForSequenceClassification", "SEQ_CLS"),
    ("gpt2", "LMHeadModel", "CAUSAL_LM"),
    ("llama", "ForCausalLM", "CAUSAL_LM"),
    ("t5", "ForConditionalGeneration", "SEQ_2_SEQ_LM"),
    ("bert", "ForTokenClassification", "TOKEN_CLS"),
    ("bert", "Model", "FEATURE_EXTRACTION"),
    ("t5", "EncoderModel", "FEATURE_EXTRACTION"),
]


@pytest.mark.parametrize(("name", "head", "task"), TASKS, ids=[f"{n}-{t}" for n, _, t in TASKS])
def test_peft_computes_the_same_and_files_go_both_ways(
    name: str, head: str, task: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": PADDED}
    if head == "ForConditionalGeneration":
        inputs["decoder_input_ids"] = IDS
    if (name, task) == ("llama", "SEQ_CLS"):
        inputs["attention_mask"] = None  # of embeddings PEFT cannot tell the last token
    saved = ["score" if name == "llama" else "classifier"] if task.endswith("CLS") else []
    model = build(name, head=head)
    handle = prompted(model, modules_to_save=saved)
    handle.save(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(build(name, head=head), tmp_path / "ours").eval()
    (weight,) = theirs.prompt_encoder.parameters()
    weight.requires_grad_()  # PEFT loads prompts for inference only
    found, expected = result(model, **inputs), result(theirs, **inputs)
    if expected.shape != found.shape:
        expected = expected[:, LENGTH:]
    if found.dim() == 3 and name != "t5":  # what stands on pads is nobody's
        found, expected = found[PADDED.bool()], expected[PADDED.bool()]
    assert relative_error(found, expected) < 16 * bound(0.0, torch.float32)
    for y in (found, expected):
        (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).mean().backward()
    grad = next(handle.parameters()).grad
    torch.testing.assert_close(grad, weight.grad, rtol=1e-3, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    bits = [(tmp_path / folder / WEIGHTS).read_bytes() for folder in ("ours", "theirs")]
    assert bits[0] == bits[1]
    back = build(name, head=head)
    deltaops.load(back, tmp_path / "theirs")
    assert torch.equal(result(back, **inputs), result(model, **inputs))


def test_embeddings_narrower_than_the_blocks_get_a_narrow_prompt(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import ElectraConfig, ElectraModel

    config = ElectraConfig(
        vocab_size=60, embedding_size=16, hidden_size=24, intermediate_size=40,
        num_hidden_layers=2, num_attention_heads=2,
    )  # fmt: skip
    base = ElectraModel(config).eval()
    model = copy.deepcopy(base)
    handle = prompted(model)
    assert next(handle.parameters()).shape == (LENGTH, 16)
    handle.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    found, expected = (result(m, input_ids=IDS) for m in (model, theirs))
    assert relative_error(found, expected[:, LENGTH:]) < 16 * bound(0.0, torch.float32)


def test_a_file_of_two_halves_keeps_both(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH)
    theirs = peft.get_peft_model(build("t5", head="ForConditionalGeneration"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = build("t5", head="ForConditionalGeneration")
    handle = deltaops.load(model, tmp_path / "theirs")
    assert handle.state()["encoder.prompt_embeddings"].shape == (2 * LENGTH, HIDDEN)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    error = relative_error(result(model, **inputs), result(theirs, **inputs))
    assert error < 16 * bound(0.0, torch.float32)
    handle.save(tmp_path / "ours")
    bits = [(tmp_path / folder / WEIGHTS).read_bytes() for folder in ("ours", "theirs")]
    assert bits[0] == bits[1]


def test_a_file_that_needs_more_is_refused() -> None:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "use_something_new": True}
    with pytest.raises(CheckpointError, match="use_something_new=True"):
        Prompt.from_peft(config)
    with pytest.raises(CheckpointError, match="num_virtual_tokens must be an integer"):
        Prompt.from_peft({"peft_type": "PROMPT_TUNING"})


# ------------------------------------------------------------------------------------- lengths


def test_a_language_models_loss_is_that_of_its_tokens() -> None:
    model: Any = build("gpt2", head="LMHeadModel")
    prompted(model)
    out = model(input_ids=IDS, labels=IDS, output_hidden_states=True)
    assert out.logits.shape == (2, 7, 60)
    assert [h.shape[1] for h in out.hidden_states] == [7] * 3
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    as_tuple = model(input_ids=IDS, return_dict=False)
    torch.testing.assert_close(as_tuple[0], out.logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_classified_as_without_its_pads(side: str) -> None:
    model: Any = build("llama", head="ForSequenceClassification")
    prompted(model)
    mask = PADDED.flip(1) if side == "left" else PADDED
    ids = IDS.masked_fill(mask == 0, 0)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(input_ids=ids, attention_mask=mask, position_ids=places).logits[1]
    alone = model(input_ids=ids[1:, mask[1] == 1]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left_changes_no_generated_token(name: str) -> None:
    model: Any = build(name, head="LMHeadModel" if name == "gpt2" else "ForCausalLM")
    prompted(model)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    mask = PADDED.flip(1)
    ids = IDS.masked_fill(mask == 0, 0)
    both = model.generate(ids, attention_mask=mask, **settings)
    alone = model.generate(ids[1:, 2:], **settings)
    assert torch.equal(both[1, 2:], alone[0])
    without = model.generate(ids, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(without, both)
    chunks = model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **settings)
    assert torch.equal(chunks, both)
    beams = [
        model.generate(ids, attention_mask=mask, num_beams=3, use_cache=cache, **settings)
        for cache in (True, False)
    ]
    assert torch.equal(*beams)


def test_generation_goes_on_from_a_cache_that_it_returned() -> None:
    model: Any = build("llama", head="ForCausalLM")
    handle = prompted(model)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    straight = model.generate(IDS, max_new_tokens=8, **settings)
    first = model.generate(IDS, max_new_tokens=3, return_dict_in_generate=True, **settings)
    cache = first.past_key_values
    assert cache.get_seq_length() == 7 + 2  # the last token was not read yet
    second = copy.deepcopy(cache)
    resumed = model.generate(first.sequences, max_new_tokens=5, past_key_values=cache, **settings)
    assert torch.equal(resumed, straight)
    with torch.no_grad():
        out = model(input_ids=first.sequences[:, -1:], past_key_values=second)
    assert torch.equal(out.logits[:, -1].argmax(-1), straight[:, 10])
    handle.revert()


@pytest.mark.parametrize("by_config", [False, True])
def test_a_tuple_holds_what_is_of_tokens(by_config: bool) -> None:
    model: Any = build("llama")
    prompted(model)
    named = model(IDS, output_hidden_states=True)
    model.config.return_dict = not by_config
    settings = {} if by_config else {"return_dict": False}
    last, cache, states = model(IDS, output_hidden_states=True, **settings)
    assert torch.equal(last, named.last_hidden_state)
    assert all(map(torch.equal, states, named.hidden_states))
    assert cache.get_seq_length() == IDS.shape[1]


def test_a_cache_can_be_pickled() -> None:
    model: Any = build("llama")
    prompted(model)
    with torch.no_grad():
        cache = model(IDS).past_key_values
        again = pickle.loads(pickle.dumps(cache))
        assert again.get_seq_length() == IDS.shape[1]
        results = [model(IDS[:, :1], past_key_values=c).last_hidden_state for c in (cache, again)]
    assert torch.equal(*results)


def test_an_encoder_and_its_decoder_generate_alike_with_a_cache_and_without() -> None:
    model: Any = build("t5", head="ForConditionalGeneration")
    handle = prompted(model)
    settings: dict[str, Any] = {
        "attention_mask": PADDED, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    found = [model.generate(IDS, use_cache=cache, **settings) for cache in (True, False)]
    assert torch.equal(*found)
    # the states of an encoder without a prompt are read as they are
    with handle.disabled():
        states = model.encoder(input_ids=IDS, attention_mask=PADDED)
        off = result(model, input_ids=IDS, attention_mask=PADDED, decoder_input_ids=IDS)
    given = {"encoder_outputs": states, "attention_mask": PADDED, "decoder_input_ids": IDS}
    assert torch.equal(result(model, **given), off)


def test_a_mask_for_a_cache_of_fixed_size_is_refused() -> None:
    model: Any = build("llama", head="ForCausalLM")
    prompted(model)
    with pytest.raises(ShapeError, match=r"must be a cache that grows, got a StaticCache"):
        model.generate(IDS, max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ShapeError, match=r"must be \[B, T\], of tokens, got \[1, 1, 7, 7\]"):
        model(input_ids=IDS, attention_mask=torch.ones(1, 1, 7, 7))


def test_packed_sequences_are_refused() -> None:
    model: Any = build("llama", head="ForCausalLM")
    prompted(model)
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ShapeError, match="packed into one row would need a prompt each"):
        model(input_ids=IDS[:1], position_ids=places, use_cache=False)


@pytest.mark.parametrize(
    ("name", "positions", "room"), [("gpt2", 12, 12), ("bert", 12, 12), ("roberta", 13, 12)]
)
def test_more_positions_than_the_model_has_are_refused(
    name: str, positions: int, room: int
) -> None:
    model: Any = build(
        name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": positions}
    )
    prompted(model)
    model(input_ids=torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(
        ShapeError, match=rf"4 vectors .* and 9 tokens .* the {room} positions .* leaves 8"
    ):
        model(input_ids=torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(TargetError, match=f"has {room} positions, and a prompt of {room} vectors"):
        deltaops.attach(
            build(
                name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": positions}
            ),
            Prompt(num_virtual_tokens=room),
        )


def test_a_cache_counts_against_the_positions_too() -> None:
    model: Any = build("gpt2", head="LMHeadModel", n_positions=14)
    prompted(model)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    assert model.generate(IDS, max_new_tokens=4, **settings).shape == (2, 11)
    with pytest.raises(ShapeError, match="leaves 10 of them"):
        model.generate(IDS, max_new_tokens=5, **settings)


# -------------------------------------------------------------------------------------- starts


def test_a_start_from_tokens_repeats_or_cuts_them() -> None:
    model: Any = build("gpt2")
    table = model.wte.weight.detach().clone()
    (prompt,) = deltaops.attach(
        model, Prompt(num_virtual_tokens=5, prompt_tuning_init=[7, 9])
    ).parameters()
    assert torch.equal(prompt, table[[7, 9, 7, 9, 7]])
    short = deltaops.attach(build("gpt2"), Prompt(1, torch.tensor([3, 4])))  # type: ignore[arg-type]  # taken too
    assert torch.equal(next(short.parameters()), table[[3]])
    for ids in (torch.tensor([[3, 4]]), torch.tensor([3, 4]).numpy(), [[3, 4]]):
        assert Prompt(1, ids).prompt_tuning_init == (3, 4)  # type: ignore[arg-type]  # taken too


def test_starts_are_of_the_vocabulary_or_as_scattered() -> None:
    model: Any = build("gpt2")
    table = model.wte.weight.detach().clone()
    draw = torch.Generator().manual_seed(5)
    (prompt,) = deltaops.attach(model, Prompt(), generator=draw).parameters()
    assert all(bool((table == row).all(1).any()) for row in prompt)
    again = deltaops.attach(build("gpt2"), Prompt(), generator=draw.manual_seed(5))
    assert torch.equal(prompt, next(again.parameters()))
    random = Prompt(num_virtual_tokens=30, prompt_tuning_init="RANDOM")
    (numbers,) = deltaops.attach(build("gpt2"), random).parameters()
    assert 0.8 < float(numbers.detach().std() / table.std()) < 1.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be an integer ≥ 1"),
        ({"prompt_tuning_init": "TEXT"}, r'For a text pass tokenizer\(text\)\["input_ids"\]'),
        ({"prompt_tuning_init": []}, "ids of tokens, got"),
        ({"prompt_tuning_init": [1, -2]}, "ids of tokens, got"),
        ({"num_transformer_submodules": 0}, "num_transformer_submodules must be"),
        ({"layers_to_transform": [0]}, "before the first layer"),
        ({"autocast_adapter_dtype": 1}, "must be a bool"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prompt(**settings)


def test_what_cannot_have_the_prompt_says_why() -> None:
    with pytest.raises(TargetError, match="it has 60 tokens, none with prompt_tuning_init's 60"):
        deltaops.attach(build("gpt2"), Prompt(prompt_tuning_init=[60]))
    with pytest.raises(TargetError, match=r'reads no tokens .*prompt_tuning_init="random"'):
        deltaops.attach(build("clip vision"), Prompt())
    with pytest.raises(TargetError, match="decoder: it reads an encoder"):
        deltaops.attach(build("t5"), Prompt(target_modules=["decoder"]))


def test_a_model_that_scales_embeddings_by_itself_is_refused() -> None:
    from transformers import MarianConfig, MarianModel

    config = MarianConfig(
        vocab_size=60, d_model=24, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=40,
        decoder_ffn_dim=40, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0,
        scale_embedding=True, decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with pytest.raises(TargetError, match="multiplies the embeddings of tokens by embed_scale"):
        deltaops.attach(MarianModel(config), Prompt())


def test_two_stacks_of_one_model_are_refused_by_name() -> None:
    pair = nn.ModuleDict({"one": build("gpt2"), "two": build("gpt2")})
    with pytest.raises(TargetError, match=r"'two' would be the second stack .* after 'one'"):
        deltaops.attach(pair, Prompt())
    assert {type(m).__module__.split(".")[0] for m in pair.modules()} <= {"torch", "transformers"}
    assert deltaops.attach(pair, Prompt(target_modules=["two"])).sites == ("two",)


def test_a_prompt_on_one_of_two_stacks_is_saved_with_its_name(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), HIDDEN)
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 60, "max_position_embeddings": 20, "eos_token_id": 2}
    image = sizes | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=HIDDEN)
    first, second = (CLIPModel(config).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    name = "text_model.encoder"
    prompted(first, target_modules=[name], prompt_tuning_init="random").save(tmp_path / "one")
    assert deltaops.load(second, tmp_path / "one").sites == (name,)
    inputs = {"input_ids": IDS, "pixel_values": torch.randn(2, 3, 16, 16)}
    assert torch.equal(second(**inputs).logits_per_text, first(**inputs).logits_per_text)
    prompted(build("gpt2")).save(tmp_path / "peft")
    assert (tmp_path / "peft" / CONFIG).exists()
    pair = nn.ModuleDict({"one": build("gpt2"), "two": build("gpt2")})
    with pytest.raises(CheckpointError, match="would be the second stack"):
        deltaops.load(pair, tmp_path / "peft")


# ------------------------------------------------------------------------------- what it leaves


def test_a_classifier_of_half_precision_trains_its_prompt_in_float32() -> None:
    model = build("llama").to(torch.bfloat16)
    (prompt,) = prompted(model).parameters()
    assert prompt.dtype == torch.float32
    y = answer("llama", model)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert prompt.grad is not None


def test_classes_keep_the_names_that_transformers_looks_them_up_by(tmp_path: Path) -> None:
    model: Any = build("llama")
    handle = prompted(model)
    assert str(type(model)) == str(type(build("llama")))
    assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 3
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaModel"]
    assert "(the model)  LlamaModel 24 prompt  +96" in str(handle)
    assert any(row.kind == "prompt" for row in deltaops.report(model).rows)


def test_a_pickle_computes_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    model = build("gpt2")
    prompted(model)
    torch.save(model, tmp_path / "model.pt")
    expected = answer("gpt2", model)
    program = (
        "import sys, torch; torch.set_num_threads(1);"
        "from deltaops.testing.architectures import answer;"
        "model = torch.load(sys.argv[1], weights_only=False);"
        "torch.save(answer('gpt2', model), sys.argv[2])"
    )
    files = [str(tmp_path / "model.pt"), str(tmp_path / "answer.pt")]
    subprocess.run([sys.executable, "-P", "-c", program, *files], check=True)
    assert torch.equal(torch.load(files[1]), expected)


def test_the_trainer_trains_evaluates_and_resumes_a_prompt(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model: Any = build("gpt2", head="LMHeadModel")
    handle = prompted(model)
    before = next(handle.parameters()).detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[],
        use_cpu=True, save_strategy="no", learning_rate=0.01, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    assert not torch.equal(next(handle.parameters()), before)
    assert trainer.predict(rows).predictions.shape == (8, 7, 60)


def test_a_table_that_somebody_watches_is_called_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = build("gpt2")
    handle = prompted(model)
    gathers = []
    gather = deltaops.modules.prompt.prompt_embedding

    def counted(*given: Tensor) -> Tensor:
        gathers.append(given)
        return gather(*given)

    monkeypatch.setattr("deltaops.modules.prompt.prompt_embedding", counted)
    outputs = []
    for watched in (False, True):
        model.zero_grad()
        seen: list[Any] = []
        if watched:
            model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))  # noqa: B023  # called at once
        y = result(model, input_ids=IDS)
        y.square().sum().backward()
        (prompt,) = handle.parameters()
        outputs.append((y.detach(), prompt.grad))
        assert (len(gathers), len(seen)) == (1, int(watched))
    (y, grad), (same, alike) = outputs
    assert torch.equal(y, same)
    torch.testing.assert_close(grad, alike)
