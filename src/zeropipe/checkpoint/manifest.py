"""The manifest: what a checkpoint holds and where, as JSON beside the tensors, so that no reader ever guesses.

It is written last inside the folder and carries its own checksum; a folder without a whole manifest is not a
complete checkpoint of ours.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zeropipe.checkpoint.files import FileRecord, checksum_text, missing_text
from zeropipe.errors import CheckpointError
from zeropipe.frozen import from_json, to_json
from zeropipe.layout.flat import FlatShards
from zeropipe.paths import inside

MANIFEST_NAME = "zeropipe_manifest.json"
FORMAT = 1
_BLANK = checksum_text(0)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of the module as one model-parallel rank holds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str  # "param", "frozen", "buffer" or "computed" (by a hook)
    file: str
    mp_rank: int = 0


@dataclass(frozen=True, slots=True)
class FlatEntry:
    """One flat layout: what is stored for it and in which file each shard is."""

    name: str
    mp_rank: int
    group_index: int
    layout: FlatShards
    keys: dict[str, str]  # "fp32", "exp_avg", ... -> dtype
    scalars: dict[str, Any]  # plain values
    files: tuple[str, ...]  # by shard; "" where nobody has reported it yet


@dataclass(frozen=True, slots=True)
class Manifest:
    """``degrees``: sizes of the axes, ``{"dp": 2, "tp": 1, "pp": 1}``. ``versions``: of the writers."""

    tag: str
    stage: int
    dtype: str
    optimizer: str
    world: int
    degrees: dict[str, int]
    global_steps: int
    versions: dict[str, str]
    rank_files: tuple[str, ...]  # by rank: where its RNG and data position are
    tied: dict[str, str]
    excluded: tuple[str, ...]
    files: tuple[FileRecord, ...]
    module: tuple[TensorEntry, ...]
    flats: tuple[FlatEntry, ...]

    def to_text(self) -> str:
        said = to_json(self)
        # By name, and before what the ranks say: the order that the format has had from its first version on.
        files = {record.pop("name"): record for record in said.pop("files")}
        items = [("format", FORMAT), *said.items(), ("checksum", _BLANK)]
        items.insert([name for name, _ in items].index("rank_files"), ("files", files))
        text = json.dumps(dict(items), indent=1)
        return text.replace(_own(_BLANK), _own(checksum_text(zlib.crc32(text.encode()))))

    def check_names(self, folder: Path) -> None:
        """Raises CheckpointError for a file that would be outside of ``folder``, or that nothing checks."""
        known = {record.name for record in self.files}
        for name in known:
            inside(folder, name, "a file of the manifest")
        used = {entry.file for entry in self.module} | set(self.rank_files)
        used |= {file for flat in self.flats for file in flat.files}
        if used - known:
            raise ValueError(f"it has no size and checksum for {min(used - known)!r}")

    @classmethod
    def from_text(cls, text: str, path: Path) -> Manifest:
        """Raises CheckpointError when the text is not, to the byte, what ``to_text`` gave, or is newer than us."""
        try:
            data = json.loads(text)
            found = data["checksum"]
            # The checksum is of the text with a blank in its own place.
            blank = text.replace(_own(found), _own(_BLANK))
            if checksum_text(zlib.crc32(blank.encode())) != found:
                raise ValueError("its checksum does not match")
            if data["format"] > FORMAT:
                raise CheckpointError(
                    f"{path} was written by a newer zeropipe ({data['versions'].get('zeropipe')})",
                    expected=f"format {FORMAT} or older",
                    found=data["format"],
                    fix="update zeropipe",
                )
            records = [{"name": name, **record} for name, record in data["files"].items()]
            manifest: Manifest = from_json(cls, data | {"files": records})
            manifest.check_names(path.parent)
            return manifest
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: {error}",
                fix="use an earlier checkpoint, or copy this one again from where it is whole",
            ) from error


def _own(checksum: str) -> str:
    return f'"checksum": "{checksum}"\n}}'


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest, None where it has none. Raises CheckpointError when it is damaged.

    As bytes: reading text would take other ends of lines for the same.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.from_text(path.read_bytes().decode("utf-8"), path)
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}", fix="use an earlier checkpoint") from error
    except OSError as error:
        raise CheckpointError(missing_text(path, error)) from error


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank contributes to the manifest."""

    rank: int
    files: tuple[FileRecord, ...]
    module: tuple[TensorEntry, ...]
    flats: tuple[FlatEntry, ...]
    tied: dict[str, str]
    excluded: tuple[str, ...]
    rank_file: str


def join_flats(parts: Iterable[FlatEntry]) -> tuple[FlatEntry, ...]:
    """One entry per flat out of those that each rank gave for its own shard.

    Raises CheckpointError when a shard is in no file.
    """
    joined: dict[tuple[int, str], FlatEntry] = {}
    for entry in parts:
        key = (entry.mp_rank, entry.name)
        before = joined.get(key)
        if before is None:
            joined[key] = entry
            continue
        # Each rank names the files of the shards that it has written.
        files = tuple(a or b for a, b in zip(before.files, entry.files, strict=True))
        joined[key] = replace(before, files=files)
    for entry in joined.values():
        if "" in entry.files:
            raise CheckpointError(
                f"no rank has written shard {entry.files.index('')} of {entry.name}",
                expected=f"{entry.layout.num_shards} shards",
                found=len([f for f in entry.files if f]),
                fix="every rank must call save_checkpoint",
            )
    return tuple(joined.values())
