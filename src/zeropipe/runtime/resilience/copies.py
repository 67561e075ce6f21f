"""Copies of the last good steps in memory that outlasts the process, made while the next step computes.

::

    step 7         | forward, backward            | step 8            | forward, backward
    boundary: take   copy in a thread        settle                take
    slot 0           [########### 7 #######] seal                    7               7
    slot 1            6 (whole)                                      [######### 8 ####...

The optimizer's state changes in a step alone, so a thread may copy it until the next one begins (``settle``). What a
program can write to in between (parameters, buffers, and masters that are parameters) is copied before ``step``
returns; and if something else was written meanwhile, which version counters tell, the piece gets no head, and from
then on all is copied at once. Two slots: a rank that dies among its copies leaves the step before whole.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from zeropipe.checkpoint.memory.pieces import Packed, Seal, Slot, pack
from zeropipe.checkpoint.memory.shelf import SHARED, Shelf, command, host_of
from zeropipe.checkpoint.memory.state import share_of
from zeropipe.checkpoint.save.records import LocalState
from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import with_words
from zeropipe.errors import UsageError, describe
from zeropipe.runtime.engine.checkpoints import Checkpoints
from zeropipe.runtime.engine.parts import Parts
from zeropipe.runtime.engine.state import local_state
from zeropipe.runtime.optimizers.shard_view import Communicates
from zeropipe.runtime.resilience.guests import Guests, keepers

_log = logging.getLogger("zeropipe")
_PATIENCE = 5.0  # s at the end of a run, for a piece on its way to another host


class Engines:
    """The engines of this process that keep copies, and what is left to do for them when it ends."""

    def __init__(self) -> None:
        self._taken: set[int] = set()
        self._endings: dict[str, Callable[[], None]] = {}  # by token
        self._process = 0

    @property
    def free(self) -> int:
        """The first number that is free: a process that was started anew so finds what its predecessor kept."""
        return next(n for n in range(len(self._taken) + 1) if n not in self._taken)

    def take(self, number: int, engine: object) -> None:
        """It is free again when ``engine`` is gone."""
        self._taken.add(number)
        weakref.finalize(engine, self._taken.discard, number)

    def at_end(self, token: str, ending: Callable[[], None]) -> None:
        """Have ``ending`` called when the process ends well. It keeps no engine alive."""
        if self._process != os.getpid():  # of a parent's engines the parent takes care
            self._process, self._endings = os.getpid(), {}
            atexit.register(self._end)
        self._endings[token] = ending

    def end(self, token: str) -> None:
        """Call it now."""
        ending = self.forget(token)
        if ending is not None:
            ending()

    def forget(self, token: str) -> Callable[[], None] | None:
        """Never call it."""
        return self._endings.pop(token, None)

    def _end(self) -> None:
        # Where an error ends the process, the one that is started in its place goes on from what is there.
        if self._process == os.getpid() and getattr(sys, "last_value", None) is None:
            for token in list(self._endings):
                self.end(token)


ENGINES = Engines()


@dataclass(frozen=True, slots=True)
class _Life:
    """What all ranks have agreed on before the first copy, and where this one's lie."""

    shelf: Shelf
    attempt: int
    token: str
    slots: tuple[Slot, Slot]
    guests: Guests


@dataclass(frozen=True, slots=True)
class _Copy:
    """One that is under way."""

    slot: Slot
    memory: torch.Tensor
    packed: Packed
    stays: frozenset[int]  # memory that a thread copies
    versions: list[tuple[torch.Tensor, int]]  # of what lies there, when the step ended
    seal: Seal


class Copies:
    """The copies of one engine, on this rank. Every rank of the group that saves together makes the same calls."""

    def __init__(self, parts: Parts, checkpoints: Checkpoints) -> None:
        self._parts, self._group = parts, checkpoints.group
        checkpoints.serve(settle=self.settle)
        self._every = parts.config.checkpoint.memory.every
        self._client_state: Mapping[str, Any] = {}

        # Where they lie, once it is asked for.
        self._wanted = self._every > 0 and not self._group.imagined
        self._shelf: Shelf | None = None
        self._token = ""  # of this life's pieces; the same on all ranks

        # From the first copy on.
        self._life: _Life | None = None
        self._copies = 0
        self._free = 0  # the slot that does not hold the newest piece

        # The copy under way, if there is one.
        self._thread: threading.Thread | None = None
        self._failure = ""
        self._at_once = False  # a program has written to what was being copied
        self._told: set[str] = set()

    def shelf(self) -> Shelf | None:
        """Where copies lie; None where none are kept. Collective the first time."""
        if self._wanted and self._shelf is None:
            # Which engine of a process this is all ranks must say alike, and one may not have let go of another yet.
            # Launchers give ranks other words: those of the first count for all.
            root = Path(self._parts.config.checkpoint.memory.folder or SHARED)
            mine = ENGINES.free, command(), secrets.token_hex(6), host_of(root)
            told = all_gather_object(mine, self._group, label="copies of which engine")
            number, (_, asked, self._token, _) = max(free for free, *_ in told), told[0]
            ENGINES.take(number, self)
            shelf = self._shelf = Shelf(root, number, asked)
            # From here on: a life that has nothing left to do makes no copy, and those before it have left theirs.
            token, rank, neighbours = self._token, self._group.rank, [h for *_, h in told].count(shelf.host)
            ENGINES.at_end(token, lambda: shelf.end(token, rank, neighbours))
        return self._shelf if self._wanted else None

    def keep(self, client_state: Mapping[str, Any]) -> None:
        """Have copies hold what ``client_state`` is when ``step`` returns."""
        self._client_state = client_state

    # At boundaries.

    def take(self) -> None:
        """After a step: copy the state as it is now, in part behind. Collective the first time.

        Raises UsageError, on every rank alike and once, where the copies have no room.
        """
        if not self._wanted or self._parts.clock.global_steps % self._every:
            return
        self.settle()
        packed, stays = None, frozenset[int]()
        try:
            if self._parts.optimizer is not None:  # as a checkpoint does
                self._parts.optimizer.take_edits()
            local = local_state(self._parts, self._client_state)
            base = None if self._parts.optimizer is None else self._parts.optimizer.optimizer
            packed = pack(share_of(local, replicas_agree=not isinstance(base, Communicates)))
            stays = frozenset() if self._at_once else _own_memory(local, self._parts.module)
        except Exception as reason:  # a state hook of the program
            self._failure = f"{type(reason).__name__}: {reason}"
        self._copies += 1
        shelf = self.shelf()
        if self._life is None and shelf is not None:
            self._begin(shelf, 0 if packed is None else packed.nbytes)
        if self._life is not None:
            self._copy(self._life, packed, stays)
        self._tell()

    def settle(self) -> None:
        """The copy under way is made; for whoever is about to change the state."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
            self._tell()

    def outlive(self) -> int:
        """This process ends and the run goes on: what it has kept stays. The step of that, 0 where there is none."""
        self.settle()
        ENGINES.forget(self._token)
        step = self._parts.clock.global_steps
        return 0 if self._life is None else step - step % self._every

    def close(self) -> None:
        """The engine is destroyed; may be called again."""
        self.settle()
        # In a ``finally`` that an error passes the run has not come to its end well: how the process ends decides.
        if sys.exc_info()[0] is None:
            ENGINES.end(self._token)
        self._stop()

    # What they are made of.

    def _begin(self, shelf: Shelf, nbytes: int) -> None:
        """All ranks agree on whose copies these are, and on whether there is room."""
        group, fault, last = self._group, "", 0
        try:
            shelf.open()
            last = max((seal.attempt for _, seal in shelf.found()), default=0)
        except (OSError, UsageError) as reason:
            fault = str(reason)
        everyone = all_gather_object((shelf.host, last, 2 * nbytes, fault), group, label="copies begin")
        fault = next((text for *_, text in everyone if text), "")
        hosts, count = [host for host, *_ in everyone], self._parts.config.checkpoint.memory.copies
        # Its own ranks' pieces, and those of others that they keep.
        kept = [rank for rank, host in enumerate(hosts) if host == shelf.host]
        kept += [r for r in range(len(hosts)) if shelf.host in {hosts[k] for k in keepers(hosts, r, count)}]
        here = [everyone[rank][2] for rank in kept]
        if not fault and sum(here) > (free := shelf.room()):
            fault = describe(
                f"copies in memory have no room in {shelf.root}",
                rank=group.ranks[group.rank],
                expected=f"{sum(here)} bytes for two copies of the parts of {len(here)} ranks",
                found=f"{free} bytes",
                fix="make it larger (a container's --shm-size), or name another folder in "
                '"checkpoint": {"memory": {"folder": ...}}',
            )
        fault = next(filter(None, all_gather_object(fault, group, label="copies have room")), "")
        if fault:
            self._stop()
            raise UsageError(fault)
        rank, token, neighbours = group.rank, self._token, hosts.count(shelf.host)
        slots = shelf.slot(token, rank, 0), shelf.slot(token, rank, 1)
        guests = Guests(with_words(group), shelf, token, hosts, count)
        self._life = _Life(shelf, 1 + max(last for _, last, *_ in everyone), token, slots, guests)

        def end() -> None:
            guests.wait(_PATIENCE)
            shelf.end(token, rank, neighbours)

        ENGINES.at_end(token, end)

    def _copy(self, life: _Life, packed: Packed | None, stays: frozenset[int]) -> None:
        life.guests.wait()
        # Every rank has settled its first copy before anybody could end this step: what was before is of no more use.
        if self._copies == 2:
            life.shelf.keep_only(life.token)
        slot, memory = life.slots[self._free], None
        if packed is not None:
            try:
                memory = slot.begin(packed.nbytes)
                packed.begin(memory, lambda tensor: _memory_of(tensor) not in stays)
            except OSError as reason:
                self._failure, memory = f"{reason.strerror} ({slot.path})", None
        if packed is None or memory is None:
            life.guests.exchange(None, None)
            return
        kept = [tensor for tensor in packed.tensors if _memory_of(tensor) in stays]
        place = (self._copies, self._parts.clock.global_steps, self._group.rank, self._group.size)
        seal = Seal(life.attempt, life.token, *place, life.shelf.agent, packed.nbytes, "")
        copy = _Copy(slot, memory, packed, stays, [(tensor, tensor._version) for tensor in kept], seal)
        # Not a daemon: the interpreter waits for it at exit.
        self._thread = threading.Thread(target=self._rest, args=(copy, life.guests), name="zeropipe copies")
        self._thread.start()

    def _rest(self, copy: _Copy, guests: Guests) -> None:
        """What a thread does of a copy."""
        sealed: Seal | None = None
        try:
            digest = copy.packed.finish(copy.memory, lambda tensor: _memory_of(tensor) in copy.stays)
            if any(tensor._version != version for tensor, version in copy.versions):
                self._at_once = True
                self._failure = "the optimizer's state was written to after the step"
            else:
                sealed = replace(copy.seal, digest=digest)
                copy.slot.end(sealed)
                self._free = 1 - self._free
        except Exception as reason:
            self._failure, sealed = f"{type(reason).__name__}: {reason}", None
        guests.exchange(None if sealed is None else copy.memory, sealed)

    def _tell(self) -> None:
        text, self._failure = self._failure, ""
        if self._life is not None and not text:
            text = self._life.guests.failure
        if text and text not in self._told:
            self._told.add(text)
            _log.warning(
                "[rank %d] copies in memory, step %d: %s",
                self._group.ranks[self._group.rank],
                self._parts.clock.global_steps,
                text,
            )

    def _stop(self) -> None:
        self._wanted, self._life = False, None


def _own_memory(local: LocalState, module: torch.nn.Module) -> frozenset[int]:
    """Addresses of the memory of masters and moments that no parameter or buffer of ``module`` shows."""
    held = {_memory_of(tensor) for flat in local.flats for tensor in flat.tensors.values()}
    return frozenset(
        held - {_memory_of(tensor) for tensor in (*module.parameters(), *module.buffers())} - {0}
    )


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
