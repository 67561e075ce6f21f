"""MiCS: shards inside small groups of ranks, replicas across them, so that parameters never leave a group.

    ranks        0 1 2 3 | 4 5 6 7          mics_shard_size = 4
    shard group  0 1 2 3 | 4 5 6 7          gathers, and the reduction of every micro-step
    replicas     0 4, 1 5, 2 6, 3 7         one all-reduce of the gradient shard per boundary

Source: arXiv 2205.00119, section 3 (partitioning into groups) and 3.4 (2-hop gradient synchronisation).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import SELF, Group, new_groups, world
from zeropipe.errors import ConfigError, describe


@dataclass(frozen=True, slots=True)
class Replication:
    """The two groups of one rank. Together they span the ranks that train together."""

    shard: Group  # a parameter's shards are divided among these
    replicas: Group = SELF  # these hold the same shards; a group of one where there is one replica


def shard_lists(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The shard groups: runs of ``size`` consecutive members of ``ranks``. Raises ConfigError if it is no divisor."""
    count = len(ranks)
    if size < 1 or count % size:
        divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        raise ConfigError(
            describe(
                "config key 'zero_optimization.mics_shard_size'",
                expected=f"a divisor of the {count} ranks that train together",
                found=size,
                fix=f"use one of {divisors}",
            )
        )
    return [tuple(ranks[at : at + size]) for at in range(0, count, size)]


def replica_lists(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The members that hold the same shard, one tuple for each place in a shard group."""
    return [tuple(members) for members in zip(*shard_lists(ranks, size), strict=True)]


def mics_groups(group: Group, size: int, shard: Group | None = None) -> Replication:
    """Divide ``group`` into shard groups of ``size`` ranks. Collective over the world.

    ``shard``: this rank's shard group where it exists already (the parameters were made shards before).
    """
    if size == group.size:
        return Replication(group)
    every = [group.ranks]
    if group.ranks != world().ranks:  # a group starts only when the whole world takes part
        every = sorted(set(all_gather_object(group.ranks, world(), label="data-parallel groups")))
    if shard is None:
        shard = new_groups([members for ranks in every for members in shard_lists(ranks, size)])
    return Replication(shard, new_groups([m for ranks in every for m in replica_lists(ranks, size)]))
