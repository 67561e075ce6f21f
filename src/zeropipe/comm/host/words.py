"""What ranks tell each other before they need each other (``agreement.py``), whether on a board or by messages: a label
and a note in so many bytes, the error where labels differ, and what a rank may owe by a word."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Protocol, TypeVar

from zeropipe.comm.group import Group
from zeropipe.errors import DesyncError

WORD_BYTES = 192
NOTE_BYTES = 8
TEXT_BYTES = WORD_BYTES - NOTE_BYTES  # of a label its end, which tells layers apart


@lru_cache(maxsize=2**12)
def packed(text: str) -> bytes:
    return text.encode()[-TEXT_BYTES:].ljust(TEXT_BYTES)


def parted(group: Group, mine: str, peer: int, theirs: bytes) -> DesyncError:
    """The error where member ``peer`` says ``theirs`` and this rank ``mine``."""
    other = theirs.decode(errors="replace").strip()
    return DesyncError(
        f"ranks went different ways: this one is at '{mine}', rank {group.ranks[peer]} is at '{other}'",
        rank=group.ranks[group.rank],
        expected="the same modules in the same order on every rank",
        found=f"'{mine}' here and '{other}' there",
        fix="make control flow equal on all ranks, or mark the module around both with "
        "set_z3_leaf_modules so that it is gathered whole",
    )


class Relay(Protocol):
    """What a member owes its peers once all have said the same word: the second hop of a gather."""

    def begin(self) -> None: ...
    def abort(self) -> None:
        """Let the peers know that nothing will come."""


class Said(Protocol):
    """A word of this rank, as far as it may owe something by it."""

    @property
    def relay(self) -> Relay | None: ...
    def be_met(self, limit: timedelta) -> None:
        """From now on whoever waits for it waits for so long."""


_Word = TypeVar("_Word", bound=Said)


def last_owed(unmet: Sequence[_Word], limit: timedelta) -> _Word | None:
    """The last of the words by which this rank owes something; all are waited for no longer than ``limit`` then."""
    last = next((word for word in reversed(unmet) if word.relay is not None), None)
    for word in unmet if last is not None else ():
        word.be_met(limit)
    return last
