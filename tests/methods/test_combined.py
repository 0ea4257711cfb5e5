"""Combinations: how they are said, named, refused, run as one op, switched and saved."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import deltaops
from deltaops import (
    IA3,
    Adapter,
    BitFit,
    Combined,
    IntrinsicPrompt,
    LNTuning,
    LoRA,
    ParallelAdapter,
    Prefix,
    Prompt,
)
from deltaops.errors import AttachError, CheckpointError, ConfigError, TargetError
from deltaops.methods import PRESETS, as_delta
from deltaops.modules import place
from deltaops.surgery import Handle
from deltaops.surgery.files import MANIFEST, TENSORS
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build
from deltaops.tuning.spec import parse_delta

pytestmark = [
    # transformers renames gradient checkpointing between the versions that we support
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type.*:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def moved(handle: Handle) -> Handle:
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return handle


# -------------------------------------------------------------------------------------- saying


def test_a_sum_names_its_parts_by_their_methods() -> None:
    delta = LoRA(r=2) + BitFit() + LoRA(r=4).named("wide") + LoRA(r=1)
    assert list(delta.by_name) == ["lora", "bitfit", "wide", "lora2"]
    assert delta == LoRA(r=2) + (BitFit() + LoRA(r=4).named("wide")) + LoRA(r=1)
    assert (
        Combined([LoRA(r=2), BitFit()]) == LoRA(r=2) + BitFit() == as_delta([LoRA(r=2), BitFit()])
    )
    assert list(Combined({"slow": LoRA(r=2), "fast": LoRA(r=4)}).by_name) == ["slow", "fast"]
    assert hash(delta) == hash(copy.deepcopy(delta))
    assert "named('wide')" in repr(delta)


def test_modules_to_save_of_one_part_are_left_alone_by_all() -> None:
    model = build("bert", head="ForSequenceClassification")
    handle = deltaops.attach(model, LoRA(r=2, modules_to_save=["classifier"]) + BitFit())
    assert "classifier" not in handle.sites
    assert sum(key.startswith("classifier.") for key in handle.state()) == 2


def test_a_mapping_says_places() -> None:
    model = build("bert")
    handle = deltaops.attach(
        model,
        {
            "query|value": LoRA(r=3),
            "mlp": ParallelAdapter(7),
            "attention": Adapter(size=5),
            r".*\.1\..*\.key": LoRA(r=2),
        },
    )
    found = {part: {s.path for s in handle.places if s.part == part} for part in handle.parts}
    layers = ("encoder.layer.0", "encoder.layer.1")
    assert found == {
        "lora": {f"{at}.attention.self.{x}" for at in layers for x in ("query", "value")},
        "parallel": {f"{at}.output.dense" for at in layers},
        "adapter": {f"{at}.attention.output.dense" for at in layers},
        "lora2": {"encoder.layer.1.attention.self.key"},
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_a_model_of_usual_widths(name: str) -> None:
    model = build("bert", hidden_size=32, intermediate_size=64)
    handle = deltaops.attach(model, name.upper())
    assert handle.delta == PRESETS[name]()
    assert handle.places
    handle.revert()


@pytest.mark.parametrize(
    ("spec", "delta"),
    [
        ("lora:r=4+bitfit", LoRA(r=4) + BitFit()),
        (
            "lora:target_modules=query+value,r=4+adapter:size=5",
            LoRA(r=4, target_modules=["query", "value"]) + Adapter(size=5),
        ),
        ("mam", PRESETS["MAM"]()),
        ("unipelt", PRESETS["UniPELT"]()),
        ("LoRA+BitFit", PRESETS["LoRA+BitFit"]()),
    ],
)
def test_the_command_line_says_them(spec: str, delta: Combined) -> None:
    assert parse_delta(spec) == delta
    head = parse_delta(spec, modules_to_save=["classifier"])
    assert head.gated == delta.gated
    assert all(part.modules_to_save == ("classifier",) for part in head.by_name.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Combined([]), "at least one delta"),
        (lambda: Combined({"a/b": LoRA()}), "'a/b' cannot name a part"),
        (lambda: Combined((("a", LoRA()), ("a", BitFit()))), "distinct names, got a, a"),
        (lambda: Combined({"a": 3}), "'a' must be a delta"),  # type: ignore[dict-item]
        (lambda: LoRA() + 3, "expected deltas such as"),  # type: ignore[operator]
        (lambda: as_delta(3), "expected a delta such as"),
        (lambda: as_delta("MAN"), "names no combination; there are MAM, UniPELT"),
        (lambda: as_delta({"query": 3}), "expected a delta for each place"),
        (
            lambda: as_delta({"query": LoRA(target_modules=["key"])}),
            "so does its own target_modules",
        ),
    ],
)
def test_what_is_no_combination_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ------------------------------------------------------------------------------------ refusing


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (BitFit() + LNTuning(), "its bias, by 'bitfit' and 'lntuning'"),
        (
            BitFit() + ParallelAdapter(size=2, target_modules=["key"]),
            "self.key: its bias, by 'bitfit' and 'parallel'",
        ),
        (LoRA(r=2, use_dora=True) + LoRA(r=2), "its weight, by 'lora' and 'lora2'"),
        (IA3() + LoRA(r=2, init_lora_weights="pissa"), "its weight, by 'ia3' and 'lora'"),
        (Prefix() + Prefix(num_virtual_tokens=2), "'prefix' and 'prefix2' both want to be"),
        (
            Prompt(prompt_tuning_init="random") + IntrinsicPrompt(),
            "'prompt' and 'intrinsic-prompt' both want to be the prompt",
        ),
    ],
)
def test_two_that_cannot_share_a_place_are_refused_before_anything_changes(
    delta: Combined, message: str
) -> None:
    model = build("bert")
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    with pytest.raises(AttachError, match=message):
        deltaops.attach(model, delta)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before


def test_a_part_that_matches_nothing_or_does_not_fit_is_named() -> None:
    model = build("bert")
    with pytest.raises(TargetError, match="the part 'lora2': target_modules"):
        deltaops.attach(model, LoRA(r=2) + LoRA(r=2, target_modules=["nowhere"]))
    with pytest.raises(ConfigError, match="the part 'adapter': the delta does not fit"):
        deltaops.attach(model, LoRA(r=2) + Adapter(reduction_factor=7))
    assert deltaops.surgery.handle_of(model) is None


def test_a_part_that_fails_halfway_takes_all_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    model = build("llama")
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    monkeypatch.setattr(Adapter, "bind", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        deltaops.attach(model, LoRA(r=2) + Prefix(num_virtual_tokens=2) + Adapter(size=2))
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before


# --------------------------------------------------------------------------------------- fusing


def calls_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """Calls of the op alone, in groups, and branches in all of them, in one forward pass."""
    single: list[int] = []
    groups: list[int] = []

    def alone(x: Any, weight: Any, bias: Any, branches: Any, *rest: Any, **named: Any) -> Any:
        single.append(len(branches))
        return op(x, weight, bias, branches, *rest, **named)

    def together(x: Any, layers: Any, **named: Any) -> Any:
        groups.append(sum(len(layer.branches) for layer in layers))
        return group(x, layers, **named)

    sharing = importlib.import_module("deltaops.modules.sharing")  # a function has its name
    op, group = place.delta_linear, sharing.delta_linear_group
    with monkeypatch.context() as patch:
        patch.setattr(place, "delta_linear", alone)
        patch.setattr(sharing, "delta_linear_group", together)
        answer("llama", model)
    return len(single), len(groups), sum(single) + sum(groups)


def test_all_that_is_on_one_linear_is_one_call_and_groups_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, stacked = build("llama"), build("llama")
    deltaops.attach(plain, LoRA(r=2))
    handle = deltaops.attach(
        stacked,
        LoRA(r=2) + LoRA(r=3) + BitFit(target_modules=["o_proj", "k_proj", "gate_proj"]),
    )
    single, groups, branches = calls_of(plain, monkeypatch)
    assert groups == 4  # of two blocks: q, k and v; gate and up
    assert branches == 14
    assert calls_of(stacked, monkeypatch) == (single, groups, 2 * branches)
    with handle.disabled("lora2"):
        assert calls_of(stacked, monkeypatch) == (single, groups, branches)


def test_an_activation_and_a_bias_join_the_call_of_a_low_rank(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("llama")
    before = calls_of(deltaops.attach(copy.deepcopy(model), LoRA(r=2)).model, monkeypatch)
    deltaops.attach(model, LoRA(r=2) + ParallelAdapter(size=3, target_modules=["q_proj"]))
    assert calls_of(model, monkeypatch) == (*before[:2], before[2] + 2)


# ------------------------------------------------------------------------------------ switching


def test_parts_are_switched_by_name_and_all_of_it_is_undone() -> None:
    model = build("bert")
    handle = moved(deltaops.attach(model, LoRA(r=2) + BitFit() + Adapter(size=3)))
    all_on = answer("bert", model)
    handle.disable("lora", "adapter")
    assert handle.enabled == ("bitfit",)
    assert "lora (off)" in str(handle)
    bias_alone = answer("bert", model)
    with handle.disabled("bitfit"):
        nothing = answer("bert", model)
        with handle.disabled("bitfit"), handle.disabled():
            assert torch.equal(answer("bert", model), nothing)
        assert torch.equal(answer("bert", model), nothing)
    with handle.disabled():
        assert torch.equal(answer("bert", model), nothing)
    assert torch.equal(answer("bert", model), bias_alone)
    handle.enable("lora")
    assert not torch.equal(answer("bert", model), bias_alone)
    handle.enable()
    assert torch.equal(answer("bert", model), all_on)
    handle.disable()
    assert torch.equal(answer("bert", model), nothing)
    handle.revert()


def test_switching_of_what_is_merged_and_merging_of_what_is_off_are_refused() -> None:
    handle = moved(deltaops.attach(build("bert"), LoRA(r=2) + BitFit()))
    with pytest.raises(ConfigError, match="no part is called 'lore'; there are lora, bitfit"):
        handle.disable("lore")
    handle.disable("bitfit")
    with pytest.raises(AttachError, match="bitfit is switched off, and would be lost"):
        handle.merge()
    handle.enable()
    handle.merge()
    with pytest.raises(AttachError, match=r"handle.disable: the delta is merged"):
        handle.disable("lora")


def test_a_weight_multiplies_what_a_part_adds_and_files_hold_it(tmp_path: Path) -> None:
    model = build("llama")
    pattern = {"q_proj": 5}
    wish = LoRA(r=2, alpha=3, alpha_pattern=pattern) + LoRA(r=3).named("other") + Adapter(size=3)
    handle = moved(deltaops.attach(model, wish))
    start = answer("llama", model)
    handle.weigh("lora", 0.3)
    assert handle.weights == {"lora": 0.3, "other": 1.0, "adapter": 1.0}
    assert "lora × 0.3 + lora 'other'" in str(handle)
    weighed = answer("llama", model)
    with handle.disabled("lora"):
        off = answer("llama", model)
    handle.save(tmp_path / "all")
    handle.save(tmp_path / "lora", part="lora", format="peft")
    twin = build("llama")
    again = deltaops.load(twin, tmp_path / "all")
    assert torch.equal(answer("llama", twin), weighed)
    assert again.parts["lora"] == LoRA(r=2, alpha=0.3 * 3, alpha_pattern={"q_proj": 0.3 * 5})
    alone = build("llama")
    deltaops.load(alone, tmp_path / "lora")
    with handle.disabled("other", "adapter"):
        assert torch.equal(answer("llama", model), answer("llama", alone))
    handle.weigh("lora", 0)
    assert relative_error(answer("llama", model), off) < 16 * bound(0.0, torch.float32)
    handle.weigh("lora", 1)
    assert torch.equal(answer("llama", model), start)
    with pytest.raises(ConfigError, match="Adapter: what it does cannot be weighed"):
        handle.weigh("adapter", 0.5)
    with pytest.raises(ConfigError, match="must be a finite number, got nan"):
        handle.weigh("lora", float("nan"))


def test_two_lora_on_one_embedding_and_on_the_same_experts(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=24, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    model = transformers.MixtralModel(config).eval()
    places = ["embed_tokens", "experts", "q_proj"]
    wish = LoRA(r=2, alpha=3, target_modules=places) + LoRA(r=4, alpha=3, target_modules=places)
    base, twin = answer("llama", model), copy.deepcopy(model)
    handle = moved(deltaops.attach(model, wish))
    both = answer("llama", model)
    handle.weigh("lora", 2)
    handle.save(tmp_path)
    deltaops.load(twin, tmp_path)
    assert torch.equal(answer("llama", twin), answer("llama", model))
    handle.weigh("lora", 1)
    assert torch.equal(answer("llama", model), both)
    handle.merge()
    assert relative_error(answer("llama", model), both) < 16 * bound(0.0, torch.float32)
    handle.unmerge()
    handle.save(tmp_path, part="lora2")
    alone = copy.deepcopy(model)
    deltaops.surgery.handle_of(alone).revert()  # type: ignore[union-attr]
    deltaops.load(alone, tmp_path)
    with handle.disabled("lora"):
        assert torch.equal(answer("llama", alone), answer("llama", model))
    handle.revert()
    assert torch.equal(answer("llama", model), base)


def test_a_single_delta_is_a_part_by_the_name_of_the_adapter() -> None:
    model = build("gpt2")
    handle = moved(deltaops.attach(model, LoRA(r=2)))
    on = answer("gpt2", model)
    with handle.disabled("default"):
        assert handle.enabled == ()
        assert not torch.equal(answer("gpt2", model), on)
    assert torch.equal(answer("gpt2", model), on)


def test_the_report_has_a_line_for_each_layer_with_all_its_kinds() -> None:
    model = build("bert")
    handle = deltaops.attach(model, LoRA(r=2) + BitFit())
    kinds = {row.path: row.kind for row in deltaops.report(model).rows}
    assert kinds["encoder.layer.0.output.dense"] == "lora + bitfit"
    assert kinds["encoder.layer.0.output.LayerNorm"] == "bitfit"
    assert "Linear 24→24 lora + bitfit" in str(handle)
    handle.disable("bitfit")
    whys = {row.path: row.reason for row in deltaops.report(model).rows}
    assert whys["encoder.layer.0.output.dense"].endswith("; bitfit is off")


# ---------------------------------------------------------------------------------------- files


def saved(folder: Path, delta: Combined, **settings: Any) -> tuple[nn.Module, Handle]:
    model = build("bert", head="ForSequenceClassification")
    handle = moved(deltaops.attach(model, delta))
    handle.save(folder, **settings)
    return model, handle


STACK = LoRA(r=2, modules_to_save=["classifier"]) + LNTuning() + Adapter(size=3)


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([[5, 17, 3]])).logits
    return found


def test_one_manifest_has_all_parts_and_what_is_off(tmp_path: Path) -> None:
    model, handle = saved(tmp_path, STACK)
    expected = logits(model)
    handle.disable("adapter")
    handle.save(tmp_path)
    assert handle.enabled == ("lora", "lntuning")
    assert sorted(p.name for p in tmp_path.iterdir()) == [MANIFEST, TENSORS]
    parts = json.loads((tmp_path / MANIFEST).read_text())["parts"]
    assert [part["name"] for part in parts] == ["lora", "lntuning", "adapter"]
    twin = build("bert", head="ForSequenceClassification")
    loaded = deltaops.load(twin, tmp_path, trainable=False)
    assert loaded.delta == handle.delta
    assert torch.equal(logits(twin), expected)
    loaded.revert()
    assert torch.equal(logits(twin), logits(build("bert", head="ForSequenceClassification")))


def test_flat_makes_every_part_flat(tmp_path: Path) -> None:
    model = build("llama")
    handle = deltaops.attach(model, Prefix(3, reparameterised=True) + LoRA(r=2))
    moved(handle).save(tmp_path, flat=True)
    twin = build("llama")
    loaded = deltaops.load(twin, tmp_path)
    assert loaded.parts["prefix"] == Prefix(3)
    assert relative_error(answer("llama", twin), answer("llama", model)) < 16 * bound(
        0.0, torch.float32
    )


@pytest.mark.parametrize("part", ["lora", "lntuning"])
def test_a_part_that_peft_has_is_exported_to_its_files(part: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, handle = saved(tmp_path, STACK, part=part, format="peft")
    others = [name for name in handle.parts if name != part]
    with handle.disabled(*others):
        expected = logits(model)
    theirs = peft.PeftModel.from_pretrained(
        build("bert", head="ForSequenceClassification"), tmp_path
    ).eval()
    assert relative_error(logits(theirs), expected) < 16 * bound(0.0, torch.float32)


def test_a_part_that_peft_lacks_is_written_in_our_format_or_refused(tmp_path: Path) -> None:
    _, handle = saved(tmp_path, STACK, part="adapter")
    loaded = deltaops.load(build("bert", head="ForSequenceClassification"), tmp_path)
    assert loaded.delta == Adapter(size=3, modules_to_save=["classifier"])
    with pytest.raises(CheckpointError, match="PEFT has no such method"):
        handle.save(tmp_path, part="adapter", format="peft")
    with pytest.raises(CheckpointError, match=r"save\(path, part=NAME\)"):
        handle.save(tmp_path, format="peft")
    with pytest.raises(ConfigError, match="no part is called 'x'; there are lora"):
        handle.save(tmp_path, part="x")
    with pytest.raises(ConfigError, match="format must be one of auto, peft, deltaops"):
        handle.save(tmp_path, format="pickle")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m["parts"].pop(), "belong to nothing in this model: 'adapter/"),
        (lambda m: m["parts"][0].update(name="x/y"), "cannot name a part"),
        (lambda m: m["parts"][1].update(name="lora"), "distinct names"),
        (lambda m: m["parts"][0].update(method="lorra"), "method='lorra'"),
        (lambda m: m["parts"][0].update(settings={"rank": 3}), "rank"),
        (lambda m: m["parts"][0].update(settings=None), "an object of settings"),
        (lambda m: m.update(parts={}), "must have a list of parts"),
        (lambda m: m.update(parts=[]), "at least one delta"),
        (lambda m: m["parts"][2]["settings"].update(size=4), "adapter/.* must be "),
    ],
)
def test_a_foreign_manifest_is_refused_and_the_model_left_alone(
    damage: Any, message: str, tmp_path: Path
) -> None:
    saved(tmp_path, STACK)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    damage(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    model = build("bert", head="ForSequenceClassification")
    before = logits(model)
    with pytest.raises(CheckpointError, match=message):
        deltaops.load(model, tmp_path)
    assert deltaops.surgery.handle_of(model) is None
    assert torch.equal(logits(model), before)


def test_truncated_tensors_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, STACK)
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        deltaops.load(build("bert", head="ForSequenceClassification"), tmp_path)


def test_a_name_is_the_folder_of_all_parts(tmp_path: Path) -> None:
    handle = deltaops.attach(build("bert"), LoRA(r=2) + BitFit(), name="mine")
    handle.save(tmp_path)
    assert (tmp_path / "mine" / MANIFEST).is_file()


@pytest.mark.parametrize("order", [1, -1], ids=["bias first", "norms first"])
def test_a_bias_that_one_gives_to_norms_is_not_trained_by_the_other(
    order: int, tmp_path: Path
) -> None:
    model, twin = build("llama"), build("llama")
    before = answer("llama", model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    deltas = [BitFit(target_modules="all-norm"), LNTuning()][::order]
    handle = moved(deltaops.attach(model, deltas))
    assert {key.rpartition(".")[2] for key in handle.state() if "lntuning/" in key} == {"weight"}
    assert len({id(p) for p in handle.parameters()}) == len(handle.state())
    handle.save(tmp_path)
    deltaops.load(twin, tmp_path)
    assert torch.equal(answer("llama", twin), answer("llama", model))
    handle.revert()
    assert torch.equal(answer("llama", model), before)
    assert all(torch.equal(state.pop(k), tensor) for k, tensor in model.state_dict().items())
    assert not state


def test_a_manifest_of_before_gates_has_none(tmp_path: Path) -> None:
    _, handle = saved(tmp_path, STACK)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["gated"]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    loaded = deltaops.load(build("bert", head="ForSequenceClassification"), tmp_path)
    assert loaded.delta == handle.delta


def test_inspect_and_convert_say_what_a_manifest_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from deltaops.cli.convert import convert
    from deltaops.cli.inspect import inspect

    deltaops.attach(build("bert"), (LoRA(r=2) + Adapter(size=3)).with_gates()).save(tmp_path)
    inspect(str(tmp_path), "lora")
    shown = capsys.readouterr().out
    assert "part adapter" in shown
    assert "gated" in shown
    with pytest.raises(CheckpointError, match="is in deltaops' format already"):
        convert(tmp_path, tmp_path / "out", None, None)
    for parts in ([{"name": "lora"}], ["lora"], 3):
        (tmp_path / MANIFEST).write_text(json.dumps({"parts": parts}))
        with pytest.raises(CheckpointError, match="a list of parts, each with name, method"):
            inspect(str(tmp_path), "lora")
