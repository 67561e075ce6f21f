"""What is provably ours, and the only place of this package that removes anything or takes a name from it.

    .NAME.zeropipe-TOKEN.incomplete/   being written: it carries the mark, and who writes in it holds the mark
    NAME/                              published: a list in it (the manifest, or LISTING) names our files
    .NAME.zeropipe-TOKEN.replaced/     what had the name NAME until then

Ours is a regular file that a list names, or one with a name that we give in a folder with the mark. A link is never
ours, nor what is behind one. Everything is looked at before the first byte is removed; what is not ours stays where
it is, or goes into the folder that takes the name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from zeropipe.checkpoint.save.files import Hold, nobody_holds, sync_folder, temporary, write_text
from zeropipe.checkpoint.save.records import MANIFEST_NAME, read_manifest
from zeropipe.errors import CheckpointError, describe
from zeropipe.paths import inside

MARK = "zeropipe_unfinished.json"
_DRAFT = f".{MARK}"  # its name until it is held
LISTING = "zeropipe_files.json"  # of the folders that have no manifest
_LISTS = (MANIFEST_NAME, LISTING)
# Earlier versions made one name of a tag, without a token.
_NAME = re.compile(r"^\.(?P<name>.+?)(?P<token>\.zeropipe-[0-9a-f]{12})?\.(?P<state>incomplete|replaced)$")
_WRITTEN = re.compile(r"^(.+\.(pt|json|distcp|safetensors|bin|incomplete)|\.metadata|claimed)$")
_STATE = re.compile(r"^(.+_(model|optim)_states\.pt|zeropipe_.+|zero|\.metadata|.+\.distcp)$")
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
_RACES = 100  # runs that publish under one name at the same moment
# Seconds: a lock of another machine may not be seen, but a file that is being written changes.
_YOUNG = 3600.0


# Folders that are being written.


def begin(final: Path) -> tuple[Path, Hold]:
    """A new work folder for what will be ``final``, empty but for the mark, which is held. Raises OSError."""
    final.parent.mkdir(parents=True, exist_ok=True)
    work = temporary(final)
    work.mkdir()
    draft = work / _DRAFT
    try:
        draft.write_text(json.dumps({"for": final.name, "host": socket.gethostname()}), encoding="utf-8")
        # Held from the moment when it has its name: a mark that nobody holds is taken for left.
        hold = Hold(draft)
        try:
            os.rename(draft, work / MARK)
        except BaseException:
            hold.release()
            raise
        return work, hold
    except BaseException:
        draft.unlink(missing_ok=True)
        _without_folder(work)
        raise


def writing(work: Path) -> Hold:
    """Tell other processes that this one writes in ``work``, until it is released."""
    return Hold(work / MARK)


def is_abandoned(work: Path) -> bool:
    """Whether it is proved that nobody writes in ``work``."""
    return nobody_holds(work / MARK)


@contextmanager
def whole_or_nothing(final: Path, start: Callable[[], tuple[Path, Hold]]) -> Iterator[Path]:
    """The work folder that ``start`` begins, held while the block runs and gone when either raises.

    Raises CheckpointError, which names ``final``, where the disk refused.
    """
    work: Path | None = None
    try:
        work, hold = start()
        with hold:
            yield work
    except BaseException as error:
        if work is not None:
            with suppress(OSError, CheckpointError):
                discard(work)
        if isinstance(error, OSError):
            raise CheckpointError(cannot_write(final, error)) from error
        raise


def cannot_write(path: Path, error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return describe(
        f"cannot write {path}: {error.strerror or error}{where}",
        fix="free space or make the folder writable and try again; nothing was left there",
    )


# Names: given, and taken from what had them.


def publish(work: Path, final: Path) -> list[Path]:
    """Give a finished work folder its name, and remove what of ours had it. Raises OSError; then all is as it was.

    Returns what had the name, is not ours and could not go into the new folder: it stays beside it.
    """
    # A folder takes a name only where nothing, or an empty folder, has it: what stands there goes aside first. Another
    # run may publish between the two renames, so try again.
    aside: Path | None = None
    for _ in range(_RACES):
        try:
            os.rename(work, final)
            break
        except OSError as error:
            if error.errno not in _TAKEN:
                # The disk has refused: who had the name gets it back.
                if aside is not None and not os.path.lexists(final):
                    os.rename(aside, final)
                raise
        other = temporary(final).with_suffix(".replaced")
        with suppress(FileNotFoundError):  # another run has just done it
            os.rename(final, other)
            aside = other
    else:
        raise OSError(errno.EBUSY, "other runs save under this name all the time", str(final))
    sync_folder(final.parent)
    (final / MARK).unlink(missing_ok=True)
    kept: list[Path] = []
    for old in asides(final):
        try:
            kept += settle(old, final)
        # The new one stands; whether the old one goes is no reason to fail.
        except (OSError, CheckpointError):
            kept.append(old)
    return kept


def asides(final: Path) -> list[Path]:
    """What had the name of ``final`` before, the newest first."""
    return sorted((p for p in entries(final.parent) if stood_for(p) == final.name), key=_age)


def name_of(path: Path) -> str | None:
    """The name that a work folder is for, or that what stands aside had; None for other names."""
    match = _NAME.match(path.name)
    return match["name"] if match and (match["token"] or match["state"] == "replaced") else None


def stood_for(path: Path) -> str | None:
    """The name that ``path`` had before it was set aside; None where it was not."""
    match = _NAME.match(path.name)
    return match["name"] if match and match["state"] == "replaced" else None


def settle(aside: Path, final: Path) -> list[Path]:
    """Remove what is ours in a folder that ``final`` has replaced; what is not goes into ``final``.

    Returns what could not: its name is taken there, or it looks like a part of a checkpoint and is not of this one.
    """
    if not _is_folder(aside):
        return [aside]  # a link or a file that stood under this name
    # Somebody's notes beside a checkpoint move along; states of a checkpoint that is not this one must not.
    listed = listed_files(aside)
    ours = {name.split("/", 1)[0] for name in listed or ()}
    for path in entries(aside):
        if path.name not in ours and not _STATE.match(path.name) and not os.path.lexists(final / path.name):
            os.rename(path, final / path.name)
    if listed is None:
        return entries(aside) or _without_folder(aside)
    return remove_listed(aside)


# What can be removed.


def listed_files(folder: Path) -> set[str] | None:
    """The files, as paths inside ``folder``, that its list proves to be ours; None without a list that is whole."""
    if not _is_folder(folder):
        return None
    with suppress(CheckpointError):
        manifest = read_manifest(folder) if _is_file(folder / MANIFEST_NAME) else None
        if manifest is not None:
            return {record.name for record in manifest.files} | {MANIFEST_NAME, MARK}
    with suppress(OSError, ValueError, CheckpointError, KeyError, TypeError):
        if _is_file(folder / LISTING):
            listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))["files"]
            paths = [inside(folder, name, "a listed file") for name in listing]
            return {str(path.relative_to(folder)) for path in paths} | {LISTING, MARK}
    return None


def remove_listed(folder: Path) -> list[Path]:
    """Remove the files that the folder's list names, and the folder if that empties it; what stays.

    Raises CheckpointError, before anything is removed, where a listed file is a link or behind one.
    """
    listed = listed_files(folder)
    if listed is None:
        raise CheckpointError(
            f"{folder} is not removed: nothing proves that zeropipe wrote it", expected=MANIFEST_NAME
        )
    paths = [folder / name for name in sorted(listed)]
    for path in paths:
        for part in (path, *path.parents[: len(path.relative_to(folder).parts) - 1]):
            if part.is_symlink() or (path.exists() and not _is_file(path)):
                raise CheckpointError(
                    f"{folder} is not removed: {part} is a link or no file, which zeropipe did not make. "
                    "Fix: remove it yourself"
                )
    return _remove(folder, paths, _LISTS)


def discard(work: Path) -> None:
    """Remove a work folder with all that was written in it. Raises CheckpointError where something is not ours."""
    found = _walk(work)
    if not found and not _without_folder(work):
        return  # nothing is there, or an empty folder
    if not (_is_folder(work) and (_is_file(work / MARK) or _is_file(work / _DRAFT))):
        raise CheckpointError(f"{work} is not removed: nothing proves that zeropipe wrote it")
    for path in found:
        if not (_is_folder(path) or (_is_file(path) and _WRITTEN.match(path.name))):
            raise CheckpointError(f"{work} is not removed: {path} is not zeropipe's. Fix: remove it yourself")
    _remove(work, found, (MARK,))


def _remove(folder: Path, paths: Iterable[Path], proof: tuple[str, ...]) -> list[Path]:
    """Remove ``paths``, all of which were looked at, and the folders that this empties; what stays of ``folder``."""
    # What proves that the rest is ours goes last: a removal that was cut short can be taken up again.
    folders = {folder}
    for path in sorted(paths, key=lambda path: path.name in proof):
        folders |= {parent for parent in path.parents if folder in parent.parents}
        if _is_folder(path):
            folders.add(path)
        else:
            path.unlink(missing_ok=True)
    left: list[Path] = []
    for parent in sorted(folders, reverse=True):  # the innermost first, and ``folder`` last
        left = _without_folder(parent)
    return _walk(folder) or left


def leftovers(folder: Path) -> list[Path]:
    """What killed processes have left in ``folder``, as far as it is proved that nobody writes there any more."""
    found: list[Path] = []
    for path in entries(folder):
        match = _NAME.match(path.name)
        with suppress(OSError):
            if match is None:
                continue
            if match["state"] == "replaced":
                left = (folder / match["name"]).is_dir() and listed_files(path) is not None
            else:
                left = _is_left(path, named=match["token"] is not None)
            found += [path] if left else []
    return found


def clear_left(folder: Path, *names: str) -> None:
    """Remove what killed processes have left of these names."""
    for path in leftovers(folder):
        if name_of(path) in names:
            # What cannot be removed does no harm but to take room.
            with suppress(OSError, CheckpointError):
                clear(path)


def clear(path: Path) -> list[Path]:
    """Remove one of the ``leftovers``; what of it stays. Raises OSError or CheckpointError where it cannot be."""
    replaced = stood_for(path)
    if replaced is not None:
        return settle(path, path.with_name(replaced))
    if _is_file(path):
        path.unlink(missing_ok=True)
    else:
        discard(path)
    return []


def _is_left(path: Path, named: bool) -> bool:
    """Whether nobody writes into what is called incomplete any more. ``named``: with a token, so nobody but us."""
    if _is_file(path):
        return named and _age(path) > _YOUNG
    if not _is_folder(path):
        return False
    mark = path / MARK
    if not _is_file(mark):
        # A save may be between its folder and its mark.
        others = [entry for entry in entries(path) if entry.name != _DRAFT]
        return not others and (not named or _age(path) > _YOUNG)
    if not is_abandoned(path):
        return False
    with suppress(OSError, ValueError, AttributeError):
        if json.loads(mark.read_text(encoding="utf-8")).get("host") == socket.gethostname():
            return True
    return all(_age(file) > _YOUNG for file in _walk(path))


# Whole outputs of the tools.


@contextmanager
def replacing(output: Path, kind: str, source: Path) -> Iterator[Path]:
    """A work folder that becomes ``output`` when the block ends, and is gone when it raises.

    Raises CheckpointError, before anything is written, unless ``output`` does not exist, is empty, or is what an
    earlier call of the same ``kind`` made and nobody has added to; or where it is ``source``, holds it or
    is inside it.
    """
    fix = "give a folder that does not exist"
    there, read = output.resolve(), source.resolve()
    if there == read or there in read.parents:
        raise CheckpointError(f"{output} holds the checkpoint that is read, and would be replaced", fix=fix)
    if read in there.parents:
        text = f"{output} is inside the checkpoint that is read, and would be part of it"
        raise CheckpointError(text, fix="give a folder outside of it")
    if os.path.lexists(output) and not _is_folder(output):
        raise CheckpointError(f"{output} is a link or a file", expected="a folder", fix=fix)
    lost = _not_of_kind(output, kind)
    if lost:
        names = ", ".join(str(p.relative_to(output)) for p in lost[:3])
        raise CheckpointError(
            f"{output} holds what would be lost",
            expected=f"nothing, or what a conversion to {kind} wrote",
            found=names + (f" and {len(lost) - 3} more" if len(lost) > 3 else ""),
            fix=fix,
        )
    with whole_or_nothing(output, lambda: begin(output)) as work:
        yield work
        files = [str(p.relative_to(work)) for p in _walk(work) if p.name != MARK]
        write_text(work / LISTING, json.dumps({"format": 1, "kind": kind, "files": files}, indent=1))
        sync_folder(work)
        publish(work, output)


def _not_of_kind(folder: Path, kind: str) -> list[Path]:
    """What in ``folder`` its list does not name; everything where it has none, or one of another ``kind``."""
    listed = listed_files(folder) or set()
    others = [path for path in _walk(folder) if str(path.relative_to(folder)) not in listed]
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((folder / LISTING).read_text(encoding="utf-8"))["kind"] == kind:
            return others
    return others or entries(folder)


# Looking without following links.


def _mode(path: Path) -> int:
    with suppress(OSError):
        return path.lstat().st_mode
    return 0


def _is_file(path: Path) -> bool:
    return stat.S_ISREG(_mode(path))


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(_mode(path))


def entries(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _walk(folder: Path) -> list[Path]:
    """Everything below ``folder`` that is no folder, and folders that are empty."""
    found: list[Path] = []
    for path in entries(folder):
        found += (_walk(path) or [path]) if _is_folder(path) else [path]
    return found


def _without_folder(folder: Path) -> list[Path]:
    """Remove an empty folder; [] or, where it is not, what is in it."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return []
    except OSError:
        return entries(folder) or [folder]
    return []


def _age(path: Path) -> float:
    """Seconds since ``path`` was changed; none for what is gone."""
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime
    return 0.0
