"""Train a method and time it, beside the same method in eager torch and full tuning.

Every contender sees the same texts in the same order for the same number of steps, under the same
head; what it trains beside it has its own learning rate (:mod:`.contenders`). Its time is
taken apart, on the first batch: losses and gradients of both programs are held to float64 first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from deltaops.errors import ConfigError
from deltaops.measure.cell import EAGER, OURS, Cell
from deltaops.measure.pair import Peer, held_pair, time_steps
from deltaops.surgery import Handle, attach
from deltaops.tuning.loop import Point, Schedule, evaluate, make_optimizer, train
from deltaops.tuning.sentence import SCALE, NamedClasses
from deltaops.tuning.spec import parse_delta
from deltaops.tuning.tokens import Order, TokenSet

from .contenders import FULL, HEAD_RATE, Contender
from .contenders import HEAD as HEAD_ALONE
from .reader import HEAD, NAMED, TRAINED, Material, Reader, by_length

FULL_TUNING = "full tuning"
"""The peer that every step is also timed against."""
TRIAL = 3
"""A learning rate is tried on a third of the steps."""
ACCURACY, TIME = "accuracy", "time"
"""The halves of a line, each of which has a run of its own."""
HELD = 0.1
"""Part of the training texts on which rates are judged."""


@dataclass(frozen=True)
class Settings:
    """What decides the bits of every result; results with other settings are no table."""

    model: str
    train: str
    test: str | None
    steps: int
    batch_size: int = 32
    seq_len: int = 32
    seed: int = 0
    head: str = TRAINED
    """As files say that were written before there was another."""
    head_rate: float | None = HEAD_RATE
    """Peak learning rate of a trained head beside anything else that trains."""
    scale: float | None = None
    """Of a named head's cosines, before the softmax."""
    texts: str = ""
    """A hash of all tokens and labels, of training and test: names alone say little."""
    encoder: str = ""
    """A hash of the encoder's weights."""


HEADS: dict[str, dict[str, Any]] = {
    NAMED: {"head": NAMED, "head_rate": None, "scale": SCALE},
    TRAINED: {"head": TRAINED, "head_rate": HEAD_RATE, "scale": None},
}
"""Head → what the settings say of it."""


@dataclass(frozen=True)
class Learned:
    """How a contender did after all steps."""

    accuracy: float
    """On the test texts, as a share."""
    loss: float
    """The same, mean, in nats."""
    training_loss: float | None
    """Of the last step; equal bits for equal seeds. None where nothing trains."""
    examples: int
    """Test texts."""
    rate: float
    why: str
    seconds: float
    """Of all steps, with the batches' own lengths."""
    tried: dict[str, float | None]
    """Learning rate → accuracy on held-out training texts, None where the loss was no longer
    finite; empty where none was looked for."""


@dataclass(frozen=True)
class Record:
    """One line of the table, of which either half may be missing."""

    name: str
    title: str
    settings: str
    trained: int
    """Parameters of the delta, or of the encoder; the head's are not among them."""
    head: int
    total: int
    """Of the encoder."""
    learned: Learned | None = None
    timed: Cell | None = None
    state: dict[str, int] | None = None
    """Peer → bytes of gradients and of the optimizer's moments, head included."""
    failed: dict[str, str] = field(default_factory=dict)
    """:data:`ACCURACY` or :data:`TIME` → what stopped it: the gate's message, or a loss that is no
    longer finite."""
    made: dict[str, dict[str, str]] = field(default_factory=dict)
    """The same → command, date and versions of the run that measured it."""

    def as_json(self) -> dict[str, Any]:
        """Every field."""
        return asdict(self)

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Record:
        """What :meth:`as_json` wrote."""
        learned, timed, failed = value["learned"], value["timed"], value["failed"]
        if isinstance(failed, str):  # as files say that were written before it was told by half
            failed = {ACCURACY if learned is None else TIME: failed} if failed else {}
        return cls(
            **{
                **value,
                "failed": failed,
                "learned": None if learned is None else Learned(**learned),
                "timed": None if timed is None else Cell.of_json(timed),
            }
        )

    def updated(self, old: Record | None) -> Record:
        """This record, with the half from an older one that had no run now."""
        if old is None or old.settings != self.settings:
            return self
        learning = self.learned is not None or ACCURACY in self.failed
        timing = self.timed is not None or TIME in self.failed
        kept = {half for half, ran in ((ACCURACY, learning), (TIME, timing)) if not ran}
        return replace(
            self,
            learned=self.learned if learning else old.learned,
            timed=self.timed if timing else old.timed,
            state=self.state if timing else old.state,
            failed={**{h: why for h, why in old.failed.items() if h in kept}, **self.failed},
            made={**{h: run for h, run in old.made.items() if h in kept}, **self.made},
        )


Tick = Callable[[], object]


def trains(contender: Contender, head: str) -> bool:
    """Whether there is anything to train: not in frozen features under a named head."""
    return contender.name != HEAD_ALONE or head == TRAINED


def work(
    contender: Contender, settings: Settings, test: int, rates: int, learning: bool, rounds: int
) -> int:
    """How often ``tick`` is called: where it is learning, and in so many rounds of timing."""
    batches = -(-test // settings.batch_size)
    if not trains(contender, settings.head):
        return learning * batches
    trials = rates * (settings.steps // TRIAL)
    return learning * (settings.steps + trials + batches) + rounds


def describe(contender: Contender, material: Material, seed: int) -> Record:
    """The line without results."""
    model, _ = _set_up(contender, material, seed)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = sum(p.numel() for p in _head(model))
    return Record(
        contender.name, contender.title,
        repr(parse_delta(contender.spec)) if contender.spec else contender.title,
        trained - head, head, sum(p.numel() for p in material.encoder.parameters()),
    )  # fmt: skip


def learn(
    contender: Contender,
    material: Material,
    settings: Settings,
    rates: tuple[float, ...] = (),
    tick: Tick = lambda: None,
) -> Learned:
    """Train and test; test alone where nothing trains.

    Args:
        rates: learning rates to try first, each for a third of the steps on nine tenths of the
            training texts, judged on the rest; the best takes the place of the contender's.
        tick: called after each step and each batch of the test.
    Raises: ConfigError where the loss is no longer finite.
    """
    if not trains(contender, settings.head):
        start = _test(material.reader(settings.seed), material.test, settings.batch_size, tick)
        return Learned(
            start["accuracy"], start["loss"], None, len(material.test), contender.rate,
            contender.why, 0.0, {},
        )  # fmt: skip
    tried: dict[str, float | None] = {}
    if rates:
        fit, held = material.train.split(HELD, settings.seed)
        assert held is not None  # a part was asked for
        trial = replace(settings, steps=max(1, settings.steps // TRIAL))
        held = by_length(held)
        for rate in rates:
            try:
                model, *_ = _trained(replace(contender, rate=rate), material, fit, trial, tick)
            except ConfigError:  # the loss is no longer finite: no rate to train at
                tried[repr(rate)] = None
                continue
            tried[repr(rate)] = _test(model, held, settings.batch_size)["accuracy"]
        best = best_rate(tried)
        if best is None:
            raise ConfigError(
                f"--rates: {contender.title} has no finite loss at any of {', '.join(tried)}. Try "
                "lower ones."
            )
        contender = replace(contender, rate=best, why="the best of those tried")
    model, last, seconds = _trained(contender, material, material.train, settings, tick)
    found = _test(model, material.test, settings.batch_size, tick)
    return Learned(
        found["accuracy"], found["loss"], last, len(material.test), contender.rate, contender.why,
        seconds, tried,
    )  # fmt: skip


def best_rate(tried: dict[str, float | None]) -> float | None:
    """Of :attr:`Learned.tried`: the first of the best ones; None where no loss was finite."""
    finite = {rate: accuracy for rate, accuracy in tried.items() if accuracy is not None}
    return float(max(finite, key=lambda rate: finite[rate])) if finite else None


def take_time(
    contender: Contender,
    material: Material,
    settings: Settings,
    rounds: int,
    tick: Tick = lambda: None,
) -> tuple[Cell, dict[str, int]]:
    """Gate, then seconds a step of ours, of eager torch and of full tuning, in turns.

    Args:
        contender: one that trains.
        rounds: how often each peer's step is timed.
        tick: called after each round, and once before.
    Returns: the cell, and the bytes of gradients and moments by peer.
    Raises: AssertionError where a loss or gradient is off; nothing was timed then.
    """
    order = Order(len(material.train), settings.batch_size, settings.seed)
    batch = material.train.batch(order.rows(0))
    peers, absent = _peers(contender, material, settings.seed, batch)
    taken = time_steps(peers, batch, rounds=rounds, on_round=tick)
    rows, length = batch["input_ids"].shape
    return Cell(
        "method", f"{contender.title}, {rows}×{length}", "f32", 0.0, taken.timings, absent,
        taken.saved, tokens=rows * length,
    ), taken.state  # fmt: skip


# --------------------------------------------------------------------------------------- details


Model = Reader | NamedClasses


def _head(model: Model) -> list[nn.Parameter]:
    """What a head has to train: nothing, where it is names."""
    return list(model.classifier.parameters()) if isinstance(model, Reader) else []


def _set_up(contender: Contender, material: Material, seed: int) -> tuple[Model, Handle | None]:
    """A fresh model that trains what the contender trains, and the head where that trains."""
    model = material.reader(seed)
    if contender.spec:
        saved = (HEAD,) if material.names is None else ()
        return model, attach(model, parse_delta(contender.spec, modules_to_save=saved))
    model.encoder.requires_grad_(contender.name == FULL)
    return model, None


def _groups(
    model: Model, handle: Handle | None, contender: Contender, head_rate: float | None
) -> list[dict[str, Any]]:
    """For the optimizer: a trained head at its own rate; "pace" is a group's rate itself."""
    head = {id(p) for p in _head(model)}
    groups: list[dict[str, Any]] = [{"params": list(model.encoder.parameters()), "pace": 1.0}]
    if handle is not None:
        groups = handle.parameter_groups(1.0)
    found = [
        {
            "params": [p for p in g["params"] if p.requires_grad and id(p) not in head],
            "pace": contender.rate * g["pace"],
        }
        for g in groups
    ]
    alone = contender.name == HEAD_ALONE
    own = {
        "params": _head(model),
        "pace": contender.rate if alone else head_rate,
    }
    return [g for g in (*found, own) if g["params"]]


def _trained(
    contender: Contender, material: Material, data: TokenSet, settings: Settings, tick: Tick
) -> tuple[Model, float, float]:
    """The model after all steps, its last loss, and the seconds that they took."""
    model, handle = _set_up(contender, material, settings.seed)
    optimizer = make_optimizer(_groups(model, handle, contender, settings.head_rate), 1.0)
    order = Order(len(data), settings.batch_size, settings.seed)
    losses: list[float] = []

    def after(point: Point) -> None:
        losses.append(point.loss)
        tick()

    began = time.perf_counter()
    train(model, data, order, optimizer, Schedule(settings.steps, 1.0), on_step=after)
    return model, losses[-1], time.perf_counter() - began


def _test(
    model: Model, data: TokenSet, batch_size: int, tick: Tick = lambda: None
) -> dict[str, float]:
    found = evaluate(model, data, batch_size, on_batch=tick)
    assert found is not None  # nobody stops it
    return found


def _peers(
    contender: Contender, material: Material, seed: int, batch: dict[str, Tensor]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """Models to time; ours and eager torch's have passed the gate. The rest with its reason."""
    full, _ = _set_up(replace(contender, name=FULL, spec=""), material, seed)
    model, handle = _set_up(contender, material, seed)
    peers: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    if handle is None:
        absent[OURS] = "there is no delta to compute"
        if contender.name != FULL:
            peers[EAGER] = model, [p for p in model.parameters() if p.requires_grad]
    else:
        peers, absent = held_pair(material.reader(seed), handle, batch)
    peers[FULL_TUNING] = full, list(full.parameters())
    for m, _ in peers.values():
        m.train()
    return peers, absent
