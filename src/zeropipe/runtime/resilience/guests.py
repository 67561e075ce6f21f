"""Pieces of ranks of other hosts: a host that is lost takes its memory along, so a neighbour keeps it too.

::

    host 0   rank 0 --piece--> rank 2        rank 2 of host 1 keeps it as its guest, and so on round the ring of hosts;
             rank 1 --piece--> rank 3        with two copies each piece goes to the next two
    host 1   rank 2 --piece--> rank 0
             rank 3 --piece--> rank 1

A piece travels when it has its seal, in a thread, out of the memory where it lies; the next steps need not wait for it,
the next copy does. What is sent is a head, and then the piece if there is one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence

import torch

from zeropipe.checkpoint.memory.pieces import Seal, Slot
from zeropipe.checkpoint.memory.shelf import Shelf
from zeropipe.comm.group import Group
from zeropipe.comm.messages import carry
from zeropipe.frozen import from_json, to_json

_HEAD = 1024  # bytes


def keepers(hosts: Sequence[str], rank: int, copies: int) -> list[int]:
    """Who keeps the piece of ``rank``: one rank of each of the next ``copies`` hosts. ``hosts``: by rank."""
    order = list(dict.fromkeys(hosts))
    at, mine = order.index(hosts[rank]), [r for r, host in enumerate(hosts) if host == hosts[rank]]
    found = []
    for step in range(1, min(copies, len(order) - 1) + 1):
        others = [r for r, host in enumerate(hosts) if host == order[(at + step) % len(order)]]
        found.append(others[mine.index(rank) % len(others)])
    return found


class Guests:
    """What one rank sends to others and keeps of others."""

    def __init__(self, group: Group, shelf: Shelf, token: str, hosts: Sequence[str], copies: int) -> None:
        talking = group.speaking
        self._group = talking or group
        copies = copies if talking is not None else 0
        self._to = keepers(hosts, group.rank, copies)
        self._slots: dict[int, list[Slot]] = {
            rank: [shelf.slot(token, rank, number, copy=True) for number in (0, 1)]
            for rank in range(group.size)
            if group.rank in keepers(hosts, rank, copies)
        }
        self._thread: threading.Thread | None = None
        self._over = False  # a connection is gone: whoever sends on would be taken for something else
        self.failure = ""

    def exchange(self, piece: torch.Tensor | None, seal: Seal | None) -> None:
        """Send ``piece``, which must not change until ``wait`` has returned, and take what others send; behind."""
        if self._over or not (self._to or self._slots):
            return
        # A daemon: where a peer is gone for good, it keeps no process.
        self._thread = threading.Thread(
            target=self._run, args=(piece, seal), name="zeropipe guests", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def _run(self, piece: torch.Tensor | None, seal: Seal | None) -> None:
        try:
            self._exchange(piece, seal)
        except Exception as reason:
            self._over = True
            self.failure = f"no other host keeps a copy any more: {type(reason).__name__}: {reason}"

    def _exchange(self, piece: torch.Tensor | None, seal: Seal | None) -> None:
        # [1] What comes.
        text = b"" if seal is None else json.dumps(to_json(seal)).encode()
        head = torch.frombuffer(bytearray(text.ljust(_HEAD)), dtype=torch.uint8)
        heads = {rank: torch.empty_like(head) for rank in self._slots}
        carry(
            self._group,
            [(head, rank) for rank in self._to],
            [(theirs, rank) for rank, theirs in heads.items()],
        )
        # [2] The pieces.
        coming: list[tuple[Slot, Seal]] = []
        receives: list[tuple[torch.Tensor, int]] = []
        for rank, theirs in heads.items():
            said = theirs.numpy().tobytes().strip()
            if not said:
                continue
            theirs_seal: Seal = from_json(Seal, json.loads(said))
            try:
                memory = self._slots[rank][0].begin(theirs_seal.nbytes)
                coming.append((self._slots[rank][0], theirs_seal))
            except OSError as reason:  # what is sent must go somewhere
                self.failure = f"no room for a copy of rank {self._group.ranks[rank]}: {reason.strerror}"
                memory = torch.empty(theirs_seal.nbytes, dtype=torch.uint8)
            receives.append((memory, rank))
        carry(self._group, [] if piece is None else [(piece, rank) for rank in self._to], receives)
        for slot, theirs_seal in coming:
            slot.end(theirs_seal)
            self._slots[theirs_seal.rank].reverse()  # the next one goes into the older one's place
