"""Files that are whole or not there: one file, or several that belong together.

One file is written beside its place and renamed into it, which is atomic. Several files of one directory are replaced
by one rename as well, as Kubernetes' AtomicWriter does it: for a moment every one of them is a link through one
pointer, and turning the pointer replaces them all. Each step before it leaves what can be read as it was, each step
after it what is new; so a process killed anywhere leaves the old files or the new ones, never some of both::

    directory/adapter_config.json        ->  .tucka-save/current/adapter_config.json
    directory/adapter_model.safetensors  ->  .tucka-save/current/adapter_model.safetensors
    directory/.tucka-save/current        ->  old, then new (the commit)

Links exist only while files are replaced, or where that was interrupted; `settle` puts the files in their place.
"""

from __future__ import annotations

import errno
import filecmp
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

logger = logging.getLogger(__name__)

WORKSPACE = ".tucka-save"
"""Name of the hidden directory in which new files wait."""

LOCK = ".tucka-save.lock"
"""Name of the empty file by which processes wait for each other; it may stay, since who waits for it has it open."""

MARKER = "one-by-one"
"""Name of the file that commits new files where there are no symbolic links."""

NO_LINKS = (errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""How a system says that it has no symbolic links, or none for this user."""


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> Path:
    """Let a function write a temporary file beside `path`, then put it in its place.

    Parameters
    ----------
    path : str or Path
        Where the file is to be. A file that it replaces hands on its mode.
    write : callable
        Takes the temporary path, which ends like `path`.

    Raises
    ------
    OSError
        If the directory is missing or cannot be written to; what was at `path` is still there.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} to")
    temporary = path.with_name(f".{path.stem[:40]}-{uuid.uuid4().hex[:8]}{path.suffix}")
    try:
        write(temporary)
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    to_disk(path.parent)
    return path


def replace_together(directory: str | Path, write: Callable[[Path], Any]) -> list[Path]:
    """Let a function write files into an empty directory, then put all of them in their places at once.

    Files of the same names are replaced, all others stay. Processes that write to one directory wait for each other.

    Parameters
    ----------
    directory : str or Path
        Where the files are to be; it exists.
    write : callable
        Takes the empty directory, on the same file system; it may make directories in it.

    Returns
    -------
    list of Path
        The files whose bytes changed, relative to `directory`.

    Raises
    ------
    Exception
        Whatever `write` raises, and `OSError` if a file cannot be written. The old files are then as they were, and
        nothing new is beside them but the empty `LOCK`.

    Notes
    -----
    A single changed file is renamed into its place. Several need symbolic links, which POSIX systems have. Where there
    are none (FAT, Windows without its developer mode) the old files are taken away and the new ones renamed one after
    the other: a process killed within that moment leaves a directory that cannot be read instead of files that do not
    belong together, and `settle` or the next call puts the new ones in their places.
    """
    directory = Path(directory)
    new = directory / WORKSPACE / "new"
    with FileLock(directory / LOCK):
        settle(directory)
        try:
            new.mkdir(parents=True)
            write(new)
            changed = _drop_unchanged(directory)
            for path in {Path(), *changed, *(path.parent for path in changed)}:
                to_disk(new / path)
            _publish(directory, changed)
        finally:
            _settle_or_warn(directory)
    return changed


def settle(directory: str | Path) -> None:
    """Put files in the place of the links that a killed process left, and remove what else it left.

    What can be read in the directory stays the same. No other process may be writing to it meanwhile.
    """
    directory = Path(directory)
    workspace = directory / WORKSPACE
    waiting = _files_below(workspace / "new")
    if (workspace / MARKER).exists():
        for path in waiting:
            (directory / path).unlink(missing_ok=True)
        for path in waiting:
            os.replace(workspace / "new" / path, directory / path)
    for path in waiting:
        place, held = directory / path, workspace / "current" / path
        if not place.is_symlink() or WORKSPACE not in Path(os.readlink(place)).parts:
            continue
        if held.exists():
            os.replace(held, place)
        else:
            place.unlink()
    if workspace.exists():
        shutil.rmtree(workspace)


def to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a directory, would survive a loss of power."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(handle)


def _drop_unchanged(directory: Path) -> list[Path]:
    """Remove new files that are in their places already, byte for byte; returns the others."""
    new = directory / WORKSPACE / "new"
    changed = []
    for path in _files_below(new):
        if (directory / path).is_file() and filecmp.cmp(directory / path, new / path, shallow=False):
            (new / path).unlink()
        else:
            changed.append(path)
    return changed


def _publish(directory: Path, changed: list[Path]) -> None:
    """Make the new files the ones that are read, in one atomic step."""
    workspace = directory / WORKSPACE
    for path in changed:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
    if len(changed) == 1:
        os.replace(workspace / "new" / changed[0], directory / changed[0])
    elif changed and _has_links(workspace):
        _point(workspace, "old")
        _link(directory, changed)
        _point(workspace, "new")
    elif changed:
        (workspace / MARKER).touch()
        to_disk(workspace)


def _has_links(workspace: Path) -> bool:
    try:
        (workspace / "trial").symlink_to("new", target_is_directory=True)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return False
    return True


def _point(workspace: Path, version: str) -> None:
    """Turn the pointer to a version of the files."""
    turned = workspace / "turned"
    turned.symlink_to(version, target_is_directory=True)
    os.replace(turned, workspace / "current")
    to_disk(workspace)


def _link(directory: Path, changed: list[Path]) -> None:
    """Put a link through the pointer in the place of every file; the pointer leads to the very same files."""
    workspace = directory / WORKSPACE
    for path in changed:
        place, old, link = directory / path, workspace / "old" / path, workspace / "link"
        old.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            _keep(place.resolve(), old)
        link.symlink_to(Path(*[".."] * len(path.parent.parts), WORKSPACE, "current", path))
        os.replace(link, place)
    for folder in {(directory / path).parent for path in changed}:
        to_disk(folder)


def _keep(file: Path, name: Path) -> None:
    """Give a file a second name, or a copy where it can have none."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)
        to_disk(name)


def _settle_or_warn(directory: Path) -> None:
    """Which files are read is settled before, so what fails here is no failure to write."""
    try:
        settle(directory)
        to_disk(directory)
    except OSError as error:
        logger.warning("%s stays until the next save into it: %s", directory / WORKSPACE, error)


def _files_below(folder: Path) -> list[Path]:
    """The files below a folder, relative to it."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
