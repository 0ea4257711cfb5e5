"""Intrinsic adapters: decoded once in each pass, from a seed, for all places."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deltaops
from deltaops import Adapter, IntrinsicAdapter, IntrinsicPrompt
from deltaops.errors import AttachError, CheckpointError, ConfigError, TargetError
from deltaops.methods.decoder import START, AdapterSizes, write_decoder
from deltaops.modules import RandomRows, decoded_adapter
from deltaops.packing import PACKING
from deltaops.surgery.files import MANIFEST
from deltaops.testing import bound, relative_error
from deltaops.testing.architectures import answer, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def moved(model: nn.Module, **settings: Any) -> deltaops.surgery.Handle:
    """Attached, with numbers away from zero."""
    handle = deltaops.attach(model, IntrinsicAdapter(**({"size": 5} | settings)))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.copy_(torch.linspace(-2, 2, len(parameter)))
    return handle


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_it_is_decoded_once_for_all_places(reentrant: bool | None) -> None:
    model: Any = build("bert").train()
    handle = moved(model)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    calls: list[int] = []
    model.intrinsic_adapter.decoder.register_forward_hook(lambda *_: calls.append(1))
    answer("bert", model).square().mean().backward()
    # a reentrant checkpoint needs a graph for each place that its blocks read again
    assert len(calls) == 1 + (len(handle.places) - 1 if reentrant else 0)
    (z,) = handle.parameters()
    other: Any = build("bert").train()
    (expected,) = moved(other).parameters()
    answer("bert", other).square().mean().backward()
    torch.testing.assert_close(z.grad, expected.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_large_projection_gives_the_gradient_of_a_small_one(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    projection = torch.randn(50, 3001, dtype=dtype)
    rows = RandomRows(torch.randn(3001, dtype=dtype), projection)
    z, dy = torch.randn(50, dtype=dtype, requires_grad=True), torch.randn(2900, dtype=dtype)

    def run() -> list[Tensor]:
        theta = rows(z, 60, 2960)
        return [theta, *torch.autograd.grad(theta, z, dy)]

    before, small = PACKING.bytes(projection), run()
    monkeypatch.setattr(decoded_adapter, "LARGE", 1)
    large = [run() for _ in range(3)]
    part = projection[:, 60:2960].double()
    oracles = rows.base[60:2960].double() + z.detach().double() @ part, part @ dy.double()
    for got, baseline, oracle in zip(large[0], small, oracles, strict=True):
        # in float64 the oracle is no better
        exact = dtype is torch.float64
        limit = 1e-13 if exact else bound(relative_error(baseline, oracle), dtype)
        assert relative_error(got, oracle) <= limit
    assert all(torch.equal(*pair) for got in large for pair in zip(got, large[0], strict=True))
    assert PACKING.bytes(projection[:, 60:2960]) == before == 0  # no copy is kept of it


def test_it_starts_as_an_adapter_starts() -> None:
    model = build("bert")
    handle = deltaops.attach(model, IntrinsicAdapter(size=5, layer_norm=True, seed=3))
    for site in handle.places[1:]:
        found: Any = model.get_submodule(site.path)
        t = {key: tensor.detach() for key, tensor in found.adapter["default"].tensors().items()}
        assert not t["down_bias"].any()
        assert not t["up_bias"].any()
        assert not t["norm_bias"].any()
        assert bool((t["norm_weight"] == 1).all())
        for name in ("down.weight", "up.weight"):
            assert 0.005 < float(t[name].std()) < 0.015
            assert float(t[name].abs().max()) <= 0.02


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_flat_file_is_an_adapters(name: str, tmp_path: Path) -> None:
    model = build(name)
    handle = moved(model, layer_norm=True, scaling=0.5)
    handle.save(tmp_path, flat=True)
    twin = build(name)
    loaded = deltaops.load(twin, tmp_path)
    assert loaded.delta == Adapter(size=5, layer_norm=True, scaling=0.5)
    assert torch.equal(answer(name, twin), answer(name, model))


def test_a_file_holds_the_numbers_and_the_seed_the_rest(tmp_path: Path) -> None:
    model = build("gpt2")
    handle = moved(model, seed=3)
    handle.save(tmp_path)
    assert {k: tuple(v.shape) for k, v in handle.state().items()} == {
        "intrinsic_adapter.intrinsic": (5,)
    }
    assert not any("decoder" in key for key in model.state_dict())
    assert "projection" not in (tmp_path / MANIFEST).read_text()
    expected, twin = answer("gpt2", model), build("gpt2")
    torch.manual_seed(99)
    deltaops.load(twin, tmp_path)
    assert torch.equal(answer("gpt2", twin), expected)
    assert not torch.equal(answer("gpt2", moved(build("gpt2"), seed=4).model), expected)


def test_numbers_near_one_move_parameters_by_a_tenth() -> None:
    model = build("bert")
    handle = deltaops.attach(model, IntrinsicAdapter(size=5, intrinsic_dim=50))
    source: Any = model.get_submodule("intrinsic_adapter")
    n = handle.places[0].out_features
    start = source(0, n).detach()
    with torch.no_grad():
        source.intrinsic.copy_(torch.randn(50))
    assert 0.07 < float((source(0, n).detach() - start).std()) < 0.14


class Around(nn.Module):
    """A layer before a stack of blocks, and one after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(8, 8) for _ in range(2))})
        self.after = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for block in self.inner["blocks"]:  # type: ignore[union-attr]  # a list
            x = block(x)
        y: Tensor = self.after(x)
        return y


def test_places_around_a_stack_read_their_own_numbers() -> None:
    names = ["before", "blocks.0", "blocks.1", "after"]
    torch.manual_seed(0)
    model, plain = Around(), Around()
    plain.load_state_dict(model.state_dict())
    handle = moved(model, target_modules=names)
    other = deltaops.attach(plain, Adapter(size=5, target_modules=names))
    taken = []
    with torch.no_grad():
        for path in other.sites:
            theirs: Any = plain.get_submodule(path)
            ours: Any = model.get_submodule(path)
            for key, tensor in ours.adapter["default"].tensors().items():
                theirs.adapter["default"].get_parameter(key).copy_(tensor)
                taken.append(tensor.flatten())
    source: Any = model.get_submodule("intrinsic_adapter")
    assert torch.equal(torch.cat(taken), source(0, handle.places[0].out_features)[0])
    x = torch.randn(3, 8)
    assert torch.equal(model(x), plain(x))
    assert torch.equal(copy.deepcopy(model)(x), plain(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_blocks_that_are_checkpointed_by_hand_have_their_own_numbers(reentrant: bool) -> None:
    """After a whole pass and its backward pass, whose numbers are others by now."""
    model: Any = build("bert").train()
    (z,) = moved(model).parameters()
    answer("bert", model).square().mean().backward()
    with torch.no_grad():
        z.mul_(0.5)
    x = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
    layer = model.encoder.layer[1]
    (expected,) = torch.autograd.grad(layer(x).square().sum(), z)
    z.grad = None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(z.grad, expected, rtol=1e-5, atol=1e-9)


def test_one_loss_of_a_pass_with_checkpoints_and_one_without() -> None:
    found = []
    for checkpoints in (False, True):
        model: Any = build("bert")
        (z,) = moved(model).parameters()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            model.enable_input_require_grads()
        first = answer("bert", model.train()).square().mean()
        (first + answer("bert", model.eval()).mean()).backward()
        found.append(z.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


def test_a_layer_that_is_checkpointed_by_hand_has_its_gradient() -> None:
    model = nn.ModuleDict({"out": nn.Linear(8, 8)})
    (z,) = moved(model, target_modules=["out"]).parameters()
    x = torch.randn(3, 8)
    layer = model["out"]
    (expected,) = torch.autograd.grad(layer(x).square().sum(), z)
    found = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(found.square().sum(), z)[0], expected)


def test_mixed_widths_of_numbers() -> None:
    """T5 keeps one layer of its feed-forward in float32, whatever the rest is."""
    model: Any = build("t5").to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "wo"):
            module.wo.float()
    handle = moved(model, autocast_adapter_dtype=False)
    y = answer("t5", model)
    y.float().square().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in handle.parameters())
    wide: Any = build("t5").to(torch.bfloat16).double()
    moved(wide)
    assert relative_error(y, answer("t5", wide)) < 16 * bound(0.0, torch.bfloat16)


def test_it_says_what_it_is() -> None:
    model = build("gpt2")
    handle = deltaops.attach(model, IntrinsicAdapter(size=4))
    words = "decoded by a fixed random projection, made from its seed and not stored"
    assert f"intrinsic_dim=5), {words}" in str(handle)
    assert "shared by all, 5→" in str(handle)


# ------------------------------------------------------------------------------------ fitted


def fitted(folder: Path, model: nn.Module, delta: Adapter, **changes: Any) -> dict[str, Tensor]:
    """Some decoder of the adapters of ``model``, also in ``folder``."""
    handle = deltaops.attach(model, delta)
    places = [[site.path, site.out_features] for site in handle.places]
    sizes = AdapterSizes(3, sum(p.numel() for p in handle.parameters()), 6)
    handle.revert()
    tensors = {name: torch.randn(shape) * 0.1 for name, shape in sizes.shapes().items()}
    facts = {"tasks": [], "adapter": delta.settings(), "places": places} | changes
    write_decoder(folder, sizes, tensors, facts)
    return tensors


def test_a_fitted_decoders_adapters_are_its_formula(tmp_path: Path) -> None:
    delta = Adapter("pfeiffer", size=5, non_linearity="relu")
    model = build("bert")
    t = fitted(tmp_path / "decoder", model, delta)
    handle = deltaops.attach(model, IntrinsicAdapter(decoder=tmp_path / "decoder"))
    assert (handle.delta.style, handle.delta.size) == ("pfeiffer", 5)
    (z,) = handle.parameters()
    assert torch.equal(z, t[START])
    theta = t["second.weight"] @ torch.tanh(t["first.weight"] @ z + t["first.bias"])
    twin = build("bert")
    other = deltaops.attach(twin, delta)
    with torch.no_grad():
        parameters = list(other.parameters())
        parts = (theta + t["second.bias"]).split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))
    y, expected = answer("bert", model), answer("bert", twin)
    assert relative_error(y, expected) < 16 * bound(0.0, torch.float32)
    handle.save(tmp_path / "adapter")
    loaded = deltaops.load(build("bert"), tmp_path / "adapter")
    assert loaded.delta == handle.delta
    assert torch.equal(answer("bert", loaded.model), y)
    handle.save(tmp_path / "flat", flat=True)
    flat = deltaops.load(build("bert"), tmp_path / "flat")
    assert flat.delta == delta
    assert torch.equal(answer("bert", flat.model), y)
    assert "fitted to the adapters of other tasks" in repr(handle.delta)


def test_settings_are_the_decoders(tmp_path: Path) -> None:
    fitted(tmp_path, build("bert"), Adapter("pfeiffer", size=5))
    assert IntrinsicAdapter("pfeiffer", size=5, decoder=tmp_path).dimension == 3
    for settings in ({"size": 6}, {"intrinsic_dim": 4}, {"layer_norm": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} must be the decoder's"):
            IntrinsicAdapter(decoder=tmp_path, **settings)
    with pytest.raises(CheckpointError, match="holds another decoder"):
        IntrinsicAdapter(decoder=tmp_path, decoder_digest="0")
    with pytest.raises(CheckpointError, match=r"has one of 'adapter'\. Use it with IntrinsicA"):
        IntrinsicPrompt(decoder=tmp_path)
    with pytest.raises(ConfigError, match="must be the path of a folder"):
        IntrinsicAdapter(decoder=3)  # type: ignore[arg-type]  # what a user might pass


def test_a_decoder_of_other_places_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path / "one", build("bert"), Adapter("pfeiffer", size=5))
    with pytest.raises(TargetError, match="makes adapters of 2 places, and the 4 here are others"):
        deltaops.attach(build("t5"), IntrinsicAdapter(decoder=tmp_path / "one"))
    for places in ([], None, [["a"]]):
        fitted(tmp_path / "two", build("bert"), Adapter("pfeiffer", size=5), places=places)
        with pytest.raises(CheckpointError, match="settings of an adapter and its places"):
            IntrinsicAdapter(decoder=tmp_path / "two")


def test_a_decoder_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    model = build("bert")
    fitted(tmp_path, model, Adapter("pfeiffer", size=5))
    delta = IntrinsicAdapter(decoder=tmp_path)
    fitted(tmp_path, model, Adapter("pfeiffer", size=5))
    with pytest.raises(CheckpointError, match="holds another decoder than the one"):
        deltaops.attach(model, delta)


@pytest.mark.parametrize("delta", [IntrinsicAdapter(size=4), IntrinsicPrompt()], ids=repr)
def test_a_decoder_without_values_gets_no_memory(delta: Any) -> None:
    with torch.device("meta"):
        model: Any = build("bert")
    deltaops.attach(model, delta)
    model.to("meta")
    with pytest.raises(AttachError, match=r"Give the model its weights .*, then attach"):
        model.to_empty(device="cpu")


def test_places_on_several_devices_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    before = [type(m) for m in model.modules()]
    with pytest.raises(AttachError, match=r"must be on one device, .* '1' is on meta"):
        deltaops.attach(model, IntrinsicAdapter(size=4, target_modules=["0", "1"]))
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intrinsic_dim": 0}, "intrinsic_dim must be an integer ≥ 1"),
        ({"seed": -1}, "seed must be an integer ≥ 0"),
        ({"seed": True}, "seed must be an integer"),
        ({"size": 0}, "IntrinsicAdapter: size must be"),
    ],
    ids=str,
)
def test_bad_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IntrinsicAdapter(**settings)


def test_a_model_with_a_part_of_that_name_is_refused() -> None:
    model = build("gpt2")
    model.intrinsic_adapter = nn.Linear(2, 2)
    before = [type(m) for m in model.modules()]
    with pytest.raises(AttachError, match="must have no 'intrinsic_adapter' yet"):
        deltaops.attach(model, IntrinsicAdapter(size=4))
    assert [type(m) for m in model.modules()] == before
    assert isinstance(model.intrinsic_adapter, nn.Linear)
