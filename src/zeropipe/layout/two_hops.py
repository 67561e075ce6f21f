"""A gather in two hops: where a group spans nodes, each shard crosses to another node once instead of once per rank.

    nodes of two ranks     0 1 | 2 3          shards    a b | c d
    first hop, across      0-2   1-3          rank 0 has a c, rank 1 has b d, ...
    second hop, in a node  0-1 | 2-3          everybody has a b c d

Source: arXiv 2205.00119, section 3.3 (hierarchical communication strategy), without its reordering copy: every
shard is received where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Message:
    """One shard on its way. ``hop``: 1 or 2; ``source``, ``target``: ranks; ``shard``: index in the group's order."""

    hop: int
    source: int
    target: int
    shard: int


@dataclass(frozen=True, slots=True)
class TwoHops:
    """How the ranks of a group lie on nodes. Shard ``s`` of what is gathered is that of the group's member ``s``."""

    nodes: tuple[tuple[int, ...], ...]  # the group's ranks in its order, cut into nodes of one length

    @property
    def across(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of equal place in their nodes, place by place: they exchange in the first hop."""
        return tuple(zip(*self.nodes, strict=True))

    def first(self, place: int) -> tuple[tuple[int, int], ...]:
        """What a rank at ``place`` has after the first hop: (index of its owner in ``across[place]``, shard)."""
        width = len(self.nodes[0])
        return tuple((node, node * width + place) for node in range(len(self.nodes)))

    def second(self) -> tuple[tuple[int, int], ...]:
        """What everybody has after the second hop: (index in its node of the rank that hands it on, shard)."""
        # Whoever received a shard across nodes hands it on: in each node that is the rank at the shard's own place.
        width = len(self.nodes[0])
        starts = range(0, len(self.nodes) * width, width)
        return tuple((place, start + place) for start in starts for place in range(width))

    def messages(self) -> Iterator[Message]:
        """All that is sent, the first hop before the second."""
        for place, members in enumerate(self.across):
            for owner, shard in self.first(place):
                yield from (
                    Message(1, members[owner], rank, shard) for rank in members if rank != members[owner]
                )
        for node in self.nodes:
            for owner, shard in self.second():
                yield from (Message(2, node[owner], rank, shard) for rank in node if rank != node[owner])

    def __str__(self) -> str:
        return " | ".join(" ".join(map(str, node)) for node in self.nodes)


def two_hops(ranks: Sequence[int], node_size: int) -> TwoHops | None:
    """How a group of ``ranks`` gathers where ``node_size`` consecutive ranks are a node; None: in one hop.

    One hop is right where the group lies in one node, where no node holds two of its ranks, and where it is not
    aligned with the nodes: they hold different numbers of its ranks, or its ranks are not in ascending order.
    """
    # Nodes are consecutive ranks, so a node's members of the group are a run with one quotient.
    runs = [tuple(run) for _, run in groupby(ranks, key=lambda rank: rank // max(node_size, 1))]
    aligned = list(ranks) == sorted(set(ranks)) and len({len(run) for run in runs}) == 1
    return TwoHops(tuple(runs)) if aligned and len(runs) > 1 and len(runs[0]) > 1 else None
