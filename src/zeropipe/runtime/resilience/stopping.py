"""Ends a run that somebody asks to stop: all ranks at one boundary, whoever of them was asked, with a last checkpoint.

    rank 0       step 7 .............. norm, word 0 | sum 1 | save, exit code 143
    rank 1       step 7 ... SIGTERM .. norm, word 1 | sum 1 | save, exit code 143
    rank 2       step 7 .............. norm, word 0 | sum 1 | (SIGTERM, noted) save, exit code 143

The word travels in the message that brings all ranks the norm of their gradients (``Remark``), so nobody sends anything
for it. A signal that a rank hears after that is one of the next step. Where the norm is left on a device, the sum of a
step is looked at after the next one, when it is there without waiting.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import world
from zeropipe.comm.neighbours import Neighbours
from zeropipe.config.schema import Checkpoint
from zeropipe.runtime.resilience.signals import Signals, TimeLimit
from zeropipe.runtime.zero.hold.policy import Remark
from zeropipe.tensor.host import Number

_log = logging.getLogger("zeropipe")
_SHELL = 128  # a shell's exit code of what a signal ended: this and the signal's number


class Stopping:
    """Whether and how the run of one engine is ended from outside.

    ``client_state``: assignable; called for what a checkpoint that the engine saves by itself holds of the user's.
    """

    def __init__(self, section: Checkpoint, remark: Remark | None, later: bool) -> None:
        """``remark``: None without an optimizer, which steps. ``later``: a sum is looked at a step later."""
        self.client_state: Callable[[], Mapping[str, Any]] | None = None
        self.due = False  # all ranks know that the run is to end here
        self.named = section.on_signal  # the signals that the configuration says
        self._section, self._remark, self._later = section, remark, later
        self._last: Sequence[Number] = ()
        self._signals: Signals | None = None
        self._limit: TimeLimit | None = None
        self._asked: tuple[str, int] | None = None
        self._since: float | None = None  # the last boundary
        self._neighbours: Neighbours | None = None
        self.folder = (
            section.folder
        )  # where the last checkpoint goes: as configured, or where the program has saved
        self.by_itself = True  # the engine saves and ends; False: whoever runs the loop does
        if section.on_signal or section.save_before is not None:
            self.arm(section.on_signal)

    def arm(self, names: Sequence[str]) -> None:
        """Hear ``names`` too from now on, and the configuration's time limit. Collective."""
        if self._remark is None or world().imagined:
            return
        if self._signals is not None:
            self._signals.hear(names)
            return
        self._neighbours = Neighbours(world())
        self._limit = TimeLimit(self._section.save_before)
        # The table of signals holds this, which must not hold the engine: one that is only let go of gives them back.
        self._signals = Signals(names, partial(_peers_gone, self._neighbours))
        weakref.finalize(self, self._signals.close).atexit = False
        self._remark.begin(self._word)

    def peers_gone(self, within: float = 0.0) -> str:
        """Which ranks of this host have died, for a message; "" where none is seen to have ``within`` seconds."""
        return "" if self._neighbours is None else _peers_gone(self._neighbours, within)

    def leave_to_caller(self) -> None:
        """Whoever runs the loop saves and ends it, where ``due``; not the engine at the end of its step."""
        self.by_itself = False

    def close(self) -> None:
        """The engine is destroyed: signals go to who heard them before."""
        if self._signals is not None and self._remark is not None:
            self._signals.close()
            self._signals = None
            self._remark.begin(None)

    def _word(self) -> float:
        return float(bool(self._why()))

    def _why(self) -> tuple[str, int] | None:
        """What this rank was asked by, and the exit code for that."""
        assert self._signals is not None
        assert self._limit is not None
        number = self._signals.heard
        if number is not None:
            self._asked = signal.Signals(number).name, _SHELL + number
        elif self._limit.is_near:
            self._asked = "the end of its time", _SHELL + signal.SIGTERM
        return self._asked  # who has asked once has asked, though a save should turn out to be short

    def stepped(self) -> None:
        """At a boundary, after the step: hear what the ranks have told each other in it."""
        if self._signals is None or self._limit is None or self._remark is None:
            return
        now = time.monotonic()
        if self._since is not None:
            self._limit.took("step", now - self._since)
        self._since = now
        self._signals.listen()
        heard, self._last = (self._last, self._remark.heard) if self._later else (self._remark.heard, ())
        self.due = self.due or any(float(number) > 0 for number in heard)

    def saved(self, folder: str, tag: str, seconds: float) -> None:
        """A checkpoint was saved in ``folder``, which took so long."""
        if self._section.folder is None:
            self.folder = folder
        if self._limit is not None:
            self._limit.took("save", seconds)

    def leave(
        self,
        save: Callable[..., bool],
        keep: Callable[[], int],
        step: int,
        folder: str | os.PathLike[str] | None = None,
        client_state: Mapping[str, Any] | None = None,
    ) -> NoReturn:
        """Save what the run ends with, and end this process as all ranks do now. Collective, where ``due``.

        ``save``: the engine's ``save_checkpoint``; ``keep``: lets copies in memory outlive this process, and says of
        which step they are. Raises SystemExit.
        """
        assert self._signals is not None
        self._signals.finish_saving()
        group, folder = world(), folder or self.folder
        everyone = all_gather_object(self._why(), group, label="asked to stop")
        asked = [(rank, why) for rank, why in zip(group.ranks, everyone, strict=True) if why is not None]
        if client_state is None and self.client_state is not None:
            client_state = self.client_state()
        # Whole when this returns: nobody would wait for a writer in the background.
        if folder is not None and save(folder, client_state=client_state, async_save=False):
            kept = f"step {step} is saved in {os.fspath(folder)}"
        else:
            why = f"it could not be in {os.fspath(folder)}" if folder else "set 'checkpoint.folder'"
            in_memory = keep()
            kept = f"step {in_memory} is kept in memory alone" if in_memory else "nothing is saved"
            kept = f"{kept}: {why}"
        code = self._section.exit_code
        if code is None:
            code = asked[0][1][1]
        if group.rank == 0:
            by = ", ".join(f"{name} (rank {rank})" for rank, (name, _) in asked)
            _log.warning("the run is stopped by %s: %s; exit code %d", by, kept, code)
        raise SystemExit(code)


def _peers_gone(neighbours: Neighbours, within: float = 0.0) -> str:
    gone = neighbours.gone(within)
    who = f"rank {gone[0]} has died" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} have died"
    return f"[rank {world().rank}] {who}" if gone else ""
