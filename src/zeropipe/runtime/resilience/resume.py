"""Goes on from the newest good state that there is, in memory or on disk, and says which it was and why.

::

    all      heads of the pieces that lie on their host ------------> all choose alike: the newest moment of which every
                                                                      rank's piece lies somewhere
    all      check the sums of their share of the pieces there -----> the next older one where one does not match
    rank 0   the step of the newest checkpoint on disk -------------> disk, if that is newer
    all      read what they need, from memory as from files; where that does not fit the model, from disk
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from zeropipe.checkpoint.loader import nothing_there, read
from zeropipe.checkpoint.memory.pieces import Seal, fault_of, opened, unpack
from zeropipe.checkpoint.memory.shelf import Shelf
from zeropipe.checkpoint.memory.state import whole_of
from zeropipe.checkpoint.save import tags
from zeropipe.checkpoint.save.records import LoadedState, LocalState, Manifest, read_manifest
from zeropipe.checkpoint.sources import Checkpoint
from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import Group, with_words
from zeropipe.comm.messages import carry
from zeropipe.errors import ZeropipeError
from zeropipe.runtime.engine.checkpoints import Checkpoints
from zeropipe.runtime.resilience.copies import Copies

_log = logging.getLogger("zeropipe")


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: the same on every rank."""

    step: int  # optimizer steps that are done
    source: Literal["memory", "disk", "nothing"]
    why: str  # a sentence for the log: what was taken, and why nothing newer was
    client_state: dict[str, Any] = field(default_factory=dict)


def resume(
    checkpoints: Checkpoints,
    copies: Copies,
    folder: str | os.PathLike[str] | None = None,
    client_state: Mapping[str, Any] | None = None,
    *,
    trust: bool = False,
) -> Resumed:
    """See ``engine.resume``."""
    notes: list[str] = []
    found = _resume(checkpoints, copies, folder, client_state, trust, notes)
    if checkpoints.group.rank == 0:
        # What was lost on the way to a state is told; where all is as it should be, whoever asks hears of it.
        level = logging.INFO if found.source == "nothing" or len(notes) < 2 else logging.WARNING
        _log.log(level, "the run begins with step %d, from %s: %s", found.step, found.source, found.why)
    return found


def _resume(
    checkpoints: Checkpoints,
    copies: Copies,
    folder: str | os.PathLike[str] | None,
    client_state: Mapping[str, Any] | None,
    trust: bool,
    notes: list[str],
) -> Resumed:
    if client_state is not None:
        copies.keep(client_state)
    on_disk = None if folder is None else checkpoints.on_disk(folder, trust=trust)
    # [1] What is in memory.
    shelf = copies.shelf()
    moment = None if shelf is None else _newest(shelf, checkpoints.group, _step_of(folder), notes)
    if shelf is not None and moment is not None:
        there = _brought(moment, shelf, checkpoints.group, notes)
        back = checkpoints.restore(partial(_read, moment.step, there, notes)) if there else None
        if back is not None:
            notes.insert(0, f"every rank's copy of step {checkpoints.step} is whole in memory")
            return Resumed(checkpoints.step, "memory", "; ".join(notes), back[1])
    # [2] What is on disk.
    if folder is None or on_disk is None:
        notes.append("no folder was given")
        return Resumed(checkpoints.step, "nothing", "; ".join(notes))
    back = checkpoints.restore(on_disk)
    if back is None:
        notes.append(nothing_there(folder, None))
        return Resumed(checkpoints.step, "nothing", "; ".join(notes))
    notes.insert(0, f"the newest good checkpoint is {back[0]}")
    return Resumed(checkpoints.step, "disk", "; ".join(notes), back[1])


# Pieces in memory.


@dataclass(frozen=True, slots=True)
class _Piece:
    """Where a piece lies, and whose it is."""

    host: str
    path: Path
    seal: Seal

    @property
    def moment(self) -> tuple[int, str, int]:
        """Grows with time."""
        return self.seal.attempt, self.seal.token, self.seal.copy


@dataclass(frozen=True, slots=True)
class _Moment:
    """A state of which every rank's piece lies somewhere, whole."""

    hosts: Sequence[str]  # by rank
    pieces: Mapping[int, Sequence[_Piece]]  # by the rank that it is of; several where hosts keep copies
    step: int

    def nearest(self, rank: int, host: str) -> _Piece:
        """That of ``rank`` which lies on ``host``, or any."""
        return min(self.pieces[rank], key=lambda piece: (piece.host != host, piece.host, str(piece.path)))


def _newest(shelf: Shelf, group: Group, on_disk: int, notes: list[str]) -> _Moment | None:
    """The newest whole state in memory, unless the one ``on_disk`` (its step) is newer. Collective; alike on all."""
    told = [_Piece(shelf.host, path, seal) for path, seal in shelf.found()]
    everyone = all_gather_object((shelf.host, shelf.agent, on_disk, told), group, label="copies in memory")
    hosts = [host for host, *_ in everyone]
    on_disk = everyone[0][2]
    # Each rank of a host has seen the same.
    pieces = {(piece.host, piece.path): piece for *_, found in everyone for piece in found}
    # A run that is over may have had the same name: that one's agents are all gone.
    living = {
        piece.seal.token for _, agent, _, found in everyone for piece in found if piece.seal.agent == agent
    }
    moments: dict[tuple[int, str, int], list[_Piece]] = {}
    for piece in pieces.values():
        if piece.seal.token in living:
            moments.setdefault(piece.moment, []).append(piece)
    for _, together in sorted(moments.items(), reverse=True):
        step, world = together[0].seal.step, together[0].seal.world
        if step < on_disk:
            notes.append(f"what is in memory is of step {step}, which is older")
            return None
        by_rank = {rank: [p for p in together if p.seal.rank == rank] for rank in range(world)}
        lost = [rank for rank, found in by_rank.items() if not found]
        if not lost:
            # Its share of those on this host.
            here = [p for p in together if p.host == shelf.host]
            mates = [rank for rank, host in enumerate(hosts) if host == shelf.host]
            mine = here[mates.index(group.rank) :: len(mates)]
            faults = {(p.host, p.path): text for p in mine if (text := fault_of(p.path, p.seal))}
            for others in all_gather_object(faults, group, label="copies checked"):
                faults |= others
            by_rank = {
                rank: [p for p in found if (p.host, p.path) not in faults] for rank, found in by_rank.items()
            }
            lost = [rank for rank, found in by_rank.items() if not found]
            notes += [f"step {step}: {path.name} on {host}: {text}" for (host, path), text in faults.items()]
        if not lost:
            return _Moment(hosts, by_rank, step)
        notes.append(f"step {step} is not whole in memory: of {_ranks(lost)} of {world} nothing is left")
    if not moments:
        notes.append("no copies of this run are in memory")
    return None


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _brought(moment: _Moment, shelf: Shelf, group: Group, notes: list[str]) -> list[_Piece]:
    """Every rank's piece on this host; those that lie elsewhere travel, one after the other. Nothing, and a note, where
    that fails. Collective."""
    group = with_words(group)
    found = [moment.nearest(rank, shelf.host) for rank in sorted(moment.pieces)]
    fault = ""
    for host in dict.fromkeys(moment.hosts):
        for rank in sorted(moment.pieces):
            piece = moment.nearest(rank, host)
            if piece.host == host:
                continue
            # One rank of either host; all go through the same list, so that pairs meet in one order.
            giver, taker = moment.hosts.index(piece.host), moment.hosts.index(host)
            try:
                if group.rank == giver:
                    carry(group, sends=[(opened(piece.path, piece.seal.nbytes), taker)])
                if host == shelf.host:
                    slot = shelf.slot(piece.seal.token, rank, 2, copy=True)
                    found[rank] = replace(piece, host=host, path=slot.path)
                    if group.rank == taker:
                        shelf.open()
                        carry(group, receives=[(slot.begin(piece.seal.nbytes), giver)])
                        slot.end(piece.seal)
            except Exception as reason:
                fault = fault or f"a piece could not be brought here: {type(reason).__name__}: {reason}"
    faults = [text for text in all_gather_object(fault, group, label="copies brought") if text]
    notes += faults[:1]
    return [] if faults else found


def _read(
    step: int,
    there: Sequence[_Piece],
    notes: list[str],
    into: LocalState,
    group: Group,
    *,
    optimizer: bool,
    moments: bool,
) -> tuple[LoadedState, Checkpoint] | None:
    name = f"the copy of step {step} in memory"
    found, fault = read(name, partial(_whole, there), into, group, optimizer=optimizer, moments=moments)
    if found is None:
        notes.append(fault)
    return found


def _whole(there: Sequence[_Piece]) -> Checkpoint:
    parts: list[Manifest] = []
    trees: list[Mapping[str, Any]] = []
    for piece in there:
        part, tree = unpack(opened(piece.path, piece.seal.nbytes))
        parts.append(part)
        trees.append(tree)
    return whole_of(there[0].path.parent, parts, trees)


def _step_of(folder: str | os.PathLike[str] | None) -> int:
    """Of the checkpoint that a load would try first; -1 where there is none, or nobody can tell."""
    if folder is None:
        return -1
    try:
        candidate = next(iter(tags.choose(Path(folder), None).candidates), None)
        manifest = None if candidate is None else read_manifest(candidate.path)
        return -1 if manifest is None else manifest.global_steps
    except (ZeropipeError, OSError):
        return -1
