"""Says to other processes that somebody still writes: a lock that ends with its process, however that ends.

Locks of the whole file (``flock``) are shared by writers and tried by who wants to clean up. They also hold between
machines on NFS. Where a file system has none, nothing can be proved, and what stands there counts as being written.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType


class Hold:
    """Open for as long as its process writes; several processes may hold one file."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        self._lock()

    @classmethod
    def create(cls, path: Path, draft: Path, text: str) -> Hold:
        """A new file that is held from the moment when it has its name. ``draft``: its name until then."""
        os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        hold = cls(draft)
        try:
            os.write(hold._handle, text.encode())
            os.rename(draft, path)
        except BaseException:
            hold.release()
            raise
        return hold

    def _lock(self) -> None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(self._handle, fcntl.LOCK_SH)

    def release(self) -> None:
        """May be called again."""
        if self._handle >= 0:
            # Named, not only closed: a data loader's worker that was forked meanwhile has the handle too.
            with suppress(OSError):
                fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def is_abandoned(path: Path) -> bool:
    """Whether it is proved that nobody holds ``path``."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
