"""Makes a finished folder the checkpoint of its tag: manifest, rename, ``latest`` - in this order.

    .TAG.incomplete/  --manifest, sync-->  --rename-->  TAG/   then `latest`

A process may die between any two of these steps; whatever it leaves, the previous checkpoint can be read.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from zeropipe.checkpoint import tags
from zeropipe.checkpoint.files import FileRecord, replace_text, sync_folder, write_text
from zeropipe.checkpoint.manifest import MANIFEST_NAME, Manifest, Part, join_flats
from zeropipe.checkpoint.script import SCRIPT, SCRIPT_NAME
from zeropipe.checkpoint.state import LocalState


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


def prepare(folder: Path, tag: str) -> Path:
    """An empty work folder for ``tag``; what an earlier, killed save of it left is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    work = tags.work_folder(folder, tag)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return work


def commit(folder: Path, tag: str, manifest: Manifest, save_latest: bool) -> Path:
    """Publish the work folder of ``tag``. Raises OSError as it comes; then the tag is what it was."""
    work, final, aside = tags.work_folder(folder, tag), folder / tag, tags.aside_folder(folder, tag)
    write_text(work / MANIFEST_NAME, manifest.to_text())
    sync_folder(work)
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(final, aside)
    try:
        os.rename(work, final)
    except OSError:
        if aside.exists() and not final.exists():
            os.rename(aside, final)
        raise
    sync_folder(folder)
    shutil.rmtree(aside, ignore_errors=True)
    script = folder / SCRIPT_NAME
    if not script.exists() or script.read_text(encoding="utf-8", errors="replace") != SCRIPT:
        replace_text(script, SCRIPT)
    if save_latest:
        replace_text(folder / tags.LATEST, tag)
    return final
