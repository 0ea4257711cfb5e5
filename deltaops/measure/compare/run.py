"""Fill the table: each contender by each seed, and a step's time, each kept as soon as it is there.

A pair of contender and seed is not trained again where the table has it with the same settings and
the same rates: so a run that was stopped goes on, and seeds can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from deltaops.errors import DeltaopsError

from .budget import sized
from .build import describe, trains
from .clock import take_time
from .contenders import Contender
from .learn import best_rate, learn
from .learn import work as work_of
from .lines import ACCURACY, TIME, Learned, Record, Settings
from .reader import Material
from .store import Comparison, origin_of, write_table


@dataclass(frozen=True)
class Wish:
    """What the table is to have."""

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    """To try first, by the first seed; empty for the contenders' own."""
    accuracy: bool
    rounds: int | None
    """Of timing; None for none."""
    again: bool
    """Train what is there already."""


def work(wish: Wish, settings: Settings, test: int) -> int:
    """How often :func:`fill` calls ``tick`` where nothing is there yet."""
    return sum(_work(c, wish, settings, test) for c in wish.contenders)


def fill(
    table: Comparison,
    wish: Wish,
    material: Material,
    path: Path | None,
    *,
    told: Callable[[str, int], object] = lambda what, done: None,
    tick: Callable[[], object] = lambda: None,
) -> tuple[Comparison, dict[str, str]]:
    """The table with all that is wished for.

    Args:
        table: to go on with.
        wish: what is to be in it.
        material: the encoder and the texts.
        path: of its JSON, written after each result; None for nowhere.
        told: what is measured now, and how much of :func:`work` is before it.
        tick: called after each step, batch of a test, and round of timing.
    Returns: the table, and what was stopped → why: a gate, a loss that is not finite, or no place
        for the method. The rest is still worth having.
    """
    settings, done = table.settings, 0
    stopped: dict[str, str] = {}

    def keep(record: Record) -> None:
        nonlocal table
        table = table.with_record(record, table.machine)
        if path is not None:
            write_table(path, table)

    for number, chosen in enumerate(wish.contenders):
        place = f"{number + 1} of {len(wish.contenders)}"
        contender = chosen
        try:
            if settings.parameters is not None:
                contender = sized(chosen, material.encoder, settings.parameters)
            line = describe(contender, material, wish.seeds[0])
        except (AssertionError, DeltaopsError) as error:
            stopped[contender.title] = str(error)
            continue
        if wish.accuracy:
            try:
                for seed, found in _learn(contender, wish, table, line, material, done, told, tick):
                    made = {ACCURACY: origin_of(table.machine)}
                    keep(replace(line, runs={seed: found}, made=made))
            except (AssertionError, DeltaopsError) as error:
                stopped[f"{contender.title} ({ACCURACY})"] = str(error)
                keep(replace(line, failed={ACCURACY: str(error)}))
        if wish.rounds is not None and trains(contender, settings.head):
            after = done + _work(contender, wish, settings, len(material.test)) - wish.rounds - 1
            told(f"{contender.title}, time, {place}", after)
            try:
                cell, state = take_time(
                    contender, material, settings, wish.seeds[0], wish.rounds, tick
                )
                made = {TIME: origin_of(table.machine)}
                keep(replace(line, timed=cell, state=state, made=made))
            except (AssertionError, DeltaopsError) as error:
                stopped[f"{contender.title} ({TIME})"] = str(error)
                keep(replace(line, failed={TIME: str(error)}))
        done += _work(contender, wish, settings, len(material.test))
    return table, stopped


# --------------------------------------------------------------------------------------- details


def _work(contender: Contender, wish: Wish, settings: Settings, test: int) -> int:
    found = 0
    if wish.accuracy:
        for number in range(len(_seeds(contender, wish, settings))):
            found += work_of(contender, settings, test, 0 if number else len(wish.rates))
    if wish.rounds is not None and trains(contender, settings.head):
        found += wish.rounds + 1  # and one to warm up
    return found


def _seeds(contender: Contender, wish: Wish, settings: Settings) -> tuple[int, ...]:
    """One is enough where nothing trains."""
    return wish.seeds if trains(contender, settings.head) else wish.seeds[:1]


def _learn(
    contender: Contender,
    wish: Wish,
    table: Comparison,
    line: Record,
    material: Material,
    done: int,
    told: Callable[[str, int], object],
    tick: Callable[[], object],
) -> Iterator[tuple[int, Learned]]:
    """What each seed gives that the table has not; the rate that the first one finds is all's."""
    settings, rates = table.settings, wish.rates
    old = next((r for r in table.records if r.name == line.name), None)
    there = old.runs if old is not None and old.settings == line.settings else {}
    for seed in _seeds(contender, wish, settings):
        told(f"{contender.title}, seed {seed}", done)
        done += work_of(contender, settings, len(material.test), len(rates))
        found = None if wish.again else there.get(seed)
        if found is not None and _as_wished(found, contender, rates):
            contender, rates = replace(contender, rate=found.rate, why=found.why), ()
            continue
        made = learn(contender, material, settings, seed, rates, tick)
        contender, rates = replace(contender, rate=made.rate, why=made.why), ()
        yield seed, made


def _as_wished(run: Learned, contender: Contender, rates: tuple[float, ...]) -> bool:
    """Whether it was trained at the rate, or the best of the rates, that are asked for."""
    if not rates:
        return run.rate == contender.rate
    tried = run.tried.keys() == {repr(rate) for rate in rates}
    return tried and best_rate(run.tried) == run.rate
