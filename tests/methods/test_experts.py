"""LoRA on the experts of a mixture: numbers and gradients, files, PEFT beside it, and refusals."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import LoRA
from deltaops.errors import AttachError
from deltaops.modules.experts import StackedBranch, Way, run_experts
from deltaops.packing import PACKING
from deltaops.reference import experts as reference
from deltaops.surgery import handle_of
from deltaops.testing import bound, relative_error

from .mixtures import (
    IDS,
    NAMES,
    PLACE,
    SIZES,
    answer,
    build,
    experts_only,
    grad_of,
    loss_of,
    shaken,
)

transformers = pytest.importorskip("transformers")

# transformers renames gradient checkpointing between the versions that we support
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


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
        return [out, torch.cat([grad_of(t).flatten() for t in leaves.values()])]

    grads = torch.cat([grad_of(t).flatten() for t in state.values()])
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


def test_dropout_is_drawn_anew_and_replayed_by_gradient_checkpointing() -> None:
    grads = []
    for checkpointing in (False, True):
        model = build().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        handle = shaken(model, experts_only(dropout=0.3))
        torch.manual_seed(5)
        loss_of(answer(model)).backward()
        grads.append([grad_of(p) for p in handle.parameters()])
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
    assert all(bool(torch.isfinite(grad_of(p)).all()) for p in handle.parameters())
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
    expected = [block(x), *(grad_of(p).clone() for p in handle.parameters())]
    model.zero_grad()
    torch.compiler.reset()
    y = torch.compile(block, backend="aot_eager")(x)
    loss_of(y).backward()
    for ours, eager in zip([y, *map(grad_of, handle.parameters())], expected, strict=True):
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
