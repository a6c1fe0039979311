"""Load mutated adapter directories, many times over, and say what came of it.

A worker process is forked for every batch, so that a crash is noticed, counted and known by its index; everything about
one directory follows from the seed and that index. `FAILURES` lists what must not happen.
"""

import json
import os
import re
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

import transformers
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from tqdm import tqdm

from tucka import patterns

from .bench import Bench, Changed, Replaced, Wrapped, sources
from .directories import Directory
from .mutations import mutate
from .on_files import MARKER
from .watch import Hang, Watch, forget_peak, memory

ALWAYS = ("checked", "read")
IN_TURN = ("load", "second", "by_transformers", "trainable")
"""Ways to load (see `Bench`): what tucka answers for alone, always; each of the others for a quarter of all."""

CLEAR = (ValueError, OSError)
"""What a bad file may raise: the first wherever tucka reads, the second where there is nothing to read."""

FAILURES = ("crash", "hang", "unclear error", "base changed", "base weight replaced", "memory", "written", "executed")
"""Outcomes that must not be."""

SECONDS = 20.0
"""How long one load may take."""
STALLS = 2
"""How often it is given that long again, if it had the processor for less than half of it: other work may have it."""
TRIAL_SECONDS = 0.15
"""How long expressions are tried: what takes longer takes longer than the library's limit as well."""
MEMORY = (96 << 20, 8)
"""Growth of the resident memory that one load may cost: a constant, and a multiple of the directory's size."""
BATCH = 500
"""Directories to a worker."""


class Result(NamedTuple):
    """What one way of loading one directory came to."""

    index: int
    kind: str
    way: str
    outcome: str
    error: str = ""
    message: str = ""
    seconds: float = 0.0
    memory: int = 0


def directory_of(seed: int, index: int, kind: str | None = None) -> tuple[str, Directory]:
    """The directory of an index."""
    rng = Random(f"{seed}:{index}")
    return mutate(rng.choice(sources()), rng, kind)


# --- one load ----------------------------------------------------------------------------------------------------


def _try(bench: Bench, watch: Watch, way: str, path: Path) -> tuple:
    """Outcome, error, message, seconds and memory of one load."""
    size = sum(entry.stat().st_size for entry in os.scandir(path) if entry.is_file(follow_symlinks=False))
    forget_peak()
    start, (resident, _) = time.perf_counter(), memory()
    _limit_time()
    try:
        with watch.watching() as seen:
            outcome, error, message = _outcome(way, getattr(bench, way), path)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, growth = time.perf_counter() - start, max(0, memory()[1] - resident)
    if Path(MARKER).exists() or (path / MARKER).exists():
        outcome = "executed"
    elif seen:
        outcome, message = "written", f"{seen[:3]} {message}"
    elif growth > MEMORY[0] + MEMORY[1] * size and outcome not in FAILURES:
        outcome, message = "memory", f"{growth >> 20} MiB for {size} bytes; {outcome} {error} {message}"
    return outcome, error, message[:2000], seconds, growth


def _outcome(way: str, load, path: Path) -> tuple[str, str, str]:
    try:
        load(path)
    except Hang:
        return "hang", "Hang", ""
    except Wrapped as error:
        return "refused, base left wrapped", type(error.cause).__name__, str(error.cause)
    except Changed as error:
        return "base changed", type(error.cause).__name__, str(error)
    except Replaced as error:
        return "base weight replaced", "Replaced", str(error)
    except CLEAR as error:
        return "refused", type(error).__name__, str(error)
    except Exception as error:
        if way in IN_TURN and _by_others(error):
            return "refused by PEFT or transformers", type(error).__name__, str(error)
        return "unclear error", type(error).__name__, f"{error} | {traceback.format_exc(limit=-3)}"
    return "loaded", "", ""


def _by_others(error: BaseException) -> bool:
    """Whether an error was raised where tucka was not asked."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return not any(f"{os.sep}tucka{os.sep}" in name for name in frames)


def _other_method(path: Path) -> bool:
    """Whether PEFT would load the directory as an adapter of another method, which is not tucka's to judge."""
    try:
        named = PeftConfig._get_peft_type(path)
        return named in PEFT_TYPE_TO_CONFIG_MAPPING and named != "TUCKA"
    except Exception:
        return False


# --- a worker ----------------------------------------------------------------------------------------------------


def _work(seed: int, indices: range, out) -> None:
    """Load the directories of these indices, and write a line for each."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    patterns.SECONDS = TRIAL_SECONDS
    bench, watch = Bench(), Watch()
    with tempfile.TemporaryDirectory() as root:
        work = Path(root) / "work"
        most = memory()[0] + (4 << 30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        for index in indices:
            work.mkdir(exist_ok=True)
            os.chdir(work)
            results = _all_ways(bench, watch, seed, index, Path(root) / f"adapter-{index}")
            if list(work.iterdir()) or len(list(Path(root).iterdir())) > 1:
                results.append(Result(index, results[0].kind, "any", "written", "", "there are files beside"))
                shutil.rmtree(work)
            out.write((json.dumps(results) + "\n").encode())


def _all_ways(bench: Bench, watch: Watch, seed: int, index: int, path: Path) -> list[Result]:
    kind, directory = directory_of(seed, index)
    directory.write(path)
    before = _entries(path)
    ways = ALWAYS if _other_method(path) else (*ALWAYS, IN_TURN[index % len(IN_TURN)])
    results = [Result(index, kind, way, *_try(bench, watch, way, path)) for way in ways]
    if _entries(path) != before:
        results.append(Result(index, kind, "any", "written", "", "the directory is another"))
    shutil.rmtree(path)
    return results


def _entries(path: Path) -> list:
    return sorted((entry.name, entry.stat(follow_symlinks=False).st_mtime_ns) for entry in os.scandir(path))


def _limit_time() -> None:
    """Raise `Hang` in this process once it has worked, or waited, for too long."""
    begun, stalls = time.process_time(), STALLS

    def too_long(*_) -> None:
        nonlocal stalls
        if not stalls or time.process_time() - begun > SECONDS / 2:
            raise Hang
        stalls -= 1
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)


# --- the run -----------------------------------------------------------------------------------------------------


def run(count: int, seed: int = 0, *, start: int = 0, progress: bool = True) -> list[Result]:
    """Load `count` mutated directories, beginning at that index."""
    sources()
    results = []
    with tqdm(total=count, disable=not progress) as bar:
        for first in range(start, start + count, BATCH):
            results += _batch(seed, range(first, min(first + BATCH, start + count)), bar)
    return results


def _batch(seed: int, indices: range, bar: tqdm) -> list[Result]:
    """The results of a batch; what kills its worker is a result as well, and another worker takes the rest."""
    results: list[Result] = []
    while indices:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _work_and_exit(seed, indices, writer)
        os.close(writer)
        done = 0
        for line in _lines(reader, child):
            results += [Result(*fields) for fields in json.loads(line)]
            done += 1
            bar.update()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if done < len(indices):
            outcome = "hang" if status == -signal.SIGKILL else "crash"
            kind, _ = directory_of(seed, indices[done])
            results.append(Result(indices[done], kind, "any", outcome, f"status {status}"))
            done += 1
            bar.update()
        indices = indices[done:]
    return results


def _work_and_exit(seed: int, indices: range, writer: int) -> None:
    try:
        with os.fdopen(writer, "wb", buffering=0) as out:
            _work(seed, indices, out)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _lines(reader: int, child: int):
    """What a worker writes; one that is stuck where no signal reaches it is killed."""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        rest = b""
        while True:
            if not select.select([pipe], [], [], (2 + STALLS) * SECONDS)[0]:
                os.kill(child, signal.SIGKILL)
            chunk = pipe.read(1 << 16)
            if not chunk:
                return
            *whole, rest = (rest + chunk).split(b"\n")
            yield from whole


def failures(results: list[Result]) -> list[Result]:
    return [result for result in results if result.outcome in FAILURES]


def summary(results: list[Result]) -> dict:
    """Counts by kind of mutation and outcome, by way and outcome, by error; peaks."""
    kinds: dict = {}
    ways: dict = {}
    for result in results:
        kinds.setdefault(result.kind, Counter())[result.outcome] += 1
        ways.setdefault(result.way, Counter())[result.outcome] += 1
    errors = Counter((r.outcome, r.error, _shape_of(r.message)) for r in results if r.error)
    return dict(
        directories=len({result.index for result in results}),
        loads=len(results),
        kinds=kinds,
        ways=ways,
        errors=[[*key, number] for key, number in errors.most_common()],
        peak_memory=max(result.memory for result in results),
        slowest=max(result.seconds for result in results),
        failures=[result._asdict() for result in failures(results)],
    )


def _shape_of(message: str) -> str:
    """A message without what differs from file to file."""
    message = re.sub(r"\S*/adapter-\d+", "…", message.split(" | ")[0])
    return re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "#", message)[:100]
