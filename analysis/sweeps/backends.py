"""Runs in parallel: joblib's backends, and what becomes of the runs of a worker process that is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import cloudpickle
from joblib import Parallel, delayed, parallel_config

from analysis.sweeps import work
from analysis.sweeps.clusters import Started, started

Item = TypeVar("Item")
Function = Callable[..., dict[str, Any]]
Calls = dict[int, tuple[Any, ...]]
"""Arguments of the calls, by their number."""

# Workers then need not import this package, nor have it.
cloudpickle.register_pickle_by_value(work)


def outcomes(
    function: Function,
    calls: Sequence[tuple[Item, tuple[Any, ...]]],
    *,
    backend: str = "loky",
    n_jobs: int | None = None,
    address: str | None = None,
) -> Iterator[tuple[Item, dict[str, Any]]]:
    """Call a function for every item, and give items and results as they come.

    Where a worker process is lost, the calls that were under way are repeated one at a time; one that loses its process
    again has the error for a result, and the rest goes on.

    Parameters
    ----------
    function : callable
        Must not raise.
    calls : sequence of (item, arguments)
        What to call it with.
    backend, n_jobs, address
        As in `analysis.sweep`.
    """
    items, todo = [item for item, _ in calls], {number: arguments for number, (_, arguments) in enumerate(calls)}
    with started(backend, n_jobs, address) as where:
        while todo:
            under_way: list[int] = []
            try:
                for number, row in _parallel(function, todo, where, under_way):
                    del todo[number]
                    yield items[number], row
            except where.lost:
                suspects = [number for number in under_way if number in todo]
            else:
                continue
            for number in suspects:
                yield items[number], _alone(function, todo.pop(number), where)


def _alone(function: Function, arguments: tuple[Any, ...], where: Started) -> dict[str, Any]:
    """The result of a single call, or that it lost its process."""
    try:
        ((_, row),) = _parallel(function, {0: arguments}, where, [])
    except where.lost as error:
        return {work.ERROR: work.one_line(f"{type(error).__name__}: the worker process was lost, twice. {error}", 250)}
    return row


def _parallel(
    function: Function, calls: Calls, where: Started, under_way: list[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Do calls in parallel; `under_way` grows by the number of each before it starts."""
    # A copy, for the caller takes out what is done.
    pending = iter(dict(calls).items())

    def tasks(some: Iterable[tuple[int, tuple[Any, ...]]]) -> Iterator[Any]:
        for number, arguments in some:
            under_way.append(number)
            yield delayed(remote)(number, arguments)

    remote = _Sent(partial(work.numbered, function))
    how: dict[str, Any] = dict(n_jobs=where.n_jobs, batch_size=1, pre_dispatch="n_jobs")
    with parallel_config(where.backend, **where.options):
        if where.unordered:
            yield from Parallel(**how, return_as="generator_unordered")(tasks(pending))
            return
        with Parallel(**how) as pool:
            while lot := list(islice(pending, where.n_jobs)):
                yield from pool(tasks(lot))


class _Sent:
    """A function that is sent to workers by cloudpickle, so that one defined in a notebook reaches them too."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes]]:
        return cloudpickle.loads, (cloudpickle.dumps(self.function),)
