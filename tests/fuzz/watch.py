"""What a process does besides loading: time, memory, files, processes, connections, pickles."""

import contextlib
import os
import re
import sys
from pathlib import Path

import torch

from tucka import patterns

EVENTS = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.Popen", "shutil.", "socket.connect",
    "socket.getaddrinfo", "pickle.find_class", "ctypes.dlopen",
)  # fmt: skip
"""Audit events that loading must not cause; see Python's table of them."""

TRIAL = [sys.executable, "-I", "-S", "-c", patterns.TRIAL]
"""The only command that may be started: regular expressions are tried there."""


class Hang(BaseException):
    """A load took too long."""


class Watch:
    """Collects what must not happen, while it watches; there is one for a process, since audit hooks stay."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hook)
        torch.load = self._unpickling(torch.load)

    @contextlib.contextmanager
    def watching(self):
        self.seen, self.on = [], True
        try:
            yield self.seen
        finally:
            self.on = False

    def _hook(self, event: str, args: tuple) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not isinstance(path, int) and str(path) != os.devnull:  # a number: the pipe to the trial
                self.seen.append(f"open {path} {mode}")
        elif event.startswith(EVENTS) and not any(isinstance(part, list) and part == TRIAL for part in args):
            self.seen.append(f"{event} {args!r:.200}")

    def _unpickling(self, load):
        def watched(*args, **kwargs):
            self.seen.append("torch.load")
            return load(*args, **kwargs)

        return watched


def memory() -> tuple[int, int]:
    """Resident memory, and its peak since `forget_peak`, in bytes."""
    text = Path("/proc/self/status").read_text()
    resident, peak = (int(re.search(rf"{name}:\s+(\d+)", text)[1]) << 10 for name in ("VmRSS", "VmHWM"))
    return resident, peak


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
