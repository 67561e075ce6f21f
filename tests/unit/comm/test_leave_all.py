"""Who is told that an error takes a rank away: whoever does not have it already."""

from __future__ import annotations

from typing import Any

import pytest

from zeropipe.comm import agreement
from zeropipe.comm.group import Group
from zeropipe.errors import CommunicationError, DesyncError

SHARDS, EVERYONE = Group(ranks=(0, 1), rank=0), Group(ranks=(0, 1, 2, 3), rank=0)


@pytest.mark.parametrize(
    ("error", "met", "told"),
    [
        (KeyError("mine alone"), [SHARDS], [SHARDS, EVERYONE]),
        (DesyncError("heard in a gather"), [SHARDS], [EVERYONE]),
        (CommunicationError("a broken gather"), [SHARDS], [EVERYONE]),
        (CommunicationError("a broken gather in two hops"), [], [SHARDS, EVERYONE]),
        (DesyncError("heard by all"), [SHARDS, EVERYONE], []),
    ],
    ids=lambda value: str(value)[:30],
)
def test_of_an_error_of_the_protocol_only_those_who_did_not_meet_it(monkeypatch, error, met, told):
    said: list[Any] = []
    monkeypatch.setattr(agreement, "leave", lambda what, group, **how: said.append((what, group, how)))
    heard = agreement.leave_all("gone", error, [SHARDS, EVERYONE], met, channel=1)
    assert said == [("gone", group, {"channel": 1, "patience": None}) for group in told]
    assert len(heard) == len(told)


def test_a_connection_that_is_gone_hides_no_error(monkeypatch):
    def leave(what: str, group: Group, **_: Any) -> Any:
        if group is SHARDS:
            raise RuntimeError("connection reset")
        return lambda: 0

    monkeypatch.setattr(agreement, "leave", leave)
    assert [same() for same in agreement.leave_all("gone", KeyError(), [SHARDS, EVERYONE], [])] == [0]
