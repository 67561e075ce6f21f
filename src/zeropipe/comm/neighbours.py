"""Which ranks run on this host, as which processes, and which of those are gone: what no collective tells in time."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from zeropipe.comm.group import Group
from zeropipe.comm.native import all_gather_object

_STARTED = Path("/proc/sys/kernel/random/boot_id")
_DEAD = ("Z", "X")  # states in Linux's /proc: ended, and perhaps not waited for yet


class Neighbours:
    """The other ranks of ``group`` on this host. Collective to make; afterwards each rank looks by itself.

    It knows of nobody where the system has no ``/proc``.
    """

    def __init__(self, group: Group) -> None:
        everyone = all_gather_object((_host(), _process(os.getpid())), group, label="who runs where")
        here = everyone[group.rank][0]
        self._processes = {
            rank: process
            for rank, (host, process) in zip(group.ranks, everyone, strict=True)
            if host == here and process is not None and rank != group.ranks[group.rank]
        }

    def gone(self, within: float = 0.0) -> list[int]:
        """The ranks whose processes have ended, as soon as there is one; at the latest after ``within`` seconds."""
        # A process that is killed closes its connections first, and only then has it ended.
        end = time.monotonic() + within
        while True:
            found = [rank for rank, process in self._processes.items() if _process(process[0]) != process]
            if found or time.monotonic() >= end:
                return found
            time.sleep(0.01)


def _host() -> tuple[str, str, str]:
    """What is the same for two processes that see each other's numbers."""
    started = space = ""
    with suppress(
        OSError
    ):  # hosts may share a name, and each counts its spaces of processes from the same number
        started = _STARTED.read_text().strip()
    with suppress(OSError):  # containers of one name count their processes apart
        space = os.readlink("/proc/self/ns/pid")
    return socket.gethostname(), started, space


def _process(number: int) -> tuple[int, str] | None:
    """A living process: its number, which another may get after it, and when it began; None where it has ended."""
    with suppress(OSError, IndexError):
        state, *rest = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        if state not in _DEAD:
            return number, rest[18]
    return None
