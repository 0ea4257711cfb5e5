"""``deltaops.jax`` against plain jax.numpy: gradients, transformations, errors, PEFT's files."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from deltaops import ops

jax = pytest.importorskip("jax")
if importlib.util.find_spec("deltaops._xla") is None:
    pytest.skip("deltaops was built without jax", allow_module_level=True)

import jax.numpy as jnp  # noqa: E402 -- where jax is

import deltaops.jax as dj  # noqa: E402 -- so too
from deltaops.errors import (  # noqa: E402 -- so too
    CheckpointError,
    ConfigError,
    DeltaopsError,
    DtypeError,
    GradientError,
    ShapeError,
)

M, N, K, R = 6, 5, 7, 3


def draw(seed: int, *shape: int, dtype: Any = jnp.float32) -> Any:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


X, W, BIAS, A, B = draw(0, 2, M, K), draw(1, N, K), draw(2, N), draw(3, R, K), draw(4, N, R)


def plain(x: Any, bias: Any, a: Any, b: Any) -> Any:
    return x @ W.T + bias + 2.0 * (x @ a.T) @ b.T


def ours(x: Any, bias: Any, a: Any, b: Any) -> Any:
    return dj.delta_linear(x, W, bias, [dj.Branch(a, b, 2.0)])


def loss(layer: Any) -> Any:
    return lambda *args: jnp.sin(layer(*args)).sum()


def close(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4), got, want)


def test_value_and_every_gradient_under_jit() -> None:
    arguments, every = (X, BIAS, A, B), (0, 1, 2, 3)
    got = jax.jit(jax.value_and_grad(loss(ours), every))(*arguments)
    close(got, jax.jit(jax.value_and_grad(loss(plain), every))(*arguments))


@pytest.mark.parametrize("which", [0, 3])
def test_each_gradient_alone(which: int) -> None:
    arguments = (X, BIAS, A, B)
    got, want = (jax.jit(jax.grad(loss(layer), which))(*arguments) for layer in (ours, plain))
    close(got, want)


def test_what_nobody_differentiates_for_is_neither_computed_nor_saved() -> None:
    program = jax.make_jaxpr(jax.grad(loss(ours), 3))(X, BIAS, A, B)
    (backward,) = [eqn for eqn in program.eqns if "backward" in str(eqn.params.get("target_name"))]
    shapes = [tuple(v.aval.shape) for v in (*backward.invars, *backward.outvars)]
    assert shapes == [(2 * M, N), (N, K), (2 * M, R), (R, K), (N, R), (N, R)]


@pytest.mark.parametrize("transposed", [False, True])
def test_packed_weights_and_flax_kernels_give_the_same_bits(transposed: bool) -> None:
    weight = W.T if transposed else W
    packed = dj.pack_weight(weight, transposed=transposed)

    def value(weight: Any, x: Any) -> Any:
        return dj.delta_linear(x, weight, None, [dj.Branch(A, B)], transposed=transposed).sum()

    expected = jax.value_and_grad(lambda x: dj.delta_linear(x, W, None, [dj.Branch(A, B)]).sum())(X)
    for layer in (weight, packed):
        got = jax.jit(jax.value_and_grad(value, 1))(layer, X)
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(
    "axes",
    [(1, None, None, None), (0, 0, None, 0)],
    ids=str,
)
def test_vmap(axes: tuple[int | None, ...]) -> None:
    sizes = {0: 2, 1: M}
    count = next(sizes[axis] for axis in axes if axis is not None)
    arguments = [
        a if axis is None or a is X else jnp.stack([a * (1 + 0.1 * i) for i in range(count)])
        for a, axis in zip((X, BIAS, A, B), axes, strict=True)
    ]
    every = (0, 1, 2, 3)
    for of in (lambda f: f, lambda f: jax.grad(loss(f), every)):
        got, want = (jax.jit(jax.vmap(of(layer), axes))(*arguments) for layer in (ours, plain))
        close(got, want)


def test_vmap_of_vmap_and_scan_and_remat() -> None:
    xs = draw(9, 3, 2, M, K)
    nested = jax.vmap(jax.vmap(ours, (0, None, None, None)), (0, None, None, None))
    close(nested(xs, BIAS, A, B), plain(xs, BIAS, A, B))

    def scanned(a: Any, b: Any) -> Any:
        body = jax.checkpoint(lambda total, x: (total + jnp.sin(ours(x, BIAS, a, b)), None))
        return jax.lax.scan(body, jnp.zeros((2, M, N)), xs)[0].sum()

    every = jax.grad(lambda a, b: jnp.sin(plain(xs, BIAS, a, b)).sum(), (0, 1))
    close(jax.jit(jax.grad(scanned, (0, 1)))(A, B), every(A, B))


def test_a_group_is_its_layers_with_one_gradient_of_x() -> None:
    conv, packed, key = W.T, dj.pack_weight(2 * W), jax.random.key(6)

    def layers(a: Any, bias: Any) -> list[dj.Layer]:
        return [
            dj.Layer(W, bias, [dj.Branch(a, B, 2.0, dropout=0.5)], key),
            dj.Layer(packed, None, [dj.Branch(a, B, bias=a[:, 0])]),
            dj.Layer(conv, transposed=True),
        ]

    def together(x: Any, a: Any, bias: Any) -> list[Any]:
        return dj.delta_linear_group(x, layers(a, bias))

    def apart(x: Any, a: Any, bias: Any) -> list[Any]:
        return [
            dj.delta_linear(x, one.weight, one.bias, one.branches, key=one.key,
                            transposed=one.transposed)
            for one in layers(a, bias)
        ]  # fmt: skip

    def total(of: Any) -> Any:
        return lambda *given: sum(jnp.sin(y).sum() for y in of(*given))

    given = (X, A, BIAS)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(together)(*given), jax.jit(apart)(*given))
    got, want = (jax.jit(jax.grad(total(of), (0, 1, 2)))(*given) for of in (together, apart))
    close(got, want)
    twice = [jnp.stack([array, array]) for array in given]
    both = jax.vmap(jax.grad(total(together), (0, 1, 2)))(*twice)
    close(both, jax.tree.map(lambda g: jnp.stack([g, g]), got))

    program = jax.make_jaxpr(jax.grad(lambda x: together(x, A, BIAS)[2].sum()))(X)
    (backward,) = [eqn for eqn in program.eqns if "backward" in str(eqn.params.get("target_name"))]
    shapes = [tuple(v.aval.shape) for v in backward.invars]
    assert shapes == [(2 * M, N), (K, N), (2 * M, 0)]  # of the layer alone whose y is used


def test_dropout_is_of_its_key_and_replayed_backward() -> None:
    def value(x: Any, key: Any) -> Any:
        branch = dj.Branch(jnp.eye(K), jnp.eye(K), dropout=0.5)
        return dj.delta_linear(x, jnp.zeros((K, K)), None, [branch], key=key)

    x, key = jnp.ones((64, K)), jax.random.key(3)
    y = value(x, key)
    assert set(np.unique(y)) == {0.0, 2.0}
    assert 0.3 < float((y > 0).mean()) < 0.7
    np.testing.assert_array_equal(jax.grad(lambda x: value(x, key).sum())(x), y)
    assert not np.array_equal(value(x, jax.random.key(4)), y)
    batch = jax.vmap(value, (0, None))(jnp.stack([x, x]), key)  # one key: one mask
    np.testing.assert_array_equal(batch, jnp.stack([y, y]))


def test_a_program_for_cuda_calls_the_handlers_of_cuda() -> None:
    """Lowered here; test_jax_on_gpu.py runs them."""
    if importlib.util.find_spec("deltaops._xla_cuda") is None:
        pytest.skip("deltaops was built without jax or nvcc")
    cuda = importlib.import_module("deltaops._xla_cuda")
    assert set(cuda.TARGETS) >= {"dropout", "dropout_mask"}
    program = jax.jit(lambda x, key: dj.dropout(x, key, 0.5) + dj.dropout_mask(key, x.shape, 0.5))
    for platform, calls in (("cuda", {"dropout", "dropout_mask"}), ("cpu", {"dropout_mask"})):
        traced = program.trace(X[0], jax.random.key(0))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert set(re.findall(r"custom_call @deltaops_(\w+)", text)) == calls


def test_rows_with_a_branch_each() -> None:
    ids = jnp.array([0, 1, -1, 1, 0, -1], jnp.int32)
    branches = [dj.Branch(A, B), dj.Branch(2 * A, B)]
    got = dj.delta_linear(X[0], W, None, branches, adapter=ids)
    deltas = jnp.stack([(X[0] @ b.a.T) @ b.b.T for b in branches] + [jnp.zeros((M, N))])
    close(got, X[0] @ W.T + deltas[ids, jnp.arange(M)])


def _drawn(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: draw(seed, *shape) for seed, (name, shape) in enumerate(shapes.items(), 5)}


HEADS = _drawn(q=(2, 4, 5, 8), k=(2, 2, 5, 8), v=(2, 2, 5, 8))
ANGLES = draw(30, 1, 5, 8)
OPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "norm_bias": (_drawn(x=(M, K), gamma=(K,), bias=(K,)), {}),
    "bottleneck": (
        _drawn(x=(M, K), down=(R, K), up=(K, R), down_bias=(R,), gamma=(K,), beta=(K,)),
        {"activation": "silu", "norm": "layer"},
    ),
    "gated": (_drawn(gate=(M, K), up=(M, K)), {"activation": "gelu"}),
    "cross_entropy": (
        _drawn(logits=(M, K)), {"target": np.array([0, 3, -100, 6, 1, 1]), "reduction": "sum"}
    ),
    "rotary": (_drawn(x=(2, 3, 5, 8)), {"cos": np.cos(ANGLES), "sin": np.sin(ANGLES)}),
    "attention": (HEADS, {"causal": True}),
    "prefix_attention": (
        HEADS | _drawn(prefix_k=(2, 3, 8), prefix_v=(2, 3, 8)),
        {"bias": np.array(draw(9, 1, 4, 5, 8))},
    ),
}  # fmt: skip
"""Trained arrays and the rest, of every op but delta_linear."""


@pytest.mark.parametrize("op", OPS)
def test_the_other_ops_have_the_gradients_of_torch(op: str) -> None:
    """Eager torch's: its ops are held to the reference, and nothing more is compiled for them."""
    arrays, rest = OPS[op]

    def ours(arrays: Any) -> Any:
        return jnp.sin(getattr(dj, op)(**arrays, **rest)).sum()

    leaves = {name: torch.tensor(np.array(a), requires_grad=True) for name, a in arrays.items()}
    given = {n: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for n, a in rest.items()}
    wanted = getattr(ops, op)(**leaves, **given).sin().sum()
    wanted.backward()
    expected = wanted.item(), {name: t.grad.numpy() for name, t in leaves.items()}
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), arrays)
    once, both = jax.jit(
        lambda arrays, twice: (
            jax.value_and_grad(ours)(arrays), jax.vmap(jax.value_and_grad(ours))(twice)
        )
    )(arrays, twice)  # fmt: skip
    close(once, expected)
    jax.tree.map(lambda b, o: np.testing.assert_array_equal(b, jnp.stack([o, o])), both, once)


def test_dropout_alone_is_that_of_the_layer() -> None:
    key, x = jax.random.key(3), draw(31, 9, K)
    branch = dj.Branch(jnp.eye(K), jnp.eye(K), dropout=0.25)
    none = dj.Branch(jnp.zeros((1, K)), jnp.zeros((K, 1)))
    y, pull = jax.vjp(lambda x: dj.dropout(x, key, 0.25, branch=1), x)
    zero = jnp.zeros((K, K))
    close(dj.delta_linear(x, zero, None, [none, branch], key=key), y)
    keep = dj.dropout_mask(key, x.shape, 0.25, branch=1)
    np.testing.assert_array_equal(y, jnp.where(keep, x * np.float32(4 / 3), 0))
    np.testing.assert_array_equal(pull(x)[0], y)
    assert not dj.dropout_mask(key, x.shape, 1.0).any()


def misaligned(a: Any) -> Any:
    raw = np.empty(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
    raw[...] = a
    return raw


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


HOWS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda a: a,
    "half": lambda a: a.astype(np.float16),
    "integers": lambda a: a.astype(np.int32),
    "complex": lambda a: a.astype(np.complex64),
    "foreign": lambda a: a.astype(a.dtype.newbyteorder()),
    "transposed": lambda a: a.T,
    "backwards": lambda a: a[..., ::-1],
    "elements apart": lambda a: np.stack([a, a], -1)[..., 0],
    "repeated": lambda a: np.broadcast_to(a[:1], a.shape),
    "misaligned": misaligned,
    "read-only": read_only,
    "deeper": lambda a: a[None],
    "flat": lambda a: a.reshape(-1),
    "text": lambda a: a.astype(str),
    "none": lambda a: None,
}
FUZZED = OPS | {"delta_linear": (_drawn(x=(M, K), weight=(N, K), bias=(N,)), {})}


@pytest.mark.parametrize("op", FUZZED)
def test_no_array_crashes_it(op: str) -> None:
    """What is taken is right, as torch has it, and what is refused has our words."""
    arrays, rest = FUZZED[op]
    arrays = {name: np.array(a) for name, a in arrays.items()} | {
        name: a for name, a in rest.items() if isinstance(a, np.ndarray)
    }
    words = {name: a for name, a in rest.items() if name not in arrays}
    choice = st.one_of(st.just("as it is"), st.sampled_from(sorted(HOWS)))

    @settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(choice, min_size=len(arrays), max_size=len(arrays)))
    def check(hows: list[str]) -> None:
        odd = {n: HOWS[how](a) for how, (n, a) in zip(hows, arrays.items(), strict=True)}
        with contextlib.suppress(DeltaopsError):
            y = getattr(dj, op)(**odd, **words)
            plain = {
                n: None if a is None else torch.from_numpy(np.array(a, a.dtype.newbyteorder("=")))
                for n, a in odd.items()
            }
            if "target" in plain:
                plain["target"] = plain["target"].long()
            expected = getattr(ops, op)(**plain, **words, backend="reference")
            np.testing.assert_allclose(y, expected.numpy(), rtol=1e-3, atol=1e-4)

    check()


def test_the_weight_is_frozen_and_second_order_is_refused() -> None:
    with pytest.raises(GradientError, match="weight is frozen"):
        jax.grad(lambda w: dj.delta_linear(X, w).sum())(W)
    close(
        jax.grad(lambda x, w: dj.delta_linear(x, jax.lax.stop_gradient(w)).sum())(X, W),
        jnp.broadcast_to(W.sum(0), X.shape),
    )
    with pytest.raises(Exception, match="cannot be differentiated"):
        jax.hessian(lambda a: loss(ours)(X, BIAS, a, B))(A)


IDS = jnp.zeros(M, jnp.int32)


def attend(q: tuple[int, ...] = (2, 4, 5, 8), **settings: Any) -> Any:
    keys, prefix = jnp.zeros((2, 2, 9, 8)), jnp.zeros((2, 3, 8))
    return dj.prefix_attention(jnp.zeros(q), keys, keys, prefix, prefix, **settings)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: dj.delta_linear(X.astype(jnp.float16), W), DtypeError, "x must be float32 or bf"),
        (lambda: dj.delta_linear(X, W.astype(jnp.bfloat16)), DtypeError, "weight must be float32"),
        (lambda: dj.delta_linear(X, W[0]), ShapeError, r"weight must be \[any, any\], got \[7\]"),
        (lambda: dj.delta_linear(jnp.float32(1), W), ShapeError, r"x must be \[any\], got \[\]"),
        (lambda: dj.delta_linear(X, W, BIAS[:2]), ShapeError, r"bias must be \[5\], got \[2\]"),
        (lambda: dj.delta_linear(X, W, None, [dj.Branch(B, A)]), ShapeError, r"\[0\].a must be"),
        (lambda: dj.delta_linear(X, W, None, [dj.Branch(A, B, dropout=0.1)]), ConfigError, "key"),
        (lambda: dj.delta_linear(X, W, num_threads=0), ConfigError, "num_threads must be"),
        (lambda: dj.delta_linear_group(X, []), ShapeError, "layers must be 1 to 16, got 0"),
        (lambda: dj.delta_linear_group(X, [dj.Layer(W), dj.Layer(A.T)]), ShapeError,
         r"x \(for layers\[1\]\.weight\) must be \[2, 6, 3\], got \[2, 6, 7\]"),
        (lambda: dj.bottleneck(X, A, A), ShapeError, r"up must be \[7, 3\]"),
        (lambda: attend(q=(2, 3, 5, 8)), ShapeError, "multiple of the heads of k, got 3 and 2"),
        (lambda: attend(causal=True), ShapeError, "as many queries as keys, got 5 and 9"),
        (lambda: attend(scale=float("nan")), ConfigError, "scale must be finite, got nan"),
        (lambda: dj.attention(*[jnp.zeros((2, 2, 3, 0))] * 3), ShapeError, "D ≥ 1"),
        (lambda: dj.norm_bias(X, norm="batch"), ConfigError, "norm must be one of none, layer"),
        (lambda: dj.gated(X, X[0]), ShapeError, r"up must be \[2, 6, 7\], got \[6, 7\]"),
        (lambda: dj.gated(X, None), DtypeError, "up must be an array for JAX, got NoneType"),
        (lambda: dj.gated(X, X, activation="swish"), ConfigError, "must be one of identity"),
        (lambda: dj.gated(object(), X), DtypeError, "gate must be an array for JAX, got object"),
        (lambda: dj.cross_entropy(X[0], IDS[:2]), ShapeError, r"target must be \[6\]"),
        (lambda: dj.cross_entropy(X[0], X[0, :, 0]), DtypeError, "target must be int32 or int64"),
        (lambda: dj.cross_entropy(X[0], IDS, reduction="none"), ConfigError, "one of sum, mean"),
        (lambda: dj.rotary(X[None], X, X), ShapeError, "D even"),
        (lambda: dj.rotary(HEADS["q"], ANGLES, ANGLES[0]), ShapeError, "sin must be"),
        (lambda: dj.attention(X, X, X), ShapeError, r"q must be \[any, any, any, any\]"),
        (lambda: dj.attention(**HEADS, mask=ANGLES[None]), DtypeError, "mask must be bool"),
        (lambda: attend(bias=jnp.zeros((1, 1, 5, 7))), ShapeError, "bias must be"),
        (lambda: dj.dropout(X, jax.random.key(0), 2.0), ConfigError, "dropout must be from 0 to 1"),
        (lambda: dj.dropout_mask(jax.random.key(0), (3,), 0.5), ShapeError, "shape must be"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(call: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()


def test_a_number_that_is_no_branch_is_refused_at_run_time() -> None:
    ids = jnp.full(M, 7, jnp.int32)
    with pytest.raises(Exception, match=r"adapter\[0\] must be the number of one of 1 branches"):
        dj.delta_linear(X[0], W, None, [dj.Branch(A, B)], adapter=ids).block_until_ready()
    with pytest.raises(Exception, match=r"target\[3\] must be a class from 0 to 6"):
        dj.cross_entropy(X[0], IDS.at[3].set(7)).block_until_ready()


def example(name: str) -> Any:
    """A file of csrc/examples, as a module."""
    path = Path(__file__).resolve().parents[2] / "csrc" / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"deltaops_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_lora_fine_tune_with_the_same_peft_files_in_and_out(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)

    def base() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    frozen = base()
    state = {name: t.clone() for name, t in frozen.state_dict().items()}
    save_file(state, tmp_path / "base.safetensors")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])
    peft.get_peft_model(frozen, config).save_pretrained(tmp_path / "in")

    first, last = example("jax_lora").fine_tune(
        tmp_path / "base.safetensors", tmp_path / "in", tmp_path / "out"
    )
    assert last < 0.7 * first

    fresh = base()
    fresh.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out")
    x = draw(20, 64, 8)
    with torch.no_grad():
        y = loaded(torch.from_numpy(np.array(x)))
    branches, found = dj.load_lora(tmp_path / "out")
    w = {name: jnp.asarray(t.numpy()) for name, t in state.items()}
    hidden = jax.nn.relu(dj.delta_linear(x, w["0.weight"], w["0.bias"], [branches["0"]]))
    close(y.numpy(), dj.delta_linear(hidden, w["2.weight"], w["2.bias"], [branches["2"]]))
    assert found == dj.load_lora(tmp_path / "in")[1]
    dj.save_lora(tmp_path / "again", branches, found)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_a_file_that_says_more_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.Sequential(torch.nn.Linear(8, 8))
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="plain LoRA, and has use_dora=True"):
        dj.load_lora(tmp_path)
    with pytest.raises(CheckpointError, match="could not be read"):
        dj.load_lora(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(CheckpointError, match="must be an object, and is a list"):
        dj.load_lora(tmp_path)


def test_a_file_whose_matrices_do_not_fit_is_refused(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    dj.save_lora(tmp_path, {"0": dj.Branch(jnp.ones((2, 8)), jnp.ones((8, 2)), 2.0)}, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 4}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"R=4 .* got \[2, 8\] and \[8, 2\]"):
        dj.load_lora(tmp_path)


@pytest.mark.parametrize(
    ("branch", "said"),
    [
        (dj.Branch(jnp.ones((2, 8)), jnp.ones((8, 3)), 2.0), r"B \[N, R\], got \[2, 8\] and"),
        (dj.Branch(jnp.ones((3, 8)), jnp.ones((8, 3)), 2.0), "of rank 2"),
        (dj.Branch(jnp.ones((2, 8)), jnp.ones((8, 2)), 1.0), r"scaling 2\.0"),
        (dj.Branch(jnp.ones((2, 8)), jnp.ones((8, 2)), 2.0, activation="relu"), "linear"),
        (dj.Branch(jnp.ones((2, 8)), jnp.ones((8, 2), jnp.bfloat16), 2.0), "one dtype"),
        (dj.Branch(jnp.ones((2, 8)), jnp.ones((8, 2)), 2.0, dropout=0.5), "dropout 0.1"),
    ],
    ids=["shapes", "rank", "scaling", "activation", "dtypes", "dropout"],
)  # fmt: skip
def test_branches_that_the_configuration_does_not_describe_are_not_saved(
    branch: dj.Branch, said: str, tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.1}
    with pytest.raises(CheckpointError, match=said):
        dj.save_lora(tmp_path / "out", {"0": branch}, config)
    with pytest.raises(CheckpointError, match="at least one"):
        dj.save_lora(tmp_path / "out", {}, config)
    assert not (tmp_path / "out").exists()


def test_flax_example_learns() -> None:
    pytest.importorskip("flax")
    first, last = example("nnx_lora").fine_tune()
    assert last < first / 5
