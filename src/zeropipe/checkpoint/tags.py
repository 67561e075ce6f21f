"""Finds the checkpoint to load: the one asked for, the one that ``latest`` names, or the newest complete one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zeropipe.checkpoint.manifest import MANIFEST_NAME, read_manifest
from zeropipe.comm.dcp import INDEX_NAME
from zeropipe.errors import CheckpointError, describe

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
_INCOMPLETE = ".incomplete"
_REPLACED = ".replaced"


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
    """Raises CheckpointError for a tag that would not be one folder inside the checkpoint's."""
    if not tag or tag in (".", "..", LATEST) or "/" in tag or os.sep in tag or "\0" in tag or tag[0] == ".":
        raise CheckpointError(
            describe(
                "the checkpoint's tag cannot be used",
                expected="a plain folder name that does not start with a dot",
                found=repr(tag),
                fix="use letters, digits, '_', '-' and '.'",
            )
        )
    return tag


def work_folder(folder: Path, tag: str) -> Path:
    """Where a save writes until it is complete; the dot hides it from ``global_step*``."""
    return folder / f".{tag}{_INCOMPLETE}"


def aside_folder(folder: Path, tag: str) -> Path:
    """Where an older checkpoint of the same tag stands while the new one takes its name."""
    return folder / f".{tag}{_REPLACED}"


def leftovers(folder: Path) -> list[Path]:
    """What killed saves have left: nothing reads it."""
    asides = [p for p in folder.glob(f".*{_REPLACED}") if (folder / p.name[1 : -len(_REPLACED)]).exists()]
    return sorted([*(p for p in folder.glob(f".*{_INCOMPLETE}") if p.is_dir()), *asides])


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
    """Every checkpoint in ``folder``, by its step and then by its time; damaged manifests are passed over."""
    found: list[tuple[int, float, Candidate]] = []
    for candidate in _all(folder):
        step = -1
        try:
            manifest = read_manifest(candidate.path)
            if manifest is not None:
                step = manifest.global_steps
        except CheckpointError as error:
            if notices is not None:
                notices.append(f"skipped {candidate.path}: {error}")
            continue
        found.append((step, candidate.path.stat().st_mtime, candidate))
    return [c for _, _, c in sorted(found, key=lambda item: item[:2], reverse=True)]


def is_checkpoint(path: Path) -> bool:
    return path.is_dir() and (
        (path / MANIFEST_NAME).exists()
        or any(path.glob("*_model_states.pt"))
        or any(path.glob("*-model_states.pt"))
        or (path / "zero").is_dir()
        or (path / INDEX_NAME).exists()
    )


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
    if "/" in tag or "\0" in tag or tag in (".", ".."):
        return None
    for path in (folder / tag, aside_folder(folder, tag)):
        try:
            if path.is_dir():
                return Candidate(tag, path)
        except OSError:  # a damaged name may be too long for the file system
            return None
    return None


def _all(folder: Path) -> Iterator[Candidate]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith("."):
            tag = path.name[1 : -len(_REPLACED)]
            if path.name.endswith(_REPLACED) and not (folder / tag).exists() and is_checkpoint(path):
                yield Candidate(tag, path)
        elif is_checkpoint(path):
            yield Candidate(path.name, path)
