"""A LoRA layer for Flax NNX on deltaops, and a fine-tune of it:  python nnx_lora.py

The frozen kernel is a plain ``nnx.Param`` outside of what is differentiated; A and B are
``nnx.LoRAParam``, so ``nnx.DiffState(0, nnx.LoRAParam)`` names what trains.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import deltaops.jax as dj


class DeltaLinear(nnx.Module):
    """A frozen ``nnx.Linear`` and a LoRA branch as one op: ``x W + bias + alpha / r (x Aᵀ) Bᵀ``."""

    def __init__(
        self,
        base: nnx.Linear,
        *,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        inputs, outputs = base.kernel.shape
        self.kernel, self.bias = base.kernel, base.bias
        self.a = nnx.LoRAParam(rngs.params.normal((r, inputs)) * inputs**-0.5)
        self.b = nnx.LoRAParam(jnp.zeros((outputs, r)))
        self.scaling, self.dropout = alpha / r, dropout
        self.rngs = rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        branch = dj.Branch(self.a[...], self.b[...], scaling=self.scaling, dropout=self.dropout)
        bias = None if self.bias is None else self.bias[...]
        key = self.rngs.dropout() if self.dropout else None
        return dj.delta_linear(x, self.kernel[...], bias, [branch], key=key, transposed=True)


def fine_tune(steps: int = 100) -> tuple[float, float]:
    """The mean squared error before and after."""
    rngs = nnx.Rngs(0, dropout=1)
    base = nnx.Linear(16, 8, rngs=rngs)
    layer = DeltaLinear(base, r=4, dropout=0.05, rngs=rngs)
    x = jax.random.normal(jax.random.key(2), (256, 16))
    target = base(x) + x @ jax.random.normal(jax.random.key(3), (16, 2)) @ jnp.ones((2, 8)) * 0.3

    def loss(layer: DeltaLinear) -> jax.Array:
        return ((layer(x) - target) ** 2).mean()

    @nnx.jit
    def step(layer: DeltaLinear) -> jax.Array:
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
        trained = nnx.state(layer, nnx.LoRAParam)
        nnx.update(layer, jax.tree.map(lambda p, g: p - 0.1 * g, trained, grads))
        return value

    errors = [float(step(layer)) for _ in range(steps)]
    return errors[0], errors[-1]


if __name__ == "__main__":
    before, after = fine_tune()
    print(f"mean squared error: {before:.3f} -> {after:.3f}")
