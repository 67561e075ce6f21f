"""Finds the checkpoint to load: the one asked for, the one that ``latest`` names, or the newest complete one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zeropipe.checkpoint import ownership
from zeropipe.checkpoint.manifest import MANIFEST_NAME, read_manifest
from zeropipe.checkpoint.utils import SCRIPT_NAME
from zeropipe.comm.dcp import INDEX_NAME
from zeropipe.errors import CheckpointError
from zeropipe.paths import is_plain_word

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
_RESERVED = frozenset({LATEST, LATEST_UNIVERSAL, SCRIPT_NAME})  # files beside the tags' folders
_MODELS = "model_states.pt"  # how the names of model and layer files end
_LONGEST = 200  # bytes; a save's work folder has a longer name


@dataclass(frozen=True, slots=True)
class Candidate:
    tag: str
    path: Path


@dataclass(frozen=True, slots=True)
class Choice:
    """Folders to try in turn. ``strict``: the caller named the tag, so nothing else will do."""

    candidates: tuple[Candidate, ...]
    notices: tuple[str, ...]
    strict: bool


def check_tag(tag: str) -> str:
    """Raises CheckpointError for a tag that would not be one folder inside the checkpoint's, and found again."""
    if (
        not is_plain_word(tag)
        or tag in _RESERVED
        or tag[0] == "."
        or tag != tag.strip()
        or not tag.isprintable()
        or len(os.fsencode(tag)) > _LONGEST
    ):
        raise CheckpointError(
            "the checkpoint's tag cannot be used",
            expected=f"a plain folder name of at most {_LONGEST} bytes that does not start with a dot",
            found=repr(tag),
            fix="use letters, digits, '_', '-' and '.'",
        )
    return tag


def tag_of(path: Path) -> str:
    """The tag in the name of a folder that a save wrote into or set aside; "" for other names."""
    return ownership.name_of(path) or ""


def leftovers(folder: Path) -> list[Path]:
    """What killed saves have left: nothing reads it and nobody writes in it."""
    return ownership.leftovers(folder)


def choose(folder: Path, tag: str | None) -> Choice:
    """Which folders to try, best first; no candidate where there is nothing at all.

    Without a tag, ``folder`` may be a tag's folder itself, or one that torch's DCP wrote.
    """
    if tag is not None:
        found = _locate(folder, tag)
        missing = () if found else (f"there is no checkpoint {tag!r} in {folder}",)
        return Choice((found,) if found else (), missing, True)
    if is_checkpoint(folder):
        return Choice((Candidate(folder.name, folder),), (), True)
    notices: list[str] = []
    named = _latest(folder)
    first = None
    if named is not None:
        first = _locate(folder, named)
        if first is None:
            notices.append(f"{folder / LATEST} names {named!r}, which is not there")
    rest = [c for c in newest_first(folder, notices) if first is None or c.path != first.path]
    if named is None and rest:
        notices.append(f"{folder} has no file {LATEST!r}")
    elif named is None:
        notices.append(f"there is no checkpoint in {folder}")
    return Choice((first, *rest) if first else tuple(rest), tuple(notices), False)


def newest_first(folder: Path, notices: list[str] | None = None) -> list[Candidate]:
    """Every checkpoint in ``folder``, by its step and then by its time; damaged manifests are passed over.

    So are folders that this process may not read: they are no reason not to take the others.
    """
    found: list[tuple[int, float, Candidate]] = []
    for candidate in _all(folder):
        try:
            manifest = read_manifest(candidate.path)
            step = -1 if manifest is None else manifest.global_steps
            found.append((step, candidate.path.stat().st_mtime, candidate))
        except (CheckpointError, OSError) as error:
            if notices is not None:
                notices.append(f"skipped {candidate.path}: {error}")
    return [c for _, _, c in sorted(found, key=lambda item: item[:2], reverse=True)]


def ours(folder: Path) -> list[Candidate]:
    """The checkpoints that saves made in ``folder`` and that still have their names, newest first.

    Not those of other programs, not links, and not copies or renamed ones: somebody wanted to keep these.
    """
    found: list[tuple[int, float, Candidate]] = []
    for candidate in _all(folder):
        with suppress(CheckpointError, OSError):
            manifest = None if candidate.path.is_symlink() else read_manifest(candidate.path)
            if manifest is not None and manifest.tag == candidate.path.name:
                found.append((manifest.global_steps, candidate.path.stat().st_mtime, candidate))
    return [c for _, _, c in sorted(found, key=lambda item: item[:2], reverse=True)]


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a folder of files as checkpoints have them; False where it cannot be read."""
    try:
        if not path.is_dir():
            return False
        names = [n for n in os.listdir(path) if n in (MANIFEST_NAME, INDEX_NAME) or n.endswith(_MODELS)]
        return any((path / name).is_file() for name in names)
    except (OSError, ValueError):  # a damaged name holds a zero or is too long for the file system
        return False


def latest_universal(folder: Path) -> str | None:
    """The tag of the universal checkpoint made last, None where there is none."""
    return _latest(folder, LATEST_UNIVERSAL)


def _latest(folder: Path, name: str = LATEST) -> str | None:
    try:
        text = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return text or None


def _locate(folder: Path, tag: str) -> Candidate | None:
    """The folder of ``tag``, or the one that had the name when a save was killed between its two renames."""
    if not is_plain_word(tag):
        return None
    with suppress(OSError):  # a damaged name may be too long for the file system
        if (folder / tag).is_dir():
            return Candidate(tag, folder / tag)
        for path in ownership.asides(folder / tag):
            if is_checkpoint(path):
                return Candidate(tag, path)
    return None


def _all(folder: Path) -> Iterator[Candidate]:
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        return
    for path in paths:
        if not path.name.startswith("."):
            if is_checkpoint(path):
                yield Candidate(path.name, path)
            continue
        tag = ownership.stood_for(path)
        if tag is not None and not os.path.lexists(folder / tag) and is_checkpoint(path):
            yield Candidate(tag, path)
