"""Train a contender and test it, by one seed.

Every contender sees the same texts in the same order for the same number of steps, under the same
head; what it trains beside it has its own learning rate (:mod:`.contenders`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from deltaops.errors import ConfigError
from deltaops.tuning.loop import Point, Schedule, evaluate, make_optimizer, train
from deltaops.tuning.tokens import Order, TokenSet

from .build import Model, count, groups, set_up, trains
from .contenders import Contender
from .lines import Learned, Settings
from .reader import Material, by_length, few
from .steer import EVALUATIONS, Controlling

TRIAL = 3
"""A learning rate is tried on a third of the steps."""
HELD = 0.1
"""Part of the training texts on which rates are judged."""

Tick = Callable[[], object]


def work(contender: Contender, settings: Settings, test: int, rates: int) -> int:
    """How often :func:`learn` calls ``tick``."""
    batches = -(-test // settings.batch_size)
    if not trains(contender, settings.head):
        return batches
    return settings.steps + rates * max(1, settings.steps // TRIAL) + batches


def learn(
    contender: Contender,
    material: Material,
    settings: Settings,
    seed: int,
    rates: tuple[float, ...] = (),
    tick: Tick = lambda: None,
) -> Learned:
    """Train and test; test alone where nothing trains.

    Args:
        contender: of the table.
        material: the encoder and the texts.
        settings: of the table.
        seed: decides start values, the head's too, the order of the texts, and few of them.
        rates: learning rates to try first, each for a third of the steps on nine tenths of the
            training texts, judged on the rest; of few texts a label, judged on as many others. The
            best takes the place of the contender's.
        tick: called after each step and each batch of the test.
    Raises: ConfigError where the loss is no longer finite, or a label has too few texts.
    """
    if not trains(contender, settings.head):
        start = _test(material.reader(seed), material.test, settings.batch_size, tick)
        return Learned(
            start["accuracy"], start["loss"], None, len(material.test), contender.rate,
            contender.why, 0.0, {},
        )  # fmt: skip
    tried: dict[str, float | None] = {}
    if rates:
        tried = _try(contender, material, settings, seed, rates, tick)
        best = best_rate(tried)
        if best is None:
            raise ConfigError(
                f"--rates: {contender.title} has no finite loss at any of {', '.join(tried)}. Try "
                "lower ones."
            )
        contender = replace(contender, rate=best, why="the best of those tried")
    data = _texts(material, settings, seed, contender.steer is not None)
    model, last, seconds = trained(contender, material, data, settings, seed, tick)
    found = _test(model, material.test, settings.batch_size, tick)
    return Learned(
        found["accuracy"], found["loss"], last, len(material.test), contender.rate, contender.why,
        seconds, tried, None if contender.steer is None else count(model),
    )  # fmt: skip


def best_rate(tried: dict[str, float | None]) -> float | None:
    """Of :attr:`Learned.tried`: the first of the best ones; None where no loss was finite."""
    finite = {rate: accuracy for rate, accuracy in tried.items() if accuracy is not None}
    return float(max(finite, key=lambda rate: finite[rate])) if finite else None


def trained(
    contender: Contender,
    material: Material,
    data: tuple[TokenSet, TokenSet | None],
    settings: Settings,
    seed: int,
    tick: Tick = lambda: None,
) -> tuple[Model, float, float]:
    """The model after all steps, its last loss, and the seconds that they took.

    Args:
        data: to train on, and what is held out for who steers: for a contender that has such.
    """
    fit, held = data
    model, handle = set_up(contender, material, seed)
    optimizer = make_optimizer(groups(model, handle, contender, settings.head_rate), 1.0)
    controller: Controlling | None = None
    if contender.steer is not None:
        assert handle is not None  # only deltas are steered
        controller = contender.steer(seed)
        controller.begin(handle, optimizer, steps=settings.steps)
    pause = max(1, settings.steps // EVALUATIONS)
    losses: list[float] = []

    def after(point: Point) -> None:
        losses.append(point.loss)
        if controller is not None and held is not None and point.step % pause == 0:
            controller.after_evaluation(_test(model, held, settings.batch_size))
        tick()

    began = time.perf_counter()
    try:
        train(
            model, fit, Order(len(fit), settings.batch_size, seed), optimizer,
            Schedule(settings.steps, 1.0), on_step=after, steer=controller,
        )  # fmt: skip
    finally:  # also of one that diverges: what keeps files finishes them
        if controller is not None:
            controller.close()
    if controller is not None:
        for part, why in controller.failed.items():
            raise ConfigError(f"{contender.title}: {part} failed, so the line is not its: {why}.")
    return model, losses[-1], time.perf_counter() - began


# --------------------------------------------------------------------------------------- details


def _texts(
    material: Material, settings: Settings, seed: int, held: bool
) -> tuple[TokenSet, TokenSet | None]:
    """What is trained on, and with ``held`` others of the training texts to be judged by."""
    if settings.few_shot is not None:
        fit, others = few(material.train, material.classes, settings.few_shot, seed)
        return fit, by_length(others)
    if not held:
        return material.train, None
    fit, rest = material.train.split(HELD, seed)
    assert rest is not None  # a part was asked for
    return fit, by_length(rest)


def _try(
    contender: Contender,
    material: Material,
    settings: Settings,
    seed: int,
    rates: tuple[float, ...],
    tick: Tick,
) -> dict[str, float | None]:
    """As :attr:`Learned.tried`."""
    data = _texts(material, settings, seed, True)
    short = replace(settings, steps=max(1, settings.steps // TRIAL))
    tried: dict[str, float | None] = {}
    for rate in rates:
        one = replace(contender, rate=rate)
        try:
            model, *_ = trained(one, material, data, short, seed, tick)
        except ConfigError:  # the loss is no longer finite: no rate to train at
            tried[repr(rate)] = None
            continue
        assert data[1] is not None  # a part was held out
        tried[repr(rate)] = _test(model, data[1], settings.batch_size)["accuracy"]
    return tried


def _test(
    model: Model, data: TokenSet, batch_size: int, tick: Tick = lambda: None
) -> dict[str, float]:
    found = evaluate(model, data, batch_size, on_batch=tick)
    assert found is not None  # nobody stops it
    return found
