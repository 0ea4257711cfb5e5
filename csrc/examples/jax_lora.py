"""Tune a LoRA adapter of PEFT's in JAX:  python jax_lora.py base.safetensors in-folder out-folder

The model is two linear layers ("0" and "2") with a relu between, as torch saves an nn.Sequential;
the adapter's files go in and come out as PEFT writes them, and torch takes no part.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.flax import load_file

import deltaops.jax as dj

Branches = dict[str, dj.Branch]


def fine_tune(base: Path, given: Path, made: Path, steps: int = 60) -> tuple[float, float]:
    """The mean squared error before and after; the adapter that was learned lies in ``made``."""
    tensors = load_file(str(base))
    layers = {name: dj.pack_weight(tensors[f"{name}.weight"]) for name in ("0", "2")}
    branches, config = dj.load_lora(given)

    def model(branches: Branches, x: jax.Array) -> jax.Array:
        hidden = dj.delta_linear(x, layers["0"], tensors["0.bias"], [branches["0"]])
        return dj.delta_linear(jax.nn.relu(hidden), layers["2"], tensors["2.bias"], [branches["2"]])

    x = jax.random.normal(jax.random.key(0), (64, tensors["0.weight"].shape[1]))
    target = jnp.stack([x[:, 0] * x[:, 1], jnp.abs(x[:, 2])], 1)

    @jax.jit
    def step(branches: Branches) -> Any:
        error, grads = jax.value_and_grad(lambda b: ((model(b, x) - target) ** 2).mean())(branches)
        return error, jax.tree.map(lambda p, g: p - 0.1 * g, branches, grads)

    errors = []
    for _ in range(steps):
        error, branches = step(branches)
        errors.append(float(error))
    dj.save_lora(made, branches, config)
    return errors[0], errors[-1]


if __name__ == "__main__":
    before, after = fine_tune(*map(Path, sys.argv[1:4]))
    print(f"mean squared error: {before:.3f} -> {after:.3f}")
