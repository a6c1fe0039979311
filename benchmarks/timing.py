"""Times of several things measured in turn in one process, so that whatever else the machine does hits all of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

Clock = Callable[[], float]
"""Does its work once and returns the seconds that count."""


class Spread(NamedTuple):
    """Quartiles of repeated measurements."""

    lower: float
    median: float
    upper: float


def spread(values: Sequence[float]) -> Spread:
    """Quartiles, interpolated between measurements."""
    return Spread(*(float(value) for value in np.percentile(values, [25, 50, 75])))


def interleave(clocks: Mapping[str, Clock], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Run every clock once a round; the seconds of each by round, warm-up rounds left out.

    Parameters
    ----------
    clocks : mapping of str to Clock
        What to measure.
    rounds, warmup : int
        Rounds that count, and rounds before them that do not.

    Raises
    ------
    ValueError
        If no round would count.
    """
    if rounds < 1:
        raise ValueError(f"at least 1 round must count, got rounds={rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    with collector_off():
        for number in range(warmup + rounds):
            gc.collect()
            for name in turn(list(clocks), number):
                taken = clocks[name]()
                if number >= warmup:
                    seconds[name].append(taken)
    return seconds


def turn(names: Sequence[str], number: int) -> list[str]:
    """The order of a round: moved on by one place, and backwards every other time.

    A mere rotation would let each run after the same other one in nearly all rounds, in the caches that one left.
    """
    first = number % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if number % 2 else turned


def summarise(seconds: Mapping[str, Sequence[float]], references: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Quartiles of the seconds, and of the ratio to each reference that was measured: taken round by round.

    Returns
    -------
    dict
        For every name ``seconds`` (three numbers), ``rounds``, ``ratios``, by reference three numbers each, and
        ``fastest``, by reference the fastest round over the reference's fastest: of what else a machine does, it has
        the least in it.
    """
    return {
        name: {
            "seconds": list(spread(taken)),
            "rounds": len(taken),
            "ratios": {
                other: list(spread([mine / its for mine, its in zip(taken, seconds[other])]))
                for other in references
                if other in seconds
            },
            "fastest": {other: min(taken) / min(seconds[other]) for other in references if other in seconds},
        }
        for name, taken in seconds.items()
    }


@contextmanager
def collector_off() -> Iterator[None]:
    """No collection of cycles while the clock runs, and quick ones between: only of what is made meanwhile."""
    was_on = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
