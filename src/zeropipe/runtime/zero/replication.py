"""MiCS: shards inside small groups of ranks, replicas across them, so that parameters never leave a group.

    ranks        0 1 2 3 | 4 5 6 7          mics_shard_size = 4
    shard group  0 1 2 3 | 4 5 6 7          gathers, and the reduction of every micro-step
    replicas     0 4, 1 5, 2 6, 3 7         one all-reduce of the gradient shard per boundary

A shard group that spans nodes may gather in two hops (``layout/two_hops.py``).

Source: arXiv 2205.00119, section 3 (partitioning into groups) and 3.4 (2-hop gradient synchronisation).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from zeropipe.comm.collectives import all_gather_object
from zeropipe.comm.group import SELF, Group, Hops, node_size, world
from zeropipe.comm.leases import LEASES
from zeropipe.config.schema_zero import ZeroOptimization
from zeropipe.errors import ConfigError
from zeropipe.layout.two_hops import TwoHops, two_hops
from zeropipe.runtime.zero.param import CHANNELS

_log = logging.getLogger("zeropipe")


@dataclass(frozen=True, slots=True)
class Replication:
    """The two groups of one rank. Together they span the ranks that train together."""

    shard: Group  # a parameter's shards are divided among these
    replicas: Group = SELF  # these hold the same shards; a group of one where there is one replica

    def with_lanes(self) -> Replication:
        """The same, with gathers and gradients on channels of their own. Collective over ``shard``."""
        return replace(self, shard=LEASES.with_lanes(self.shard, CHANNELS))


def shard_size(zero: ZeroOptimization) -> int | None:
    """Ranks that share one copy of the shards, where the config says so."""
    if zero.mics_shard_size > 0:
        return zero.mics_shard_size
    # Keeping what backward gathers inside a group is what users of hpZ are after; MiCS gives it, without a copy.
    return zero.zero_hpz_partition_size if zero.zero_hpz_partition_size > 1 else None


def shard_lists(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The shard groups: runs of ``size`` consecutive members of ``ranks``. Raises ConfigError if it is no divisor."""
    # Consecutive, as ranks are numbered node by node: a gather, which happens for every unit, stays on a node where a
    # shard group fits there; what crosses nodes is one all-reduce for each boundary.
    count = len(ranks)
    if size < 1 or count % size:
        divisors = ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
        raise ConfigError(
            "config key 'zero_optimization.mics_shard_size'",
            expected=f"a divisor of the {count} ranks that train together",
            found=size,
            fix=f"use one of {divisors}",
        )
    return [tuple(ranks[at : at + size]) for at in range(0, count, size)]


def replica_lists(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The members that hold the same shard, one tuple for each place in a shard group."""
    return [tuple(members) for members in zip(*shard_lists(ranks, size), strict=True)]


def shard_group(group: Group, zero: ZeroOptimization) -> Group:
    """This rank's shard group, of those that ``zero`` divides ``group`` into. Collective over the world."""
    return _divide(group, shard_size(zero), zero.mics_hierarchical_params_gather, replicas=False).shard


def replicated(group: Group, zero: ZeroOptimization) -> Replication:
    """How ``zero`` divides ``group``. Collective over the world."""
    return _divide(group, shard_size(zero), zero.mics_hierarchical_params_gather)


def with_hops(shard: Group) -> Group:
    """A shard group that exists, as one that gathers in two hops where it spans nodes. Collective over the world."""
    return _divide(shard, None, hierarchical=True).shard


def _divide(group: Group, size: int | None, hierarchical: bool, replicas: bool = True) -> Replication:
    """Start what groups are needed, all at once, for whoever holds them next (see ``LEASES``)."""
    whole = size is None or size == group.size
    if whole and not hierarchical:
        return Replication(group)
    # [1] Everybody's groups, as each starts only when the whole world takes part, and in one order: the data-parallel
    # ranks of every pipeline stage divide themselves in the same way.
    everywhere = [group.ranks]
    if group.ranks != world().ranks:
        everywhere = sorted(set(all_gather_object(group.ranks, world(), label="data-parallel groups")))
    shards = [members for ranks in everywhere for members in shard_lists(ranks, size or len(ranks))]
    across = [members for ranks in everywhere for members in replica_lists(ranks, size or len(ranks))]
    plans = _plans(shards) if hierarchical else {}
    hops = [members for plan in plans.values() for members in (*plan.nodes, *plan.across)]
    lists = [*([] if whole else shards), *([] if whole or not replicas else across), *hops]
    groups = LEASES.take(lists) if lists else {}
    # [2] This rank's own of them.
    here = group.ranks[group.rank]

    def mine(lists: Iterable[tuple[int, ...]]) -> Group:
        return groups[next(members for members in lists if here in members)]

    shard = group if whole else mine(shards)
    plan = plans.get(shard.ranks)
    if plan is not None:
        shard = replace(shard, hops=Hops(plan, mine(plan.across), mine(plan.nodes)))
    elif hierarchical and shard.rank == 0:
        _log.info("mics_hierarchical_params_gather: ranks %s gather in one hop", list(shard.ranks))
    return Replication(shard, SELF if whole or not replicas else mine(across))


def _plans(shards: list[tuple[int, ...]]) -> dict[tuple[int, ...], TwoHops]:
    """The shard groups that gather in two hops; none where nodes have different numbers of ranks. Collective."""
    # Two hops need on each node a rank for every place of the others; which rank that is follows from one size.
    sizes = set(all_gather_object(node_size(), world(), label="ranks per node"))
    found = {ranks: two_hops(ranks, size) for size in sizes for ranks in shards} if len(sizes) == 1 else {}
    return {ranks: plan for ranks, plan in found.items() if plan is not None}
