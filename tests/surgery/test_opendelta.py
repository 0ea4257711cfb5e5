"""Deltas as OpenDelta names them, computed by hooks as OpenDelta does, and taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from typer.testing import CliRunner

import deltaops
from deltaops.cli import app
from deltaops.errors import CheckpointError
from deltaops.surgery.files import CONFIG, MANIFEST
from deltaops.surgery.opendelta import from_opendelta, read_opendelta
from deltaops.testing import relative_error
from deltaops.testing.architectures import HIDDEN, answer, build

WIDTH, RANK = 5, 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.2


def hidden(y: Any) -> Tensor:
    found: Tensor = y[0] if isinstance(y, tuple) else y
    return found


def with_hidden(y: Any, value: Tensor) -> Any:
    return (value, *y[1:]) if isinstance(y, tuple) else value


def lora(module: nn.Linear, scaling: float) -> dict[str, Tensor]:
    a, b = drawn(RANK, module.in_features), drawn(module.out_features, RANK)
    module.register_forward_hook(lambda m, args, y: y + scaling * (args[0] @ a.T @ b.T))
    return {"lora.lora_A": a, "lora.lora_B": b}


def adapter(module: nn.Module) -> dict[str, Tensor]:
    down, d, up, u = drawn(WIDTH, HIDDEN), drawn(WIDTH), drawn(HIDDEN, WIDTH), drawn(HIDDEN)

    def after(m: nn.Module, args: Any, y: Any) -> Any:
        x = hidden(y)
        inner = functional.gelu(x @ down.T + d, approximate="tanh")
        return with_hidden(y, x + inner @ up.T + u)

    module.register_forward_hook(after)
    names = ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias")
    return {f"adapter.modulelist.{n}": t for n, t in zip(names, (down, d, up, u), strict=True)}


def added(module: nn.Module) -> dict[str, Tensor]:
    bias = drawn(HIDDEN)
    module.register_forward_hook(lambda m, args, y: y + bias)
    return {"bitfit.bias": bias}


def under(path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def check(name: str, twin: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Attach to another model of the same weights; its answer is that of the hooked one."""
    model = build(name)
    before = answer(name, model)
    expected = answer(name, twin)
    handle = from_opendelta(model, config, tensors)
    assert relative_error(answer(name, model), expected) < 1e-5
    assert relative_error(before, expected) > 1e-2
    return handle


def test_lora() -> None:
    torch.manual_seed(1)
    twin = build("t5")
    paths = [p for p, m in twin.named_modules() if p.endswith((".q", ".v"))]
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= under(path, lora(twin.get_submodule(path), 16 / RANK))  # type: ignore[arg-type]  # a linear
    tensors[f"{paths[0]}.lora.lin.weight"] = drawn(2, 2)  # of some versions, read by nothing
    handle = check("t5", twin, {"lora_r": RANK}, tensors)
    assert set(handle.sites) == set(paths)
    assert handle.delta.alpha == 16


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("t5", ("SelfAttention", "EncDecAttention", "DenseReluDense")),
        ("gpt2", (".attn", ".mlp")),
        ("distilbert", (".attention", ".ffn")),
        ("bert", ("attention.output.dense",)),
    ],
)
def test_adapters_after_modules_that_end_with_a_linear(name: str, ends: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    twin = build(name)
    tensors: dict[str, Tensor] = {}
    for path, module in list(twin.named_modules()):
        if path.endswith(ends):
            tensors |= under(path, adapter(module))
    handle = check(name, twin, {"bottleneck_dim": WIDTH}, tensors)
    assert len(handle.sites) * 4 == len(tensors)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_bitfit_on_linears_and_norms(name: str) -> None:
    torch.manual_seed(1)
    twin = build(name)
    tensors: dict[str, Tensor] = {}
    for path, module in list(twin.named_modules()):
        if type(module) is nn.Linear and "pooler" not in path:
            bias = drawn(module.out_features)
            module.bias = nn.Parameter(bias)
            tensors[f"{path}.bias"] = bias
        elif path.lower().endswith(("norm", "layer_norm")):
            tensors |= under(path, added(module))
    check(name, twin, {}, tensors)


def compacter(module: nn.Module) -> dict[str, Tensor]:
    n, width = 2, 4
    found: dict[str, Tensor] = {}
    weights = []
    for side, (inputs, outputs) in {"down": (HIDDEN, width), "up": (width, HIDDEN)}.items():
        rule, b = drawn(n, n, n), drawn(outputs)
        left, right = drawn(n, inputs // n, 1), drawn(n, 1, outputs // n)
        h = sum(torch.kron(rule[i], left[i] @ right[i]) for i in range(n))
        weights.append((h, b))
        names = ("phm_rule", "W_left", "W_right", "b")
        values = zip(names, (rule, left, right, b), strict=True)
        found |= {f"compactor.{side}_sampler.{name}": t for name, t in values}

    def after(m: nn.Module, args: Any, y: Any) -> Any:
        x = hidden(y)
        (down, d), (up, u) = weights
        return with_hidden(y, x + torch.relu(x @ down + d) @ up + u)

    module.register_forward_hook(after)
    return found


def test_compacter() -> None:
    torch.manual_seed(1)
    twin = build("t5")
    tensors: dict[str, Tensor] = {}
    for path, module in list(twin.named_modules()):
        if path.endswith(("SelfAttention", "DenseReluDense")):
            tensors |= under(path, compacter(module))
    check("t5", twin, {}, tensors)
    tensors.popitem()
    with pytest.raises(CheckpointError, match="has no up_sampler"):
        from_opendelta(build("t5"), {}, tensors)


@pytest.mark.parametrize("path", ["", "encoder."])
def test_soft_prompt(path: str) -> None:
    model, vectors = build("t5" if path else "bert"), drawn(5, HIDDEN)
    handle = from_opendelta(model, {}, {f"{path}soft_prompt_layer.soft_embeds": vectors})
    (held,) = handle.state().values()
    assert torch.equal(held, vectors)
    assert handle.delta.num_virtual_tokens == 5  # type: ignore[attr-defined]  # a Prompt


ATTENTIONS = {"bert": ("encoder.layer.{}.attention", ".self"), "gpt2": ("h.{}.attn", "")}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("mlp", [False, True], ids=["direct", "mlp"])
def test_prefixes_are_laid_out_by_head(name: str, mlp: bool) -> None:
    torch.manual_seed(1)
    path, inner = ATTENTIONS[name]
    length, heads, width = 3, 2, HIDDEN // 2
    if mlp:
        shapes = {"0": (7, 5), "2": (4 * HIDDEN, 7)}
        weights = {f"control_trans.{i}.weight": drawn(*shape) for i, shape in shapes.items()}
        biases = {f"control_trans.{i}.bias": drawn(shape[0]) for i, shape in shapes.items()}
        given = {"wte.weight": drawn(length, 5), "input_tokens": torch.arange(3), **weights}
        tensors = under(path.format(0) + ".reparams", given | biases)
        rows = torch.tanh(given["wte.weight"] @ weights["control_trans.0.weight"].T
                          + biases["control_trans.0.bias"])  # fmt: skip
        rows = rows @ weights["control_trans.2.weight"].T + biases["control_trans.2.bias"]
        parts = list(rows.split(HIDDEN, 1))
    else:
        parts = [drawn(length, HIDDEN) for _ in range(4)]
        tensors = {
            f"{path.format(i)}.prefix.past_{what}": parts[2 * i + j]
            for i in range(2)
            for j, what in enumerate(("key", "value"))
        }
    model, twin = build(name), build(name)
    handle = from_opendelta(model, {}, tensors)
    expected = deltaops.attach(twin, deltaops.Prefix(num_virtual_tokens=length))
    assert expected.state().keys() == handle.state().keys()
    with torch.no_grad():
        for i in range(2):
            for j, key in enumerate("kv"):
                held = expected.state()[f"{path.format(i)}{inner}.prefix_{key}"]
                for head in range(heads):
                    own = slice(head * width, (head + 1) * width)
                    held[head] = parts[2 * i + j][:, own]
    assert relative_error(answer(name, model), answer(name, twin)) < 1e-6


def test_prefixes_that_positions_count_are_refused() -> None:
    tensors = under("encoder.block.0.layer.0.SelfAttention.prefix", {"past_key": drawn(2, HIDDEN)})
    tensors |= {key.replace("past_key", "past_value"): t for key, t in tensors.items()}
    with pytest.raises(CheckpointError, match="here a T5Attention, is not known to be one of ours"):
        from_opendelta(build("t5"), {}, tensors)
    mlp = {"wte.weight": drawn(2, 5), "control_trans.0.weight": drawn(7, 5)}
    mlp |= {"control_trans.0.bias": drawn(7), "control_trans.2.bias": drawn(9)}
    tensors = under("h.0.attn.reparams", mlp | {"control_trans.2.weight": drawn(9, 7)})
    with pytest.raises(CheckpointError, match="expected the keys and values of this model's 2 att"):
        from_opendelta(build("gpt2"), {}, tensors)
    for rows in (2 * HIDDEN, 8 * HIDDEN):  # of one layer, of twice as many
        up = {"control_trans.2.weight": drawn(rows, 7), "control_trans.2.bias": drawn(rows)}
        with pytest.raises(CheckpointError, match=f"computes {rows} .* attentions, 4·{HIDDEN}"):
            from_opendelta(build("gpt2"), {}, under("h.0.attn.reparams", mlp | up))
    up = {"control_trans.2.weight": drawn(4 * HIDDEN, 7), "control_trans.2.bias": drawn(4 * HIDDEN)}
    with pytest.raises(
        CheckpointError, match=r"is in the first, 'h.0.attn', got one in 'h.1.attn'"
    ):
        from_opendelta(build("gpt2"), {}, under("h.1.attn.reparams", mlp | up))
    odd = mlp | up | {"control_trans.4.weight": drawn(2, 2)}
    with pytest.raises(CheckpointError, match=r"'control_trans.4.weight' beside the MLP"):
        from_opendelta(build("gpt2"), {}, under("h.0.attn.reparams", odd))


def test_a_head_trained_along_is_taken_over() -> None:
    model = build("bert", head="ForSequenceClassification", num_labels=3)
    head, path = {"weight": drawn(3, HIDDEN), "bias": drawn(3)}, "bert.encoder.layer.0.output.dense"
    tensors = under("classifier", head) | under(
        path, {"lora.lora_A": drawn(RANK, 40), "lora.lora_B": drawn(HIDDEN, RANK)}
    )
    handle = from_opendelta(model, {"lora_r": RANK}, tensors)
    assert handle.delta.modules_to_save == ("classifier",)
    assert torch.equal(handle.state()["classifier.weight"], head["weight"])


GOOD = {"lora.lora_A": drawn(RANK, HIDDEN), "lora.lora_B": drawn(HIDDEN, RANK)}
QUERY = "encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        (under("encoder.layer.0.attention", {**GOOD}), {"lora_r": RANK}, "does not fit"),
        (under(QUERY, GOOD), {"lora_r": 4}, r"must be \[4, 24\]"),
        (under(QUERY, {"lora.lora_A": GOOD["lora.lora_A"]}), {}, "has no lora_B"),
        (under(QUERY, GOOD), {"lora_r": "x"}, "OpenDelta's config.json"),
        (under(QUERY, {**GOOD, "lora.lora_B": drawn(HIDDEN, RANK) / 0}), {"lora_r": RANK}, "NaN"),
        (under(QUERY, {"prefix.past_key": drawn(2, 2)}), {}, "has no past_value"),
        (under(QUERY, {"low_rank_adapter.x": drawn(2, 2)}), {}, "low-rank adapters"),
        (under(QUERY, GOOD) | {"x.bitfit.bias": drawn(2)}, {}, "expected one delta"),
        ({"encoder.layer.0.output.dense.weight": drawn(2)}, {}, "no delta"),
        (under(QUERY, GOOD) | {"head.weight": drawn(2)}, {}, "do not agree about 'head.weight'"),
    ],
)
def test_what_does_not_fit_is_told_and_the_model_stays(
    tensors: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    model = build("bert")
    before = answer("bert", model)
    with pytest.raises(CheckpointError, match=why):
        from_opendelta(model, config, tensors)
    assert torch.equal(answer("bert", model), before)
    assert type(model.get_submodule(QUERY)) is nn.Linear


NORM, DENSE = "embeddings.LayerNorm", "encoder.layer.0.output.dense"
SAMPLERS = [f"{side}_sampler.{n}" for side in ("down", "up") for n in ("W_left", "W_right", "b")]


@pytest.mark.parametrize(
    ("tensors", "config", "why"),
    [
        (under(NORM, {"bitfit.bias": drawn(1)}), {}, r"must be \[24\] .* got \[1\]"),
        (under(NORM, {"bitfit.bias": drawn(7)}), {}, r"must be \[24\] .* got \[7\]"),
        (under(NORM, {"bitfit.bias": drawn(24), "bias": drawn(1)}), {}, r"must be \[24\]"),
        (under(NORM, {"bitfit.bias": drawn()}), {}, r"must have 1 dimensions, got \[\]"),
        (under(QUERY, {"lora.lora_A": drawn(3), "lora.lora_B": drawn(3)}), {}, "2 dimensions"),
        (under(DENSE, {"adapter.modulelist.down_proj.weight": drawn()}), {}, "2 dimensions"),
        (under(DENSE, {f"compactor.{n}": drawn(4) for n in SAMPLERS}), {}, "3 dimensions"),
        ({"soft_prompt_layer.soft_embeds": drawn()}, {}, "2 dimensions"),
        (
            {f"{p}soft_prompt_layer.soft_embeds": drawn(2, 24) for p in ("", "encoder.")},
            {}, "holds 2 soft prompts",
        ),
        (under(DENSE, adapter(nn.Identity())), {"non_linearity": []}, r"non_linearity=\[\]"),
    ],
)  # fmt: skip
def test_odd_shapes_and_settings_are_told(
    tensors: dict[str, Tensor], config: dict[str, Any], why: str
) -> None:
    with pytest.raises(CheckpointError, match=why):
        from_opendelta(build("bert"), config, tensors)


def test_an_adapter_after_a_norm_is_refused() -> None:
    model = build("bert")
    tensors = under("encoder.layer.0.attention", adapter(nn.Identity()))
    with pytest.raises(CheckpointError, match="a BertAttention, which is not known to end"):
        from_opendelta(model, {}, tensors)
    tensors = under(QUERY, adapter(nn.Identity()))
    with pytest.raises(CheckpointError, match="non_linearity='tanh'"):
        from_opendelta(model, {"non_linearity": "tanh"}, tensors)


def test_a_file_with_the_whole_backbone_is_refused() -> None:
    model = build("bert")
    with pytest.raises(CheckpointError, match="holds the whole backbone"):
        from_opendelta(model, {}, {**model.state_dict(), **under(QUERY, GOOD)})


# ------------------------------------------------------------------------------------ the command


def opendelta_folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    torch.save(tensors, path / "pytorch_model.bin")
    return path


def convert(*arguments: object) -> str:
    found = CliRunner().invoke(app, ["convert", *map(str, arguments)], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_opendelta_becomes_pefts_format(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "bert")  # type: ignore[operator]  # transformers'
    config = {"delta_type": "lora", "lora_r": RANK, "backbone_class": "BertModel"}
    source = opendelta_folder(tmp_path / "od", config, under(QUERY, GOOD))
    said = convert(source, tmp_path / "out", "--model", tmp_path / "bert")
    assert "2 tensors, in PEFT's format" in said
    handle = deltaops.load(model, tmp_path / "out")
    assert torch.equal(handle.state()[f"{QUERY}.lora_A.weight"], GOOD["lora.lora_A"])


def test_opendelta_becomes_our_format_where_peft_has_none(tmp_path: Path) -> None:
    model = build("bert")
    model.save_pretrained(tmp_path / "bert")  # type: ignore[operator]  # transformers'
    tensors = under("encoder.layer.1.output.dense", adapter(nn.Identity()))
    source = opendelta_folder(tmp_path / "od", {}, tensors)
    with pytest.raises(CheckpointError, match="--model-class T5"):
        convert(source, tmp_path / "out", "--model", tmp_path / "bert")
    arguments = ("--model", tmp_path / "bert", "--model-class", "BertModel")
    assert "deltaops' format" in convert(source, tmp_path / "out", *arguments)
    assert deltaops.load(model, tmp_path / "out").delta.size == WIDTH  # type: ignore[attr-defined]  # an Adapter


def test_every_kind_is_converted_to_the_format_that_can_hold_it(tmp_path: Path) -> None:
    model, plain = build("bert"), nn.Identity()
    model.save_pretrained(tmp_path / "bert")  # type: ignore[operator]  # transformers'
    prefix = {"prefix.past_key": drawn(3, HIDDEN), "prefix.past_value": drawn(3, HIDDEN)}
    kinds = {
        "lora": (under(QUERY, GOOD), CONFIG),
        "soft_prompt": ({"soft_prompt_layer.soft_embeds": drawn(5, HIDDEN)}, CONFIG),
        "adapter": (under(DENSE, adapter(plain)), MANIFEST),
        "compacter": (under(DENSE, compacter(plain)), MANIFEST),
        "bitfit": (under(QUERY, {"bias": drawn(HIDDEN)}), MANIFEST),
        "prefix": (
            {
                k: v
                for i in range(2)
                for k, v in under(f"encoder.layer.{i}.attention", prefix).items()
            },
            MANIFEST,
        ),
    }
    for kind, (tensors, form) in kinds.items():
        config = {"backbone_class": "BertModel", "lora_r": RANK}
        source, out = opendelta_folder(tmp_path / f"od-{kind}", config, tensors), tmp_path / kind
        convert(source, out, "--model", tmp_path / "bert")
        assert (out / form).is_file(), kind
        read, direct = build("bert"), build("bert")
        deltaops.load(read, out)
        from_opendelta(direct, config, tensors)
        assert torch.equal(answer("bert", read), answer("bert", direct)), kind


@pytest.mark.parametrize(
    "delta",
    [
        deltaops.LoRA(r=2), deltaops.LoRA(r=2, use_dora=True), deltaops.IA3(), deltaops.LNTuning(),
        deltaops.Prompt(3), deltaops.Prefix(3, shift_positions=True),
    ],
    ids=["lora", "dora", "ia3", "lntuning", "prompt", "prefix"],
)  # fmt: skip
def test_pefts_pickle_becomes_safetensors(delta: deltaops.LoRA, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    deltaops.attach(build("bert"), delta).save(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    old = tmp_path / "old"
    old.mkdir()
    (old / CONFIG).write_bytes((tmp_path / "new" / CONFIG).read_bytes())
    torch.save(tensors, old / "adapter_model.bin")
    convert(old, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], tensors[k]) for k in found)
    deltaops.load(build("bert"), tmp_path / "out")


def test_a_kind_that_is_no_name_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": ["LORA"]}')
    with pytest.raises(CheckpointError, match=r"peft_type=\['LORA'\]"):
        convert(tmp_path, tmp_path / "out")


def test_an_empty_head_does_not_size_the_model(tmp_path: Path) -> None:
    model = build("bert", head="ForSequenceClassification", num_labels=3)
    model.save_pretrained(tmp_path / "bert")  # type: ignore[operator]  # transformers'
    tensors = under(f"bert.{QUERY}", GOOD) | {"classifier.weight": torch.empty(2**40, 0)}
    tensors["classifier.bias"] = drawn(3)
    source = opendelta_folder(tmp_path / "od", {"lora_r": RANK}, tensors)
    arguments = ("--model", tmp_path / "bert", "--model-class", "BertForSequenceClassification")
    with pytest.raises(CheckpointError, match=r"classifier.weight' must be"):
        convert(source, tmp_path / "out", *arguments)


def test_folders_that_are_neither(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no folder of OpenDelta"):
        read_opendelta(tmp_path)
    source = opendelta_folder(tmp_path / "od", {}, under(QUERY, GOOD))
    with pytest.raises(CheckpointError, match="pass the backbone"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold an object"):
        read_opendelta(source)
    assert not (tmp_path / "out").exists()
