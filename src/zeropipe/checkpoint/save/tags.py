"""The folder of checkpoints: how a tag is begun and published in it, and how the one to load is found.

    .TAG.zeropipe-TOKEN.incomplete/  --manifest, sync-->  --rename-->  TAG/   then `latest`

A process may die between any two of these steps; whatever it leaves, the previous checkpoint can be read. Each save
has a work folder of its own, so it shares nothing with another run, or with an earlier save that still goes on.

    killed                        what a load finds                    what was left
    before the rename             the one before, by `latest`          a work folder that nobody holds
    what had the name is aside    it, under the name that it had       and that one
    after the rename              the new one, and by `latest` before  what had the name, beside it
    after `latest`                the new one                          nothing

The next save of the tag, or ``zeropipe ckpt prune``, removes what was left.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zeropipe.checkpoint.save import ownership
from zeropipe.checkpoint.save.files import Hold, check_room, replace_text, sync_folder, write_text
from zeropipe.checkpoint.save.records import MANIFEST_NAME, Manifest, read_manifest
from zeropipe.checkpoint.utils import SCRIPT, SCRIPT_NAME
from zeropipe.comm.dcp import INDEX_NAME
from zeropipe.errors import CheckpointError
from zeropipe.paths import is_plain_word

LATEST = "latest"
LATEST_UNIVERSAL = "latest_universal"
_MODELS = "model_states.pt"  # how the names of model and layer files end
_LONGEST = 200  # bytes; a save's work folder has a longer name
_RESERVED = frozenset({LATEST, LATEST_UNIVERSAL, SCRIPT_NAME})  # files beside the tags' folders

_log = logging.getLogger("zeropipe")


# Published.


def check_tag(tag: str) -> str:
    """Raises CheckpointError for a tag that would not be one folder inside the checkpoint's, and found again."""
    # A dot begins the names of what is not published, and `latest` is read without spaces around it.
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


def prepare(folder: Path, tag: str, save_latest: bool = True, nbytes: int = 0) -> tuple[Path, Hold]:
    """A new work folder for ``tag``, which is held; what earlier, killed saves of it left is removed.

    Raises OSError as it comes, CheckpointError where ``latest`` could not be moved in the end, or where there is no
    room for ``nbytes``.
    """
    latest = folder / LATEST
    if save_latest and (latest.is_symlink() or latest.is_dir()):
        raise CheckpointError(
            f"{latest} cannot name the checkpoint",
            expected="a file, or nothing",
            found="a link" if latest.is_symlink() else "a folder",
            fix="remove or rename it, or pass save_latest=False",
        )
    ownership.clear_left(folder, tag, LATEST, SCRIPT_NAME)
    check_room(folder, nbytes)
    return ownership.begin(folder / tag)


def commit(folder: Path, work: Path, manifest: Manifest, save_latest: bool) -> Path:
    """Publish ``work`` as the manifest's tag. Raises OSError as it comes; then the tag is what it was."""
    # The manifest last of all files: a folder that has one is whole.
    write_text(work / MANIFEST_NAME, manifest.to_text())
    sync_folder(work)
    final = folder / manifest.tag
    kept = ownership.publish(work, final)
    if kept:
        listed = ", ".join(map(str, kept[:3])) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
        _log.warning("what stood under the name of %s and is not zeropipe's is kept: %s", final, listed)
    # Whatever stands there is the user's, a link that leads nowhere too.
    script = folder / SCRIPT_NAME
    if not os.path.lexists(script):
        replace_text(script, SCRIPT)
    # After the rename: it never names what is not there.
    if save_latest:
        replace_text(folder / LATEST, manifest.tag)
    return final


# Found.


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


def choose(folder: Path, tag: str | None) -> Choice:
    """Which folders to try, best first; no candidate where there is nothing at all.

    Without a tag, ``folder`` may be a tag's folder itself, or one that torch's DCP wrote.
    """
    if tag is not None:
        found = _locate(folder, tag)
        missing = () if found else (f"there is no checkpoint {tag!r} in {folder}",)
        return Choice((found,) if found else (), missing, True)
    # [1] A tag's folder itself, as tools are given it.
    if is_checkpoint(folder):
        return Choice((Candidate(folder.name, folder),), (), True)
    # [2] What `latest` names, then all others: a load passes over what is damaged.
    notices: list[str] = []
    named = _text(folder / LATEST)
    first = None if named is None else _locate(folder, named)
    rest = [c for c, _ in _newest_first(folder, notices) if first is None or c.path != first.path]
    if named is None:
        notices.append(f"{folder} has no file {LATEST!r}" if rest else f"there is no checkpoint in {folder}")
    elif first is None:
        notices.insert(0, f"{folder / LATEST} names {named!r}, which is not there")
    return Choice((first, *rest) if first else tuple(rest), tuple(notices), False)


def _newest_first(folder: Path, notices: list[str]) -> list[tuple[Candidate, Manifest | None]]:
    """Every checkpoint in ``folder``, by its step and then by its time; damaged manifests are passed over.

    So are folders that this process may not read: they are no reason not to take the others.
    """
    found: list[tuple[int, float, Candidate, Manifest | None]] = []
    for path in ownership.entries(folder):
        tag = ownership.stood_for(path) if path.name.startswith(".") else path.name
        # What was set aside counts only where the new folder never came.
        if tag is None or (tag != path.name and os.path.lexists(folder / tag)) or not is_checkpoint(path):
            continue
        try:
            manifest = read_manifest(path)
            step = -1 if manifest is None else manifest.global_steps
            found.append((step, path.stat().st_mtime, Candidate(tag, path), manifest))
        except (CheckpointError, OSError) as error:
            notices.append(f"skipped {path}: {error}")
    found.sort(key=lambda item: item[:2], reverse=True)
    return [(candidate, manifest) for *_, candidate, manifest in found]


def ours(folder: Path) -> list[Candidate]:
    """The checkpoints that saves made in ``folder`` and that still have their names, newest first.

    Not those of other programs, not links, and not copies or renamed ones: somebody wanted to keep these.
    """
    return [
        candidate
        for candidate, manifest in _newest_first(folder, [])
        if manifest is not None and manifest.tag == candidate.path.name and not candidate.path.is_symlink()
    ]


def newest(folder: Path, keep: int) -> tuple[list[Candidate], list[Path]]:
    """The ``keep`` newest checkpoints that saves made in ``folder``, with those still in use, and the rest."""
    # Of checkpoints that saves made and that still have their names. Others do not count as newer ones.
    found = ours(folder)
    first = choose(folder, None).candidates[:1]
    # What `latest` names or a link beside the checkpoints points to somebody still uses.
    links = [path for path in folder.iterdir() if path.is_symlink()] if folder.is_dir() else []
    held = {path.resolve() for path in (*(c.path for c in first), *links)}
    kept = [c for number, c in enumerate(found) if number < keep or c.path.resolve() in held]
    return kept, [c.path for c in found if c not in kept]


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a folder of files as checkpoints have them; False where it cannot be read."""
    try:
        if not path.is_dir():
            return False
        names = [n for n in os.listdir(path) if n in (MANIFEST_NAME, INDEX_NAME) or n.endswith(_MODELS)]
        return any((path / name).is_file() for name in names)
    # A damaged name holds a zero or is too long for the file system; a folder may be another user's.
    except (OSError, ValueError):
        return False


def latest_universal(folder: Path) -> str | None:
    """The tag of the universal checkpoint made last, None where there is none."""
    return _text(folder / LATEST_UNIVERSAL)


def _text(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    return None


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
