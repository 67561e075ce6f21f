"""Checks a checkpoint byte for byte against its manifest, and finds every fault rather than the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

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
        return [_finding(folder / MANIFEST_NAME, FileState.DAMAGED, str(error))]
    if manifest is None:
        # Our files say themselves that there was a manifest; those of others never had one.
        findings = [_finding(folder / MANIFEST_NAME, FileState.MISSING)] if lacks_manifest(folder) else []
        if (folder / INDEX_NAME).exists():
            findings += _of_chunks(folder, progress)
        for path in sorted(folder.glob("**/*.pt")):
            findings.append(_checked(path, FileState.UNCHECKED, partial(load_torch, path)))
            progress(findings[-1].bytes)
        return findings
    # It carries its own checksum, so that it was read says that it is whole.
    findings = [_finding(folder / MANIFEST_NAME, FileState.WHOLE)]
    for record in manifest.files:
        findings.append(_checked(folder / record.name, FileState.WHOLE, partial(check_file, folder, record)))
        progress(record.bytes)
    # A stray file harms no load, but whoever looks for the fault wants to know of it.
    known = {record.name for record in manifest.files} | {MANIFEST_NAME, MARK}
    strays = [path for path in sorted(folder.iterdir()) if path.name not in known]
    return findings + [_finding(path, FileState.EXTRA) for path in strays]


def _finding(path: Path, state: FileState, detail: str = "") -> Finding:
    return Finding(path.name, path.stat().st_size if path.is_file() else 0, state, detail)


def _checked(path: Path, good: FileState, check: Callable[[], Any]) -> Finding:
    try:
        check()
    except CheckpointError as error:
        return _finding(path, FileState.DAMAGED if path.exists() else FileState.MISSING, str(error))
    return _finding(path, good)


def _of_chunks(folder: Path, progress: Callable[[int], None]) -> list[Finding]:
    """DCP: every chunk that the index names is read."""
    try:
        chunks = [chunk for stored in read_index(folder).values() for chunk in stored.chunks]
    except CheckpointError as error:
        return [_finding(folder / INDEX_NAME, FileState.DAMAGED, str(error))]
    found = {chunk.file: Finding(chunk.file, 0, FileState.UNCHECKED) for chunk in chunks}
    for chunk in chunks:
        # The first fault of a file is the one to tell.
        if found[chunk.file].good:
            read = partial(read_chunk, folder, chunk)
            looked = _checked(folder / chunk.file, FileState.UNCHECKED, read)
            found[chunk.file] = replace(looked, file=chunk.file)
        progress(chunk.length)
    index = _finding(folder / INDEX_NAME, FileState.UNCHECKED)
    return [index, *(finding for _, finding in sorted(found.items()))]
