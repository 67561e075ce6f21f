"""Names that come from a file: the one check that a path made of them stays inside its folder.

Tensors, files and tags are named by whoever wrote a checkpoint. As part of a path ``../../x`` or ``/etc/x`` would
reach anything, so each such name goes through here before a path is made of it, for reading and for writing.
"""

from __future__ import annotations

from pathlib import Path

from zeropipe.errors import CheckpointError


def is_plain_word(name: object) -> bool:
    """Whether ``name`` is the name of one entry of a folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\\\0") & set(name)


def inside(folder: Path, name: object, what: str) -> Path:
    """``folder / name``, where ``name`` is plain words joined by ``/``. Raises CheckpointError for any other.

    ``what``: whose name it is, for the message.
    """
    if not isinstance(name, str) or not all(map(is_plain_word, name.split("/"))):
        raise CheckpointError(
            f"{what} would lead out of {folder}",
            expected="a name without '..', that does not begin with '/'",
            found=repr(name),
            fix="do not use this checkpoint: whoever wrote it may mean harm, or it is damaged",
        )
    return folder / name
