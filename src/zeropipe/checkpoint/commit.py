"""Makes a finished folder the checkpoint of its tag: manifest, rename, ``latest`` - in this order.

    .TAG.zeropipe-TOKEN.incomplete/  --manifest, sync-->  --rename-->  TAG/   then `latest`

A process may die between any two of these steps; whatever it leaves, the previous checkpoint can be read. Each save
has a work folder of its own, so it shares nothing with another run, or with an earlier save that still goes on.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from zeropipe.checkpoint import ownership, tags
from zeropipe.checkpoint.files import FileRecord, Hold, replace_text, sync_folder, write_text
from zeropipe.checkpoint.manifest import MANIFEST_NAME, Manifest, Part, join_flats
from zeropipe.checkpoint.state import LocalState
from zeropipe.checkpoint.utils import SCRIPT, SCRIPT_NAME
from zeropipe.errors import CheckpointError

_log = logging.getLogger("zeropipe")


def build_manifest(tag: str, local: LocalState, parts: Sequence[Part]) -> Manifest:
    """``local``: any rank's; only what all ranks share is taken from it."""
    parts = sorted(parts, key=lambda part: part.rank)
    files: dict[str, FileRecord] = {}
    for part in parts:
        for record in part.files:
            assert record.name not in files, f"two ranks have written {record.name}"
            files[record.name] = record
    tied: dict[str, str] = {}
    for part in parts:
        tied |= part.tied
    return Manifest(
        tag=tag,
        stage=local.stage,
        dtype=local.dtype,
        optimizer=local.optimizer_name,
        world=local.grid.world,
        degrees={"dp": local.grid.dp_degree, "tp": local.grid.tp_degree, "pp": local.grid.pp_degree},
        global_steps=local.train.global_steps,
        versions={"zeropipe": importlib.metadata.version("zeropipe"), "torch": torch.__version__},
        files=tuple(files.values()),
        module=tuple(entry for part in parts for entry in part.module),
        flats=join_flats(entry for part in parts for entry in part.flats),
        tied=tied,
        excluded=tuple(dict.fromkeys(name for part in parts for name in part.excluded)),
        rank_files=tuple(part.rank_file for part in parts),
    )


def prepare(folder: Path, tag: str, save_latest: bool = True) -> tuple[Path, Hold]:
    """A new work folder for ``tag``, which is held; what earlier, killed saves of it left is removed.

    Raises OSError as it comes, CheckpointError where ``latest`` could not be moved in the end.
    """
    latest = folder / tags.LATEST
    if save_latest and (latest.is_symlink() or latest.is_dir()):
        raise CheckpointError(
            f"{latest} cannot name the checkpoint",
            expected="a file, or nothing",
            found="a link" if latest.is_symlink() else "a folder",
            fix="remove or rename it, or pass save_latest=False",
        )
    for path in ownership.leftovers(folder):
        if tags.tag_of(path) in (tag, tags.LATEST, SCRIPT_NAME):
            with suppress(OSError, CheckpointError):  # it does no harm but to take room
                ownership.clear(path)
    return ownership.begin(folder / tag)


def commit(folder: Path, tag: str, work: Path, manifest: Manifest, save_latest: bool) -> Path:
    """Publish ``work`` as ``tag``. Raises OSError as it comes; then the tag is what it was."""
    write_text(work / MANIFEST_NAME, manifest.to_text())
    sync_folder(work)
    final = folder / tag
    kept = ownership.publish(work, final)
    if kept:
        listed = ", ".join(map(str, kept[:3])) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
        _log.warning("what stood under the name of %s and is not zeropipe's is kept: %s", final, listed)
    script = folder / SCRIPT_NAME
    if not os.path.lexists(script):
        replace_text(script, SCRIPT)
    if save_latest:
        replace_text(folder / tags.LATEST, tag)
    return final
