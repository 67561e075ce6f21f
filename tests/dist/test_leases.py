"""Process groups that engines make are shared, and end with the last engine or shard that needs them."""

from __future__ import annotations

import gc
from typing import Any

import torch.distributed as dist

import zeropipe
from tests.dist.test_zero_two_hops import TWO_HOPS, nodes_of
from tests.helpers.pool import Pools
from tests.helpers.zero3 import Stack, engine_of, x_batch
from zeropipe import zero
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
    import torch

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
