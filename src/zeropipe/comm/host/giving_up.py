"""What a rank does about a group in which something has failed, so that nobody waits for what will not come."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import torch

from zeropipe.comm.group import Group
from zeropipe.comm.host.one_sided import ONE_SIDED
from zeropipe.comm.host.reading import LATE, circle_of

_INSTANT = timedelta(milliseconds=1)
_NEVER = 7918  # a tag under which nothing is ever sent


def give_up(group: Group, why: str, close: bool = False) -> None:
    """After an error: end what ``group`` has under way through the memory of this host, here and on all its members.
    ``close``: and what it has by gloo, which otherwise has noticed itself."""
    speaking = group.speaking
    pg = None if speaking is None else speaking.pg
    if speaking is None or pg is None:
        return
    ONE_SIDED.cut(circle_of(speaking), speaking.ranks, why)
    if close or why.startswith(LATE):
        # A message that does not arrive in time makes gloo close its connections; its own abort leaves the peers
        # waiting.
        with suppress(Exception):
            pg.recv([torch.empty(1)], (speaking.rank + 1) % speaking.size, _NEVER).wait(_INSTANT)
