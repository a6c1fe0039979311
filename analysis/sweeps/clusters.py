"""How the backends of a sweep start and end."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

from joblib import cpu_count, register_parallel_backend
from joblib.externals.loky.process_executor import BrokenProcessPool

BACKENDS = ("loky", "threading", "dask", "ray")

_DASK = "dask that reports lost workers"


class Started(NamedTuple):
    """A backend that is ready.

    Attributes
    ----------
    backend, options
        What joblib knows it by.
    n_jobs : int
        How many runs it does at a time.
    lost : tuple of exception types
        What is raised where a worker process ends while it works.
    unordered : bool
        Whether it gives each result when it is there; otherwise runs are done in lots of `n_jobs`.
    """

    backend: str
    options: dict[str, Any]
    n_jobs: int
    lost: tuple[type[BaseException], ...]
    unordered: bool = True


@contextmanager
def started(backend: str, n_jobs: int | None = None, address: str | None = None) -> Iterator[Started]:
    """Make a backend ready, and end what was started for it.

    Raises
    ------
    ValueError
        If there is no such backend, it has no address, or `n_jobs` is no number of jobs.
    ImportError
        If its package is missing.
    """
    check(backend, n_jobs, address)
    if backend == "dask":
        with _dask(n_jobs, address) as where:
            yield where
    elif backend == "ray":
        with _ray(n_jobs, address) as where:
            yield where
    else:
        yield Started(backend, {}, n_jobs or 1, (BrokenProcessPool,))


def check(backend: str, n_jobs: int | None, address: str | None) -> None:
    """Reject what `started` cannot start."""
    if backend not in BACKENDS:
        raise ValueError(f"backends are {', '.join(BACKENDS)}, got {backend!r}")
    if n_jobs is not None and (isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs == 0):
        raise ValueError(f"n_jobs is a number of runs at a time, or -1 for one on every core, got {n_jobs!r}")
    if backend in ("dask", "ray"):
        _needed(backend)
    elif address is not None:
        raise ValueError(f"backend {backend!r} is on this machine and has no address, got {address!r}")


def _needed(backend: str) -> ModuleType:
    try:
        return importlib.import_module("distributed" if backend == "dask" else backend)
    except ImportError as error:
        package = "tucka[sweep]" if backend == "dask" else "ray"
        raise ImportError(f"backend {backend!r} needs another package: pip install '{package}'") from error


@contextmanager
def _dask(n_jobs: int | None, address: str | None) -> Iterator[Started]:
    """The client of the caller, that of an address, or a cluster of processes on this machine."""
    distributed: Any = _needed("dask")
    import dask

    try:
        client = distributed.get_client() if address is None else None
    except ValueError:
        client = None
    own = None
    if client is None:
        address = address or dask.config.get("scheduler-address", None)
        workers = cpu_count() if n_jobs in (None, -1) else n_jobs
        local = dict(n_workers=workers, threads_per_worker=1, dashboard_address=None)
        try:
            own = client = distributed.Client(address, timeout=30) if address else distributed.Client(**local)
        except OSError as error:
            raise ValueError(f"there is no dask scheduler at {address}: {error}") from error
    register_parallel_backend(_DASK, _dask_backend)
    try:
        # joblib gives dask's scheduler as many runs as the cluster has threads.
        options = dict(client=client, wait_for_workers_timeout=300)
        yield Started(_DASK, options, 1, (distributed.scheduler.KilledWorker,))
    finally:
        if own is not None:
            own.close()


def _dask_backend(**options: Any) -> Any:
    """Joblib's backend for dask, and an error where dask gives a run up.

    joblib 1.6 hears of tasks that end well only: when a task has cost several workers their lives, it waits for ever.
    """
    from joblib._dask import DaskDistributedBackend

    class ReportingBackend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            # What joblib takes for a single job it would do in this process.
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func: Callable[[], Any], callback: Any = None) -> Any:
            answer = super().submit(func, callback)
            answer.add_done_callback(lambda done: done.exception() is not None and callback(done.exception()))
            return answer

        def retrieve_result_callback(self, out: Any) -> Any:
            if isinstance(out, BaseException):
                raise out
            return super().retrieve_result_callback(out)

    return ReportingBackend(**options)


@contextmanager
def _ray(n_jobs: int | None, address: str | None) -> Iterator[Started]:
    """The Ray that runs already, that of an address, or one on this machine."""
    ray: Any = _needed("ray")
    from ray.util.joblib import register_ray  # type: ignore[import-not-found]

    own = not ray.is_initialized()
    if own:
        ray.init(address=address, log_to_driver=False)
    register_ray()
    try:
        jobs = int(ray.cluster_resources()["CPU"]) if n_jobs in (None, -1) else n_jobs
        # Of several runs joblib takes no result from Ray before all are there.
        yield Started("ray", {}, jobs or 1, (ray.exceptions.RayError,), unordered=False)
    finally:
        if own:
            ray.shutdown()
