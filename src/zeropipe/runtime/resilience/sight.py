"""What a process can see of itself, and what others of its host can see of it when it can say nothing any more.

A process that is stopped, or in a call that keeps the interpreter's lock, runs no Python. The kernel still says what
state it is in, and a signal still makes ``faulthandler`` write its stacks, from C, into memory that others may open.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

_DEEPEST = 60  # frames that are told; those in the middle are left out
_WIDEST = 160  # characters of one of them
_SIGNAL = signal.SIGURG  # what nobody handles is ignored, so that a late one never ends a process
_STATES = {
    "T": "stopped by a signal (SIGSTOP, SIGTSTP)",
    "t": "stopped by a debugger",
    "Z": "dead",
    "X": "dead",
    "D": "in the kernel",
    "R": "running",
    "S": "in a call that waits",
}
_DEBUGGERS = ("/bdb.py", "/pdb.py", "/pydevd.py", "/pydevd_frame.py")
_TALKS = ("/torch/distributed/", "/zeropipe/comm/")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process is, so that another may look at it and never takes another one for it."""

    host: str  # the kernel's start, and whose process numbers and network these are
    name: str  # of the host, for people
    pid: int
    started: int  # ticks of that kernel: a number is given again, with another time
    thread: int  # that trains, as Python names it
    stacks: int  # file descriptor; -1: none

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host that lives."""
        return self.host == _host() and _stat(self.pid)[1] == self.started

    @property
    def state(self) -> str:
        """What the kernel says of it; "" where that is not known."""
        if self.host != _host():
            return ""
        letter, started = _stat(self.pid)
        if started != self.started or letter in ("Z", "X"):
            return "dead"
        asleep = ""
        if letter in ("D", "S"):
            with suppress(OSError):
                asleep = Path(f"/proc/{self.pid}/wchan").read_text().strip("0\n")
        return _STATES.get(letter, letter) + (f" ({asleep})" if asleep else "")

    @property
    def is_stopped(self) -> bool:
        return self.host == _host() and _stat(self.pid)[0] in ("T", "t")

    def stack(self, patience: float) -> tuple[str, ...]:
        """Of the thread that trains, outermost first, as the process writes it within ``patience`` seconds; () if it
        does not, as one that is stopped."""
        if self.stacks < 0 or not self.is_here or self.is_stopped:
            return ()
        path = Path(f"/proc/{self.pid}/fd/{self.stacks}")
        with suppress(OSError):
            before = path.stat().st_size
            os.kill(self.pid, _SIGNAL)
            end, after = time.monotonic() + patience, before
            # Whole once it grows no more.
            while time.monotonic() < end:
                time.sleep(0.02)
                size = path.stat().st_size
                if size == after > before:
                    break
                after = size
            return _of_thread(path.read_bytes()[before:].decode(errors="replace"), self.thread)
        return ()

    def end(self) -> None:
        """Kill it, if it is here."""
        if self.is_here:
            with suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)


class Self:
    """This process, as seen by a thread of its own: the thread that trains is that which makes this."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._native = threading.get_native_id()
        self._stacks = -1
        with suppress(OSError, AttributeError, ValueError, RuntimeError):
            if signal.getsignal(_SIGNAL) in (signal.SIG_DFL, signal.SIG_IGN):
                self._stacks = os.memfd_create("zeropipe stacks")
                faulthandler.register(_SIGNAL, file=self._stacks, all_threads=True)
        pid = os.getpid()
        self.place = Place(_host(), os.uname().nodename, pid, _stat(pid)[1] or 0, self._thread, self._stacks)

    def close(self) -> None:
        if self._stacks >= 0:
            faulthandler.unregister(_SIGNAL)
            os.close(self._stacks)
            self._stacks = -1

    def frames(self) -> list[FrameType]:
        """Of the thread that trains, outermost first. Whoever takes them lets them go soon: they hold its tensors."""
        found: list[FrameType] = []
        frame = sys._current_frames().get(self._thread)
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found[::-1]

    def bytes_of_files(self) -> int:
        """What the thread that trains has read and written so far."""
        return sum(_io(f"/proc/self/task/{self._native}/io").values())

    def bytes_sent(self) -> int:
        """What the whole process has written, to connections too."""
        return _io("/proc/self/io").get("wchar", 0)


def shown(frames: list[FrameType]) -> tuple[str, ...]:
    """``file:line in function``, outermost first."""
    texts = [f"{f.f_code.co_filename}:{f.f_lineno} in {f.f_code.co_name}"[-_WIDEST:] for f in frames]
    return _short(texts)


def fingerprint(frames: list[FrameType]) -> tuple[Any, ...]:
    """Equal while the thread is in the same calls; a loop in the innermost function does not show."""
    return (*((f.f_code, f.f_lineno) for f in frames[:-1]), *(f.f_code for f in frames[-1:]))


def in_debugger(frames: list[FrameType]) -> bool:
    return any(f.f_code.co_filename.endswith(_DEBUGGERS) for f in frames)


def talks(frames: list[FrameType]) -> str:
    """The call of torch's own that the innermost frames are in, "" where they compute."""
    inner = frames[-1].f_code.co_filename if frames else ""
    if not any(part in inner for part in _TALKS):
        return ""
    # The wrapper around a collective is a frame of torch's too: the name is that of the first one inside.
    calls = [f for f in frames if _TALKS[0] in f.f_code.co_filename and f.f_code.co_name != "wrapper"]
    return calls[0].f_code.co_name if calls else frames[-1].f_code.co_name


def _short(texts: list[str]) -> tuple[str, ...]:
    if len(texts) <= _DEEPEST:
        return tuple(texts)
    half = _DEEPEST // 2
    return (*texts[:half], f"... {len(texts) - 2 * half} more ...", *texts[-half:])


def _of_thread(text: str, thread: int) -> tuple[str, ...]:
    """One thread's frames out of what faulthandler wrote, outermost first."""
    for block in text.split("\n\n"):
        head, *lines = block.strip().splitlines() or [""]
        if f"{thread:x}" in head:
            return _short([_frame(line) for line in reversed(lines) if line.startswith("  File ")])
    return ()


def _frame(line: str) -> str:
    """``File "a.py", line 3 in f``, as we show it."""
    file, _, rest = line.strip().removeprefix('File "').partition('", line ')
    return f"{file}:{rest}"[-_WIDEST:]


def _host() -> str:
    with suppress(OSError):
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Containers of one kernel are hosts of their own.
        spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "net")]
        return f"{start} {spaces}"
    return os.uname().nodename


def _stat(pid: int) -> tuple[str, int | None]:
    """The state's letter, and when the process started; nothing of one that is not there."""
    with suppress(OSError, IndexError, ValueError):
        # The name in brackets may hold anything.
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return words[0], int(words[19])
    return "", None


def _io(path: str) -> dict[str, int]:
    with suppress(OSError, ValueError):
        rows = (line.split(":") for line in Path(path).read_text().splitlines())
        return {name: int(value) for name, value in rows if name in ("rchar", "wchar")}
    return {}
