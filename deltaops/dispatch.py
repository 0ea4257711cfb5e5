"""Which backend runs a call, and why. Nothing falls back unseen: ``explain`` has every reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .backends import Backend, Call, registered
from .backends.base import PlanningBackend
from .errors import BuildError, NoBackendError

LAST_RESORT = "reference"


@dataclass(frozen=True)
class Verdict:
    """What one backend said: ``reason`` is None where it can run."""

    backend: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.backend}: {self.reason or 'yes'}"


@dataclass(frozen=True)
class Explanation:
    """Which backend a call gets and what each one before it said."""

    call: Call
    chosen: str | None
    verdicts: tuple[Verdict, ...]
    plan: str | None = None
    """Which of its ways the chosen backend takes and why; None where it has one only."""

    @property
    def fast(self) -> bool:
        """Whether a fused backend runs it."""
        return self.chosen is not None and self.chosen != LAST_RESORT

    @property
    def reason(self) -> str:
        """One line: what runs, or why the fused ones do not."""
        if self.fast:
            # a plan may leave the products to a library: "fused" would promise too much
            if self.plan:
                return f"run by {self.chosen} ({self.plan})"
            return f"fused by {self.chosen}"
        refused = "; ".join(str(v) for v in self.verdicts if v.reason)
        return f"eager torch ({refused})" if self.chosen else f"nothing runs it ({refused})"

    def __str__(self) -> str:
        head = f"{self.call.title} → {self.chosen or 'no backend'}"
        plan = [f"  plan: {self.plan}"] if self.plan else []
        return "\n".join([head, *(f"  {verdict}" for verdict in self.verdicts), *plan])


def _reason(backend: Backend, call: Call) -> str | None:
    # The call first: "runs on the CPU" says more about a CUDA tensor than a missing compiler does.
    return backend.unsupported(call) or backend.unavailable()


def explain_call(call: Call, backend: str = "auto", strict: bool = False) -> Explanation:
    """Who would run ``call``; never raises for a backend that cannot.

    Args:
        call: what is asked for.
        backend: as :func:`select`'s.
        strict: a fused backend is wanted even where eager torch is faster.
    Raises: NoBackendError when ``backend`` is no backend's name.
    """
    candidates = registered()
    if backend != "auto":
        if backend not in candidates:
            known = ", ".join(["auto", *candidates])
            raise NoBackendError(
                f"backend must be one of {known}, got {backend!r}. Check the spelling."
            )
        reason = _reason(candidates[backend], call)
        return _explained(call, None if reason else backend, [Verdict(backend, reason)])
    verdicts = []
    for candidate in candidates.values():
        reason = _reason(candidate, call) or (None if strict else candidate.outrun(call))
        verdicts.append(Verdict(candidate.name, reason))
        if reason is None:
            return _explained(call, candidate.name, verdicts)
    return _explained(call, None, verdicts)


def _explained(call: Call, chosen: str | None, verdicts: Sequence[Verdict]) -> Explanation:
    backend = registered()[chosen] if chosen else None
    plan = backend.planned(call) if isinstance(backend, PlanningBackend) else None
    return Explanation(call, chosen, tuple(verdicts), plan)


@lru_cache(maxsize=4096)
def select(call: Call, backend: str = "auto", strict: bool = False) -> Backend:
    """The backend for ``call``.

    Args:
        backend: "auto" asks them in order; a name runs that one or raises.
        strict: refuse the eager last resort that "auto" would otherwise end with.
    Raises: NoBackendError with every reason.
    """
    explanation = explain_call(call, backend, strict)
    if explanation.chosen is None or (strict and backend == "auto" and not explanation.fast):
        wish = "a fused backend (strict=True)" if strict else f"backend {backend!r}"
        raise NoBackendError(
            f"{call.op}: {wish} was asked for and none takes this call.\n{explanation}\n"
            "Pass backend='auto' and strict=False to let eager torch run it."
        )
    return registered()[explanation.chosen]


def backends() -> dict[str, str]:
    """Name → "ready", or why it cannot run here and how to mend that."""
    return {name: _state(backend) for name, backend in registered().items()}


def _state(backend: Backend) -> str:
    try:
        return backend.unavailable() or "ready"
    except BuildError as error:  # of another build: a call of it raises this
        return str(error)
