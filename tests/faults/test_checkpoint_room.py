"""A save that cannot be: found before the first byte where it can be, told on all ranks alike, survived as often as the
configuration says. What was there before stays as it was, byte for byte, and nothing half written is left."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpointing import make_engine, train
from zeropipe.checkpoint.save import files, tags
from zeropipe.checkpoint.save.attempt import Tolerance
from zeropipe.checkpoint.save.contents import estimated
from zeropipe.checkpoint.save.verify import verify
from zeropipe.errors import CheckpointError
from zeropipe.runtime.engine.state import local_state


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Each makes the next save of a run into ``folder`` fail in its way, and returns what puts it right.


def fails_to_sync(folder: Path) -> Callable[[], None]:
    """As a disk that is broken says it, late."""
    real = os.fsync

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    files.os.fsync = broken  # type: ignore[assignment]
    return lambda: setattr(files.os, "fsync", real)


def has_a_limit(folder: Path) -> Callable[[], None]:
    """The system itself refuses in the middle of a file, after some of it was written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))

    def undo() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)

    return undo


def disappears(folder: Path) -> Callable[[], None]:
    """The whole folder is gone when the files are written."""
    real = files.torch.save

    def gone(*args: Any, **kwargs: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        real(*args, **kwargs)

    files.torch.save = gone
    return lambda: setattr(files.torch, "save", real)


def is_full(folder: Path) -> Callable[[], None]:
    real = files.os.statvfs

    def full(path: Any) -> Any:
        found = real(path)
        values = list(found)
        values[3] = values[4] = 0
        return os.statvfs_result(values)

    files.os.statvfs = full  # type: ignore[assignment]
    return lambda: setattr(files.os, "statvfs", real)


FAULTS = {f.__name__: f for f in (fails_to_sync, has_a_limit, is_full, disappears)}
SAYS = {
    "fails_to_sync": "Input/output error",
    "has_a_limit": "File too large",
    "is_full": "there is no room",
    "disappears": "No such file or directory",
}


def saves(
    rank: int, world: int, folder: str, stage: int, fault: str, asynchronous: bool, odd: int
) -> tuple[list[str], list[str]]:
    """What six saves gave: good, three that fail on rank ``odd``, two good ones; and what was logged here."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zeropipe").addHandler(handler)
    engine = make_engine(stage, checkpoint={"tolerate_failed_saves": 2})
    found: list[str] = []

    def save(tag: str) -> None:
        try:
            saved = engine.save_checkpoint(folder, tag=tag, async_save=asynchronous)
            if asynchronous:
                engine.checkpoints.saver._join()
            train(engine, 1, rank)
            found.append("good" if saved else "warned")
        except CheckpointError as error:
            found.append(str(error))

    try:
        save("first")
        undo = FAULTS[fault](Path(folder)) if rank == odd or fault in ("is_full",) else None
        for number in range(3):
            save(f"bad{number}")
        if undo is not None:
            undo()
        save("after")
        save("last")
        engine.destroy()
    finally:
        logging.getLogger("zeropipe").removeHandler(handler)
    return found, [line for line in lines if "a save has failed" in line]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(("stage", "fault"), [(1, "fails_to_sync"), (3, "has_a_limit"), (2, "is_full")])
def test_failed_saves_are_warnings_and_then_an_error(pool, tmp_path, stage, fault, asynchronous):
    ranks = pool(2).run(saves, str(tmp_path), stage, fault, asynchronous, 1)
    (found, lines), (other, silent) = ranks
    assert found == other, found  # alike on all ranks
    # An asynchronous one is heard of at the step after it, so its own call says that it was begun.
    begun = "good" if asynchronous and fault != "is_full" else "warned"
    assert found[0] == "good" and found[1:3] == [begun, begun] and found[4:] == ["good", "good"], found
    assert SAYS[fault] in found[3] and "3 saves in a row have failed" in found[3], found
    assert len(lines) == 2 and not silent and all(SAYS[fault] in line for line in lines), lines
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"first", "after", "last", "latest", "zero_to_fp32.py"}, names  # nothing half written
    assert (tmp_path / "latest").read_text() == "last"
    assert all(f.good for tag in ("first", "after", "last") for f in verify(tmp_path / tag))


def vanishing(rank: int, world: int, folder: str, asynchronous: bool) -> list[str]:
    found, _ = saves(rank, world, folder, 1, "disappears", asynchronous, 1)
    return found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_folder_that_disappears_in_the_middle_is_an_error_and_the_next_save_makes_it_anew(
    pool, tmp_path, asynchronous
):
    found, other = pool(2).run(vanishing, str(tmp_path / "saves"), asynchronous)
    assert found == other and SAYS["disappears"] in found[3], found
    assert found[4:] == ["good", "good"] and (tmp_path / "saves" / "latest").read_text() == "last"


def refused(rank: int, world: int, folder: str, asynchronous: bool) -> tuple[str, bool]:
    engine = make_engine(2)
    text = ""
    try:
        engine.save_checkpoint(folder, async_save=asynchronous)
        engine.wait_for_checkpoint()
    except CheckpointError as error:
        text = str(error)
    return text, engine.save_checkpoint(f"{folder}-elsewhere")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_a_path_that_cannot_be_a_folder_is_refused_on_all_ranks(pool, tmp_path, kind, asynchronous):
    path = tmp_path / "taken"
    if kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere" / "at all")
    else:
        path.write_text("mine")
    given = path / "below" if kind == "below a file" else path
    before = contents(tmp_path)
    (text, good), (other, also) = (
        pool(2).run(refused, str(given), asynchronous)
        if kind != "below a file"
        else (pool(2).run(refused_below, str(given), asynchronous))
    )
    assert text == other and "cannot make the checkpoint folder" in text and good and also
    assert {k: v for k, v in contents(tmp_path).items() if k in before} == before


def refused_below(rank: int, world: int, folder: str, asynchronous: bool) -> tuple[str, bool]:
    engine = make_engine(2)
    try:
        engine.save_checkpoint(folder, async_save=asynchronous)
    except CheckpointError as error:
        return str(error), True
    return "", False


def test_the_estimate_is_what_is_written(tmp_path):
    """Within 12 %, never more than what is written: a run is not refused a disk that has room."""
    for stage in range(4):
        engine = make_engine(stage)
        train(engine, 1, 0)
        engine.save_checkpoint(tmp_path, tag=f"stage{stage}")
        written = sum(p.stat().st_size for p in (tmp_path / f"stage{stage}").glob("*.pt"))
        asked = estimated(local_state(engine._parts, None, exclude_frozen=False))
        assert 0.5 * written < asked <= written, (stage, asked, written)


def test_what_a_killed_save_left_counts_as_room(tmp_path, monkeypatch):
    """Else a disk that a killed save has filled would stay full: every later save would be refused before cleaning."""
    left = tmp_path / ".t.zeropipe-0123456789ab.incomplete"
    left.mkdir()
    (left / "zeropipe_unfinished.json").write_text('{"for": "t", "host": "' + os.uname().nodename + '"}')
    (left / "x.pt").write_bytes(bytes(1000))

    def free(path: Any) -> Any:
        class Found:
            f_blocks, f_frsize = 10, 1000
            f_bfree = f_bavail = 0 if left.exists() else 1

        return Found

    monkeypatch.setattr(files.os, "statvfs", free)
    work, hold = tags.prepare(tmp_path, "t", nbytes=1000)
    hold.release()
    assert work.is_dir() and not left.exists()
    with pytest.raises(CheckpointError, match="about 1,001 bytes, found 1,000 bytes free"):
        tags.prepare(tmp_path, "t", nbytes=1001)


def test_a_file_system_that_does_not_say_its_size_is_written_to(tmp_path, monkeypatch):
    class Unknown:
        f_blocks = f_bfree = f_bavail = f_frsize = 0

    monkeypatch.setattr(files.os, "statvfs", lambda path: Unknown)
    files.check_room(tmp_path, 10**15)

    def refuses(path: Any) -> Any:
        raise OSError(errno.ENOSYS, "no")

    monkeypatch.setattr(files.os, "statvfs", refuses)
    files.check_room(tmp_path, 10**15)


def test_a_success_between_failures_begins_the_count_anew():
    tolerance = Tolerance(1, tells=False)
    for _ in range(3):
        tolerance.failed("x")
        tolerance.failed("x", again=True)  # the same one
        tolerance.succeeded()
    tolerance.failed("x")
    with pytest.raises(CheckpointError, match=r"^x \(2 saves in a row have failed\)$"):
        tolerance.failed("x")
    with pytest.raises(CheckpointError, match=r"^x$"):
        Tolerance(0, tells=False).failed("x")


# A file system of its own, small, that this process alone sees.

_MINE, _PRIVATE, _REMOUNT, _READ_ONLY = 0x00020000, 0x44000, 32, 1  # CLONE_NEWNS, MS_REC | MS_PRIVATE


def on_a_small_disk(rank: int, world: int, folder: str) -> tuple[list[str], list[str], str]:
    """What saves gave until one failed; what is there then; and what one gave once it could not be written to."""
    libc, there = ctypes.CDLL(None, use_errno=True), folder.encode()
    if libc.unshare(_MINE) or libc.mount(b"none", b"/", None, _PRIVATE, None):
        pytest.skip("this user may not mount a file system of its own")
    assert libc.mount(b"tmpfs", there, b"tmpfs", 0, b"size=200k") == 0
    engine = make_engine(1, checkpoint={"tolerate_failed_saves": 1})
    found = []
    for tag in "abcdefgh":
        try:
            found.append("saved" if engine.save_checkpoint(folder, tag=tag) else "warned")
        except CheckpointError as error:
            found.append(str(error))
            break
    left = os.listdir(folder)
    good = found.count("saved")
    assert (Path(folder) / "latest").read_text() == "abcdefgh"[good - 1]
    assert all(f.good for tag in "abcdefgh"[:good] for f in verify(Path(folder) / tag))
    assert libc.mount(b"tmpfs", there, b"tmpfs", _REMOUNT | _READ_ONLY, b"size=2m") == 0
    with pytest.raises(CheckpointError) as raised:
        make_engine(1).save_checkpoint(folder, tag="a")
    return found, left, str(raised.value)


def test_a_real_file_system_that_is_full_and_one_that_is_read_only(pool, tmp_path):
    (outcome,) = pool(1).run_faulty(on_a_small_disk, str(tmp_path))
    if outcome.kind == "skipped":
        pytest.skip(outcome.error)
    assert outcome.kind == "result", outcome.error
    found, left, read_only = outcome.value
    good = found.count("saved")
    assert good >= 1 and found[good] == "warned" and len(found) == good + 2, found
    assert "there is no room" in found[-1] and "2 saves in a row have failed" in found[-1]
    assert {*left} == {*"abcdefgh"[:good], "latest", "zero_to_fp32.py"}
    assert "Read-only file system" in read_only and "[rank 0]" in read_only


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no users")
def test_a_folder_of_another_user_is_named(tmp_path):
    """Root may write anywhere, so this is tried as nobody."""
    if os.geteuid() != 0:
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            make_engine(0).save_checkpoint(folder)
        return
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o755)
    for path in (tmp_path, *tmp_path.parents):
        path.chmod(path.stat().st_mode | 0o011) if path != Path("/") else None
    engine = make_engine(0)
    os.seteuid(65534)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            engine.save_checkpoint(folder)
    finally:
        os.seteuid(0)
    assert not list(folder.iterdir())
