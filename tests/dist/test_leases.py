"""Process groups that engines make are shared, and end with the last engine or shard that needs them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import zeropipe
from tests.dist.test_zero_two_hops import TWO_HOPS, nodes_of
from tests.helpers.pool import Pools
from tests.helpers.zero3 import Stack, engine_of, x_batch
from zeropipe import zero
from zeropipe.comm.group import disjoint
from zeropipe.comm.group import world as everyone
from zeropipe.comm.leases import LEASES, Leases

MICS = {"mics_shard_size": 2}


def groups() -> int:
    """Process groups in this process, the default one included."""
    return len(dist.distributed_c10d._world.pg_map)


def engine_with(options: dict[str, Any], world: int = 4) -> Any:
    with nodes_of(2):
        return engine_of(Stack(1), 3, world, zero_optimization=options)


def step(engine: Any, rank: int) -> None:
    engine.backward(engine(x_batch(0, rank)).square().mean())
    engine.step()


def works() -> None:
    """torch.distributed still carries what a user sends."""
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [dist.get_world_size()] * 3


def many(rank: int, world: int, options: dict[str, Any]) -> list[int]:
    LEASES.take([])  # what other tests left
    counts = [groups()]
    for _ in range(4):
        engine = engine_with(options)
        step(engine, rank)
        engine.destroy()
        engine.destroy()
        counts.append(groups())
        works()
    zero.unshard_module(engine.module)
    del engine
    gc.collect()
    LEASES.take([])
    counts.append(groups())
    works()
    return counts


def test_many_engines_in_a_row_do_not_grow_the_number_of_groups(pool: Pools) -> None:
    """What stays after destroy() is the shards' own group: parameters are shards until they are made whole."""
    for before, *after, end in pool(4).run(many, MICS):
        assert after == [before + 1] * 4
        assert end == before
    for before, *after, end in pool(4).run(many, TWO_HOPS):
        assert after == [before + 2] * 4
        assert end == before
    for before, *after, end in pool(4).run(many, {}):
        assert {before, *after, end} == {before}


def whole_again(rank: int, world: int) -> tuple[int, int, int]:
    LEASES.take([])
    before = groups()
    engine = engine_with(MICS)
    step(engine, rank)
    during = groups()
    engine.destroy()
    zero.unshard_module(engine.module)
    after = groups()
    works()
    return before, during, after


def test_nothing_is_left_once_the_model_is_whole(pool: Pools) -> None:
    for before, during, after in pool(4).run(whole_again):
        assert during == before + 2
        assert after == before


def side_by_side(rank: int, world: int) -> list[int]:
    LEASES.take([])
    counts = [groups()]
    first, second = engine_with(MICS), engine_with(MICS)
    counts.append(groups())
    step(first, rank)
    step(second, rank)
    first.destroy()
    counts.append(groups())
    step(second, rank)  # its groups are those of the first
    with zero.GatheredParameters(first.module.parameters()):
        assert all(param.numel() for param in first.module.parameters())
    third = engine_with(MICS)
    counts.append(groups())
    step(third, rank)
    step(second, rank)
    for engine in (second, third):
        engine.destroy()
    for engine in (first, second, third):
        zero.unshard_module(engine.module)
    counts.append(groups())
    works()
    return counts


def test_engines_share_their_groups_and_the_last_one_ends_them(pool: Pools) -> None:
    for before, two, one, again, none in pool(4).run(side_by_side):
        assert (two, one, again, none) == (before + 2, before + 2, before + 2, before)


def one_rank_forgets(rank: int, world: int) -> int:
    """Ranks that disagree about what is there make a new group together, instead of waiting for ever."""
    leases = Leases()
    first = leases.take([(0, 1)]).get((0, 1))
    if rank == 0:
        leases._leases.clear()  # as if it had dropped its group alone
    second = leases.take([(0, 1)]).get((0, 1))
    if rank < 2:
        assert first is not None and second is not None
        user = Leases()
        leases.hold(second, user)
        leases.hold(second, user)
        assert leases.take([(0, 1)])[0, 1] is second
        leases.drop(user)
        leases.drop(user)
        assert not leases._leases
    else:
        leases.take([(0, 1)])
        assert first is second is None
    works()
    return len(leases._leases)


def test_ranks_decide_together_whether_a_group_is_there(pool: Pools) -> None:
    outcomes = pool(3).run_faulty(one_rank_forgets)
    assert [(o.kind, o.value, o.error) for o in outcomes] == [("result", 0, "")] * 3


def world_ends_first(rank: int, world: int) -> bool:
    """A script that ends torch.distributed before its engine, and starts it anew."""
    engine = engine_with(MICS)
    step(engine, rank)
    store = dist.distributed_c10d._get_default_store()
    assert LEASES._leases
    dist.destroy_process_group()
    LEASES.drop(engine._sharded)
    assert not LEASES._leases
    del store
    return not dist.is_initialized()


def test_the_end_of_torch_distributed_ends_the_leases(pool: Pools) -> None:
    outcomes = pool(4).run_faulty(world_ends_first)
    assert [(o.kind, o.value, o.error) for o in outcomes] == [("result", True, "")] * 4


def test_the_world_is_never_leased(pool: Pools) -> None:
    assert pool(2).run(_world) == [True, True]


def _world(rank: int, world: int) -> bool:
    before = groups()
    taken = LEASES.take([(0, 1)])
    LEASES.hold(taken[0, 1], zeropipe)
    LEASES.drop(zeropipe)
    return taken[0, 1] == everyone() and groups() == before


def split(rank: int, world: int) -> tuple[list[Any], list[tuple[int, ...]]]:
    """A world that was started with its device, whose communicators are split: torch's own call is played by gloo."""
    everyone: Any = dist.group.WORLD
    calls: list[Any] = []

    def split_group(parent: Any, lists: list[list[int]], timeout: Any = None) -> Any:
        calls.append((parent is everyone, lists))
        members = dist.get_process_group_ranks(parent)
        mine = [[members[at] for at in ranks] for ranks in lists if rank in (members[at] for at in ranks)]
        everyone.bound_device_id = None
        made = dist.new_group(mine[0], use_local_synchronization=True) if mine else None
        everyone.bound_device_id = torch.device("cpu", 0)
        return made

    with pytest.MonkeyPatch.context() as patch:
        # A stand-in for NCCL: gloo, bound to a device, that says it can.
        patch.setattr(everyone, "bound_device_id", torch.device("cpu", 0))
        patch.setattr(dist.ProcessGroupGloo, "supports_splitting", True)
        patch.setattr(dist, "split_group", split_group)
        engine = engine_with(MICS)
        step(engine, rank)
        again = engine_with(MICS)  # theirs are there
        found = [one.ranks for one in (again._sharded.parts.shard, again._sharded.parts.replicas)]
        for one in (engine, again):
            one.destroy()
            zero.unshard_module(one.module)
    return calls, found


def test_shard_groups_and_replicas_are_two_splits_of_the_world(pool: Pools) -> None:
    """They were a communicator each, in which all ranks of the world took part."""
    for rank, (calls, found) in enumerate(pool(4).run(split)):
        assert calls == [(True, [[0, 1], [2, 3]]), (True, [[0, 2], [1, 3]])]  # alike on every rank
        assert found == [(rank // 2 * 2, rank // 2 * 2 + 1), (rank % 2, rank % 2 + 2)]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(tuple), max_size=8))
def test_what_starts_together_has_no_common_member(lists: list[tuple[int, ...]]) -> None:
    bundles = disjoint(lists)
    assert sorted(ranks for bundle in bundles for ranks in bundle) == sorted(lists)
    for bundle in bundles:
        members = [rank for ranks in bundle for rank in ranks]
        assert len(members) == len(set(members))
    assert bundles == disjoint(lists)
