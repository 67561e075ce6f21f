"""A shard group that spans nodes gathers between nodes first, then inside each: the same bits, fewer bytes between
nodes, and no rank waits for ever. The nodes are pretended: two ranks each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import zeropipe
from tests.dist.test_data_parallel import gpt, nasty
from tests.dist.test_zero3 import NOTHING_PERSISTS, train3
from tests.dist.test_zero3_counts import BACKWARD, BACKWARD_AHEAD, BYTES, FORWARD, FORWARD_AHEAD
from tests.helpers.data import gpt_batch, token_batch
from tests.helpers.models import TinyGPT
from tests.helpers.pool import Pools
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from tests.helpers.zero3 import Stack, engine_of, x_batch
from zeropipe.comm import collectives
from zeropipe.comm.native import Native
from zeropipe.comm.point_to_point import PointToPoint
from zeropipe.comm.record import Event, inject, record
from zeropipe.errors import ConfigError, DesyncError

TWO_HOPS = {"mics_hierarchical_params_gather": True}
SOON = 20.0  # s; on an idle machine it is milliseconds
ODD = 1  # the rank that goes another way: in a node with rank 0, across from rank 3


@contextmanager
def nodes_of(size: int | str) -> Iterator[None]:
    """Let torchrun have started ``size`` ranks on each node."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_WORLD_SIZE", str(size))
        yield


def hops_config(world: int, **extra: Any) -> dict[str, Any]:
    zero = {"stage": 3, **TWO_HOPS, **extra.pop("zero", {})}
    return config(3, world, zero_optimization=zero, **extra)


def train_on_nodes(rank: int, world: int, node: int, *args: Any) -> Any:
    with nodes_of(node):
        return train3(rank, world, *args)


# The same numbers.


@pytest.mark.parametrize("zero", [{}, NOTHING_PERSISTS], ids=["persistent", "nothing persists"])
@pytest.mark.parametrize("model", ["gpt", "nasty"])
def test_training_is_that_of_one_hop(pool: Pools, model: str, zero: dict[str, Any]) -> None:
    factory, make = (gpt, gpt_batch) if model == "gpt" else (nasty, token_batch)
    flat = {"stage": 3, **zero}
    expected = pool(4).run(train3, factory, make, config(3, 4, zero_optimization=flat), 3)
    ours = pool(4).run(train_on_nodes, 2, factory, make, hops_config(4, zero=zero), 3)
    for mine, other in zip(ours, expected, strict=True):
        assert mine["losses"] == other["losses"]
        assert_bitwise(mine["weights"], other["weights"])


def test_training_in_bf16_with_accumulation_is_that_of_one_hop(pool: Pools) -> None:
    extra = {"bf16": {"enabled": True}, "gas": 2}
    flat = config(3, 4, zero_optimization={"stage": 3, **NOTHING_PERSISTS}, **extra)
    expected = pool(4).run(train3, gpt, gpt_batch, flat, 2)
    ours = pool(4).run(train_on_nodes, 2, gpt, gpt_batch, hops_config(4, zero=NOTHING_PERSISTS, **extra), 2)
    for mine, other in zip(ours, expected, strict=True):
        assert_bitwise(mine["weights"], other["weights"])


def train_on_a_mesh(rank: int, world: int, two_hops: bool) -> Any:
    """One replica, shards over all four: the second way to say where the shards are."""
    from torch.distributed.device_mesh import init_device_mesh

    zero = {"stage": 3, **NOTHING_PERSISTS, **(TWO_HOPS if two_hops else {})}
    with nodes_of(2):
        mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp_replicate", "dp_shard"))
        engine, *_ = zeropipe.initialize(
            model=gpt(), config=config(3, world, zero_optimization=zero), mesh_param=mesh
        )
    with record() as events:
        for step in range(2):
            engine.backward(engine(*gpt_batch(step, rank)))
            engine.step()
    weights = {k: v.clone() for k, v in engine.module.state_dict().items()}
    engine.destroy()
    return weights, {e.ranks for e in events if e.op == "all_gather"}


def test_a_mesh_gathers_in_two_hops_too(pool: Pools) -> None:
    expected = pool(4).run(train_on_a_mesh, False)
    ours = pool(4).run(train_on_a_mesh, True)
    for rank, (mine, other) in enumerate(zip(ours, expected, strict=True)):
        assert_bitwise(mine[0], other[0])
        assert other[1] == {(0, 1, 2, 3)}
        assert mine[1] == {((0, 2), (1, 3))[rank % 2], ((0, 1), (2, 3))[rank // 2]}


def test_groups_of_two_nodes_with_replicas(pool: Pools) -> None:
    """Eight ranks, nodes of two, shards among four: both kinds of MiCS's groups beside each other."""
    zero = {"mics_shard_size": 4, **NOTHING_PERSISTS}
    flat = config(3, 8, zero_optimization={"stage": 3, **zero})
    expected = pool(8).run(train3, gpt, gpt_batch, flat, 2, timeout=120)
    ours = pool(8).run(train_on_nodes, 2, gpt, gpt_batch, hops_config(8, zero=zero), 2, timeout=120)
    pool(8).close()
    for mine, other in zip(ours, expected, strict=True):
        assert_bitwise(mine["weights"], other["weights"])


@pytest.mark.parametrize("native", [False, True], ids=["gloo", "native calls"])
def test_the_backends_own_calls_give_the_same(pool: Pools, native: bool) -> None:
    """What runs on NCCL, here with gloo's own all-gather."""
    assert pool(4).run(_gather_by, native) == [True] * 4


def _gather_by(rank: int, world: int, native: bool) -> bool:
    from zeropipe.comm.group import world as all_ranks
    from zeropipe.config.schema_zero import ZeroOptimization
    from zeropipe.runtime.zero.replication import shard_group

    with nodes_of(2), collectives.carried_by(Native() if native else PointToPoint()):
        group = shard_group(all_ranks(), ZeroOptimization(stage=3, mics_hierarchical_params_gather=True))
        assert group.hops is not None
        for numel in (1, 5, 4099):
            shard = torch.arange(numel, dtype=torch.float64) + 10_000 * rank
            whole = torch.empty(4 * numel, dtype=torch.float64)
            work = collectives.all_gather(whole, shard, group, label="whole", async_op=True)
            work.wait()
            work.wait()
            want = torch.cat([torch.arange(numel, dtype=torch.float64) + 10_000 * r for r in range(4)])
            assert_bitwise(whole, want)
            own = whole[rank * numel : (rank + 1) * numel]
            whole[: rank * numel] = whole[(rank + 1) * numel :] = -1
            collectives.all_gather(whole, own, group, label="in place", guarded=not native)
            assert_bitwise(whole, want)
    return True


# What is sent.


def three_steps(rank: int, world: int, zero: dict[str, Any]) -> list[list[Event]]:
    with nodes_of(2):
        engine = engine_of(Stack(2), 3, world, zero_optimization={**TWO_HOPS, **zero})
    steps = []
    for step in range(3):
        with record() as events:
            engine.backward(engine(x_batch(step, rank)).square().mean())
            engine.step()
        steps.append([event for event in events if event.op == "all_gather"])
    engine.destroy()
    return steps


def hops_of(gathers: list[tuple[str, str, int]], rank: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """Both hops of each gather, one after the other."""
    across, node = ((0, 2), (1, 3))[rank % 2], ((0, 1), (2, 3))[rank // 2]
    found = []
    for _, label, nbytes in gathers:
        found += [(label, nbytes // 2, across), (label, nbytes, node)]
    return found


def sent(events: list[Event]) -> list[tuple[str, int, tuple[int, ...]]]:
    return [(event.label, event.bytes, event.ranks) for event in events]


def test_every_gather_goes_in_two_hops_and_nothing_else_is_sent(pool: Pools) -> None:
    for rank, steps in enumerate(pool(4).run(three_steps, {"stage3_prefetch_bucket_size": 0})):
        unordered = sorted(hops_of(FORWARD + BACKWARD, rank))
        assert sorted(sent(steps[1])) == sorted(sent(steps[2])) == unordered
        # All first hops of a unit are on their way before the first of its second hops.
        two = [name for name in BYTES if name.startswith("norm.")]
        start = [("blocks.0." + name, size, place) for place, size in _first_unit(rank) for name in two]
        assert sent(steps[1])[:4] == start


def _first_unit(rank: int) -> list[tuple[tuple[int, ...], int]]:
    across, node = ((0, 2), (1, 3))[rank % 2], ((0, 1), (2, 3))[rank // 2]
    return [(across, BYTES["norm.weight"] // 2), (node, BYTES["norm.weight"])]


def test_a_prefetch_starts_the_first_hop_ahead_and_the_second_at_use(pool: Pools) -> None:
    for rank, steps in enumerate(pool(4).run(three_steps, {"stage3_prefetch_bucket_size": 600})):
        assert sorted(sent(steps[2])) == sorted(hops_of(FORWARD_AHEAD + BACKWARD_AHEAD, rank))
        labels = [(e.label, e.ranks) for e in steps[2]]
        across, node = ((0, 2), (1, 3))[rank % 2], ((0, 1), (2, 3))[rank // 2]
        # F1 fetch 1 2: the first hop of "up" goes with "norm", its second when it is used.
        norm = FORWARD_AHEAD[0][1]
        assert labels.index(("blocks.0.up.weight", across)) < labels.index((norm, node))
        assert labels.index(("blocks.0.up.weight", node)) > labels.index((norm, node))


def test_bytes_between_nodes_are_half_of_those_of_one_hop(pool: Pools) -> None:
    """A rank sends its shard to each member of the event's group; with two ranks per node, half as often across."""
    hops = pool(4).run(three_steps, {"stage3_prefetch_bucket_size": 0})
    flat = pool(4).run(
        three_steps, {"stage3_prefetch_bucket_size": 0, "mics_hierarchical_params_gather": False}
    )
    for rank in range(4):
        assert {e.ranks for e in flat[rank][2]} == {(0, 1, 2, 3)}
        assert _crossing(hops[rank][2], rank) * 2 == _crossing(flat[rank][2], rank) > 0


def _crossing(events: list[Event], rank: int) -> int:
    """Bytes that ``rank`` sends to other nodes."""
    there = [(e, [other for other in e.ranks if other // 2 != rank // 2]) for e in events]
    return sum(event.bytes // event.group_size * len(others) for event, others in there)


# Where one hop remains.


@pytest.mark.parametrize("nodes", [(1, 1, 1, 1), (4, 4, 4, 4), (3, 3, 3, 3), (2, 2, 2, 4), (8, 8, 8, 8)])
def test_one_hop_remains_in_one_node_and_without_alignment(pool: Pools, nodes: tuple[int, ...]) -> None:
    for ranks in pool(4).run(_ranks_of_gathers, nodes):
        assert ranks == {(0, 1, 2, 3)}


def _ranks_of_gathers(rank: int, world: int, nodes: tuple[int, ...]) -> set[tuple[int, ...]]:
    with nodes_of(nodes[rank]):
        engine = engine_of(Stack(1), 3, world, zero_optimization=TWO_HOPS)
    with record() as events:
        engine.backward(engine(x_batch(0, rank)).square().mean())
        engine.step()
    engine.destroy()
    return {event.ranks for event in events if event.op == "all_gather"}


def test_a_wrong_number_of_ranks_per_node_is_an_error(pool: Pools) -> None:
    assert pool(1).run(_wrong_node) == ["LOCAL_WORLD_SIZE"]


def _wrong_node(rank: int, world: int) -> str:
    from zeropipe.comm.group import node_size

    with nodes_of("two"), pytest.raises(ConfigError) as caught:
        node_size()
    return "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in str(caught.value) else str(caught.value)


# Init, edits, and gathers that the user asks for.


def test_a_model_built_as_shards_an_edit_and_whole_again(pool: Pools) -> None:
    for whole, edited in pool(4).run(_built):
        assert_bitwise(whole, edited)


def _built(rank: int, world: int) -> Any:
    settings = hops_config(4, zero=NOTHING_PERSISTS)
    with nodes_of(2):
        with zeropipe.zero.Init(config_dict_or_path=settings):
            model = TinyGPT()
        engine = zeropipe.initialize(model=model, config=settings)[0]
    name, param = next(iter(engine.module.named_parameters()))
    engine.backward(engine(*gpt_batch(0, rank)))
    engine.step()
    with record() as events, zeropipe.zero.GatheredParameters([param], modifier_rank=2):
        assert {e.group_size for e in events if e.op == "all_gather"} == {2}
        if rank == 2:
            param.data.fill_(3.0)
    with zeropipe.zero.GatheredParameters([param]):
        edited = param.detach().clone()
    assert (edited == 3.0).all(), "the edit reaches every rank"
    engine.destroy()
    zeropipe.zero.unshard_module(model)
    return param.detach().clone(), edited


def test_a_rank_that_reads_later_keeps_nobody_waiting(pool: Pools) -> None:
    """Rank 0 reads what it unsharded at once; the others come to it after a barrier that rank 0 reaches last."""
    assert pool(4).run(_read_early) == [True] * 4


def _read_early(rank: int, world: int) -> bool:
    with nodes_of(2):
        engine = engine_of(Stack(1), 3, world, zero_optimization=TWO_HOPS)
    ahead = zeropipe.zero.unshard(engine.module)
    if rank == 0:
        ahead.wait()
    torch.distributed.barrier()
    ahead.wait()
    whole = engine.module.head.weight.numel() > 0
    zeropipe.zero.reshard(engine.module)
    engine.destroy()
    return whole


# Ranks that go different ways.


def go_astray(rank: int, world: int, how: str, zero: dict[str, Any]) -> tuple[str, str, float]:
    """Two steps together, then rank ODD does something else; what each rank is told, and after how long."""
    with nodes_of(2):
        engine = engine_of(Stack(), 3, world, zero_optimization={**TWO_HOPS, **zero})
    for step in range(2):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    begun = time.monotonic()
    try:
        if rank == ODD and how == "raises":
            engine.module.blocks[1].register_forward_pre_hook(_fail)
        if rank == ODD and how == "skips":
            engine.module.order = (0, 2)
        for _ in range(2):
            engine.backward(engine(x_batch(1, rank)).square().mean())
            engine.step()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begun
    return "", "", time.monotonic() - begun


def _fail(module: Any, args: Any) -> None:
    raise ValueError("not today")


PREFETCH = [{}, {"stage3_prefetch_bucket_size": 0}, {"stage3_prefetch_bucket_size": 2500}]


@pytest.mark.parametrize("zero", PREFETCH, ids=["prefetch all", "prefetch nothing", "prefetch some"])
def test_a_rank_that_skips_a_module_stops_every_rank_with_its_name(pool: Pools, zero: dict[str, Any]) -> None:
    for outcome in pool(4).run_faulty(go_astray, "skips", zero, timeout=60):
        assert outcome.kind == "result", (outcome.kind, outcome.error)
        kind, message, seconds = outcome.value
        assert kind == DesyncError.__name__, message
        assert "ranks went different ways" in message
        assert seconds < SOON


@pytest.mark.parametrize("zero", PREFETCH, ids=["prefetch all", "prefetch nothing", "prefetch some"])
def test_a_rank_that_raises_tells_the_others(pool: Pools, zero: dict[str, Any]) -> None:
    """It has gathers under way that it does not use any more, and stays alive."""
    outcomes = pool(4).run_faulty(go_astray, "raises", zero, timeout=60)
    for outcome in outcomes:
        assert outcome.kind == "result", (outcome.kind, outcome.error)
        kind, message, seconds = outcome.value
        assert kind == ("ValueError" if outcome.rank == ODD else DesyncError.__name__), message
        assert "not today" in message if outcome.rank == ODD else "ValueError raised in" in message
        assert seconds < SOON


def skip_in_forward(rank: int, world: int, zero: dict[str, Any]) -> list[torch.Tensor]:
    """Inference: rank ODD has a module gathered ahead that it then skips, and goes on with what follows."""
    with nodes_of(2):
        engine = engine_of(Stack(), 3, world, zero_optimization={**TWO_HOPS, **zero})
    outputs = []
    with torch.no_grad():
        for step in range(
            3
        ):  # the next pass would begin with another plan on rank ODD, which is an error in time
            engine.module.order = (0, 2) if rank == ODD and step == 2 else (0, 1, 2)
            outputs.append(engine(x_batch(step, 0)))
    engine.destroy()
    return outputs


def test_a_rank_that_skips_what_is_gathered_already_serves_it_still(pool: Pools) -> None:
    zero = {"stage3_prefetch_bucket_size": 100_000}
    results = pool(4).run(skip_in_forward, zero)
    for rank, outputs in enumerate(results):
        for step, (ours, first) in enumerate(zip(outputs, results[0], strict=True)):
            if rank != ODD or step != 2:
                assert_bitwise(ours, first)
    assert not torch.equal(results[ODD][2], results[0][2])


def fail_at_second_hop(rank: int, world: int, how: str) -> tuple[str, float]:
    """Rank ODD gets into trouble between the two hops of a gather."""
    with nodes_of(2):
        engine = engine_of(Stack(), 3, world, zero_optimization=TWO_HOPS)
    engine.backward(engine(x_batch(0, rank)).square().mean())
    engine.step()

    def trouble(event: Event) -> None:
        if rank == ODD and event.op == "all_gather" and event.ranks == (0, 1):
            if how == "dies":
                import os

                os._exit(9)
            raise OSError("no memory")

    begun = time.monotonic()
    try:
        with inject(trouble):
            engine.backward(engine(x_batch(1, rank)).square().mean())
            engine.step()
    except (RuntimeError, OSError) as error:
        return type(error).__name__, time.monotonic() - begun
    return "", time.monotonic() - begun


@pytest.mark.parametrize("how", ["dies", "fails"])
def test_trouble_between_the_hops_is_an_error_on_every_rank(pool: Pools, how: str) -> None:
    for outcome in pool(4).run_faulty(fail_at_second_hop, how, timeout=60):
        if outcome.rank == ODD and how == "dies":
            assert outcome.kind == "died"
            continue
        assert outcome.kind == "result", (outcome.kind, outcome.error)
        kind, seconds = outcome.value
        assert (
            kind == "OSError"
            if outcome.rank == ODD
            else kind in ("CommunicationError", "DesyncError", "RuntimeError")
        )
        assert seconds < SOON
