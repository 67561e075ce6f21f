"""Loads: all ranks choose the same checkpoint, share the work of checking it, and each reads what it needs.

    rank 0   tags.choose ---candidates--->
    all      open one, check sizes and a share of the sums, compare shapes; nothing is written yet
    all      hear of each other's errors: the next candidate, or on
    all      Reader.fill, into the engine's own tensors
    all      hear of each other's errors: from here on one leaves the engine's state mixed

One process alone (``open_source``) does the first two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from zeropipe.checkpoint.reader import Reader, wanted_shapes
from zeropipe.checkpoint.save import tags
from zeropipe.checkpoint.save.files import THREADS, FileRecord, check_file
from zeropipe.checkpoint.save.records import LoadedState, LocalState, Manifest, read_manifest
from zeropipe.checkpoint.sources import Checkpoint
from zeropipe.checkpoint.sources.dcp import parse_dcp
from zeropipe.checkpoint.sources.deepspeed import parse_deepspeed
from zeropipe.checkpoint.sources.ours import parse_ours
from zeropipe.checkpoint.sources.parallel import seen_from
from zeropipe.checkpoint.sources.universal import parse_universal
from zeropipe.comm.agreement import together
from zeropipe.comm.collectives import broadcast_object
from zeropipe.comm.dcp import INDEX_NAME
from zeropipe.comm.group import SELF, Group
from zeropipe.errors import CheckpointError


def open_source(
    folder: str | os.PathLike[str],
    tag: str | None = None,
    *,
    trust: bool = False,
    order: Sequence[Sequence[str]] = (),
) -> Checkpoint:
    """Open a checkpoint of ours, DeepSpeed's or torch's DCP for reading, in one process.

    ``folder`` may be a tag's folder itself. ``order``: names of the optimizer's parameters by group, which
    DeepSpeed's stage 0 files do not tell. Raises CheckpointError when there is none, or it cannot be read.
    """
    root = Path(folder)
    choice = tags.choose(root, tag)
    errors = list(choice.notices)
    for candidate in choice.candidates:
        try:
            return open_folder(candidate.path, candidate.tag, trust=trust, order=order)
        except CheckpointError as error:
            if choice.strict:
                raise
            errors.append(str(error))
    raise CheckpointError("; ".join(errors))


def open_folder(
    path: Path,
    tag: str,
    *,
    trust: bool = False,
    order: Sequence[Sequence[str]] = (),
    unchecked: bool = False,
) -> Checkpoint:
    """``unchecked``: read files of ours without their manifest."""
    # By what only one form has. DeepSpeed's comes last: the others have model files like its own.
    manifest = read_manifest(path)
    if manifest is not None:
        return parse_ours(path, manifest, trust=trust)
    if (path / "zero").is_dir():
        return parse_universal(path, tag, trust=trust)
    if (path / INDEX_NAME).exists():
        return parse_dcp(path, tag, trust=trust)
    return parse_deepspeed(path, tag, trust=trust, order=order, unchecked=unchecked)


def load(
    folder: str | os.PathLike[str],
    tag: str | None,
    into: LocalState,
    group: Group = SELF,
    *,
    optimizer: bool = True,
    moments: bool = True,
    verify: bool = True,
    trust: bool = False,
) -> tuple[LoadedState, Checkpoint] | None:
    """Fill ``into`` in place from the checkpoint; None where there is none (the reason is logged by the caller).

    Collective. Without a tag a damaged or incomplete checkpoint is passed over for the next newest one, and
    the notices say so. ``verify``: check the checksum of every file first, each file on one rank.
    Raises CheckpointError on every rank alike, naming file and rank, before anything is changed.
    """
    root = Path(folder)
    # It passes over what it cannot read: an error here would leave the other ranks waiting.
    choice = broadcast_object(tags.choose(root, tag) if group.rank == 0 else None, 0, group, label="tag")
    notices = list(choice.notices)
    for candidate in choice.candidates:
        look = partial(_opened, candidate, into, group, trust=trust, verify=verify)
        found, fault = read(str(candidate.path), look, into, group, optimizer=optimizer, moments=moments)
        if found is not None:
            loaded, source = found
            return replace(loaded, notices=(*notices, *loaded.notices)), source
        if choice.strict:
            raise CheckpointError(fault)
        notices.append(f"skipped {candidate.path}: {fault}")
    if choice.candidates:
        raise CheckpointError(f"no checkpoint in {root} can be loaded: " + "; ".join(notices))
    return None


def read(
    name: str,
    look: Callable[[], Checkpoint],
    into: LocalState,
    group: Group = SELF,
    *,
    optimizer: bool = True,
    moments: bool = True,
) -> tuple[tuple[LoadedState, Checkpoint] | None, str]:
    """Fill ``into`` in place from what ``look`` opens, called ``name`` in messages; None and why, if it cannot be read.

    Collective. Where one rank cannot, none does, and nothing is changed. Raises CheckpointError on every rank alike for
    a failure after that.
    """
    # [1] Looked at alone. A rank that cannot read it raises nothing yet.
    fix = "`zeropipe ckpt verify` says which file is at fault"
    looked = partial(_fitting, look, into)
    reader, errors = together(
        group, "checkpoint checked", looked, f"{name} cannot be read", fix, CheckpointError
    )
    if errors:
        return None, errors[0]
    # [2] All ranks can read it: from here on the engine's tensors are written.
    assert reader is not None
    fix = "the engine's state is mixed now: load another checkpoint before training on"
    fill = partial(reader.fill, optimizer=optimizer, moments=moments)
    loaded, errors = together(group, "checkpoint read", fill, f"reading {name} failed half way", fix)
    if errors:
        raise CheckpointError(errors[0])
    assert loaded is not None
    return (loaded, reader.source), ""


def nothing_there(folder: str | os.PathLike[str], tag: str | None) -> str:
    """The log line for a load that found nothing."""
    return "; ".join(tags.choose(Path(folder), tag).notices)


def _opened(
    candidate: tags.Candidate, into: LocalState, group: Group, *, trust: bool, verify: bool
) -> Checkpoint:
    """A candidate whose files are whole, as far as this rank checks them."""
    manifest = read_manifest(candidate.path)
    if manifest is not None:
        _check_share(candidate.path, manifest, group, verify)
    # DeepSpeed's stage 0 knows parameters by their position in the optimizer: this one's is as good as any.
    order = [list(g.get("param_names") or ()) for g in into.param_groups]
    return open_folder(candidate.path, candidate.tag, trust=trust, order=order, unchecked=not verify)


def _fitting(look: Callable[[], Checkpoint], into: LocalState) -> Reader:
    """A reader of what fits this rank, as far as one can tell without reading tensors."""
    shapes = wanted_shapes(into)
    reader = Reader(seen_from(look(), into.grid, into.model.universal_info, shapes), into)
    reader.check_shapes(shapes)
    # Opens the files that hold it, so that a refusal comes before anything is written.
    reader.source.train_state(into.grid.rank)
    return reader


def _check_share(path: Path, manifest: Manifest, group: Group, verify: bool) -> None:
    """Sizes of all files on every rank; the bytes of each file on one, the largest spread first."""
    # A size costs one look, so each rank sees for itself whether it sees the whole folder.
    for record in manifest.files:
        file = path / record.name
        try:
            size = file.stat().st_size
        except OSError as error:
            what = f"{file} is missing or cannot be read: {error.strerror}"
            fix = "check that the whole checkpoint folder is visible from this machine"
            raise CheckpointError(what, fix=fix) from error
        if size != record.bytes:
            raise CheckpointError(f"{file} is truncated", expected=f"{record.bytes} bytes", found=size)
    # A sum costs a read of the file: the largest first, each to whoever has least, so that all end together.
    if verify:
        load = [0] * group.size
        mine: list[FileRecord] = []
        for record in sorted(manifest.files, key=lambda r: (-r.bytes, r.name)):
            owner = load.index(min(load))
            load[owner] += record.bytes
            if owner == group.rank:
                mine.append(record)
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda record: check_file(path, record), mine))
