"""One save as a rank means it: what, where, how a failure of it is told, and how many in a row a run survives."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zeropipe.checkpoint.save import tags
from zeropipe.checkpoint.save.records import LocalState, Manifest, united
from zeropipe.errors import CheckpointError, describe

_log = logging.getLogger("zeropipe")


class SaveFailed(Exception):
    """A checkpoint could not be written, where the program has asked for nothing wrong: on its way to ``Tolerance``."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one rank saves, and under which name."""

    root: Path
    tag: str
    save_latest: bool
    local: LocalState
    rank: int  # in the world, as messages name it

    @property
    def final(self) -> Path:
        return self.root / self.tag

    def publish(self, work: Path, parts: Sequence[Manifest]) -> str:
        """Commit; "" or the text of what went wrong."""
        try:
            tags.commit(self.root, work, united(parts), self.save_latest)
        except Exception as reason:
            return self.failure(f"cannot complete the checkpoint {self.final}", reason)
        return ""

    def failure(self, what: str, reason: BaseException) -> str:
        """The message of ``reason``, which has met this rank; errors of ours have one already."""
        if isinstance(reason, CheckpointError):
            return str(reason)
        detail = str(reason).splitlines()[0] if str(reason) else type(reason).__name__
        if isinstance(reason, OSError) and reason.strerror:
            detail = f"{reason.strerror} ({reason.filename})" if reason.filename else reason.strerror
        return describe(
            f"{what}: {detail}",
            rank=self.rank,
            fix="free space or make the folder writable and save again; earlier checkpoints are intact",
        )


class Tolerance:
    """Failed saves in a row: a warning each for the first ``limit``, then an error. All ranks count alike, since all
    hear of a failure at the same place; ``tells``: this one says it."""

    def __init__(self, limit: int, tells: bool) -> None:
        self._limit, self._tells = limit, tells
        self._failed = 0  # in a row

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, each failure is an error."""
        limit, self._limit = self._limit, 0
        try:
            yield
        finally:
            self._limit = limit

    def succeeded(self) -> None:
        self._failed = 0

    def failed(self, text: str, again: bool = False) -> None:
        """A save has failed with ``text``. Raises CheckpointError once there are too many. ``again``: it is counted."""
        self._failed += not again
        if self._failed > self._limit:
            counted = f" ({self._failed} saves in a row have failed)" if self._limit else ""
            raise CheckpointError(f"{text}{counted}")
        if self._tells:
            _log.warning(
                "a save has failed, and training goes on: %s (failed in a row: %d; an error after %d)",
                text,
                self._failed,
                self._limit,
            )
