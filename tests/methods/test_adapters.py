"""Adapters in sequence and in parallel: settings, places, what they refuse, what they keep."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltaops
from deltaops import Adapter, ParallelAdapter
from deltaops.errors import AttachError, ConfigError, TargetError
from deltaops.testing.architectures import answer, build


@pytest.mark.parametrize("kind", [Adapter, ParallelAdapter])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size must be an integer ≥ 1 or None"),
        ({"size": 2.0}, "size must be"),
        ({"reduction_factor": 0}, "reduction_factor must be"),
        ({"reduction_factor": True}, "reduction_factor must be"),
        ({"non_linearity": "tanh"}, "non_linearity must be one of"),
        ({"scaling": float("nan")}, "scaling must be finite"),
        ({"autocast_adapter_dtype": 1}, "autocast_adapter_dtype must be a bool"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
    ids=str,
)
def test_bad_values_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__}: {message}"):
        kind(**settings)


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ConfigError, match="style must be one of houlsby, pfeiffer, got 'bapna'"):
        Adapter(style="bapna")


def test_they_print_what_differs() -> None:
    assert repr(Adapter()) == "Adapter(style='houlsby')"
    assert repr(Adapter("pfeiffer", size=8)) == "Adapter(style='pfeiffer', size=8)"
    shown = "Adapter(style='houlsby', target_modules=('q_proj',))"
    assert repr(Adapter(target_modules=["q_proj"])) == shown
    assert repr(ParallelAdapter(scaling=1.0)) == "ParallelAdapter(scaling=1.0)"


@pytest.mark.parametrize(
    "delta", [Adapter(reduction_factor=7), ParallelAdapter(reduction_factor=7)]
)
def test_a_factor_that_does_not_divide_is_refused_before_any_change(delta: Any) -> None:
    model = build("bert")
    before = [type(m) for m in model.modules()]
    with pytest.raises(ConfigError, match="reduction_factor=7 does not divide its 24 features"):
        deltaops.attach(model, delta)
    assert [type(m) for m in model.modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("delta", [Adapter(), ParallelAdapter()])
def test_a_model_without_blocks_is_refused_with_what_was_found(delta: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with pytest.raises(TargetError, match="no list of blocks with an attention"):
        deltaops.attach(model, delta)
    handle = deltaops.attach(model, type(delta)(size=2, target_modules=["2"]))
    assert handle.sites == ("2",)


def test_styles_stand_where_the_papers_put_them() -> None:
    houlsby = deltaops.attach(build("llama"), Adapter(size=2)).sites
    pfeiffer = deltaops.attach(build("llama"), Adapter("pfeiffer", size=2)).sites
    assert houlsby[:2] == ("layers.0.self_attn.o_proj", "layers.0.mlp.down_proj")
    assert pfeiffer == ("layers.0.mlp.down_proj", "layers.1.mlp.down_proj")


def test_a_houlsby_adapter_starts_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"out": nn.Linear(64, 512)})
    handle = deltaops.attach(model, Adapter(size=64, target_modules=["out"]))
    state = handle.state()
    for side in ("down", "up"):
        drawn = state[f"out.adapter.{side}.weight"]
        assert drawn.abs().max() <= 0.02
        assert abs(drawn.std().item() - 0.0088) < 2e-4  # of N(0, 0.01), cut at two deviations
        assert not state[f"out.adapter.{side}_bias"].any()


def test_nothing_of_a_sub_layer_is_kept_after_it() -> None:
    model = build("llama")
    handle = deltaops.attach(model, ParallelAdapter())
    answer("llama", model)
    with handle.disabled():
        answer("llama", model)
    relays = [r for path in handle.sites for r in model.get_submodule(path).relays()]  # type: ignore[operator]  # a place's
    assert len(relays) == 2
    assert not any(relay.carried for relay in relays)


def test_a_pass_that_fails_halfway_stands_in_nobodys_way() -> None:
    model = build("bert")
    deltaops.attach(model, ParallelAdapter())
    expected = answer("bert", model)

    def fail(module: nn.Module, args: Any) -> None:
        raise MemoryError

    second: nn.Module = model.encoder.layer[1].output  # type: ignore[union-attr, assignment]  # a BERT's
    hook = second.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        answer("bert", model)
    hook.remove()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert torch.equal(answer("bert", twin), expected)


@pytest.mark.parametrize("part", ["intermediate", "output"])
def test_either_end_of_a_sub_layer_can_be_compiled_alone(part: str) -> None:
    model = build("bert")
    deltaops.attach(model, ParallelAdapter())
    expected = answer("bert", model)
    torch.compiler.reset()
    getattr(model.encoder.layer[0], part).compile(backend="eager", fullgraph=True)  # type: ignore[union-attr]  # a BERT's
    torch.testing.assert_close(answer("bert", model), expected)
    torch.testing.assert_close(answer("bert", model), expected)


def test_the_end_of_a_sub_layer_without_its_start_is_refused() -> None:
    model = build("llama")
    deltaops.attach(model, ParallelAdapter())
    end: nn.Module = model.layers[0].mlp.down_proj  # type: ignore[union-attr, assignment]  # a Llama's
    with pytest.raises(AttachError, match="its last was called without its first"):
        end(torch.randn(1, 40))


def test_two_threads_in_one_sub_layer_do_not_meet() -> None:
    model = build("bert")
    handle = deltaops.attach(model, ParallelAdapter())
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    inputs = [torch.randint(3, 60, (2, 7)) for _ in range(2)]
    with torch.no_grad():
        alone = [model(input_ids=ids).last_hidden_state for ids in inputs]
        both_inside = threading.Barrier(2)
        for block in model.encoder.layer:  # type: ignore[union-attr]  # a BERT's
            act: nn.Module = block.intermediate.intermediate_act_fn  # type: ignore[union-attr, assignment]
            act.register_forward_hook(lambda module, args, y: (both_inside.wait(timeout=60), y)[1])

        def run(ids: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = model(input_ids=ids).last_hidden_state
            return found

        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(run, inputs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_an_adapter_beside_one_layer_runs_in_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltaops.modules import place

    real, seen = place.delta_linear, list[Any]()

    def spy(
        x: Tensor, weight: Tensor, bias: Any, branches: Any, *rest: Any, **named: Any
    ) -> Tensor:
        seen.extend(branches)
        return real(x, weight, bias, branches, *rest, **named)

    monkeypatch.setattr(place, "delta_linear", spy)
    model = nn.ModuleDict({"only": nn.Linear(8, 6, bias=False)})
    delta = ParallelAdapter(size=3, target_modules=["only"], non_linearity="silu")
    handle = deltaops.attach(model, delta)
    model["only"](torch.randn(2, 8))
    assert [(b.activation, b.scaling, b.bias is not None) for b in seen] == [("silu", 4.0, True)]
    assert model["only"].bias is not None
    handle.revert()
    assert model["only"].bias is None


def test_the_report_names_the_method_and_what_runs_it() -> None:
    model = build("gpt2")
    deltaops.attach(model, ParallelAdapter())
    rows = {row.path: row for row in deltaops.report(model).rows}
    assert rows["h.0.mlp.c_fc"].kind == rows["h.0.mlp.c_proj"].kind == "parallel"
    assert rows["h.0.attn.c_attn"].kind == "frozen"
