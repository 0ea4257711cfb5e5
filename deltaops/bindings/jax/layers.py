"""The native calls of ``delta_linear``: one layer, or several of the same x in one pass over it.

One call each way on the CPU; on CUDA what :mod:`.on_cuda` puts together, where it takes the layers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import on_cuda
from .autodiff import Operands
from .ffi import Array, cuda_built, ffi_call, like

# as csrc/bindings/xla_delta_linear.cpp
BIAS, SEED, ADAPTER, PACKED, X, S = 1, 2, 4, 8, 16, 32
FORWARD = {"bias": BIAS, "seed": SEED, "adapter": ADAPTER, "packed": PACKED}
BACKWARD = {"s": S, "seed": SEED, "adapter": ADAPTER, "packed_backward": PACKED}


class Settings(NamedTuple):
    """What is static of a layer."""

    scaling: tuple[float, ...]
    threshold: tuple[int, ...]
    activation: tuple[int, ...]
    transposed: bool
    num_threads: int

    def names(self, kind: str) -> list[str]:
        """Of the operands of all branches: "a.0", "a.1", …"""
        return [f"{kind}.{i}" for i in range(len(self.scaling))]

    def parameters(self) -> list[str]:
        """Of the branches' matrices, A before B."""
        return [*self.names("a"), *self.names("b")]

    def sizes(self, operands: Operands) -> tuple[int, int]:
        """N and K."""
        n, k = operands["weight"].shape[:: -1 if self.transposed else 1]
        return n, k

    def gradients(self, operands: Operands, dtype: Any) -> dict[str, Any]:
        """Those that there are besides that of x, as results."""
        found = {"bias": like((self.sizes(operands)[0],), dtype)}
        found |= {x: like(operands[x].shape, operands[x].dtype) for x in self.parameters()}
        for name, a in zip(self.names("bias"), self.names("a"), strict=True):
            found[name] = like(operands[a].shape[:1], operands[a].dtype)
        return found


def forward(
    settings: Sequence[Settings], x: Array, layers: Sequence[Operands], keep: bool
) -> tuple[list[Array], list[Array]]:
    """Each layer's y ``[M, N]``, and where ``keep`` says so its S ``[M, ΣR]``."""

    def on_gpu(x: Array, layers: Sequence[Operands]) -> tuple[list[Array], list[Array]]:
        y, s = on_cuda.forward(settings, x, layers)
        return y, s if keep else []

    on_cpu = partial(_forward_on_cpu, settings, keep)
    if not cuda_built() or not on_cuda.takes(settings, [x], layers):
        return on_cpu(x, layers)
    found: tuple[list[Array], list[Array]] = jax.lax.platform_dependent(
        x, list(layers), cpu=on_cpu, cuda=on_gpu
    )
    return found


def _forward_on_cpu(
    settings: Sequence[Settings], keep: bool, x: Array, layers: Sequence[Operands]
) -> tuple[list[Array], list[Array]]:
    m, operands, present, biased = x.shape[0], [x], [], []
    results, states = [], []
    for mine, layer in zip(settings, layers, strict=True):
        biases = mine.names("bias")
        order = ["weight", *FORWARD, *mine.parameters(), *biases]
        operands += [layer[name] for name in order if name in layer]
        present.append(_bits(FORWARD, layer) | (S if keep else 0))
        biased += [name in layer for name in biases]
        results.append(like((m, mine.sizes(layer)[0]), x.dtype))
        ranks = sum(layer[name].shape[0] for name in mine.names("a"))
        states.append(like((m, ranks), jnp.float32))
    found = ffi_call(
        "delta_linear_forward",
        [*results, *(states if keep else [])],
        operands,
        present=_numbers(present),
        biased=_numbers(biased),
        **_attributes(settings),
    )
    return found[: len(results)], found[len(results) :]


def backward(
    settings: Sequence[Settings],
    grad_y: Sequence[Array],
    x: Array | None,
    layers: Sequence[Operands],
    wanted: Sequence[Collection[str]],
    wants_x: bool,
) -> tuple[Array | None, list[Operands]]:
    """The gradient of x, summed over the layers, where it is wanted; each layer's ``wanted``."""

    on_cpu = partial(_backward_on_cpu, settings, wanted, wants_x)

    def on_gpu(
        grad_y: Sequence[Array], x: Array | None, layers: Sequence[Operands]
    ) -> tuple[Array | None, list[Operands]]:
        return on_cuda.backward(settings, grad_y, x, layers, wanted, wants_x)

    names = {name for some in wanted for name in some}
    if not cuda_built() or not on_cuda.takes(settings, grad_y, layers, names):
        return on_cpu(grad_y, x, layers)
    found: tuple[Array | None, list[Operands]] = jax.lax.platform_dependent(
        list(grad_y), x, list(layers), cpu=on_cpu, cuda=on_gpu
    )
    return found


def _backward_on_cpu(
    settings: Sequence[Settings],
    wanted: Sequence[Collection[str]],
    wants_x: bool,
    grad_y: Sequence[Array],
    x: Array | None,
    layers: Sequence[Operands],
) -> tuple[Array | None, list[Operands]]:
    m, dtype = grad_y[0].shape[0], grad_y[0].dtype
    operands, present, flags = [*grad_y, *([] if x is None else [x])], [], [wants_x]
    results = [like((m, settings[0].sizes(layers[0])[1]), dtype)] if wants_x else []
    names: list[list[str]] = []
    for mine, layer, some in zip(settings, layers, wanted, strict=True):
        known = mine.gradients(layer, dtype)
        names.append([name for name in known if name in some])
        flags += [name in some for name in known]
        results += [known[name] for name in names[-1]]
        order = ["weight", *BACKWARD, *mine.parameters()]
        operands += [layer[name] for name in order if name in layer]
        present.append(_bits(BACKWARD, layer))
    present[0] |= 0 if x is None else X
    found = iter(
        ffi_call(
            "delta_linear_backward",
            results,
            operands,
            present=_numbers(present),
            wanted=_numbers(flags),
            **_attributes(settings),
        )
    )
    grad_x = next(found) if wants_x else None
    return grad_x, [{name: next(found) for name in mine} for mine in names]


def saved(settings: Settings, wanted_x: bool) -> list[str]:
    """Operands of a layer that its backward pass reads, beside x."""
    names = ["weight", "seed", "adapter", *settings.parameters()]
    return [*names, "packed_backward"] if wanted_x else names


def _attributes(settings: Sequence[Settings]) -> dict[str, Any]:
    """As the handlers take them: layer after layer."""
    return {
        "transposed": _numbers([s.transposed for s in settings]),
        "counts": _numbers([len(s.scaling) for s in settings]),
        "scaling": np.array([scale for s in settings for scale in s.scaling], np.float32),
        "threshold": _numbers([number for s in settings for number in s.threshold]),
        "activation": _numbers([number for s in settings for number in s.activation]),
        "num_threads": np.int32(settings[0].num_threads),
    }


def _numbers(given: Iterable[int]) -> Any:
    return np.array(list(given), np.int32)


def _bits(known: dict[str, int], layer: Operands) -> int:
    return sum(bit for name, bit in known.items() if name in layer)
