"""Which ranks are taken for ranks of this host: of what they have told of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from zeropipe.comm import neighbours
from zeropipe.comm.group import Group
from zeropipe.comm.neighbours import Neighbours

ENDED = 2**22 + 1, "0"  # Linux gives no process such a number


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("started", ["", "another"])
def test_hosts_of_one_name_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: str
) -> None:
    """A process of another host is none that has ended here."""
    here = neighbours._host()
    if started:
        other = tmp_path / "boot_id"
        other.write_text(started)
        monkeypatch.setattr(neighbours, "_STARTED", other)
        assert neighbours._host() != here
    theirs = neighbours._host()
    monkeypatch.setattr(neighbours, "_STARTED", Path("/proc/sys/kernel/random/boot_id"))
    monkeypatch.setattr(neighbours, "all_gather_object", lambda mine, *_, **__: [mine, (theirs, ENDED)])
    assert Neighbours(Group((0, 1), 0)).gone() == ([] if started else [1])
