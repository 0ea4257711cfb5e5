"""LoRA on the experts of a mixture: numbers and gradients, files, PEFT beside it, and refusals."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.errors import AttachError, CheckpointError, ConfigError, ShapeError, TargetError
from deltaops.methods.lora_experts import _FAMILIES, _FORMER
from deltaops.modules.experts import StackedBranch, Way, run_experts
from deltaops.packing import PACKING
from deltaops.reference import experts as reference
from deltaops.surgery import Handle, handle_of
from deltaops.surgery import experts as surgery_experts
from deltaops.surgery.files import CONFIG, WEIGHTS
from deltaops.testing import bound, relative_error

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
PLACE = "layers.0.mlp.experts"
SIZES = {
    "vocab_size": 60, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
    "moe_intermediate_size": 20, "num_local_experts": 5, "num_experts": 5,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 8,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def build(family: str = "Mixtral", **settings: Any) -> Any:
    """A model without a head, the same bits every time."""
    config = getattr(transformers, f"{family}Config")(**SIZES | settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}Model")(config).eval()


def answer(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS).last_hidden_state
    return found


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).mean()


def shaken(model: nn.Module, delta: LoRA, **settings: Any) -> Handle:
    """``delta`` on ``model``, far from its start."""
    handle = deltaops.attach(model, delta, **settings)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)
    return handle


def experts_only(**settings: Any) -> LoRA:
    return LoRA(**{"r": 3, "alpha": 5, "target_modules": [], "target_parameters": NAMES} | settings)


# ------------------------------------------------------------------------ numbers and gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapted", ["both", "gate_up", "down", "none"])
@pytest.mark.parametrize(("tokens", "rank"), [(0, 2), (1, 1), (13, 17)], ids=str)
def test_numbers_and_gradients_against_float64(
    tokens: int, rank: int, adapted: str, dtype: torch.dtype
) -> None:
    experts, hidden, inner, chosen = 6, 11, 7, 2
    index = torch.randn(tokens, experts - 1).topk(chosen).indices  # nothing for the last expert
    given = [
        torch.randn(tokens, hidden).to(dtype),
        torch.rand(tokens, chosen),
        torch.randn(experts, rank, hidden),
        torch.randn(experts, 2 * inner, rank),
        torch.randn(experts, rank, inner),
        torch.randn(experts, hidden, rank),
    ]
    frozen = [torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)]
    frozen = [w.to(dtype) for w in frozen]
    outer = torch.randn(tokens, hidden)
    first, second = adapted in ("both", "gate_up"), adapted in ("both", "down")

    def ours(x: Tensor, p: Tensor, up: Tensor, down: Tensor, *t: Tensor) -> Tensor:
        one = [StackedBranch(t[0], t[1], 1.5, 0.0)] if first else []
        two = [StackedBranch(t[2], t[3], -0.5, 0.0)] if second else []
        way = Way("auto", False, "auto")
        return run_experts(x, index, p, (up, one), (down, two), nn.SiLU(), way)

    def dense(x: Tensor, p: Tensor, up: Tensor, down: Tensor, *t: Tensor) -> Tensor:
        one = (t[0].to(x.dtype), t[1].to(x.dtype), 1.5) if first else None
        two = (t[2].to(x.dtype), t[3].to(x.dtype), -0.5) if second else None
        return reference.forward(x, index, p, up, down, "silu", one, two)

    def run(form: Any, wide: bool) -> list[Tensor]:
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in given]
        weights = [w.double() if wide else w for w in frozen]
        y = form(leaves[0], leaves[1], *weights, *leaves[2:])
        wanted = leaves[:2] + leaves[2:4] * first + leaves[4:] * second
        return [y, *torch.autograd.grad((y * outer).sum(), wanted)]

    found, again, baseline, oracle = (
        run(form, wide) for form, wide in ((ours, 0), (ours, 0), (dense, 0), (dense, 1))
    )
    for one, same, theirs, exact in zip(found, again, baseline, oracle, strict=True):
        assert torch.equal(one, same)
        assert relative_error(one, exact) <= bound(relative_error(theirs, exact), dtype)
    for gradient in found[3:]:
        assert gradient.shape[0] == experts
        assert not gradient[-1].any()  # of the expert without a token


def test_a_mixture_of_one_expert_is_that_expert() -> None:
    model = build(num_local_experts=1, num_experts=1, num_experts_per_tok=1, num_hidden_layers=1)
    before = answer(model)
    handle = shaken(model, experts_only())
    assert {t.shape[0] for t in handle.state().values()} == {1}
    y = answer(model)
    assert relative_error(y, before) > 0.01
    assert relative_error(answer(handle.merge_and_unload()), y) < 16 * bound(0.0, torch.float32)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Qwen2Moe"])
@pytest.mark.parametrize("way", ["eager", "batched_mm", "grouped_mm"])
def test_it_starts_as_the_model_was_whatever_computes_that(family: str, way: str) -> None:
    model = build(family)
    model.set_experts_implementation(way)
    before = answer(model.requires_grad_(False))
    deltaops.attach(model, experts_only())
    assert relative_error(answer(model), before) < 16 * bound(0.0, torch.float32)


def test_the_whole_model_against_a_dense_loop_in_float64() -> None:
    model = build()
    plain = copy.deepcopy(model).requires_grad_(False)
    handle = shaken(model, LoRA(r=3, alpha=5, use_rslora=True, target_parameters=NAMES))
    y = answer(model)
    loss_of(y).backward()
    state = handle.state()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in handle.parameters()
    }

    def densely(dtype: torch.dtype) -> list[Tensor]:
        oracle = copy.deepcopy(plain).to(dtype)
        leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in state.items()}
        for site in handle.places:
            module = oracle.get_submodule(site.path)
            if site.parameters:
                module.forward = _dense(module, site.path, leaves, handle.delta)
            else:
                a, b = (leaves[f"{site.path}.lora_{side}.weight"] for side in "AB")
                module.register_forward_hook(
                    lambda m, args, y, a=a, b=b: y + 5 / 3**0.5 * (args[0] @ a.T @ b.T)
                )
        out = answer(oracle)
        loss_of(out).backward()
        return [out, torch.cat([_grad(t).flatten() for t in leaves.values()])]

    grads = torch.cat([_grad(t).flatten() for t in state.values()])
    for found, baseline, oracle in zip(
        [y, grads], densely(torch.float32), densely(torch.float64), strict=True
    ):
        assert relative_error(found, oracle) < 4 * bound(
            relative_error(baseline, oracle), torch.float32
        )


def _dense(module: Any, path: str, leaves: dict[str, Tensor], delta: Any) -> Any:
    branches = [
        (leaves[f"{path}.lora_A.{name}"], leaves[f"{path}.lora_B.{name}"], delta.scaling)
        for name in ("gate_up_proj", "down_proj")
    ]

    def forward(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up, down = module.gate_up_proj, module.down_proj
        return reference.forward(x, index, weights, up, down, "silu", *branches)

    return forward


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def test_dropout_is_drawn_anew_and_replayed_by_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        handle = shaken(model, experts_only(dropout=0.3))
        torch.manual_seed(5)
        loss_of(answer(model)).backward()
        grads.append([_grad(p) for p in handle.parameters()])
        assert not torch.equal(answer(model), answer(model))
        assert torch.equal(answer(model.eval()), answer(model))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_bfloat16_and_autocast() -> None:
    model = build().to(torch.bfloat16)
    handle = shaken(model, experts_only())
    assert {p.dtype for p in handle.parameters()} == {torch.float32}
    y = answer(model)
    assert y.dtype == torch.bfloat16
    wide = copy.deepcopy(model).double()
    # a token may be sent to another expert where two are nearly alike; these are not
    assert relative_error(y, answer(wide)) < 16 * bound(0.0, torch.bfloat16)
    loss_of(y).backward()
    assert all(bool(torch.isfinite(_grad(p)).all()) for p in handle.parameters())
    model = build()
    shaken(model, experts_only())
    exact = answer(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = answer(model)
    assert relative_error(y, exact) < 16 * bound(0.0, torch.bfloat16)


def test_an_unfrozen_base_runs_in_torch_and_gets_its_gradient() -> None:
    model = build()
    shaken(model, experts_only())
    frozen = answer(model)
    weight = model.get_parameter(f"{PLACE}.gate_up_proj").requires_grad_()
    row = next(r for r in deltaops.report(model).rows if r.path == PLACE)
    assert row.backend == "torch"
    assert "requires a gradient" in row.reason
    y = answer(model)
    loss_of(y).backward()
    assert relative_error(y, frozen) < 16 * bound(0.0, torch.float32)
    assert weight.grad is not None
    assert weight.grad.any()


def test_it_learns() -> None:
    teacher, model = build(), build()
    shaken(teacher, experts_only())
    with torch.no_grad():
        target = answer(teacher)
    handle = deltaops.attach(model.train(), experts_only())
    optimizer = torch.optim.Adam(handle.parameters(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = (answer(model) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_generation_with_a_cache_equals_without() -> None:
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()
    handle = shaken(model, experts_only())
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompt = IDS[:1, :4]
    with_cache, without = (
        model.generate(prompt, use_cache=cache, pad_token_id=0, **settings)
        for cache in (True, False)
    )
    assert with_cache.shape == (1, 10)
    assert torch.equal(with_cache, without)
    with handle.disabled():
        assert not torch.equal(with_cache, model.generate(prompt, pad_token_id=0, **settings))


# of torch's compiler, where a graph breaks and goes on with what requires a gradient
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_torch_compile_runs_the_experts_between_two_graphs() -> None:
    model = build(num_hidden_layers=1)
    handle = shaken(model, experts_only())
    block, x = model.layers[0].mlp, torch.randn(1, 7, 24)
    loss_of(block(x)).backward()
    expected = [block(x), *(_grad(p).clone() for p in handle.parameters())]
    model.zero_grad()
    torch.compiler.reset()
    y = torch.compile(block, backend="aot_eager")(x)
    loss_of(y).backward()
    for ours, eager in zip([y, *map(_grad, handle.parameters())], expected, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------- on and off


def test_names_roles_and_patterns_say_where() -> None:
    handle = deltaops.attach(
        build(),
        experts_only(
            target_parameters=["layers.1.mlp.experts.down_proj"],
            rank_pattern={"down_proj": 40},
            alpha_pattern={r".*experts\.down_proj": 20},
        ),
    )
    assert {k: tuple(t.shape) for k, t in handle.state().items()} == {
        "layers.1.mlp.experts.lora_A.down_proj": (5, 40, 20),
        "layers.1.mlp.experts.lora_B.down_proj": (5, 24, 40),
    }
    assert "MixtralExperts 24→20 down_proj lora" in str(handle)
    assert "default: down_proj r=40, alpha=20" in repr(handle.model)
    mixed = LoRA(
        r=2,
        target_modules=["attention-output", "experts"],
        layers_to_transform=[0],
        layers_pattern=["layers"],
    )
    handle = deltaops.attach(build(), mixed)
    assert handle.sites == ("layers.0.self_attn.o_proj", PLACE)
    assert handle.places[1].parameters == ("gate_up_proj", "down_proj")
    assert not any("experts" in p for p in deltaops.attach(build(), LoRA(r=2)).sites)
    every = deltaops.attach(build(), LoRA(r=2, target_parameters=NAMES))
    assert len(every.sites) == 2 * (4 + 1)


def test_merge_disable_copy_and_revert() -> None:
    model = build()
    model.get_parameter(f"{PLACE}.down_proj").requires_grad_(False)

    def look() -> list[Any]:
        found: list[Any] = [
            (type(m), sorted(vars(m)), list(m._parameters), list(m._modules))
            for m in model.modules()
        ]
        return found + [p.requires_grad for p in model.parameters()]

    before, state = look(), {k: v.clone() for k, v in model.state_dict().items()}
    base = answer(model)
    handle = shaken(model, experts_only(), frozen=False, blocks=False)  # the rest as it was
    applied = answer(model)
    assert relative_error(applied, base) > 0.01
    with handle.disabled():
        assert torch.equal(answer(model), base)
    handle.merge()
    merged = answer(model)
    assert relative_error(merged, applied) < 16 * bound(0.0, torch.float32)
    with handle.disabled():
        assert torch.equal(answer(model), base)
    assert torch.equal(answer(model), merged)
    handle.unmerge()
    assert torch.equal(answer(model), applied)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(answer(twin), applied)
        found = handle_of(twin)
        assert found is not None
        with torch.no_grad():
            for parameter in found.parameters():
                parameter.zero_()
        assert torch.equal(answer(model), applied)
        assert torch.equal(answer(found.merge_and_unload()), base)
        assert {type(m).__module__.split(".")[0] for m in twin.modules()} <= {
            "torch", "transformers",
        }  # fmt: skip
    with pytest.raises(AttachError, match="has a delta already"):
        deltaops.attach(model, experts_only())
    handle.revert()
    assert look() == before
    now = model.state_dict()
    assert state.keys() == now.keys()
    assert all(torch.equal(state[key], now[key]) for key in state)


def test_packed_copies_belong_to_each_expert() -> None:
    model = build(hidden_size=128, head_dim=64, moe_intermediate_size=64, intermediate_size=64)
    shaken(model, experts_only(), pack="always", frozen=False, blocks=False)
    with torch.no_grad():
        first, second, third = answer(model), answer(model), answer(model)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    rows = {r.path: r for r in deltaops.report(model).rows}
    native = deltaops.backends()["cpu"] == "ready"
    assert (rows[PLACE].packed > 0) == native
    with torch.no_grad():
        model.get_parameter(f"{PLACE}.gate_up_proj")[3] *= 2
        changed = answer(model)
        fresh = copy.deepcopy(model)
        assert torch.equal(changed, answer(fresh))
    assert not torch.equal(changed, first)


def test_a_policy_ends_with_its_delta() -> None:
    model = build(num_hidden_layers=1)
    handle = shaken(model, experts_only(), pack="never")
    answer(model)
    weight = model.get_parameter(f"{PLACE}.gate_up_proj")
    assert "never" in {PACKING.policy(matrix) for matrix in weight}
    handle.revert()
    shaken(model, experts_only())
    answer(model)
    assert {PACKING.policy(matrix) for matrix in weight} == {"auto"}


# ------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_save_and_load_give_the_same_bits(dropout: float, tmp_path: Path) -> None:
    delta = LoRA(r=3, dropout=dropout, target_modules=["q_proj", "experts"])
    model = build()
    handle = shaken(model, delta)
    handle.save(tmp_path)
    assert (tmp_path / CONFIG).exists() == (dropout == 0.0)  # PEFT has no dropout there
    twin = build()
    loaded = deltaops.load(twin, tmp_path)
    assert torch.equal(answer(twin), answer(model))
    assert loaded.sites == handle.sites
    mine, theirs = handle.state(), loaded.state()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


TARGETS = {
    "both": {"target_parameters": NAMES},
    "down": {"target_parameters": NAMES[1:]},
    "one layer": {"target_parameters": ["layers.1.mlp.experts.gate_up_proj"]},
    "patterns": {
        "target_parameters": NAMES,
        "rank_pattern": {r".*\.gate_up_proj": 4},
        "alpha_pattern": {"down_proj": 7},
    },
}


# PEFT looks for its patterns among modules, says so, and uses them
@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_files_of_peft_and_ours_mean_the_same(
    family: str, targets: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], **targets)
    theirs = peft.get_peft_model(build(family), config)
    with torch.no_grad():
        for parameter in (p for p in theirs.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    model = build(family)
    handle = deltaops.load(model, tmp_path / "theirs")
    found, expected = answer(model), answer(theirs)
    assert relative_error(expected, answer(build(family))) > 0.01
    assert relative_error(found, expected) < 16 * bound(0.0, torch.float32)
    for y in (found, expected):
        loss_of(y).backward()
    grads = {k: p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    ours = {k: _grad(p) for k, p in handle.state().items()}
    ours = handle.delta.to_peft_tensors(ours, handle.places)
    assert ours.keys() == {key.replace(".default", "") for key in grads}
    for key, grad in grads.items():
        torch.testing.assert_close(ours[key.replace(".default", "")], grad, rtol=1e-3, atol=1e-7)
    handle.save(tmp_path / "ours")
    mine, back = (
        safetensors.torch.load_file(tmp_path / folder / WEIGHTS) for folder in ("ours", "theirs")
    )
    assert mine.keys() == back.keys()
    assert all(torch.equal(mine[key], back[key]) for key in mine)
    again = peft.PeftModel.from_pretrained(build(family), tmp_path / "ours")
    assert torch.equal(answer(again), answer(theirs))


def test_an_experts_role_is_written_for_peft_by_parameter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = build()
    shaken(model, LoRA(r=3, target_modules=["k_proj", "experts"])).save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_parameters"] == [
        f"layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")
    ]
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert relative_error(answer(theirs), answer(model)) < 16 * bound(0.0, torch.float32)


def test_layers_with_names_that_peft_takes_for_experts_are_written_in_our_format(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    for kind, family in conversion._MODEL_TO_CONVERSION_PATTERN.items():
        if family in conversion._MOE_TARGET_MODULE_MAPPING and kind.islower():  # no class
            assert kind in _FAMILIES[family].split()
            assert conversion._MOE_TARGET_MODULE_MAPPING[family].keys() == set(_FORMER[family])
    model = build("Qwen3Moe", mlp_only_layers=[0])
    delta = LoRA(r=3, target_modules=["all-linear", "experts"])
    shaken(model, delta).save(tmp_path / "dense")
    assert not (tmp_path / "dense" / CONFIG).exists()
    twin = build("Qwen3Moe", mlp_only_layers=[0])
    deltaops.load(twin, tmp_path / "dense")
    assert torch.equal(answer(twin), answer(model))
    model = build("Qwen3Moe", mlp_only_layers=[0])
    shaken(model, LoRA(r=3, target_modules=["q_proj", "experts"])).save(tmp_path / "without")
    twin = build("Qwen3Moe", mlp_only_layers=[0])
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / "without")
    assert relative_error(answer(theirs), answer(model)) < 16 * bound(0.0, torch.float32)


# -------------------------------------------------------------------------------- accelerate


def test_accelerate_runs_the_experts_of_a_peft_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=NAMES)
    model = peft.get_peft_model(build(), config)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]

    def run() -> list[Tensor]:
        model.zero_grad()
        y = answer(model)
        loss_of(y).backward()
        return [y, *(p.grad for p in model.parameters() if p.requires_grad)]

    expected = run()
    report = deltaops.accelerate(model)
    rows = {r.path: r for r in report.rows if "experts" in r.path}
    assert len(rows) == 2
    assert all(r.kind == "peft lora" and r.backend != "peft" for r in rows.values())
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert list(model.state_dict()) == keys
    with model.disable_adapter():
        off = answer(model)
        assert {r.reason for r in deltaops.report(model).rows if "experts" in r.path} == {
            "adapters are disabled: PEFT's forward"
        }
    assert relative_error(off, answer(build())) < 16 * bound(0.0, torch.float32)
    report.revert()
    assert [type(m) for m in model.modules()] == kinds
    assert torch.equal(answer(model), expected[0])


def peft_model() -> Any:
    """Of one layer, with an adapter on attention and experts that is not at its start."""
    peft = pytest.importorskip("peft")
    return stirred(peft.get_peft_model(build(num_hidden_layers=1), peft_config()))


def peft_config() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=3, target_modules=["q_proj"], target_parameters=NAMES)


def stirred(model: Any) -> Any:
    torch.manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def test_adapters_added_after_accelerate_and_merged_are_those_of_plain_peft(
    tmp_path: Path,
) -> None:
    plain, fast = peft_model(), peft_model()
    plain.save_pretrained(tmp_path)
    deltaops.accelerate(fast)
    for model in (plain, fast):
        model.add_adapter("second", peft_config())
        model.load_adapter(tmp_path, "third")
        stirred(model)
    assert list(fast.state_dict()) == list(plain.state_dict())
    limit = 16 * bound(0.0, torch.float32)
    for active in ("second", ["default", "third"]):
        for model in (plain, fast):
            model.base_model.set_adapter(active)
        assert relative_error(answer(fast), answer(plain)) < limit
        rows = [r for r in deltaops.report(fast).rows if "experts" in r.path]
        assert [r.backend != "peft" for r in rows] == [True]
    for model in (plain, fast):
        model.merge_adapter()
    assert relative_error(answer(fast), answer(plain)) < limit
    (row,) = [r for r in deltaops.report(fast).rows if "experts" in r.path]
    assert row.reason == "adapters are merged: PEFT's forward"
    for model in (plain, fast):
        model.unmerge_adapter()
    assert relative_error(answer(fast), answer(plain)) < limit


def test_accelerate_leaves_other_parameters_and_says_why() -> None:
    peft = pytest.importorskip("peft")
    names = ["gate.weight", "experts.down_proj"]
    model = peft.get_peft_model(
        build(), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)
    )
    rows = {r.path: r for r in deltaops.accelerate(model).rows if ".mlp" in r.path}
    router = rows["base_model.model.layers.0.mlp.gate"]
    assert router.kind == "left alone"
    assert "weight of MixtralTopKRouter is no parameter of experts" in router.reason
    assert rows["base_model.model.layers.0.mlp.experts"].backend != "peft"


# ---------------------------------------------------------------------------------- refusals


def test_experts_are_known_whatever_stands_around_and_no_failure_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    accelerate = pytest.importorskip("accelerate")

    experts = build().get_submodule(PLACE)
    for around in (
        torch.autocast("cpu", torch.bfloat16), torch.device("meta"), torch.inference_mode(),
        FakeTensorMode(), accelerate.init_empty_weights(include_buffers=True),
    ):  # fmt: skip
        surgery_experts._cache.clear()
        with around:
            assert surgery_experts.unlike_experts(experts) is None
    surgery_experts._cache.clear()
    with monkeypatch.context() as patch:
        patch.setattr(surgery_experts, "reference", lambda x, *others: x)
        assert "compute something else" in str(surgery_experts.unlike_experts(experts))
    assert surgery_experts.unlike_experts(experts) is None
    experts._apply_gate = lambda x: x[..., ::2]
    assert "has a gate of its own" in str(surgery_experts.unlike_experts(experts))


SHAPES: dict[str, tuple[dict[str, Tensor], str]] = {
    "x": ({"x": torch.zeros(3, 5)}, r"x must be \[T, 4\], got \[3, 5\]"),
    "index": ({"index": torch.zeros(2, 1, dtype=torch.long)}, r"index must be \[3, J\]"),
    "weights": ({"weights": torch.zeros(3, 2)}, r"weights must be \[3, 1\]"),
    "down": ({"down": torch.zeros(2, 4, 5)}, r"down must be \[2, 4, 3\]"),
    "no such expert": ({"index": torch.full((3, 1), 2)}, "from 0 to 1"),
}


@pytest.mark.parametrize(("wrong", "message"), SHAPES.values(), ids=SHAPES)
def test_sizes_that_do_not_fit_are_refused(wrong: dict[str, Tensor], message: str) -> None:
    given = {
        "x": torch.zeros(3, 4), "index": torch.zeros(3, 1, dtype=torch.long),
        "weights": torch.ones(3, 1), "gate_up": torch.zeros(2, 6, 4), "down": torch.zeros(2, 4, 3),
    } | wrong  # fmt: skip
    x, index, weights, gate_up, down = given.values()
    way = Way("auto", False, "auto")
    with pytest.raises(ShapeError, match=message):
        run_experts(x, index, weights, (gate_up, []), (down, []), nn.SiLU(), way)


def tiny_gpt_oss() -> Any:
    with torch.device("meta"):
        config = transformers.GptOssConfig(**SIZES)
        return transformers.GptOssModel(config)


class _Halved(nn.Module):
    """Experts with the two parameters, which are computed with in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 6, 4))
        self.down_proj = nn.Parameter(torch.zeros(2, 4, 3))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return x / 2


class HalvedExperts(_Halved):
    pass


REFUSALS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gpt-oss": (
        tiny_gpt_oss,
        {},
        r"GptOssExperts has gate_up_proj \[5, 24, 40\], gate_up_proj_bias \[5, 40\], down_proj .*"
        "without biases",
    ),
    "other arithmetic": (
        lambda: nn.ModuleDict({"experts": HalvedExperts()}),
        {},
        "and computes something else with them than Mixtral's experts do",
    ),
    "unknown name": (
        build,
        {"target_parameters": ["experts.gate_proj"]},
        r"target_parameters names 'experts.gate_proj', and no parameter .* Nearest: experts",
    ),
    "router": (build, {"target_parameters": ["gate.weight"]}, "name layers in target_modules"),
    "linear": (
        build,
        {"target_parameters": ["q_proj.weight"], "target_modules": "all-linear"},
        "weight of Linear: target_parameters is for experts",
    ),
    "dora": (build, {"use_dora": True}, "it holds experts, and use_dora needs linear layers"),
    "pissa": (build, {"init_lora_weights": "pissa"}, "it holds experts, and init_lora_weights"),
    "excluded": (build, {"exclude_modules": ["experts"]}, "says nothing of target_parameters"),
    "another layer": (
        build,
        {"target_parameters": [f"{PLACE}.down_proj"], "layers_to_transform": [1]},
        r"in none of layers_to_transform=\[1\]",
    ),
    "the root": (
        lambda: build().get_submodule(PLACE),
        {"target_parameters": ["down_proj"]},
        "down_proj of MixtralExperts is at the model's root",
    ),
    "one of two": (
        build,
        {"target_parameters": [*NAMES, "gate.weight"]},
        "Take parameters that it cannot have out of target_parameters.$",
    ),
    "saved whole": (build, {"modules_to_save": ["experts"]}, "modules_to_save trains it whole"),
    "as a module": (
        build,
        {"target_modules": ["mlp.experts"], "target_parameters": ()},
        "experts are parameters: name those in target_parameters",
    ),
    "none there": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
        {"target_modules": "experts", "target_parameters": ()},
        "no experts in 3-D parameters",
    ),
}


@pytest.mark.parametrize(("make", "settings", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_it_cannot_do_is_refused_before_anything_changes(
    make: Any, settings: dict[str, Any], message: str
) -> None:
    model = make()
    before = [(type(m), sorted(vars(m)), list(m._modules)) for m in model.modules()]
    with pytest.raises(TargetError, match=message):
        deltaops.attach(model, experts_only(**settings))
    assert [(type(m), sorted(vars(m)), list(m._modules)) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


def test_no_targets_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="target_modules is empty"):
        LoRA(target_modules=[])
    with pytest.raises(ConfigError, match="target_parameters must be module names"):
        LoRA(target_parameters=[3])  # type: ignore[arg-type]


def test_a_file_for_other_experts_is_refused(tmp_path: Path) -> None:
    shaken(build(), experts_only()).save(tmp_path)
    with pytest.raises(CheckpointError, match=r"must be \[12, 24\] for this model"):
        deltaops.load(build(num_local_experts=4, num_experts=4), tmp_path)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        deltaops.load(transformers.LlamaModel(transformers.LlamaConfig(**SIZES)), tmp_path)
