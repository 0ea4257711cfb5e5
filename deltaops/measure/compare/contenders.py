"""Who is compared: each method with its settings and the learning rate it is trained at.

The rate depends on the head. A new head learns too, and a delta that moves the features fast moves
them away under it; names stand still, and the delta has all the way to go.

A method of :data:`deltaops.methods.METHODS` that has no line here takes part with its defaults.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from deltaops.errors import ConfigError
from deltaops.methods import METHODS, Combined, Delta, parts_of
from deltaops.tuning.spec import parse_delta

from .reader import NAMED
from .steer import Steer, steered_by

FULL, HEAD = "full", "head"
"""Without a delta: everything trained, and nothing but the head, where that is one to train."""
HEAD_RATE = 0.01
"""Of the new head beside anything else that trains."""
GUESS = 0.01
"""Peak learning rate of a method without a line: few parameters, each felt in every token."""


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    name: str
    """On the command line."""
    title: str
    spec: str
    """As in ``deltaops tune --delta``; empty without a delta."""
    rate: float
    """Peak learning rate of what trains beside the head, or of the head alone; 0 where nothing
    trains. ``deltaops compare --rates`` tries others."""
    why: str
    """Of the rate."""
    paces: tuple[tuple[str, float], ...] = ()
    """Of a combination: part → its rate as a factor of ``rate``, which is that of the first."""
    sized: Delta | Combined | None = None
    """Takes the place of ``spec``'s delta where it is sized to a number of parameters."""
    steer: Steer | None = None
    """What acts on the delta as it trains. It is not sized then: a controller has its budget."""

    def delta(self, modules_to_save: tuple[str, ...] = ()) -> Delta | Combined | None:
        """What is attached, with these modules trained beside it; None without one."""
        if not self.spec:
            return None
        if self.sized is None:
            found: Delta | Combined = parse_delta(self.spec, modules_to_save=modules_to_save)
            return found
        if isinstance(self.sized, Combined):
            parts = {n: _saving(part, modules_to_save) for n, part in self.sized.by_name.items()}
            return Combined(parts, self.sized.gated)
        return _saving(self.sized, modules_to_save)


_CARRIED = "the prefix's, not tried for a pool of them"
_LINES = (
    Contender(FULL, "full tuning", "", 1e-4, "every weight moves: small steps"),
    Contender(HEAD, "frozen features + head", "", 0.03, "nothing else changes what it reads"),
    Contender("lora", "LoRA, r = 16", "lora:r=16,alpha=32", 1e-3, "matrices, B from zero"),
    Contender("dora", "DoRA, r = 16", "lora:r=16,alpha=32,use_dora=true", 1e-3, "as LoRA's"),
    Contender("houlsby", "Adapter (Houlsby)", "adapter", 1e-3, "matrices, from near zero"),
    Contender("pfeiffer", "Adapter (Pfeiffer)", "adapter:style=pfeiffer", 1e-3, "as Houlsby's"),
    Contender("parallel", "ParallelAdapter", "parallel", 3e-4, "its scale of 4 multiplies steps"),
    Contender("bitfit", "BitFit", "bitfit", 3e-3, "one number a feature"),
    Contender("ia3", "(IA)³", "ia3", 1e-2, "gains near 1: steps of percents"),
    Contender("lntuning", "LNTuning", "lntuning", 3e-3, "one number a feature"),
    Contender("compacter", "Compacter", "compacter", 1e-2, "its factors start at 1e-4"),
    Contender("prefix", "Prefix, P = 16", "prefix:num_virtual_tokens=16", 1e-2, "few vectors"),
    Contender(
        "prefix-mlp", "Prefix, P = 16, by an MLP",
        "prefix:num_virtual_tokens=16,reparameterised=true",
        1e-3, "the MLP's matrices move all its prefixes",
    ),
    Contender("prompt", "Prompt, P = 16", "prompt:num_virtual_tokens=16", 3e-2, "few vectors"),
    Contender(  # as many positions as the prompt's
        "pool", "PromptPool, 4 of N = 10", "prompt-pool:size=10,length=4,top_k=4",
        3e-2, "as the prompt's",
    ),
    Contender(  # as many positions as the prefix's
        "prefix-pool", "PrefixPool, 4 of N = 10", "prefix-pool:size=10,length=4,top_k=4",
        1e-2, _CARRIED,
    ),
    Contender(
        "intrinsic", "IntrinsicPrompt, q = 5",
        "intrinsic-prompt:num_virtual_tokens=16,intrinsic_dim=5", 3e-2, "few numbers",
    ),
    Contender(
        "intrinsic-adapter", "IntrinsicAdapter, q = 5", "intrinsic-adapter", 5e-2, "few numbers"
    ),
    Contender(
        "intrinsic-250", "IntrinsicPrompt, q = 250",
        "intrinsic-prompt:num_virtual_tokens=16,intrinsic_dim=250", 3e-2, "few numbers",
    ),
    Contender(
        "intrinsic-adapter-250", "IntrinsicAdapter, q = 250",
        "intrinsic-adapter:intrinsic_dim=250", 5e-2, "few numbers",
    ),
    Contender(
        "intrinsic-1000", "IntrinsicPrompt, q = 1000",
        "intrinsic-prompt:num_virtual_tokens=16,intrinsic_dim=1000", 3e-2, "few numbers",
    ),
    Contender(
        "intrinsic-adapter-1000", "IntrinsicAdapter, q = 1000",
        "intrinsic-adapter:intrinsic_dim=1000", 5e-2, "few numbers",
    ),
)  # fmt: skip

_FASTER = "names stand still: thrice that beside a trained head"
_OF_THREE = "on held-out training texts the best of 0.1, 0.3 and 1"
_NAMED: dict[str, tuple[float, str]] = {
    FULL: (3e-4, _FASTER),
    "lora": (3e-3, _FASTER),
    "dora": (3e-3, "as LoRA's"),
    "houlsby": (3e-3, _FASTER),
    "pfeiffer": (3e-3, "as Houlsby's"),
    "parallel": (1e-3, _FASTER),
    "bitfit": (3e-2, "on held-out training texts better than 0.01"),
    "ia3": (3e-2, _FASTER),
    "lntuning": (1e-2, _FASTER),
    "compacter": (3e-2, _FASTER),
    "prefix": (3e-2, "on held-out training texts better than 0.01"),
    "prefix-mlp": (3e-3, _FASTER),
    "prompt": (1e-2, "on held-out training texts the best of 0.003, 0.01, 0.03 and 0.1"),
    "prefix-pool": (3e-2, _CARRIED),
    "pool": (1e-2, "on held-out training texts no worse than 0.03, and as the prompt's"),
    "intrinsic": (1e-1, _FASTER),
    "intrinsic-adapter": (1e-1, "names stand still: twice that beside a trained head"),
    "intrinsic-250": (3e-1, _OF_THREE),
    "intrinsic-adapter-250": (1e-1, _OF_THREE),
    "intrinsic-1000": (1.0, _OF_THREE),
    "intrinsic-adapter-1000": (3e-1, _OF_THREE),
}
"""Name → rate under a named head and its reason, where it is another than above."""


def contenders(head: str = NAMED) -> dict[str, Contender]:
    """Name → contender: the lines above, then methods without one, with their defaults.

    Args:
        head: :data:`.reader.NAMED` or :data:`.reader.TRAINED`.
    """
    found = {line.name: line for line in _LINES}
    if head == NAMED:
        found[HEAD] = Contender(HEAD, "frozen features", "", 0.0, "nothing trains")
        for name, (rate, why) in _NAMED.items():
            found[name] = replace(found[name], rate=rate, why=why)
    covered = {line.spec.partition(":")[0] for line in _LINES}
    for kind, method in METHODS.items():
        if kind not in covered:
            found[kind] = Contender(kind, method.__name__, kind, GUESS, "not yet looked for")
    return found


def chosen(names: str | None, head: str = NAMED) -> list[Contender]:
    """Those named, in the table's order, then combinations; all of the table without names.

    Args:
        names: of the table's lines, or deltas as ``deltaops tune --delta`` takes them, such as
            ``lora:r=8,alpha=16+bitfit`` or MAM, between commas; either may have a controller
            behind an @, as ``deltaops tune --controller`` takes it.
        head: as for :func:`contenders`.
    Raises: ConfigError.
    """
    known = contenders(head)
    if names is None:
        return list(known.values())
    wanted = list(_pieces(names))
    if not wanted:
        raise ConfigError(
            f"--methods knows {', '.join(known)}; got {names!r}. Separate names by commas."
        )
    own = [_written(name, known) for name in dict.fromkeys(wanted) if name not in known]
    return [*(known[name] for name in known if name in wanted), *own]


def _pieces(names: str) -> Iterator[str]:
    """``names`` between commas, but for those between the options of one delta."""
    found = ""
    for piece in (part.strip() for part in names.split(",")):
        option, equals, _ = piece.partition("=")
        if found and equals and ":" not in option and "+" not in option:
            found += f",{piece}"
            continue
        if found:
            yield found
        found = piece
    if found:
        yield found


def _written(spec: str, known: dict[str, Contender]) -> Contender:
    """A line for a delta that none of the table's has, or for one that is steered."""
    spec, at, parts = (text.strip() for text in spec.partition("@"))
    if at:
        line = known[spec] if spec in known else _written(spec, known)
        if not line.spec:
            raise ConfigError(
                f"--methods: a controller steers a delta, and {spec!r} has none. Leave out "
                f"@{parts}, or name a method."
            )
        title = f"{line.title} @ {parts}"
        return replace(line, name=f"{spec}@{parts}", title=title, steer=steered_by(parts))
    try:
        delta = parse_delta(spec)
    except ConfigError as error:
        raise ConfigError(
            f"--methods knows {', '.join(known)}, and deltas as --delta takes them; got {spec!r}. "
            f"{error}"
        ) from error
    nearest = {name: _nearest(part, known) for name, part in parts_of(delta).items()}
    first = next(iter(nearest.values())).rate
    told = dict.fromkeys(f"{line.name} {line.rate:g}" for line in nearest.values())
    return Contender(
        spec, spec, spec, first, f"each part's own: {', '.join(told)}",
        tuple((name, line.rate / first) for name, line in nearest.items()),
    )  # fmt: skip


def _nearest(delta: Delta, known: dict[str, Contender]) -> Contender:
    """The line of the same method with most settings in common."""
    same = [line for line in known.values() if line.spec.partition(":")[0] == delta.kind]

    def alike(line: Contender) -> int:
        other = line.delta()
        return sum(
            getattr(delta, f.name) == getattr(other, f.name)
            for f in fields(delta)  # type: ignore[arg-type]  # every method is a dataclass
        )

    return max(same, key=alike)


def _saving(delta: Delta, modules_to_save: tuple[str, ...]) -> Delta:
    found: Delta = replace(delta, modules_to_save=modules_to_save)  # type: ignore[type-var]  # as above
    return found
