"""Saves: every rank writes its own files, all ranks learn of any failure at once, and one publishes the whole.

    sync    collect -> write -> (gather parts or errors) -> rank 0 commits -> (outcome to all)
    async   copy to host memory | background: write -> leave the part in the folder -> the last one commits

The background thread never communicates, so it cannot disturb the training's collectives; the parts that the
ranks leave in the work folder tell the last of them that all is there.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

from zeropipe.checkpoint import commit as publishing
from zeropipe.checkpoint import tags
from zeropipe.checkpoint.files import FileRecord, replace_text
from zeropipe.checkpoint.manifest import FlatEntry, Part, TensorEntry
from zeropipe.checkpoint.snapshot import HostBuffers
from zeropipe.checkpoint.state import LocalState
from zeropipe.checkpoint.writer import Outgoing, collect, write
from zeropipe.comm.collectives import all_gather_object, broadcast_object
from zeropipe.comm.group import Group
from zeropipe.errors import CheckpointError, DesyncError, describe

_PART = "part_"
_CLAIM = "claimed"


class Saver:
    """One engine's saves, one at a time. Every rank of ``group`` makes the same calls."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None  # of the background writer, not yet raised
        self._unconfirmed: Path | None = None  # what the last asynchronous save should have published
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
        asynchronous save failed (this one is not begun then), and DesyncError when ranks give different tags.
        The checkpoints that were there stay as they are.
        """
        root = Path(folder)
        self._open(root, tag)
        if async_save:
            outgoing = collect(local, copy=True, buffers=self._buffers)
            self._unconfirmed = root / tag
            # Not a daemon: the interpreter waits for it at exit.
            self._thread = threading.Thread(
                target=self._background, args=(root, tag, local, outgoing, save_latest), name="checkpoint"
            )
            self._thread.start()
            return root / tag
        part: Part | None = None
        error = ""
        try:
            part = write(tags.work_folder(root, tag), collect(local, copy=False))
        except Exception as reason:
            error = _text(self._group, f"cannot write the checkpoint {root / tag}", reason)
        parts = self._agree(part, error, root, tag)
        outcome = ""
        if self._group.rank == 0:
            outcome = _publish(self._group, root, tag, local, parts, save_latest)
        outcome = broadcast_object(outcome, 0, self._group, label="checkpoint published")
        if outcome:
            raise CheckpointError(outcome)
        return root / tag

    def wait(self) -> None:
        """Return when this rank's background writer is done. Raises its CheckpointError."""
        self._join()
        self.raise_pending()

    def raise_pending(self) -> None:
        """Raise what a background writer of this rank has failed with; cheap, for every step."""
        if self._error is not None and not self._busy():
            error, self._error = self._error, None
            self._unconfirmed = None
            raise error

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._buffers.give_back()

    def _open(self, root: Path, tag: str) -> None:
        """Wait for the last save, agree that all is well and on what to save, and make the work folder."""
        self._join()
        error, self._error = self._error, None
        text = "" if error is None else str(error)
        try:
            tags.check_tag(tag)
            if self._group.rank == 0 and not text:
                publishing.prepare(root, tag)
        except CheckpointError as reason:
            text = text or str(reason)
        except OSError as reason:
            text = text or _text(self._group, f"cannot make the checkpoint folder {root / tag}", reason)
        last, self._unconfirmed = self._unconfirmed, None
        everyone = all_gather_object((str(root), tag, text), self._group, label="save begins")
        texts = [t for _, _, t in everyone if t]
        if not texts and last is not None:
            # All writers are done, so the last one has published; unless a rank died or saved less often.
            lost = self._group.rank == 0 and not last.is_dir()
            if broadcast_object(lost, 0, self._group, label="last save published"):
                texts = [
                    describe(
                        f"the asynchronous checkpoint {last} was never completed",
                        fix="make sure that every rank calls save_checkpoint, and that all see the same folder",
                    )
                ]
        if texts:
            if self._group.rank == 0:
                shutil.rmtree(tags.work_folder(root, tag), ignore_errors=True)
            raise CheckpointError(texts[0])
        names = {(r, t) for r, t, _ in everyone}
        if len(names) > 1:
            if self._group.rank == 0:
                shutil.rmtree(tags.work_folder(root, tag), ignore_errors=True)
            listed = "; ".join(
                f"rank {rank}: {Path(r) / t}"
                for rank, (r, t, _) in zip(self._group.ranks, everyone, strict=True)
            )
            raise DesyncError(f"ranks save different checkpoints: {listed}. Fix: give all the same tag")

    def _agree(self, part: Part | None, error: str, root: Path, tag: str) -> list[Part]:
        """Every rank's part, or the first rank's error on all of them."""
        replies = all_gather_object((part, error), self._group, label="checkpoint written")
        errors = [text for _, text in replies if text]
        if errors:
            if self._group.rank == 0:
                shutil.rmtree(tags.work_folder(root, tag), ignore_errors=True)
            raise CheckpointError(errors[0])
        return [p for p, _ in replies]

    def _background(
        self, root: Path, tag: str, local: LocalState, outgoing: Outgoing, save_latest: bool
    ) -> None:
        work = tags.work_folder(root, tag)
        try:
            part = write(work, outgoing)
            replace_text(work / f"{_PART}{part.rank:05d}.json", json.dumps(_part_to_json(part)))
            parts = sorted(work.glob(f"{_PART}*.json"))
            if len(parts) < local.grid.world or not _claim(work, parts[0]):
                return
            parts[0] = work / _CLAIM
            joined = [_part_from_json(json.loads(path.read_text())) for path in parts]
            for path in parts:
                path.unlink()
            outcome = _publish(self._group, root, tag, local, joined, save_latest)
            if outcome:
                self._error = CheckpointError(outcome)
        except Exception as reason:
            what = f"cannot write the checkpoint {root / tag} in the background"
            self._error = CheckpointError(_text(self._group, what, reason))


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


def _publish(
    group: Group, root: Path, tag: str, local: LocalState, parts: list[Part], save_latest: bool
) -> str:
    """Commit; "" or the text of what went wrong."""
    try:
        publishing.commit(root, tag, publishing.build_manifest(tag, local, parts), save_latest)
    except CheckpointError as reason:
        return str(reason)
    except Exception as reason:
        return _text(group, f"cannot complete the checkpoint {root / tag}", reason)
    return ""


def _text(group: Group, what: str, reason: Exception) -> str:
    detail = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
    if isinstance(reason, OSError) and reason.strerror:
        detail = f"{reason.strerror} ({reason.filename})" if reason.filename else reason.strerror
    return describe(
        f"{what}: {detail}",
        rank=group.ranks[group.rank],
        fix="free space or make the folder writable and save again; earlier checkpoints are intact",
    )


def _part_to_json(part: Part) -> dict[str, Any]:
    return {
        "rank": part.rank,
        "files": [[r.name, r.bytes, r.checksum] for r in part.files],
        "module": [t.to_json() for t in part.module],
        "flats": [f.to_json() for f in part.flats],
        "tied": part.tied,
        "excluded": list(part.excluded),
        "rank_file": part.rank_file,
    }


def _part_from_json(data: dict[str, Any]) -> Part:
    return Part(
        data["rank"],
        tuple(FileRecord(*record) for record in data["files"]),
        tuple(map(TensorEntry.from_json, data["module"])),
        tuple(map(FlatEntry.from_json, data["flats"])),
        data["tied"],
        tuple(data["excluded"]),
        data["rank_file"],
    )
