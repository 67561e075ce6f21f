"""Hears what ends a run from outside, signals and the end of its time, at once; it is answered at a boundary.

    first     noted: the run saves and ends at its next boundary
    second    the process ends now, as the signal would have ended it; a save that is under way is finished first

Schedulers send the first one twice: to torchrun, which hands it on, and to the ranks themselves. So what follows within
``TWICE`` seconds is still the first.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from zeropipe.errors import ConfigError

_log = logging.getLogger("zeropipe")
TWICE = 5.0  # s


class Signals:
    """Hears ``names`` in this process, beside whoever heard them before: their handlers are called too.

    ``hopeless``: asked when a signal is heard; says why no boundary will be reached, such as that a peer of this host
    is gone: then the process ends at once. torchrun stops the others of a rank that died by SIGTERM and waits for them.
    """

    def __init__(self, names: Iterable[str], hopeless: Callable[[], str] = str) -> None:
        self._numbers: set[int] = set()
        self._hopeless = hopeless
        self._before: dict[int, Any] = {}  # what stood there
        self._pid, self._open = os.getpid(), True
        self._inside = False  # a handler: what it calls may call us back

        self.heard: int | None = None  # the first signal, and when
        self._since = 0.0
        self._saving = False  # what is the last of this run
        self.hear(names)

    def hear(self, names: Iterable[str]) -> None:
        """``names`` too, from now on."""
        self._numbers |= {getattr(signal, name) for name in names}
        self.listen()

    def listen(self) -> None:
        """Hear the signals, also where the program has set a handler of its own since: it is called by ours."""
        # Python hands signals to the main thread alone, and lets no other set a handler.
        if threading.current_thread() is not threading.main_thread():
            return
        for number in self._numbers:
            current = signal.getsignal(number)
            if current != self._hear:
                self._before[number] = current
                signal.signal(number, self._hear)

    def close(self) -> None:
        """Give the signals back to whoever had them, unless somebody else has them by now."""
        self._open = False
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                if signal.getsignal(number) == self._hear:
                    signal.signal(number, signal.SIG_DFL if before is None else before)

    def finish_saving(self) -> None:
        """The run's last checkpoint is begun: whoever hurries gets it whole, as the process ends then anyway."""
        self._saving = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._inside:
            return
        before = self._before.get(number)
        # A process that this one has forked, such as a loader's worker, has its handlers and none of its boundaries. Of
        # one that is closed somebody may have kept the handler, to call it or to put it back.
        if os.getpid() != self._pid or not self._open:
            if callable(before):
                before(number, frame)
            elif before != signal.SIG_IGN:
                self._end(number)
            return
        if self.heard is None:
            self.heard, self._since = number, time.monotonic()
        hurries = time.monotonic() - self._since > TWICE
        # Python's own for SIGINT is none that somebody has set: it would end the step by KeyboardInterrupt.
        if callable(before) and before is not signal.default_int_handler:
            self._inside = True
            try:
                before(number, frame)
            finally:
                self._inside = False
        # A rank that is done with the last checkpoint is gone too, and torchrun then stops those that are about to go.
        if not self._saving:
            why = "a second signal" if hurries else self._hopeless()
            if why:
                with suppress(Exception):  # it may have come in the middle of another line
                    _log.error("this process ends now, by %s: %s", signal.Signals(number).name, why)
                if before is signal.default_int_handler:
                    before(number, frame)
                self._end(number)

    def _end(self, number: int) -> None:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class TimeLimit:
    """When the time of a run is up: ``given`` minutes after its launcher was started, or at the Unix time that the
    environment variable ``given`` holds (Slurm's SLURM_JOB_END_TIME).

    Raises ConfigError where the variable holds no time. Where it is not set there is no limit, and the log says so.
    """

    def __init__(self, given: float | str | None) -> None:
        self._end: float | None = None  # Unix time
        self._longest = {"step": 0.0, "save": 0.0}  # s
        if isinstance(given, str):
            text = os.environ.get(given)
            if text is None:
                _log.warning(
                    "config key 'checkpoint.save_before' names %s, which is not set: no time limit", given
                )
                return
            try:
                self._end = float(text)
            except ValueError:
                raise ConfigError(
                    f"environment variable {given}, which config key 'checkpoint.save_before' names",
                    expected="a Unix time in seconds",
                    found=repr(text),
                    fix="name one that holds the end of the job, as Slurm's SLURM_JOB_END_TIME does",
                ) from None
        elif given is not None:
            self._end = launched() + 60.0 * given

    def took(self, what: str, seconds: float) -> None:
        """A ``step`` or a ``save`` took so long."""
        self._longest[what] = max(self._longest[what], seconds)

    @property
    def is_near(self) -> bool:
        """Whether another step and then a save might not end in time."""
        if self._end is None:
            return False
        # Twice the longest of each, as the next may be longer; of a save nothing is known before the first.
        step, save = self._longest["step"], self._longest["save"] or _FIRST_SAVE
        return time.time() + 2 * (step + save) > self._end


_FIRST_SAVE = 30.0  # s


def launched() -> float:
    """The Unix time at which torchrun was started, which restarts do not change, or this process where it is alone."""
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    with suppress(OSError, ValueError, IndexError):
        # Of Linux: in ticks since the machine was started, the 20th word after the command's name in parentheses.
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    return time.time()
