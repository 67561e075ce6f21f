"""Hostfiles and filters of the ``deepspeed`` command."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zeropipe.compat.runner import Slots, choose, parse_filter, parse_hostfile
from zeropipe.errors import ConfigError

TWO: Slots = {"worker-0": (0, 1, 2, 3), "worker-1": (0, 1)}


def test_a_hostfile() -> None:
    text = "# the cluster\nworker-0 slots=4  # fast\n\n  worker-1   slots=2\n"
    assert parse_hostfile(text) == TWO


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("worker-0 slots=4\nworker-0 slots=2", "line 2; expected a host once.*'worker-0 slots=2'"),
        ("worker-0", "line 1; expected a host once, as 'name slots=N', found 'worker-0'"),
        ("worker-0 slots=four", "line 1"),
        ("worker-0 slots=4 fast", "line 1"),
        ("# nothing\n", "names no host.*Fix"),
    ],
)
def test_a_malformed_hostfile_names_the_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_hostfile(text)


def test_filters() -> None:
    assert choose(TWO) == TWO
    assert choose(TWO, include="worker-0@worker-1:0") == {"worker-0": (0, 1, 2, 3), "worker-1": (0,)}
    assert choose(TWO, include="worker-1:1,0") == {"worker-1": (0, 1)}
    assert choose(TWO, exclude="worker-1") == {"worker-0": (0, 1, 2, 3)}
    assert choose(TWO, exclude="worker-0:0,2@worker-1:1") == {"worker-0": (1, 3), "worker-1": (0,)}
    assert choose(TWO, num_nodes=1) == {"worker-0": (0, 1, 2, 3)}
    assert choose(TWO, num_gpus=2) == {"worker-0": (0, 1), "worker-1": (0, 1)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"include": "worker-0", "exclude": "worker-1"}, "exclude each other"),
        ({"include": "worker-0", "num_gpus": 1}, "Fix: remove --num_nodes and --num_gpus"),
        ({"include": "worker-2"}, "--include; expected slots of worker-0:0,1,2,3.*found worker-2"),
        ({"exclude": "worker-1:7"}, "--exclude; expected slots of .*found worker-1:7"),
        ({"include": "worker-0:a"}, "expected host:slot,slot@host:slot, found 'worker-0:a'"),
        ({"include": "worker-0@"}, "expected host:slot"),
        ({"include": "worker-0:1@worker-0:2"}, "expected host:slot"),
        ({"exclude": "worker-0@worker-1"}, "no slot is left"),
        ({"num_nodes": 3}, r"--num_nodes; expected 1 to 2 \(hosts\), found 3"),
        ({"num_gpus": 3}, r"--num_gpus; expected 1 to 2 \(slots on worker-1\), found 3"),
        ({"num_gpus": 0}, "--num_gpus; expected 1 to 4"),
    ],
)
def test_what_cannot_be_followed_is_named(given: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose(TWO, **given)  # type: ignore[arg-type]


pools = st.dictionaries(
    st.sampled_from("abcd"), st.integers(1, 5).map(lambda n: tuple(range(n))), min_size=1, max_size=4
)


@given(pools, st.data())
def test_including_and_excluding_the_same_slots_divides_them(hosts: Slots, data: st.DataObject) -> None:
    named = {
        host: data.draw(st.sets(st.sampled_from(slots), min_size=1).map(sorted))
        for host, slots in hosts.items()
        if data.draw(st.booleans())
    }
    text = "@".join(f"{host}:{','.join(map(str, slots))}" for host, slots in named.items())
    if not named:
        return
    assert parse_filter(text, "--include") == {host: tuple(slots) for host, slots in named.items()}
    inside = choose(hosts, include=text)
    assert inside == {host: tuple(named[host]) for host in hosts if host in named}
    try:
        outside = choose(hosts, exclude=text)
    except ConfigError:
        outside = {}
    for host, slots in hosts.items():
        assert sorted((*inside.get(host, ()), *outside.get(host, ()))) == list(slots)
