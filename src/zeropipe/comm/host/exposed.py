"""Memory that a rank exposes to the others of its host: they have it mapped, and read it like their own.

It has no name and is no file of any mount (``memfd_create``), so that no container's small ``/dev/shm`` limits it and
nothing is left of it when the last process that has mapped it has ended, however that ends. When it may be read and
written ``near.py`` says.

Who writes to it by hand (a master in ``optimizer.param_groups``) drains nothing. He need not after a step, a backward
that reduces, a forward without gradients, and whatever gathers and returns: all ranks have read before, as all meet
there, or drain in his place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from zeropipe.comm.agreement import TALKS
from zeropipe.comm.group import Group
from zeropipe.comm.host.near import NearTalk, NearWord
from zeropipe.comm.host.one_sided import ONE_SIDED
from zeropipe.comm.native import all_gather_object
from zeropipe.comm.record import Call, Work


@dataclass(frozen=True, slots=True, eq=False)
class Exposed:
    """``every``: 1D, by member, of one size; this rank's own is to be written, the others' only read."""

    every: tuple[torch.Tensor, ...]
    own: torch.Tensor
    talk: NearTalk

    def before_write(self) -> None:
        """Return when nobody reads any more what this rank is about to change."""
        self.talk.drain()


def expose(numel: int, dtype: torch.dtype, group: Group, channel: int) -> Exposed | None:
    """Memory of ``numel`` elements (zeros) of each member, read in the order of ``channel``; None where the members
    share no host or gather in hops between several, or one of them cannot map it. Collective."""
    talk = TALKS.on_board(group, channel) if numel and group.hops is None else None
    if talk is None:
        return None
    nbytes, descriptor, own = numel * dtype.itemsize, -1, None
    try:
        with suppress(OSError, RuntimeError):
            descriptor = os.memfd_create("zeropipe shards")
            os.ftruncate(descriptor, nbytes)
            own = _mapped(os.getpid(), descriptor, numel, dtype, shared=True)
        there: list[int] = all_gather_object(
            -1 if own is None else descriptor, group, label="memory of shards"
        )
        every: list[torch.Tensor] = []
        with suppress(OSError, RuntimeError):
            if own is not None and min(there) >= 0:
                # The others' so that a store here, which is somebody's fault, stays here.
                peers = ONE_SIDED.peers_of(talk.group)
                every = [
                    own
                    if member not in peers
                    else _mapped(peers[member].pid, number, numel, dtype, shared=False)
                    for member, number in enumerate(there)
                ]
        can: list[bool] = all_gather_object(bool(every), group, label="memory of shards")
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if own is None or not all(can):
        return None
    for memory in every:
        if memory is not own:
            ONE_SIDED.borrow(memory)
    return Exposed(tuple(every), own, talk)


def borrowed() -> int:
    """Bytes of other ranks' memory that this process has mapped: resident here as well, and there once."""
    return ONE_SIDED.borrowed


def _mapped(pid: int, number: int, numel: int, dtype: torch.dtype, shared: bool) -> torch.Tensor:
    # torch's own mapping, so that the memory goes with the last tensor.
    storage: Any = torch.UntypedStorage.from_file(f"/proc/{pid}/fd/{number}", shared, numel * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage)


def read_exposed(
    outputs: Sequence[torch.Tensor],
    sources: Sequence[torch.Tensor],
    talk: NearTalk,
    *,
    label: str,
    note: int = 0,
    early: bool = False,
    async_op: bool = False,
) -> Work:
    """Fill each of ``outputs`` from its source, views of what the members expose, when the work is waited for: what
    ``all_gather`` of these does, with the same words. ``early``: those who have promised need not have come as far."""
    call = Call("all_gather", talk.group, label, async_op, channel=talk.channel, guarded=True, note=note)
    call.check(outputs[0]).enter(sum([output.nbytes for output in outputs]))
    word = talk.say(label, note, copy=partial(torch._foreach_copy_, list(outputs), list(sources)))
    work = Work(call).after(_Read(talk, word, early)).under(call)
    if not async_op:
        talk.drain()  # who has waited for it may write to what it exposes, by hand
    return work


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """What a work waits for in place of words."""

    talk: NearTalk
    word: NearWord
    early: bool

    def meet(self) -> int:
        return self.talk.read(self.word, self.early)
