"""How ranks of one host find each other: whose memory may be read is proved by reading it.

::

    each rank                                                    all tell all
    listens on a socket that no file system knows        [1]     its name, this host, where 16 secret bytes lie
    connects to those after it, and says who it is       [2]     whom it has reached
    accepts those before it, reads the secret of all     [3]     whose secret it could read
    keeps those who have read this one's too

A host is where a socket of no file system reaches, and a process is who the kernel says is at its other end: names of
hosts and numbers of processes in containers say nothing. What cannot be reached or read goes by messages.
"""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zeropipe.comm.collectives import carry_by
from zeropipe.comm.group import SELF, Group
from zeropipe.comm.host.board import Page, page_of
from zeropipe.comm.host.one_sided import ONE_SIDED, Memory
from zeropipe.comm.native import Native, all_gather_object
from zeropipe.errors import UsageError

_log = logging.getLogger("zeropipe")
VARIABLE = "ZEROPIPE_TRANSPORT"
WAYS = ("auto", "one_sided", "messages", "native")
_SECRET = 16  # bytes
_HELLO = struct.Struct(f"<q{_SECRET}s")
_PATIENCE = 10.0  # seconds for what is on its way already
_SCOPE = Path("/proc/sys/kernel/yama/ptrace_scope")
_SET_PTRACER = 0x59616D61


@dataclass(frozen=True, slots=True)
class _Card:
    """What a rank tells of itself."""

    way: str
    listens: str  # the name of its socket; empty: it has none
    at: int  # where its secret lies
    secret: bytes
    page: int  # the descriptor of where it says words; -1: it has no such


Line = tuple[int, socket.socket]  # to a process, by its number


def way_asked() -> str:
    """What ``ZEROPIPE_TRANSPORT`` says on this rank."""
    return os.environ.get(VARIABLE) or "auto"


def choose_transport(*groups: Group, agreed: Group = SELF) -> None:
    """Let CPU tensors of ``groups``, whose members call this together, go by what ``ZEROPIPE_TRANSPORT`` says:
    ``one_sided``, ``messages`` or ``native``, or ``auto``: through the memory of a host for those that share it. Where
    it is not set it is ``auto``. ``agreed``: one more, whose members know that ``way_asked`` is the same on all, so
    that no word is needed where it asks for none.

    Raises UsageError, on all members, where the variable has another value, or not the same one everywhere, or where
    ``one_sided`` cannot be.
    """
    for group in (agreed, *groups):
        speaking = group.speaking
        if group.size > 1 and not group.imagined and speaking is not None and not ONE_SIDED.met(speaking):
            _choose(speaking, known=group is agreed)


def _choose(group: Group, known: bool) -> None:
    way = way_asked()
    here = way in ("auto", "one_sided")
    if known and not here:
        _check([way], group)
        _settle(group, way)
        return
    secret = ctypes.create_string_buffer(secrets.token_bytes(_SECRET), _SECRET)
    memory, listener = _open() if here else (None, None)
    name = "" if listener is None else listener.getsockname()[1:].decode()
    own = ONE_SIDED.own_page() if listener is not None else None
    card = _Card(way, name, ctypes.addressof(secret), secret.raw, -1 if own is None else own[1])
    cards: list[_Card] = all_gather_object(card, group, label="transports")
    _check([card.way for card in cards], group)
    if not here:
        _settle(group, way)
        return
    # [1] to [3]; each step is over everywhere before the next begins, so nobody waits for what nobody does.
    lines: dict[int, Line] = {} if listener is None else _reach(cards, group)
    reached: list[list[int]] = all_gather_object(sorted(lines), group, label="transports")
    if listener is not None:
        lines |= _accept(listener, [m for m, found in enumerate(reached) if group.rank in found], cards)
        listener.close()
    mine = [m for m, (pid, _) in lines.items() if memory is not None and _reads(memory, pid, cards[m])]
    pages = {m: page for m in mine if (page := _page(lines[m][0], cards[m])) is not None}
    mine = list(pages)
    read: list[list[int]] = all_gather_object(mine, group, label="transports")
    for member, (_, line) in list(lines.items()):
        if member not in mine or group.rank not in read[member]:
            line.close()
            del lines[member]
    whole = all(len(found) == group.size - 1 for found in read)
    if way == "one_sided" and not whole:
        raise UsageError(
            f"{VARIABLE}=one_sided: ranks cannot read each other's memory",
            rank=group.ranks[group.rank],
            expected=f"ranks {list(group.ranks)} on one host, as one user whose processes may trace each other",
            found=f"reads of ranks {sorted(group.ranks[m] for m in lines)}",
            fix=f"unset {VARIABLE}, or allow process_vm_readv (ptrace_scope, seccomp)",
        )
    if way == "auto" and not whole and group.rank == 0:
        members = range(group.size)
        apart = [(m, n) for m in members for n in members[m + 1 :] if n not in read[m] or m not in read[n]]
        one, other = (group.ranks[member] for member in apart[0])
        more = f" and {len(apart) - 1} more pairs" if len(apart) > 1 else ""
        _log.info(
            "tensors go by messages between ranks %d and %d%s: on other hosts, or their memory may not be read",
            *(one, other, more),
        )
    ways = {group.ranks[m]: (*line, pages[m]) for m, line in lines.items()}
    near = {
        group.ranks[m]: frozenset(group.ranks[n] for n in (m, *found) if n == m or m in read[n])
        for m, found in enumerate(read)
    }
    ONE_SIDED.meet(group, memory, ways, near)


def _settle(group: Group, way: str) -> None:
    """Nobody reads anybody's memory."""
    if way == "native":
        carry_by(Native())
    ONE_SIDED.meet(group, None, {}, {rank: frozenset([rank]) for rank in group.ranks})


def _check(ways: list[str], group: Group) -> None:
    if len(set(ways)) > 1 or ways[0] not in WAYS:
        raise UsageError(
            f"the environment variable {VARIABLE}",
            rank=group.ranks[group.rank],
            expected=f"one of {', '.join(WAYS)} on all ranks",
            found=", ".join(repr(way) for way in dict.fromkeys(ways)),
        )


def _open() -> tuple[Memory | None, socket.socket | None]:
    """What reads memory, and a socket to be found by; None where this system has no such thing."""
    try:
        memory, listener = Memory(), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"\0zeropipe-{secrets.token_hex(_SECRET)}")
        listener.listen(socket.SOMAXCONN)
        listener.settimeout(_PATIENCE)
    except (OSError, AttributeError):
        return None, None
    with suppress(OSError, ValueError):
        if int(_SCOPE.read_text()) == 1:
            # Only who started a process may read it, unless that one says who else: here who started this one too,
            # and with it the other ranks that it started.
            ctypes.CDLL(None).prctl(_SET_PTRACER, ctypes.c_ulong(os.getppid()), 0, 0, 0)
    return memory, listener


def _reach(cards: list[_Card], group: Group) -> dict[int, Line]:
    """Connections to the members after this one."""
    lines: dict[int, Line] = {}
    for member in range(group.rank + 1, group.size):
        with suppress(OSError):
            if cards[member].listens:
                line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                line.connect(f"\0{cards[member].listens}")
                line.sendall(_HELLO.pack(group.rank, cards[group.rank].secret))
                lines[member] = _process_at(line), line
    return lines


def _accept(listener: socket.socket, expected: list[int], cards: list[_Card]) -> dict[int, Line]:
    """Connections of the members before this one, who all have called by now; whoever else calls is turned away."""
    lines: dict[int, Line] = {}
    with suppress(OSError):
        while len(lines) < len(expected):
            line = listener.accept()[0]
            line.settimeout(_PATIENCE)
            hello = line.recv(_HELLO.size, socket.MSG_WAITALL)
            member, secret = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (-1, b"")
            if member in expected and secret == cards[member].secret:
                lines[member] = _process_at(line), line
            else:
                line.close()
    return lines


def _process_at(line: socket.socket) -> int:
    """The number that the process at the other end has here."""
    found: tuple[int, int, int] = struct.unpack(
        "3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    )
    return found[0]


def _page(pid: int, card: _Card) -> Page | None:
    if card.page >= 0:
        with suppress(OSError, ValueError):
            return page_of(pid, card.page)
    return None


def _reads(memory: Memory, pid: int, card: _Card) -> bool:
    found = ctypes.create_string_buffer(_SECRET)
    with suppress(OSError):
        memory.read(pid, card.at, ctypes.addressof(found), _SECRET)
    return found.raw == card.secret
