"""Processes that are killed before each of their steps on the file system in turn; `test_saving` reads the outcome.

A program of its own that loads `tucka/files.py` and nothing else of the library, so that it forks in a millisecond::

    python kill_steps.py DIRECTORY '{"old": ["a.json"], "new": ["a.json", "b.bin"], "links": true}'
"""

import errno
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path


def fork(function):
    """Run a function in a child process, which ends with it."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child):
    os.kill(child, signal.SIGKILL)
    return exit_code(child)


def below(directory):
    """Names of what lies below a directory, but for locks."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.name != ".tucka-save.lock"}


def write_version(version, names):
    """What writes files of those names that tell the version."""

    def write(folder):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{version} {name}")

    return write


def kill_before_step(number):
    """Kill this process before a step that would change the file system: the first that is numbered so."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.mkdir", "os.rename", "os.symlink", "os.link", "os.remove", "os.rmdir"):
            seen += 1
            if seen > number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def read_all(folder, names):
    return {name: (folder / name).read_text() if (folder / name).exists() else None for name in names}


def outcomes(files, directory, old, new):
    """For a kill before every step of a replacement in turn: what is read then, and after `settle`."""
    found, code, names = [], None, sorted({*old, *new})
    while code != 0:
        folder, number = directory / str(len(found)), len(found)
        folder.mkdir()
        files.replace_together(folder, write_version("old", old))

        def act(folder=folder, number=number):
            kill_before_step(number)
            files.replace_together(folder, write_version("new", new))

        code = exit_code(fork(act))
        assert code in (0, -signal.SIGKILL)
        killed = read_all(folder, names)
        files.settle(folder)
        found.append([killed, read_all(folder, names), sorted(below(folder))])
    return found


def no_links(*args, **kwargs):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def main():
    spec = importlib.util.spec_from_file_location("files", Path(__file__).parents[1] / "tucka" / "files.py")
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    case = json.loads(sys.argv[2])
    if not case["links"]:
        Path.symlink_to = no_links
    json.dump(outcomes(files, Path(sys.argv[1]), case["old"], case["new"]), sys.stdout)


if __name__ == "__main__":
    main()
