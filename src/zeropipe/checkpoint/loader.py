"""Loads: all ranks choose the same checkpoint, share the work of checking it, and each reads what it needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from zeropipe.checkpoint.reader import Reader
from zeropipe.checkpoint.save import tags
from zeropipe.checkpoint.save.files import THREADS, FileRecord, check_file
from zeropipe.checkpoint.save.records import LoadedState, LocalState, Manifest, read_manifest
from zeropipe.checkpoint.sources.data import Checkpoint
from zeropipe.checkpoint.sources.dcp import parse_dcp
from zeropipe.checkpoint.sources.deepspeed import parse_deepspeed
from zeropipe.checkpoint.sources.ours import parse_ours
from zeropipe.checkpoint.sources.parallel import Place, seen_from
from zeropipe.checkpoint.sources.universal import parse_universal
from zeropipe.comm.collectives import all_gather_object, broadcast_object
from zeropipe.comm.dcp import INDEX_NAME
from zeropipe.comm.group import SELF, Group
from zeropipe.errors import CheckpointError, describe


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
        # [1] Each rank opens it alone and raises nothing, or the others would wait in the gather.
        source, reader, error = _try(candidate, into, group, trust=trust, verify=verify)
        errors = [e for e in all_gather_object(error, group, label="checkpoint checked") if e]
        if errors:
            if choice.strict:
                raise CheckpointError(errors[0])
            notices.append(f"skipped {candidate.path}: {errors[0]}")
            continue
        # [2] All ranks can read it: from here on the engine's tensors are written.
        assert source is not None
        assert reader is not None
        return _fill(source, reader, into, group, notices, optimizer, moments), source
    if choice.candidates:
        raise CheckpointError(f"no checkpoint in {root} can be loaded: " + "; ".join(notices))
    return None


def nothing_there(folder: str | os.PathLike[str], tag: str | None) -> str:
    """The log line for a load that found nothing."""
    return "; ".join(tags.choose(Path(folder), tag).notices)


def _try(
    candidate: tags.Candidate, into: LocalState, group: Group, *, trust: bool, verify: bool
) -> tuple[Checkpoint | None, Reader | None, str]:
    """Open and check one candidate on this rank; the text of what is wrong with it, or ""."""
    rank = group.ranks[group.rank]
    try:
        manifest = read_manifest(candidate.path)
        if manifest is not None:
            _check_share(candidate.path, manifest, group, verify)
        order = [list(g.get("param_names") or ()) for g in into.param_groups]
        opened = open_folder(candidate.path, candidate.tag, trust=trust, order=order, unchecked=not verify)
        source = seen_from(opened, _place(into), into.model.universal_info)
        reader = Reader(source, into)
        reader.check_shapes()
        source.train_state(into.grid.rank)  # opens the files that hold it, so that refusals come now
        return source, reader, ""
    except CheckpointError as error:
        return None, None, f"[rank {rank}] {error}"
    except Exception as error:
        what = f"{candidate.path} cannot be read: {type(error).__name__}: {error}"
        return None, None, describe(what, rank=rank, fix="`zeropipe ckpt verify` says which file is at fault")


def _place(into: LocalState) -> Place:
    shapes = {name: tuple(tensor.shape) for name, tensor in into.model.tensors.items()}
    shapes |= {spec.name: spec.shape for flat in into.flats for spec in flat.layout.tensors}
    return Place(into.grid.tp_rank, into.grid.tp_degree, into.grid.pp_rank, shapes)


def _check_share(path: Path, manifest: Manifest, group: Group, verify: bool) -> None:
    """Sizes of all files on every rank; the bytes of each file on one, the largest spread first."""
    for record in manifest.files:
        try:
            size = (path / record.name).stat().st_size
        except OSError as error:
            raise CheckpointError(
                f"{path / record.name} is missing or cannot be read: {error.strerror}",
                fix="check that the whole checkpoint folder is visible from this machine",
            ) from error
        if size != record.bytes:
            raise CheckpointError(
                f"{path / record.name} is truncated", expected=f"{record.bytes} bytes", found=size
            )
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


def _fill(
    source: Checkpoint,
    reader: Reader,
    into: LocalState,
    group: Group,
    notices: list[str],
    optimizer: bool,
    moments: bool,
) -> LoadedState:
    error = ""
    filled = None
    try:
        filled = reader.fill(optimizer=optimizer, moments=moments)
    except Exception as reason:
        error = describe(
            f"reading {source.folder} failed half way: {type(reason).__name__}: {reason}",
            rank=group.ranks[group.rank],
            fix="the engine's state is mixed now: load another checkpoint before training on",
        )
    errors = [e for e in all_gather_object(error, group, label="checkpoint read") if e]
    if errors:
        raise CheckpointError(errors[0])
    assert filled is not None
    left_out = source.left_out()
    return LoadedState(
        path=str(source.folder),
        tag=source.tag,
        stage=source.stage,
        flats=filled.flats,
        param_groups=tuple(source.param_groups),
        train=source.train_state(into.grid.rank),
        missing=filled.missing,
        unexpected=filled.unexpected,
        notices=tuple(notices) + filled.notices + ((left_out,) if left_out else ()),
    )
