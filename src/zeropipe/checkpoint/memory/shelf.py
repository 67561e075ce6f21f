"""Where the pieces of a run lie on one host, whose they are, and when they go.

::

    /dev/shm/zeropipe-UID-KEY/         of one user (mode 0700), one run and one host
        agent                          who started the processes of the run here: a process that outlives theirs;
                                       without torchrun also one of these, as a shell starts other runs too
        ENGINE.TOKEN.RANK.SLOT         pieces; ``.copy``: of a rank of another host
        ended.ENGINE.TOKEN.RANK        this rank came to its end

torchrun's agent restarts the processes of a host when one dies; so the pieces of a run may be used while any host has
the agent that they were made under, and are of no use to anybody once the agent is gone. Whether it is can be proved
for a process of this host and this namespace of processes alone; whatever else lies there is left.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from zeropipe.checkpoint.memory.pieces import Seal, Slot, seal_of
from zeropipe.errors import UsageError

SHARED = Path("/dev/shm")
_FOLDER = re.compile(r"^zeropipe-(\d+)-[0-9a-f]{16}$")
_FILE = re.compile(r"^(?P<engine>\d+)\.(?P<token>[0-9a-f]{12})\.\d+\.[012](\.copy)?$")
_ENDED = re.compile(r"^ended\.(?P<engine>\d+)\.(?P<token>[0-9a-f]{12})\.\d+$")
_AGENT = "agent"
_NO_RUN = ("", "none")  # torchrun's words for a run without a name


def host_of(root: Path) -> str:
    """Whoever has the same sees the same memory. ``ZEROPIPE_HOST`` names the host where containers hide it."""
    named = os.environ.get("ZEROPIPE_HOST")
    return named or f"{socket.gethostname()} {_boot()} {os.stat(root).st_dev if root.exists() else ''}"


def agent_of_this() -> str:
    """Who started this process: torchrun's agent, or whatever its parent is."""
    return _identity(os.getppid())


def command() -> str:
    """What a process was asked to do: without torchrun, all that tells two runs of one shell apart."""
    where = ""
    with suppress(OSError):  # the folder is gone
        where = os.getcwd()
    return "\0".join([where, *sys.argv])


class Shelf:
    """The pieces of one engine on this host. ``asked``: the `command` of all ranks."""

    def __init__(self, root: Path, engine: int, asked: str = "") -> None:
        self.root, self.host, self.agent = root, host_of(root), agent_of_this()
        self._engine = engine
        run = os.environ.get("TORCHELASTIC_RUN_ID", "")
        self._named = run not in _NO_RUN
        run = run if self._named else f"{self.agent}\0{asked}"
        key = hashlib.blake2b(f"{run}\0{self.host}".encode(), digest_size=8).hexdigest()
        self.folder = root / f"zeropipe-{os.geteuid()}-{key}"

    # Before the first piece.

    def open(self) -> None:
        """Make the folder, and remove what dead runs of this user have left.

        Raises OSError, and UsageError where the root is no folder that can be written or what stands there is not ours.
        """
        if not self.root.is_dir() or not os.access(self.root, os.W_OK | os.X_OK):
            raise UsageError(
                f"copies in memory cannot be kept in {self.root}",
                expected="a folder that can be written",
                found="none" if not self.root.exists() else "one that cannot",
                fix='name another in "checkpoint": {"memory": {"folder": ...}}',
            )
        for path in self._others():
            _clear(path)
        with suppress(FileExistsError):
            self.folder.mkdir(mode=0o700)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise UsageError(
                f"copies in memory cannot be kept in {self.folder}",
                expected="a folder of this user that nobody else can open",
                found=f"mode {stat.filemode(found.st_mode)}, user {found.st_uid}",
                fix="remove it",
            )
        draft = self.folder / f"{_AGENT}.{os.getpid()}"
        own = "" if self._named else _identity(os.getpid())
        draft.write_text(f"{self.agent}\n{own}", encoding="utf-8")
        os.replace(draft, self.folder / _AGENT)

    def room(self) -> int:
        """Bytes that can still be written."""
        free = os.statvfs(self.root)
        return free.f_bavail * free.f_frsize

    # Pieces.

    def slot(self, token: str, rank: int, number: int, *, copy: bool = False) -> Slot:
        """The file for every other piece of ``rank``; ``copy``: of a rank of another host."""
        return Slot(self.folder / f"{self._engine}.{token}.{rank}.{number}{'.copy' if copy else ''}")

    def found(self) -> list[tuple[Path, Seal]]:
        """Every piece that has a head, of whatever attempt."""
        if not _is_ours(self.folder):
            return []
        named = ((path, seal_of(path)) for path in self._files(_FILE))
        return sorted((path, seal) for path, seal in named if seal is not None)

    def keep_only(self, token: str) -> None:
        """The pieces of other attempts go."""
        for path in [*self._files(_FILE), *self._files(_ENDED)]:
            if f".{token}." not in path.name:
                _unlink(path)

    def end(self, token: str, rank: int, ranks: int) -> None:
        """``rank`` has come to its end; the last of as many ``ranks`` as this host has takes all pieces away."""
        # Not each its own: where another rank dies at its end, the run goes on from what is there.
        if not _is_ours(self.folder):  # nothing was ever kept
            return
        with suppress(OSError):
            (self.folder / f"ended.{self._engine}.{token}.{rank}").touch(mode=0o600)
            ended = [path for path in self._files(_ENDED) if f".{token}." in path.name]
            if len(ended) >= ranks:
                # Those of lives before this one too, which may have been too short for ``keep_only``.
                for path in [*self._files(_FILE), *self._files(_ENDED)]:
                    _unlink(path)
                _clear(self.folder, only_empty=True)

    def _files(self, pattern: re.Pattern[str]) -> list[Path]:
        """This engine's, of such names."""
        with suppress(OSError):
            matches = ((name, pattern.match(name)) for name in os.listdir(self.folder))
            return [self.folder / n for n, match in matches if match and int(match["engine"]) == self._engine]
        return []

    def _others(self) -> Iterator[Path]:
        """Folders of this user's runs that are dead, which is proved: their agents are, or what our own has started."""
        for name in os.listdir(self.root):
            match, path = _FOLDER.match(name), self.root / name
            if match and int(match[1]) == os.geteuid() and path != self.folder and _is_ours(path):
                with suppress(OSError, ValueError):
                    agent, *one = (path / _AGENT).read_text(encoding="utf-8").splitlines()
                    if _is_dead(agent) or (agent == self.agent and any(map(_is_dead, one))):
                        yield path


def _is_ours(folder: Path) -> bool:
    with suppress(OSError):
        found = folder.lstat()
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return False


def _clear(folder: Path, only_empty: bool = False) -> None:
    """Remove what we name so, and the folder if nothing else is in it; ``only_empty``: unless pieces are in it."""
    with suppress(OSError):
        names = os.listdir(folder)
        if only_empty and any(map(_FILE.match, names)):
            return
        for name in names:
            if _FILE.match(name) or _ENDED.match(name) or name.split(".")[0] == _AGENT:
                _unlink(folder / name)
        folder.rmdir()


def _unlink(path: Path) -> None:
    with suppress(OSError):  # another rank was quicker
        path.unlink()


# Processes, such that nobody is taken for another who has the same number.


def _identity(process: int) -> str:
    return f"{_boot()} {os.readlink('/proc/self/ns/pid')} {process} {_began(process)}"


def _is_dead(identity: str) -> bool:
    """Whether that is proved."""
    boot, space, process, began = identity.split()
    if boot != _boot():
        return True
    return space == os.readlink("/proc/self/ns/pid") and _began(int(process)) != began


def _began(process: int) -> str:
    """Ticks from the start of the host to that of the process; "" where there is none."""
    try:
        # Behind the name, which may hold anything, field 22 of the whole.
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    except OSError:
        return ""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
