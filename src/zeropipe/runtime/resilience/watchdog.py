"""Names a rank that is alive and stuck, while the main threads of all ranks wait for it.

    thread "watchdog"         looks at this process now and then: has it moved, what does it wait for, where is it
    thread "watchdog's post"  leaves what was seen on the board, hears of the next rank, and says what follows

The second may hang, as the store may be in a process that is stopped; the first never does. What counts as moving: a
collective begins, a phase of the engine begins or ends, a save or a load moves bytes; of the program's own code, that
the thread that trains is seen in a call where it was not seen since. So a rank that compiles, validates or writes for
an hour moves. A rank is named ``_SHARE`` of the time that the user set after it last moved: before that time is over.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from zeropipe.comm.group import world
from zeropipe.comm.record import SEAM
from zeropipe.comm.witness import WITNESS, Board
from zeropipe.runtime.resilience.beats import (
    Beat,
    Kind,
    Verdict,
    Word,
    added,
    beat_of,
    judge,
    removed,
    report,
    word_of,
)
from zeropipe.runtime.resilience.sight import Self, fingerprint, in_debugger, shown, talks

_log = logging.getLogger("zeropipe")
Steps = Callable[[], int]  # the optimizer steps of an engine so far
EXIT_CODE = 124  # of a run that the watchdog ends, as of a command that ``timeout`` ends
_SHARE = 0.8  # of the user's time: what is left is for saying it
_LOOKS = 40  # in the user's time
_RARELY = 5.0  # s between two looks at most
_STALE = 4  # looks after which a rank that says nothing new is doubted
_PAUSE = 1.0  # s: a look that comes later than this was of a process that did not run
_SENT = 2**20  # bytes: a large message on its way is no standstill; what loggers write is less
_KNOWN = 4096  # places where the thread was seen since it moved
_FEW = 64  # ranks that each know where all others are


class _Sighting:
    """Since when this process has not moved, and what it does."""

    def __init__(self, pause: float) -> None:
        self.self = Self()
        self._pause = pause
        self._ticks = 0
        self._phase, self._moves_files = "before the first step", False

        # When it last moved, and how it stood then.
        self._since = self._looked = time.monotonic()
        self._calls = self._counted = 0
        self._files = self._sent = 0
        self._seen: set[object] = set()
        self._number = 0
        self.lost = 0.0  # s before the last look in which this process did not run

    def mark(self, phase: str, files: bool) -> None:
        """``phase`` begins; from the thread that trains."""
        self._phase, self._moves_files = phase, files
        self._ticks += 1

    def look(self, rank: int) -> Beat:
        now = time.monotonic()
        late = now - self._looked - self._pause
        # Stopped, suspended or starved: that time is none in which it could have moved.
        self.lost = late if late > max(_STALE * self._pause, _PAUSE) else 0.0
        self._since += self.lost
        self._looked = now
        frames = self.self.frames()
        awaited, call = WITNESS.awaited(), talks(frames)
        kind: Kind = "works"
        doing = self._phase
        if in_debugger(frames):
            kind, doing = "debugged", f"{doing}: in a debugger"
        elif awaited is not None:
            kind, doing = "waits", f"{doing}: waits for {str(awaited).removeprefix(f'[rank {rank}] ')}"
        elif call:
            kind, doing = "waits", f"{doing}: waits in {call}() of torch.distributed, which the program calls"
        if self._moved(kind, fingerprint(frames)):
            self._since = now
        self._number += 1
        return Beat(self._number, kind, doing, now - self._since, shown(frames), self.self.place)

    def _moved(self, kind: Kind, where: object) -> bool:
        counted = self._calls, self._counted
        self._calls, self._counted = SEAM.calls, self._ticks
        if counted != (self._calls, self._counted):
            self._seen = {where}
            self._files, self._sent = self.self.bytes_of_files(), self.self.bytes_sent()
            return True
        if kind == "waits":
            sent = self.self.bytes_sent()
            moved = sent - self._sent >= _SENT
            self._sent = sent if moved else self._sent
            return moved
        files = self._files
        if self._moves_files:
            self._files = self.self.bytes_of_files()
        if where in self._seen:
            return files != self._files
        if len(self._seen) < _KNOWN:
            self._seen.add(where)
        return True


class _Dog:
    """Watches this process and, by the board, the world: from the first engine that asks for it to the last."""

    def __init__(self, name: str, seconds: float, end: bool) -> None:
        self._limit = _SHARE * seconds
        self._pause = min(max(seconds / _LOOKS, 0.02), _RARELY)
        self._end = end
        self.sighting = _Sighting(self._pause)
        self._board = Board(name)
        self._beat = self.sighting.look(self._board.me)
        if self._board.shared:  # at once: who stands still before it has said anything is known to be there
            self._board.post(self._beat.to_text())
        self._over = threading.Event()

        # Of the post: when the store last answered, when it was last asked for all, and what it heard of others.
        self._answered = self._round = time.monotonic()
        self._asked = -seconds
        self._heard: dict[int, tuple[int, float]] = {}  # number of the last beat, since when it is the last
        self._ended: set[int] = set()
        self._posted = self._beat.number
        self._beats: dict[int, Beat] = {}
        self._word = Word()  # of this rank alone, where there is no board
        self._cut_off = False  # and it has been said

        targets = {"zeropipe watchdog": self._watch, "zeropipe watchdog's post": self._post}
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True) for name, run in targets.items()
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._over.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(_PAUSE)
        self.sighting.self.close()

    # The first thread.

    def _watch(self) -> None:
        while not self._over.wait(self._pause):
            self._beat = beat = self.sighting.look(self._board.me)
            self._answered += self.sighting.lost
            silence = time.monotonic() - self._answered
            if silence < self._limit:
                self._cut_off = False
            elif beat.idle >= self._limit and not self._cut_off:
                self._cut_off = True
                self._tell_alone(beat, silence)

    def _tell_alone(self, beat: Beat, silence: float) -> None:
        """Say what is known here, since the store does not answer."""
        rank = self._board.me
        near = {r: b.place.state for r, b in self._beats.items() if r != rank and b.place.state}
        listed = "; ".join(f"the process of rank {r} is {state}" for r, state in near.items())
        verdict = Verdict((rank,) if beat.kind == "works" else (), (), beat.kind != "works")
        text = report(verdict, {rank: beat}, {}, self._limit, 0)
        self._say(
            f"the store by which ranks hear of each other does not answer for {silence:.3g} s: the process or the host "
            f"that keeps it is gone, stopped or cut off. This rank: {beat.doing}. Of this host: {listed or 'nothing'}",
            text,
        )
        if self._end:
            self._leave("the store does not answer")

    # The second.

    def _post(self) -> None:
        try:
            while not self._over.wait(self._pause):
                self._go_round()
                self._answered = time.monotonic()
            self._say_over()
        except (RuntimeError, OSError):
            # The store is gone, with the process that kept it. Whoever is stuck then is told by the first thread.
            _log.debug("watchdog: the store is gone", exc_info=True)

    def _say_over(self) -> None:
        last = self._beat
        if self._board.shared:
            self._board.post(Beat(last.number + 1, "over", "is over", 0.0, (), last.place).to_text())

    def _go_round(self) -> None:
        now, beat, board = time.monotonic(), self._beat, self._board
        # What was not heard while this process did not run says nothing.
        if now - self._round > max(_STALE * self._pause, _PAUSE):
            self._heard.clear()
        self._round = now
        text = board.common() if board.shared else self._word.to_text()
        word = word_of(text)
        silent: set[int] = set()
        if board.shared:
            board.post(beat.to_text())
            if word.end:
                self._finish(word)
            silent = self._hear(now)
        stands = beat.idle >= self._limit
        stuck = {board.me} if beat.kind == "works" and stands else set()
        # By a look that others can tell from the last one that they know: else it would be named once more.
        new, self._posted = beat.number != self._posted, beat.number
        if board.me in word.told and not stuck and new:
            self._replace(text, removed(word, board.me, waits=False))
            self._say(f"rank {board.me} moves again")
        elif board.me == 0 and word.all_wait and not stands:
            self._replace(text, removed(word, board.me, waits=True))
            self._say("ranks move again")
        # Who waits asks for all others only on rank 0, and not at every look: somebody may work for hours.
        waits = board.me == 0 and board.shared and beat.kind == "waits" and stands and not word.all_wait
        if (stuck | silent) - set(word.told) or (waits and now - self._asked >= self._limit / 4):
            self._asked = now
            self._ask(text, word, silent)

    def _hear(self, now: float) -> set[int]:
        """The ranks, from the next one on, that have said nothing new for the limit, up to the first that has."""
        silent: set[int] = set()
        passed = set(self._ended)
        if not self._beats and self._board.size <= _FEW:
            self._beats = {rank: beat_of(text) for rank, text in self._board.read_all().items()}
        while (rank := self._board.after(passed)) != self._board.me:
            text = self._board.read(rank)
            passed.add(rank)
            if not text:  # it has not begun
                continue
            beat = self._beats[rank] = beat_of(text)
            number, since = self._heard.get(rank, (-1, now))
            if beat.kind == "over":
                self._ended.add(rank)
            elif beat.number != number:
                self._heard[rank] = beat.number, now
                break
            elif now - since >= self._limit:
                silent.add(rank)
            elif now - since < _STALE * self._pause:
                break
        return silent

    def _ask(self, text: str, word: Word, silent: set[int]) -> None:
        """Look at what all ranks say, and tell what follows, unless it has been told."""
        board = self._board
        beats = {board.me: self._beat}
        if board.shared:
            beats = {rank: beat_of(said) for rank, said in board.read_all().items()} | beats
        self._beats = beats
        verdict = judge(beats, silent, self._limit, board.size)
        if not set(verdict.named) - set(word.told) and not (verdict.all_wait and not word.all_wait):
            return
        told = added(word, verdict, self._end, board.me)
        if not self._replace(text, told):
            return  # somebody else is telling
        states = {rank: beats[rank].place.state for rank in silent}
        for rank in silent:
            stack = beats[rank].place.stack(_STALE * self._pause)
            if stack:
                last = beats[rank]
                beats[rank] = Beat(last.number, last.kind, last.doing, last.idle, stack, last.place)
        self._say(report(verdict, beats, states, self._limit, board.size))
        if self._end:
            self._finish(told)

    def _replace(self, before: str, word: Word) -> bool:
        if not self._board.shared:
            self._word = word
            return True
        return self._board.replace(before, word.to_text())

    def _say(self, *texts: str) -> None:
        _log.error("[rank %d] watchdog: %s", self._board.me, "\n".join(texts))

    def _finish(self, word: Word) -> None:
        """End this process, and those of this host that cannot end themselves."""
        self._say_over()
        for rank in word.told:
            beat = beat_of(said) if self._board.shared and (said := self._board.read(rank)) else None
            if beat is None or rank == self._board.me or not beat.place.is_here or beat.kind == "over":
                continue
            self._over.wait(_STALE * self._pause)
            # One that comes to its own end says so first.
            if beat_of(self._board.read(rank)).number == beat.number:
                beat.place.end()
        self._leave(word.why)

    def _leave(self, why: str) -> None:
        # Others must read that it ends before the connections to this rank break, and rank 0 may keep the store.
        wait = 2 * self._pause + 0.2
        # Whoever holds a lock of the log or of stdout may be the thread that is stuck.
        backstop = threading.Timer(wait + _PAUSE, os._exit, (EXIT_CODE,))
        backstop.daemon = True
        backstop.start()
        self._say(f"the run ends with exit code {EXIT_CODE}: {why}")
        time.sleep(wait)
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(EXIT_CODE)


class Watch:
    """One engine's part of it (a ``Watcher`` of its reporter)."""

    def __init__(self, dogs: Watchdog, steps: Steps) -> None:
        self._dogs, self._steps = dogs, steps
        self._forget = weakref.finalize(self, dogs.forget, id(self))
        self.ended("")

    def began(self, phase: str) -> None:
        self._dogs.mark(f"step {self._steps() + 1}, {phase}")

    def ended(self, phase: str) -> None:
        self._dogs.mark(f"outside the engine, after step {self._steps()}")

    def began_files(self, what: str) -> None:
        """``what`` moves files: a save, a load."""
        self._dogs.mark(f"after step {self._steps()}, {what}", files=True)

    def stepped(self, losses: object) -> None: ...

    def close(self) -> None:
        self._forget()


class Watchdog:
    """The watch of this process. Process groups belong to the process, and so does this."""

    def __init__(self) -> None:
        self._start_anew()
        os.register_at_fork(
            after_in_child=self._start_anew
        )  # no thread there, and the ranks are the parent's

    def _start_anew(self) -> None:
        self._dog: _Dog | None = None
        self._watches: set[int] = set()
        # Ranks have as many in the same world, in the same order, so that they name their boards alike.
        self._world: object = None
        self._dogs = 0

    def follow(self, seconds: float, end: bool, steps: Steps) -> Watch:
        """Watch this process for an engine that counts ``steps``; what the first engine asks for holds for all."""
        here = world().started
        if self._world != here:
            self.close()
            self._world, self._dogs = here, 0
        if self._dog is None:
            self._dogs += 1
            self._dog = _Dog(f"watchdog {self._dogs}", seconds, end)
        watch = Watch(self, steps)
        self._watches.add(id(watch))
        return watch

    def forget(self, watch: int) -> None:
        self._watches.discard(watch)
        if not self._watches:
            self.close()

    def close(self) -> None:
        dog, self._dog = self._dog, None
        if dog is not None:
            dog.close()

    def mark(self, phase: str, files: bool = False) -> None:
        if self._dog is not None:
            self._dog.sighting.mark(phase, files)


WATCHDOG = Watchdog()
