"""Measures a GPU for the planner: each plan of ``delta_linear``'s GEMMs, for calls of some shapes.

As :mod:`deltaops.measure.gpu` does: every plan passes a gate against float64 first; then they and
the frozen layer run in turns, each as one graph over more operands than the cache holds. A run in
which the frozen layer drifts is thrown away; what cannot be captured as a graph, and a direction
that drifts in every attempt, have no seconds. The result is seconds; choosing is the planner's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from deltaops.backends import Backend, GroupMember, NormBiasCall
from deltaops.backends.triton import delta_linear, planner, produce
from deltaops.backends.triton.tables import DIRECTIONS, Entry, Setting
from deltaops.errors import DataError
from deltaops.reference import delta_linear as reference
from deltaops.reference import norm_bias
from deltaops.testing import assert_accurate

from .gpu import CACHE_BYTES
from .gpu_clock import DRIFT, captured, cuda_clock, steady
from .gpu_subject import FROZEN, SCALING, Call
from .interleave import Timing

MAKE_S = ("decode", "beside")
"""Plans that make S themselves, and cannot be handed one."""
EPS = 1e-5
"""Of the norm that makes x."""

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}

TOKENS = (1, 16, 128, 512, 2048, 8192)
LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336))
"""N and K of the layers that are measured where none is named: those of the design page."""


def settings(
    tokens: Sequence[int],
    layers: Sequence[tuple[int, int]],
    ranks: Sequence[int],
    dtype: torch.dtype,
    adapter: torch.dtype,
    dropout: bool,
) -> list[Setting]:
    """All combinations, in this order, each once."""
    combinations = [
        planner.setting_of(dtype, (adapter,), m, n, k, (rank,), dropout)
        for n, k in layers
        for rank in ranks
        for m in tokens
    ]
    return list(dict.fromkeys(combinations))


@dataclass(frozen=True)
class Measured:
    """One setting: what the table keeps, and how it was taken."""

    entry: Entry
    frozen: dict[str, float]
    """Seconds of the frozen layer in each direction."""
    notes: tuple[str, ...]
    """What went otherwise than planned."""
    failed: bool = False
    """Whether an error ended it."""


def measure(
    setting: Setting,
    run: Backend,
    *,
    device: str = "cuda",
    rounds: int = 20,
    clock: Callable[[Call], float] = cuda_clock,
    capture: Callable[[Call], Call] = captured,
    cache_bytes: float = CACHE_BYTES,
) -> Measured:
    """Seconds of each plan, in both directions: of those that were captured, in a steady run.

    Args:
        run: whose plans they are: the Triton backend.
        clock: runs a call and says how many seconds it took.
        capture: turns a call into one without launch costs, or raises RuntimeError.
    Raises: DataError where a plan gives wrong numbers; nothing of the setting is timed then.
        torch.OutOfMemoryError.
    """
    copies = _operands(setting, device, cache_bytes)
    _gate(setting, copies[0], run)
    seconds, frozen, notes = {}, {}, []
    for direction in DIRECTIONS:
        calls = {FROZEN: _frozen(direction, copies)}
        for plan in _possible(setting, direction, copies[0]):
            calls[plan] = _planned(direction, plan, copies, run)
        peers: dict[str, Call] = {}
        for name, call in calls.items():
            try:
                peers[name] = capture(call)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # its launches would be timed beside others' replays
                notes.append(f"{direction}, {name}: left out, not captured as a graph: {error}")
        if FROZEN not in peers or len(peers) == 1:
            continue
        taken, moved, _ = steady(peers, clock, rounds)
        if moved > DRIFT:
            notes.append(f"{direction}: left out, the frozen layer drifted by {moved:.1%}")
            continue
        medians = {name: Timing.of(t).median / len(copies) for name, t in taken.items()}
        frozen[direction] = medians.pop(FROZEN)
        seconds[direction] = medians
    if "forward" in seconds and _makes_s_before(setting, copies[0], run):
        with_s = {p: t for p, t in seconds["forward"].items() if p not in MAKE_S}
        if with_s:
            best = min(with_s, key=lambda plan: with_s[plan])
            added = _seconds_produced(best, copies, run, clock, capture, rounds)
            if isinstance(added, str):
                notes.append(f"forward, produced: left out, {added}")
            else:
                seconds["forward"]["produced"] = added
    return Measured(Entry(setting, seconds), frozen, tuple(notes))


def measure_all(
    wanted: Iterable[Setting],
    measure_one: Callable[[Setting], Measured],
    keep: Callable[[Entry], object],
    on_done: Callable[[Measured], object] = lambda one: None,
) -> list[Measured]:
    """Measure each; it is kept at once, so that a run that is stopped has not been in vain. A
    setting that does not fit into the GPU's memory, or that fails, is left out, with a note."""
    done: list[Measured] = []
    for setting in wanted:
        try:
            one = measure_one(setting)
        except torch.OutOfMemoryError:
            one = Measured(Entry(setting, {}), {}, ("left out: too little memory",))
        except Exception as error:  # of one layer: the others can still be measured
            note = f"failed: {type(error).__name__}: {error}"
            one = Measured(Entry(setting, {}), {}, (note,), failed=True)
        done.append(one)
        if one.entry.seconds:
            keep(one.entry)
        on_done(one)
    return done


# ----------------------------------------------------------------------------------------- calls


@dataclass(frozen=True)
class _Operands:
    x: Tensor
    weight: Tensor
    grad_y: Tensor
    a: Tensor
    b: Tensor
    s: Tensor
    seed: Tensor
    dropout: float

    def settings(self) -> tuple[Any, ...]:
        return [SCALING], [self.dropout], ["identity"], self.seed

    def double(self) -> _Operands:
        changes: dict[str, Any] = {
            name: t.double()
            for name, t in vars(self).items()
            if isinstance(t, Tensor) and t.is_floating_point()
        }
        return replace(self, **changes)


def _operands(setting: Setting, device: str, cache_bytes: float) -> list[_Operands]:
    """Random copies, together no smaller than ``cache_bytes``; at least two."""
    m, n, k, rank = setting[:4]
    dtype, adapter = getattr(torch, setting.dtype), getattr(torch, setting.adapter)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype, scale: float = 1.0) -> Tensor:
        t = torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)
        return t.mul_(scale).to(dtype)

    one = dtype.itemsize * (n * k + m * k + m * n)
    return [
        _Operands(
            normal(m, k),
            normal(n, k, scale=k**-0.5),
            normal(m, n),
            normal(rank, k, dtype=adapter, scale=k**-0.5),
            normal(n, rank, dtype=adapter, scale=rank**-0.5),
            normal(m, rank, dtype=torch.float32),
            torch.randint(2**62, (1,), generator=generator, device=device),
            0.1 if setting.dropout else 0.0,
        )
        for _ in range(max(2, -(-int(cache_bytes) // one)))
    ]


def _forward(o: _Operands, run: Any) -> list[Tensor]:
    return list(run.forward(o.x, o.weight, None, [o.a], [o.b], [None], *o.settings()))


def _backward(o: _Operands, run: Any) -> list[Tensor]:
    needs = [True, False, True, True, False]
    found = run.backward(o.grad_y, o.x, o.weight, [o.a], [o.b], o.s, *o.settings(), needs)
    return list(found)


_CALLS = {"forward": _forward, "backward": _backward}
_RESULTS = {"forward": ("y", "S"), "backward": ("grad x", "grad a", "grad b")}


def _forcing(direction: str, plan: str) -> AbstractContextManager[None]:
    plans = (plan, "fused") if direction == "forward" else ("fused", plan)
    return planner.forced(*plans)


def _possible(setting: Setting, direction: str, o: _Operands) -> tuple[str, ...]:
    rows, factor = (o.x, o.b) if direction == "forward" else (o.grad_y, o.a)
    given = [factor], [setting.rank], rows.device, not setting.dropout
    special = delta_linear.special(direction, rows, o.weight, *given)
    return planner.possible(setting, direction, special)


def _planned(direction: str, plan: str, copies: list[_Operands], run: Backend) -> Call:
    def call() -> object:
        with _forcing(direction, plan):
            return [_CALLS[direction](o, run) for o in copies]

    return call


def _frozen(direction: str, copies: list[_Operands]) -> Call:
    if direction == "forward":
        return lambda: [functional.linear(o.x, o.weight) for o in copies]
    return lambda: [o.grad_y @ o.weight for o in copies]


def _gate(setting: Setting, o: _Operands, run: Backend) -> None:
    if _makes_s_before(setting, o, run):
        oracle, baseline = (_produced_by_reference(one) for one in (o.double(), o))
        with planner.forced(_possible(setting, "forward", o)[0], "fused"):
            _hold(setting, "forward", "produced", _produced(o, run), oracle, baseline)
    for direction, call in _CALLS.items():
        oracle = call(o.double(), reference)
        baseline = call(o, reference)
        for plan in _possible(setting, direction, o):
            with _forcing(direction, plan):
                got = call(o, run)
            _hold(setting, direction, plan, got, oracle, baseline)


def _hold(
    setting: Setting,
    direction: str,
    plan: str,
    got: list[Tensor],
    oracle: list[Tensor],
    baseline: list[Tensor],
) -> None:
    try:
        for name, value, want, low in zip(_RESULTS[direction], got, oracle, baseline, strict=True):
            assert_accurate(value, want, low, name)
    except AssertionError as error:
        raise DataError(
            f"tune-kernels: {setting}: {direction} by the plan {plan!r} is wrong: {error}. "
            "Nothing of it was timed; please report this with `deltaops doctor`."
        ) from error


# ------------------------------------------------------------------ S that is made where x is made


def _member(o: _Operands, run: Any) -> GroupMember:
    """The layer, as a backend knows those that read x."""
    settings = [SCALING], [o.dropout], ["identity"]
    plan = run.prepare(o.weight, [o.a], [o.b], [None], *settings)
    return GroupMember(plan, o.weight, None, [o.a, o.b, None], o.seed, None)


def _makes_s_before(setting: Setting, o: _Operands, run: Any) -> bool:
    """Whether the library makes S with the RMSNorm that makes x."""
    (m, k), dtype = o.x.shape, o.x.dtype
    call = NormBiasCall(o.x.device.type, dtype, (dtype,), m, k, "rms")
    asked = setting.rank > 0 and hasattr(run, "norm_and_s")
    return asked and produce.takes(call, [_member(o, run)])


def _produced(o: _Operands, run: Any) -> list[Tensor]:
    """y and S of the norm of x, S made with it."""
    member = _member(o, run)
    x, _, (s,) = run.norm_and_s(o.x, torch.ones_like(o.x[0]), EPS, [member])
    return [member.plan.forward_given(x, o.weight, None, member.operands, s), s]  # type: ignore[attr-defined]  # a GivenPlan


def _produced_by_reference(o: _Operands) -> list[Tensor]:
    x, _ = norm_bias.forward(o.x, None, None, EPS, "rms")
    return _forward(replace(o, x=x), reference)


def _seconds_produced(
    best: str,
    copies: list[_Operands],
    run: Any,
    clock: Callable[[Call], float],
    capture: Callable[[Call], Call],
    rounds: int,
) -> float | str:
    """What the layer adds to the norm before it by the plan ``best``, with S made there; or why
    nothing is known."""
    ones = torch.ones_like(copies[0].x[0])

    def norm() -> object:
        return [run.norm_bias_forward(o.x, ones, None, EPS, "rms") for o in copies]

    def both() -> object:
        with planner.forced(best, "fused"):
            return [_produced(o, run) for o in copies]

    try:  # the norm is what must not drift, as the frozen layer elsewhere
        peers = {FROZEN: capture(norm), "produced": capture(both)}
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"not captured as a graph: {error}"
    taken, moved, _ = steady(peers, clock, rounds)
    if moved > DRIFT:
        return f"the norm drifted by {moved:.1%}"
    medians = {name: Timing.of(t).median / len(copies) for name, t in taken.items()}
    more = medians["produced"] - medians[FROZEN]
    return more if more > 0 else "the norm alone took as long as both"
