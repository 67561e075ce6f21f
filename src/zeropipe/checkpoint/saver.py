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
from pathlib import Path

from zeropipe.checkpoint import commit as publishing
from zeropipe.checkpoint import ownership, tags
from zeropipe.checkpoint.files import Hold, is_abandoned, replace_text
from zeropipe.checkpoint.manifest import Part
from zeropipe.checkpoint.snapshot import HostBuffers
from zeropipe.checkpoint.state import LocalState
from zeropipe.checkpoint.writer import Outgoing, collect, write
from zeropipe.comm.collectives import all_gather_object, broadcast_object
from zeropipe.comm.group import Group
from zeropipe.errors import CheckpointError, DesyncError, describe
from zeropipe.frozen import from_json, to_json

_PART = "part_"
_CLAIM = "claimed"
_NOTE = "failed.json"


@dataclass(frozen=True, slots=True)
class _Last:
    """The asynchronous save of which not every rank knows yet how it ended; every rank has one, or none has."""

    work: Path
    final: Path


@dataclass(frozen=True, slots=True)
class _Said:
    """How the last asynchronous save looks from one rank."""

    busy: bool = False  # its writer is at work
    failure: str = ""
    told: bool = False  # the program on this rank has had the failure raised
    published: bool = False  # it was this rank that published it


class Saver:
    """One engine's saves, one at a time. Every rank of ``group`` makes the same calls."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._thread: threading.Thread | None = None
        self._last: _Last | None = None
        self._failure = ""  # of this rank's part in it
        self._told = False  # ... and raised here
        self._published = False  # by this rank
        self._buffers = HostBuffers()

    def save(
        self,
        folder: str | os.PathLike[str],
        tag: str,
        local: LocalState,
        *,
        save_latest: bool = True,
        async_save: bool = False,
    ) -> Path:
        """Write the checkpoint ``folder/tag``; the path it has, or will have once the background is done.

        Collective. Raises CheckpointError on every rank alike when any rank cannot write, when the last
        asynchronous save failed and not every rank has raised that (this one is not begun then), and DesyncError
        when ranks give different tags. The checkpoints that were there stay as they are.
        """
        root = Path(folder)
        work, hold = self._open(root, tag, save_latest)
        if async_save:
            self._start(root, tag, work, hold, local, save_latest)
            return root / tag
        with hold:
            part: Part | None = None
            error = ""
            try:
                part = write(work, collect(local, copy=False))
            except Exception as reason:
                error = _text(self._group, f"cannot write the checkpoint {root / tag}", reason)
            parts = self._agree(part, error, work)
            outcome = ""
            if self._group.rank == 0:
                outcome = _publish(self._group, root, tag, work, local, parts, save_latest)
                if outcome:
                    _discard(work)
            outcome = broadcast_object(outcome, 0, self._group, label="checkpoint published")
        if outcome:
            raise CheckpointError(outcome)
        return root / tag

    def wait(self) -> None:
        """Return when this rank's background writer is done. Raises CheckpointError where the save has failed."""
        self._join()
        if self._last is None:
            return
        if self._told:
            self._remove_failed()  # the last rank to end removes it
            return
        if not self._failure:
            with suppress(OSError, ValueError):  # of a peer; there is none where all went well
                self._failure = str(json.loads((self._last.work / _NOTE).read_text(encoding="utf-8")))
        if self._failure:
            self._told = True
            self._remove_failed()
            raise CheckpointError(self._failure)

    def raise_pending(self, *, join: bool = False) -> None:
        """Raise on every rank alike what a background writer of any rank has failed with, unless all have raised it.

        Collective while an asynchronous save is under way, else free; for every boundary. ``join``: wait for it.
        """
        if self._last is None:
            return
        if join:
            self._join()
        everyone = all_gather_object(self._said(), self._group, label="save under way")
        text = _failure_of(everyone, self._last.final)
        if any(said.busy for said in everyone):
            if text:
                self._told = True
        else:
            self._forget()
        if text:
            raise CheckpointError(text)

    def _said(self) -> _Said:
        busy = self._thread is not None and self._thread.is_alive()
        return _Said(busy, "" if busy else self._failure, self._told, self._published)

    def _forget(self) -> None:
        """All ranks know how the last save ended, and none writes any more."""
        self._join()
        if self._group.rank == 0:
            self._remove_failed()
        self._last, self._failure, self._told, self._published = None, "", False, False

    def _remove_failed(self) -> None:
        """Remove what a save that failed has left; nothing where it was published or a rank still writes."""
        if self._last is not None and is_abandoned(self._last.work / ownership.MARK):
            _discard(self._last.work)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._buffers.give_back()

    def _open(self, root: Path, tag: str, save_latest: bool) -> tuple[Path, Hold]:
        """Wait for the last save, agree that all is well and on what to save; the new work folder, held by all."""
        self._join()
        refusal = ""
        try:
            tags.check_tag(tag)
        except CheckpointError as reason:
            refusal = str(reason)
        said = self._said()
        everyone = all_gather_object((str(root), tag, refusal, said), self._group, label="save begins")
        # All ranks have joined their writers, so nobody is in the last work folder any more.
        text = next((r for _, _, r, _ in everyone if r), "")
        if not text and self._last is not None:
            text = _failure_of([s for _, _, _, s in everyone], self._last.final)
        self._forget()
        differ = len({(r, t) for r, t, _, _ in everyone}) > 1
        work: Path | None = None
        hold: Hold | None = None
        if self._group.rank == 0 and not text and not differ:
            work, hold, text = self._prepare(root, tag, save_latest)
        work, text = broadcast_object((work, text), 0, self._group, label="save prepared")
        if text:
            raise CheckpointError(text)
        if differ:
            listed = "; ".join(
                f"rank {rank}: {Path(r) / t}"
                for rank, (r, t, _, _) in zip(self._group.ranks, everyone, strict=True)
            )
            raise DesyncError(f"ranks save different checkpoints: {listed}. Fix: give all the same tag")
        assert work is not None
        if hold is None:
            try:
                hold = ownership.writing(work)
            except OSError as reason:
                what = (
                    f"cannot see the folder {work}, which rank {self._group.ranks[0]} made for the checkpoint"
                )
                text = _text(self._group, what, reason)
        # Before any rank may be done: a folder that nobody holds for a moment would be taken for left.
        texts = [t for t in all_gather_object(text, self._group, label="save held") if t]
        if texts:
            if hold is not None:
                hold.release()
            if self._group.rank == 0:
                _discard(work)
            raise CheckpointError(texts[0])
        assert hold is not None
        return work, hold

    def _prepare(self, root: Path, tag: str, save_latest: bool) -> tuple[Path | None, Hold | None, str]:
        try:
            return *publishing.prepare(root, tag, save_latest), ""
        except CheckpointError as reason:
            return None, None, str(reason)
        except Exception as reason:
            what = f"cannot make the checkpoint folder {root / tag}"
            return None, None, _text(self._group, what, reason)

    def _agree(self, part: Part | None, error: str, work: Path) -> list[Part]:
        """Every rank's part, or the first rank's error on all of them."""
        replies = all_gather_object((part, error), self._group, label="checkpoint written")
        errors = [text for _, text in replies if text]
        if errors:
            if self._group.rank == 0:
                _discard(work)
            raise CheckpointError(errors[0])
        return [p for p, _ in replies]

    # In the background.

    def _start(
        self, root: Path, tag: str, work: Path, hold: Hold, local: LocalState, save_latest: bool
    ) -> None:
        self._last = _Last(work, root / tag)
        try:
            outgoing = collect(local, copy=True, buffers=self._buffers)
        except BaseException as reason:
            hold.release()
            self._fail(root / tag, work, (), reason)
            if not isinstance(reason, Exception):
                raise
            return
        # Not a daemon: the interpreter waits for it at exit.
        arguments = (root, tag, work, hold, local, outgoing, save_latest)
        self._thread = threading.Thread(target=self._background, args=arguments, name="checkpoint")
        self._thread.start()

    def _background(
        self,
        root: Path,
        tag: str,
        work: Path,
        hold: Hold,
        local: LocalState,
        outgoing: Outgoing,
        save_latest: bool,
    ) -> None:
        with hold:
            try:
                part = write(work, outgoing)
                replace_text(work / f"{_PART}{part.rank:05d}.json", json.dumps(to_json(part)))
                if (work / _NOTE).exists():
                    _remove_own(work, outgoing.trees)
                    return
                parts = sorted(work.glob(f"{_PART}*.json"))
                if len(parts) < local.grid.world or not _claim(work, parts[0]):
                    return
                parts[0] = work / _CLAIM
                joined = [from_json(Part, json.loads(path.read_text())) for path in parts]
                for path in parts:
                    path.unlink()
                outcome = _publish(self._group, root, tag, work, local, joined, save_latest)
                if outcome:
                    self._give_up(work, [r.name for p in joined for r in p.files], outcome)
                self._published = not outcome
            except Exception as reason:
                self._fail(root / tag, work, outgoing.trees, reason)

    def _fail(self, final: Path, work: Path, names: Iterable[str], reason: BaseException) -> None:
        what = f"cannot write the checkpoint {final} in the background"
        self._give_up(work, names, _text(self._group, what, reason))

    def _give_up(self, work: Path, names: Iterable[str], text: str) -> None:
        """Give the disk back what was taken, here and by peers that are done: without this part it is nothing."""
        self._failure = text
        _remove_own(work, names)
        with suppress(OSError):
            replace_text(work / _NOTE, json.dumps(text))
        for path in work.glob(f"{_PART}*.json"):
            with suppress(OSError, ValueError, KeyError):
                done = from_json(Part, json.loads(path.read_text()))
                _remove_own(work, [record.name for record in done.files])


def _failure_of(everyone: Sequence[_Said], final: Path) -> str:
    """What to raise on every rank about the last save, "" where all is well or all have raised it."""
    failures = [said.failure for said in everyone if said.failure]
    if failures:
        return "" if all(said.told for said in everyone) else failures[0]
    if any(said.busy or said.published for said in everyone):
        return ""
    # All writers are done, so the last one has published; unless a rank died or saved less often.
    return describe(
        f"the asynchronous checkpoint {final} was never completed",
        fix="make sure that every rank calls save_checkpoint, and that all see the same folder",
    )


def _claim(work: Path, part: Path) -> bool:
    """Whether this rank is the one to publish: several may see that all parts are there.

    A rename of the first part can succeed once. A file made for the purpose could be made a second time between
    the moment when the publisher removes it and the one when it renames the folder.
    """
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


def _publish(
    group: Group, root: Path, tag: str, work: Path, local: LocalState, parts: list[Part], save_latest: bool
) -> str:
    """Commit; "" or the text of what went wrong."""
    try:
        publishing.commit(root, tag, work, publishing.build_manifest(tag, local, parts), save_latest)
    except Exception as reason:
        if isinstance(reason, CheckpointError):
            return str(reason)
        return _text(group, f"cannot complete the checkpoint {root / tag}", reason)
    return ""


def _text(group: Group, what: str, reason: BaseException) -> str:
    detail = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    if isinstance(reason, OSError) and reason.strerror:
        detail = f"{reason.strerror} ({reason.filename})" if reason.filename else reason.strerror
    return describe(
        f"{what}: {detail}",
        rank=group.ranks[group.rank],
        fix="free space or make the folder writable and save again; earlier checkpoints are intact",
    )
