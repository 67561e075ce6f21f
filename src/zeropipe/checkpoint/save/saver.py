"""Saves: every rank writes its own files, all ranks learn of any failure at once, and one publishes the whole.

    both    (agree on folder, tag and how the last save ended) -> rank 0 makes a work folder -> (its name to all)
            -> every rank holds it -> (all do)
    sync    collect -> write -> (gather parts or errors) -> rank 0 commits -> (outcome to all)
    async   copy to host memory | background: write -> leave the part in the folder -> the last one commits

Brackets are collectives; every rank takes part in each, whatever it knows itself. The background thread never
communicates, so it cannot disturb the training's collectives; the parts that the ranks leave in the work folder tell
the last of them that all is there, and a note tells those that write longer that one has failed. What a rank's writer
has met is told to all at the next boundary of an optimizer step, so that all raise it at the same place.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from zeropipe.checkpoint.save import ownership, tags
from zeropipe.checkpoint.save.attempt import Attempt, SaveFailed, Tolerance
from zeropipe.checkpoint.save.contents import Outgoing, collect, estimated, write
from zeropipe.checkpoint.save.files import Hold, replace_text
from zeropipe.checkpoint.save.records import LocalState, Manifest
from zeropipe.checkpoint.utils import HostBuffers
from zeropipe.comm.collectives import all_gather_object, broadcast_object
from zeropipe.comm.group import Group
from zeropipe.errors import CheckpointError, DesyncError, describe
from zeropipe.frozen import from_json, to_json

# What ranks leave for each other in the work folder of an asynchronous save.
_PART = "part_"  # a rank's files are written
_CLAIM = "claimed"  # all parts are there, and who renamed the first one publishes
_NOTE = "failed.json"  # a rank has failed, so that no other part is of use


class Saver:
    """One engine's saves, one at a time. Every rank of ``group`` makes the same calls."""

    def __init__(self, group: Group, tolerated: int = 0) -> None:
        """``tolerated``: failed saves in a row that are warnings."""
        self._group = group
        self.tolerance = Tolerance(tolerated, tells=group.rank == 0)
        # The asynchronous save of which not every rank knows yet how it ended; every rank has one, or none has.
        self._last: _Background | None = None
        # Kept from one asynchronous save to the next.
        self._buffers = HostBuffers()

    def save(
        self,
        folder: str | os.PathLike[str],
        tag: str,
        local: LocalState,
        *,
        save_latest: bool = True,
        async_save: bool = False,
    ) -> Path | None:
        """Write the checkpoint ``folder/tag``; the path it has, or will have once the background is done; None where
        it failed, and that is tolerated.

        Collective. Raises CheckpointError on every rank alike when any rank cannot write, when the last asynchronous
        save failed and not every rank has raised that (this one is not begun then), for a tag that cannot be used, and
        DesyncError when ranks give different tags. The checkpoints that were there stay as they are.
        """
        try:
            final = self._attempt(folder, tag, local, save_latest, async_save)
        except SaveFailed as reason:
            self.tolerance.failed(str(reason))
            return None
        if not async_save:
            self.tolerance.succeeded()
        return final

    def _attempt(
        self,
        folder: str | os.PathLike[str],
        tag: str,
        local: LocalState,
        save_latest: bool,
        async_save: bool,
    ) -> Path:
        group = self._group
        save = Attempt(Path(folder), tag, save_latest, local, group.ranks[group.rank])
        work, hold = self._begin(save)
        if async_save:
            self._last = _Background(save, work, hold)
            self._last.start(self._buffers)
            return save.final
        with hold:
            part: Manifest | None = None
            outcome = ""
            try:
                part = write(work, collect(local, tag, copy=False))
            except Exception as reason:
                outcome = save.failure(f"cannot write the checkpoint {save.final}", reason)
            written = all_gather_object((part, outcome), group, label="checkpoint written")
            # One rank's error is all ranks': from here on they go the same way.
            outcome = next((text for _, text in written if text), "")
            if not outcome:
                if group.rank == 0:
                    outcome = save.publish(work, [part for part, _ in written])
                outcome = broadcast_object(outcome, 0, group, label="checkpoint published")
            if outcome and group.rank == 0:
                _discard(work)
        if outcome:
            raise SaveFailed(outcome)
        return save.final

    def wait(self) -> None:
        """Return when this rank's background writer is done. Raises CheckpointError where the save has failed."""
        self._join()
        text = "" if self._last is None else self._last.found_here()
        if text:
            self._last_failed(text)

    def raise_pending(self, *, join: bool = False) -> None:
        """Raise on every rank alike what a background writer of any rank has failed with, unless all have raised it.

        Collective while an asynchronous save is under way, else free; for every boundary. ``join``: wait for it.
        """
        if self._last is None:
            return
        if join:
            self._join()
        everyone = all_gather_object(self._last.said(), self._group, label="save under way")
        self._hear(everyone, over=not any(said.state is _State.WRITING for said in everyone))

    def _hear(self, everyone: Sequence[_Said], over: bool) -> None:
        """What all ranks say of the last asynchronous save. ``over``: none writes any more."""
        assert self._last is not None
        last, text = self._last, self._last.failure_of(everyone)
        if over:
            self._forget()
            if not text and not any(said.failure for said in everyone):
                self.tolerance.succeeded()
        if text:
            self._last_failed(text, last)

    def _last_failed(self, text: str, last: _Background | None = None) -> None:
        last = last or self._last
        assert last is not None
        self.tolerance.failed(text, again=last.tell())

    def _begin(self, save: Attempt) -> tuple[Path, Hold]:
        """Wait for the last save, agree that all is well and on what to save; the new work folder, held by all."""
        group = self._group
        # [1] Everyone says where it saves and how the last save ended for it.
        self._join()
        refusal = ""
        try:
            tags.check_tag(save.tag)
        except CheckpointError as reason:
            refusal = str(reason)
        said = None if self._last is None else self._last.said()
        nbytes = 0
        with suppress(Exception):  # who lays it out to write it will say so
            nbytes = estimated(save.local)
        everyone = all_gather_object((str(save.final), refusal, nbytes, said), group, label="save begins")
        # All ranks have joined their writers, so nobody is in the last work folder any more.
        if self._last is not None:
            self._hear([said for *_, said in everyone], over=True)
        refusal = next((refusal for _, refusal, *_ in everyone if refusal), "")
        if refusal:
            raise CheckpointError(refusal)
        text = ""

        # [2] One rank makes the folder, and tells its name or why there is none.
        differ = len({final for final, *_ in everyone}) > 1
        work: Path | None = None
        hold: Hold | None = None
        if group.rank == 0 and not differ:
            try:
                # All ranks write into this one folder.
                total = sum(nbytes for *_, nbytes, _ in everyone)
                work, hold = tags.prepare(save.root, save.tag, save.save_latest, total)
            except Exception as reason:
                text = save.failure(f"cannot make the checkpoint folder {save.final}", reason)
        work, text = broadcast_object((work, text), 0, group, label="save prepared")
        if text:
            raise SaveFailed(text)
        if differ:
            listed = "; ".join(f"rank {r}: {e[0]}" for r, e in zip(group.ranks, everyone, strict=True))
            raise DesyncError(f"ranks save different checkpoints: {listed}. Fix: give all the same tag")

        # [3] Every rank holds the folder before any may be done: a folder that nobody holds for a moment would be taken
        # for left by whoever cleans up.
        assert work is not None
        if hold is None:
            try:
                hold = ownership.writing(work)
            except OSError as reason:
                what = f"cannot see the folder {work}, which rank {group.ranks[0]} made for the checkpoint"
                text = save.failure(what, reason)
        text = next(filter(None, all_gather_object(text, group, label="save held")), "")
        if hold is not None and not text:
            return work, hold
        if hold is not None:
            hold.release()
        if group.rank == 0:
            _discard(work)
        raise SaveFailed(text)

    def _forget(self) -> None:
        """All ranks know how the last save ended, and none writes any more."""
        self._join()
        if self._group.rank == 0 and self._last is not None:
            self._last.remove_failed()
        self._last = None

    def _join(self) -> None:
        if self._last is not None and self._last.join():
            self._buffers.give_back()


class _State(Enum):
    """How an asynchronous save stands on one rank. Only WRITING is ever left.

    WRITING -- the part is there -----------> WRITTEN     another rank has the last part and publishes; or a peer has
       |  |                                               failed, so that the part is of no use and is gone again
       |  `------- and it was the last one -> PUBLISHED   the checkpoint has its name
       `---------- could not write or publish
                                           -> FAILED      the note says why; the disk has back what was taken
    """

    WRITING = "writing"
    WRITTEN = "written"
    PUBLISHED = "published"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class _Said:
    """How the asynchronous save looks from one rank."""

    state: _State
    failure: str  # of this rank
    told: bool  # the program on this rank has had the failure raised


class _Background:
    """An asynchronous save on one rank: its thread, and how its part ended. It never communicates."""

    def __init__(self, save: Attempt, work: Path, hold: Hold) -> None:
        # Fixed: what is saved, and where until it has its name.
        self._save = save
        self._work = work
        self._hold = hold  # until the thread has ended

        # Written by the thread, and read once it has ended.
        self._state = _State.WRITING
        self._failure = ""

        # The program's side.
        self._thread: threading.Thread | None = None
        self._told = False

    def start(self, buffers: HostBuffers) -> None:
        """Copy the state, so that training may go on, and write it behind. A failure is said later."""
        try:
            outgoing = collect(self._save.local, self._save.tag, copy=True, buffers=buffers)
        except BaseException as reason:
            self._hold.release()
            self._fail((), reason)
            if not isinstance(reason, Exception):
                raise
            return
        # Not a daemon: the interpreter waits for it at exit.
        self._thread = threading.Thread(target=self._run, args=(outgoing,), name="checkpoint")
        self._thread.start()

    def join(self) -> bool:
        """Wait for the thread; whether there was one that nobody had waited for."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        return thread is not None

    def said(self) -> _Said:
        """What this rank tells the others."""
        if self._thread is not None and self._thread.is_alive():
            return _Said(_State.WRITING, "", self._told)
        # A thread that something else than an error has ended has said nothing: then nobody publishes, and
        # ``failure_of`` finds that on all ranks.
        state = _State.WRITTEN if self._state is _State.WRITING else self._state
        return _Said(state, self._failure, self._told)

    def failure_of(self, everyone: Sequence[_Said]) -> str:
        """What to raise on every rank, "" where all is well or all have raised it."""
        failures = [said.failure for said in everyone if said.failure]
        if failures:
            return "" if all(said.told for said in everyone) else failures[0]
        if any(said.state in (_State.WRITING, _State.PUBLISHED) for said in everyone):
            return ""
        # All writers are done, so the last one has published; unless a rank died or saved less often.
        return describe(
            f"the asynchronous checkpoint {self._save.final} was never completed",
            fix="make sure that every rank calls save_checkpoint, and that all see the same folder",
        )

    def tell(self) -> bool:
        """The program on this rank is about to hear of the failure; whether it has heard of it before."""
        before, self._told = self._told, True
        return before

    def found_here(self) -> str:
        """A failure of this rank, or of one that left a note; "" where the program has heard of it."""
        if not self._told and not self._failure:
            with suppress(OSError, ValueError):  # there is no note where all went well
                self._failure = str(json.loads((self._work / _NOTE).read_text(encoding="utf-8")))
        if self._told or self._failure:
            self.remove_failed()  # the last rank to end removes it
        return "" if self._told else self._failure

    def remove_failed(self) -> None:
        """Remove what a save that failed has left; nothing where it was published or a rank still writes."""
        if ownership.is_abandoned(self._work):
            _discard(self._work)

    # In the thread.

    def _run(self, outgoing: Outgoing) -> None:
        with self._hold:
            try:
                self._write(outgoing)
            except Exception as reason:
                self._fail(outgoing.trees, reason)

    def _write(self, outgoing: Outgoing) -> None:
        work, grid = self._work, self._save.local.grid
        part = write(work, outgoing)
        # At once, never half a text: a peer may read it this very moment.
        replace_text(work / f"{_PART}{grid.rank:05d}.json", json.dumps(to_json(part)))
        # The rank that failed may have looked for parts before this one was there.
        if (work / _NOTE).exists():
            _remove_own(work, outgoing.trees)
            return self._end(_State.WRITTEN)
        found = sorted(work.glob(f"{_PART}*.json"))  # by rank
        if len(found) < grid.world or not _claim(work, found[0]):
            return self._end(_State.WRITTEN)
        found[0] = work / _CLAIM
        parts = [_part(path) for path in found]
        # Gone before the folder gets its name: the manifest lists what belongs there.
        for path in found:
            path.unlink()
        outcome = self._save.publish(work, parts)
        if outcome:
            return self._give_up([record.name for part in parts for record in part.files], outcome)
        return self._end(_State.PUBLISHED)

    def _fail(self, names: Iterable[str], reason: BaseException) -> None:
        what = f"cannot write the checkpoint {self._save.final} in the background"
        self._give_up(names, self._save.failure(what, reason))

    def _give_up(self, names: Iterable[str], text: str) -> None:
        """Give the disk back what was taken, here and by peers that are done: without this part it is nothing."""
        self._end(_State.FAILED, text)
        _remove_own(self._work, names)
        with suppress(OSError):
            replace_text(self._work / _NOTE, json.dumps(text))
        for path in self._work.glob(f"{_PART}*.json"):
            with suppress(OSError, ValueError, KeyError):
                _remove_own(self._work, [record.name for record in _part(path).files])

    def _end(self, state: _State, failure: str = "") -> None:
        assert self._state is _State.WRITING, f"{self._state} -> {state}"
        self._state, self._failure = state, failure


def _part(path: Path) -> Manifest:
    part: Manifest = from_json(Manifest, json.loads(path.read_text()))
    return part


def _claim(work: Path, part: Path) -> bool:
    """Whether this rank is the one to publish: several may see that all parts are there."""
    # A rename of the first part can succeed once. A file made for the purpose could be made a second time between the
    # moment when the publisher removes it and the one when it renames the folder.
    try:
        part.rename(work / _CLAIM)
    except FileNotFoundError:  # claimed already
        return False
    return True


def _remove_own(work: Path, names: Iterable[str]) -> None:
    """Remove files that ranks of this save have written."""
    for name in names:
        with suppress(OSError):
            (work / name).unlink(missing_ok=True)


def _discard(work: Path) -> None:
    with suppress(OSError, CheckpointError):  # it does no harm but to take room
        ownership.discard(work)
