"""Checks a checkpoint byte for byte against its manifest, and finds every fault rather than the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from zeropipe.checkpoint.save.files import check_file, load_torch
from zeropipe.checkpoint.save.ownership import MARK
from zeropipe.checkpoint.save.records import MANIFEST_NAME, read_manifest
from zeropipe.checkpoint.sources.deepspeed import lacks_manifest
from zeropipe.comm.dcp import INDEX_NAME, read_chunk, read_index
from zeropipe.errors import CheckpointError


class FileState(Enum):
    WHOLE = "whole"
    DAMAGED = "damaged"
    MISSING = "missing"
    EXTRA = "not in the manifest"
    UNCHECKED = "opens; no checksum to check against"


@dataclass(frozen=True, slots=True)
class Finding:
    file: str
    bytes: int
    state: FileState
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.state in (FileState.WHOLE, FileState.UNCHECKED)


def verify(folder: Path, progress: Callable[[int], None] = lambda done: None) -> list[Finding]:
    """One finding per file of a tag's folder. ``progress`` gets the bytes of each file done.

    Without a manifest (files of DeepSpeed, of torch's DCP) each file is opened, which finds truncation but not
    flipped bytes.
    """
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [Finding(MANIFEST_NAME, _size(folder / MANIFEST_NAME), FileState.DAMAGED, str(error))]
    if manifest is None:
        lost = [Finding(MANIFEST_NAME, 0, FileState.MISSING)] if lacks_manifest(folder) else []
        chunks = _chunks(folder, progress) if (folder / INDEX_NAME).exists() else []
        return lost + chunks + [_open(path, progress) for path in sorted(folder.glob("**/*.pt"))]
    findings = [Finding(MANIFEST_NAME, _size(folder / MANIFEST_NAME), FileState.WHOLE)]
    for record in manifest.files:
        path = folder / record.name
        try:
            check_file(folder, record)
            findings.append(Finding(record.name, record.bytes, FileState.WHOLE))
        except CheckpointError as error:
            state = FileState.DAMAGED if path.exists() else FileState.MISSING
            findings.append(Finding(record.name, _size(path), state, str(error)))
        progress(record.bytes)
    # A stray file harms no load, but whoever looks for the fault wants to know of it.
    known = {record.name for record in manifest.files} | {MANIFEST_NAME, MARK}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            findings.append(Finding(path.name, _size(path), FileState.EXTRA))
    return findings


def _open(path: Path, progress: Callable[[int], None]) -> Finding:
    try:
        load_torch(path)
        finding = Finding(path.name, _size(path), FileState.UNCHECKED)
    except CheckpointError as error:
        finding = Finding(path.name, _size(path), FileState.DAMAGED, str(error))
    progress(finding.bytes)
    return finding


def _chunks(folder: Path, progress: Callable[[int], None]) -> list[Finding]:
    """DCP: every chunk that the index names is read."""
    try:
        index = read_index(folder)
    except CheckpointError as error:
        return [Finding(INDEX_NAME, _size(folder / INDEX_NAME), FileState.DAMAGED, str(error))]
    faults: dict[str, str] = {chunk.file: "" for stored in index.values() for chunk in stored.chunks}
    for stored in index.values():
        for chunk in stored.chunks:
            try:
                read_chunk(folder, chunk)
            except CheckpointError as error:
                faults[chunk.file] = faults[chunk.file] or str(error)
            progress(chunk.length)
    found = [Finding(INDEX_NAME, _size(folder / INDEX_NAME), FileState.UNCHECKED)]
    for file, fault in sorted(faults.items()):
        lost = FileState.DAMAGED if (folder / file).exists() else FileState.MISSING
        found.append(Finding(file, _size(folder / file), lost if fault else FileState.UNCHECKED, fault))
    return found


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
