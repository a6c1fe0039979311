"""Sweeps on several processes, here and on a cluster, some of which die."""

import os
import signal
import sys
import threading
import time
import warnings

import pytest

from analysis import sweep
from analysis.sweeps.clusters import started

warnings.filterwarnings("ignore", module="distributed")


def score(settings, seed):
    return {"score": settings["i"], "process": os.getpid(), "imported": "analysis" in sys.modules}


def test_processes_share_the_runs_and_need_not_import_this_package(tmp_path):
    def objective(settings, seed):
        time.sleep(0.1)
        return {"score": settings["i"], "process": os.getpid(), "imported": "analysis" in sys.modules}

    table = sweep(objective, {"i": list(range(6))}, out=tmp_path / "a.csv", n_jobs=2, progress=False)
    assert table["score"].tolist() == list(range(6)) and os.getpid() not in set(table["process"])
    assert table["process"].nunique() == 2 and not table["imported"].any()


def test_threads_share_the_runs(tmp_path):
    table = sweep(score, {"i": [1, 2, 3]}, out=tmp_path / "a.csv", backend="threading", n_jobs=2, progress=False)
    assert table["score"].tolist() == [1, 2, 3] and set(table["process"]) == {os.getpid()}


def test_a_run_that_kills_its_process_fails_and_the_others_do_not(tmp_path):
    def objective(settings, seed):
        time.sleep(0.05)
        if settings["i"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"score": settings["i"]}

    with pytest.warns(
        UserWarning, match="1 of 6 runs failed, the first .i=2, seed=0. with Terminated.*was lost, twice"
    ):
        table = sweep(objective, {"i": list(range(6))}, out=tmp_path / "a.csv", n_jobs=2, progress=False)
    assert table["score"].dropna().tolist() == [0, 1, 3, 4, 5]


def test_a_process_that_is_killed_from_outside_loses_no_run(tmp_path):
    mark = tmp_path / "killed"

    def objective(settings, seed):
        time.sleep(0.05)
        if settings["i"] == 2 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"score": settings["i"]}

    table = sweep(objective, {"i": list(range(6))}, out=tmp_path / "a.csv", n_jobs=2, progress=False)
    assert mark.exists() and table["score"].tolist() == list(range(6))


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    import dask

    # A run may take one process with it before dask gives it up; by default three.
    quiet = {"distributed.scheduler.allowed-failures": 1, "logging.distributed": "critical"}
    with (
        dask.config.set(quiet),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.wait_for_workers(2)
        yield client


def test_dask_loses_no_run_when_a_worker_is_killed(cluster, tmp_path):
    pids = sorted(worker["pid"] for worker in cluster.run(lambda: {"pid": os.getpid()}).values())
    out = tmp_path / "a.csv"

    def objective(settings, seed):
        time.sleep(0.05)
        return {"score": settings["i"], "process": os.getpid()}

    def kill_one():
        # While runs are under way, from outside.
        while not out.exists() or out.read_text().count("\n") < 4:
            time.sleep(0.01)
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    table = sweep(objective, {"i": list(range(24))}, out=out, backend="dask", progress=False)
    killer.join()
    assert table["score"].tolist() == list(range(24)) and (table["error"] == "").all()
    assert pids[0] not in {w["pid"] for w in cluster.run(lambda: {"pid": os.getpid()}).values()}
    assert pids[1] in set(table["process"])


def test_dask_reports_a_run_that_kills_every_worker(cluster, tmp_path):
    cluster.wait_for_workers(2)

    def objective(settings, seed):
        time.sleep(0.05)
        if settings["i"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"score": settings["i"]}

    with pytest.warns(UserWarning, match="1 of 3 runs failed.*KilledWorker: the worker process was lost, twice"):
        table = sweep(objective, {"i": [0, 1, 2]}, out=tmp_path / "a.csv", backend="dask", progress=False)
    assert table["score"].dropna().tolist() == [0, 2]


def test_a_scheduler_that_is_not_there_is_an_error(monkeypatch):
    distributed = pytest.importorskip("distributed")

    def nobody(*args, **options):
        raise OSError("Timed out trying to connect")

    monkeypatch.setattr(distributed, "Client", nobody)
    with (
        pytest.raises(ValueError, match=r"no dask scheduler at tcp://127.0.0.1:9: Timed out"),
        started("dask", None, "tcp://127.0.0.1:9"),
    ):
        pass


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_named(backend, package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"backend '{backend}' needs another package: pip install"):
        sweep(score, {"i": [1]}, out=tmp_path / "a.csv", backend=backend)
