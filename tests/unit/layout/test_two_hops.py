"""The plan of a gather in two hops: everything arrives, from who has it, and each byte crosses once per node."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from zeropipe.layout.two_hops import Message, TwoHops, two_hops

sizes = st.integers(2, 5)


@st.composite
def spanning(draw: st.DrawFn) -> tuple[TwoHops, int]:
    """A group that spans nodes, and the size of a node: some of each node's ranks, the same number everywhere."""
    node_size, width, count = draw(st.integers(2, 8)), draw(sizes), draw(sizes)
    assume(width <= node_size)
    nodes = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count, unique=True))
    places = st.lists(st.integers(0, node_size - 1), min_size=width, max_size=width, unique=True)
    ranks = sorted(node * node_size + place for node in nodes for place in draw(places))
    plan = two_hops(ranks, node_size)
    assert plan is not None
    assert [rank for node in plan.nodes for rank in node] == ranks
    return plan, node_size


@given(spanning())
def test_every_shard_reaches_every_rank_once_from_a_rank_that_has_it(case):
    plan, _ = case
    ranks = [rank for node in plan.nodes for rank in node]
    has = {rank: {at} for at, rank in enumerate(ranks)}
    for hop in (1, 2):
        before = {rank: set(shards) for rank, shards in has.items()}
        for message in plan.messages():
            if message.hop == hop:
                assert message.shard in before[message.source]
                assert message.shard not in has[message.target]
                has[message.target].add(message.shard)
    assert all(shards == set(range(len(ranks))) for shards in has.values())


@given(spanning())
def test_a_shard_crosses_to_each_other_node_once_in_the_first_hop_only(case):
    plan, node_size = case
    crossings = Counter(
        (m.shard, m.target // node_size)
        for m in plan.messages()
        if m.source // node_size != m.target // node_size
    )
    assert set(crossings.values()) == {1}
    size, nodes = sum(map(len, plan.nodes)), len(plan.nodes)
    assert len(crossings) == size * (
        nodes - 1
    )  # each shard to each node but its own; in one hop: to each rank of it
    first = [m for m in plan.messages() if m.hop == 1]
    assert len(first) == len(crossings)


@given(spanning())
def test_what_a_rank_is_told_to_hold_is_what_it_is_sent(case):
    plan, _ = case
    for node in plan.nodes:
        for place, rank in enumerate(node):
            received = {m.shard: m.source for m in plan.messages() if m.hop == 1 and m.target == rank}
            members = plan.across[place]
            told = {shard: members[owner] for owner, shard in plan.first(place)}
            assert told == received | {s: r for s, r in told.items() if r == rank}
            handed = {shard: node[owner] for owner, shard in plan.second()}
            arriving = {m.shard: m.source for m in plan.messages() if m.hop == 2 and m.target == rank}
            assert handed == arriving | dict.fromkeys(told, rank)


def test_the_picture_of_the_module():
    plan = two_hops((0, 1, 2, 3), 2)
    assert plan == TwoHops(((0, 1), (2, 3)))
    assert str(plan) == "0 1 | 2 3"
    assert plan.across == ((0, 2), (1, 3))
    first = [m for m in plan.messages() if m.hop == 1]
    assert first == [Message(1, 0, 2, 0), Message(1, 2, 0, 2), Message(1, 1, 3, 1), Message(1, 3, 1, 3)]
    assert Message(2, 0, 1, 2) in plan.messages()


@pytest.mark.parametrize(
    ("ranks", "node_size"),
    [
        ((), 2),
        ((0,), 2),
        ((0, 1, 2, 3), 4),  # one node
        ((0, 1, 2, 3), 8),
        ((4, 5), 4),
        ((0, 1, 2, 3), 1),  # nobody shares a node
        ((0, 2, 4, 6), 2),
        ((0, 1, 2, 3), 0),
        ((0, 1, 2, 3), 3),  # 0 1 2 | 3
        ((1, 2, 3, 4), 4),  # 1 2 3 | 4
        ((0, 1, 2), 2),
        ((0, 2, 1, 3), 2),  # not in order
        ((2, 3, 0, 1), 2),
    ],
)
def test_one_hop_within_a_node_and_where_the_group_is_not_aligned(ranks, node_size):
    assert two_hops(ranks, node_size) is None


@pytest.mark.parametrize(
    ("ranks", "node_size", "nodes"),
    [
        ((2, 3, 4, 5), 4, ((2, 3), (4, 5))),  # half of each of two nodes
        ((0, 2, 4, 6), 4, ((0, 2), (4, 6))),  # a mesh's axis
        ((4, 5, 6, 7, 8, 9), 2, ((4, 5), (6, 7), (8, 9))),
    ],
)
def test_equal_parts_of_nodes_are_enough(ranks, node_size, nodes):
    plan = two_hops(ranks, node_size)
    assert plan is not None
    assert plan.nodes == nodes
