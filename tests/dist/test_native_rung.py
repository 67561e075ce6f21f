"""What only the path of NCCL has: communicators for channels, reductions retired by the backend's own word."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zeropipe
from tests.helpers.pool import Pools, RankFailure
from tests.helpers.train import bits, config
from tests.helpers.zero3 import WIDTH, Stack, engine_of, x_batch
from zeropipe.comm import collectives as comm
from zeropipe.comm.agreement import meet
from zeropipe.comm.group import world as everyone
from zeropipe.comm.record import Event, inject, record
from zeropipe.errors import ConfigError, DesyncError, UsageError
from zeropipe.runtime.zero.gather import coordinator

DEPTH = 6


def in_flight(rank: int, world: int) -> list[tuple[int, int]]:
    """Of each step: the reductions that were started, and the most that were unfinished at one time."""
    engine = engine_of(Stack(DEPTH), 3, world, zero_optimization={"reduce_bucket_size": 1})
    reducer, steps = engine.optimizer.reducer, []
    for step in range(2):
        started, most = 0, 0

        def look(event: Event) -> None:
            nonlocal started, most
            if event.op == "reduce_to_owners":
                time.sleep(0.01)  # the others come as far: what was sent before is then there
                started, most = started + 1, max(most, len(reducer._in_flight))

        with inject(look):
            engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
        steps.append((started, most))
    engine.destroy()
    return steps


def test_reductions_are_retired_in_the_middle_of_backward_where_ranks_have_no_words(
    native_pool: Pools,
) -> None:
    """They were all kept until its end: a GPU held every gradient of the model."""
    for _, (started, most) in native_pool(3).run(in_flight):
        assert started == 6 * DEPTH + 1  # a bucket for each parameter
        assert most <= started // 2


def words(rank: int, world: int) -> list[list[str]]:
    """What ranks tell each other in each step, of backwards in which nothing is gathered for long."""
    options = {"reduce_bucket_size": 1, "stage3_max_reuse_distance": 10**9}
    engine = engine_of(Stack(DEPTH), 3, world, zero_optimization=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator, "REDUCTIONS_COMPARED_EVERY", 1)
        said: list[list[str]] = []
        for step in range(2):
            with record() as events:
                engine.backward(engine(x_batch(step, rank)).square().mean())
                engine.step()
            said.append([event.label for event in events if event.op == "meet"])
    engine.destroy()
    return said


def test_no_rank_waits_for_words_in_the_middle_of_backward(native_pool: Pools, pool: Pools) -> None:
    """Beside NCCL gloo carries words. One for every 2M elements of backward made every host wait for all others, where
    reductions are retired without them."""
    for of_rank in native_pool(2).run(words):
        for said in of_rank:
            assert said and "backward goes on" not in said
            assert len(said) <= 6
    # Where nobody else knows what has arrived it is said.
    assert all("backward goes on" in said for _, said in pool(2).run(words))


def started_without_gloo(rank: int, world: int) -> tuple[bool, str]:
    """Ranks that part in a world of NCCL alone: in a meeting, and before it."""
    engine = engine_of(Stack(2), 3, world)
    group = engine.optimizer.partitions[0].group
    found = ""
    try:
        meet(f"rank {rank % 2} goes its way", group, patience=timedelta(seconds=20))
    except DesyncError as error:
        found = str(error)
    meet("all are back", group)
    engine.destroy()
    return group.backend == "strict" and group.has_tags is False, found


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_that_part_hear_of_it_in_a_world_without_gloo(native_pool: Pools, size: int) -> None:
    for rank, (native, found) in enumerate(native_pool(size).run(started_without_gloo)):
        assert native
        assert f"this one is at 'rank {rank % 2} goes its way'" in found


def fails_alone(rank: int, world: int, where: str) -> str:
    """The very first thing that this world does: gloo beside it has not been started yet."""
    settings: Any = "/nowhere.json" if rank == 1 and where == "configuration" else config(3, world)
    model = Stack(1).to("meta" if rank == 1 and where == "model" else "cpu")
    with pytest.raises((ConfigError, UsageError, DesyncError)) as caught:
        zeropipe.initialize(model=model, config=settings)
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(("where", "what"), [("configuration", "nowhere.json"), ("model", "meta device")])
def test_a_rank_that_fails_alone_in_initialize_tells_the_others_without_gloo(
    native_pool: Pools, where: str, what: str
) -> None:
    first, second = native_pool(2).run_faulty(fails_alone, where)
    assert (first.kind, second.kind) == ("result", "result"), first.error + second.error
    assert first.value.startswith("DesyncError") and what in first.value
    assert not second.value.startswith("DesyncError")


def odd_order(rank: int, world: int) -> None:
    small, large = torch.ones(2), torch.ones(3)
    for tensor in (small, large) if rank else (large, small):
        comm.all_reduce(tensor, everyone(), async_op=True)
    time.sleep(0.1)


def one_more(rank: int, world: int) -> None:
    if rank == 0:
        comm.broadcast(torch.ones(1), 0, everyone(), async_op=True)


@pytest.mark.parametrize("task", [odd_order, one_more])
def test_another_order_on_one_rank_fails_the_test_that_has_it(task: Any) -> None:
    pools = Pools(native=True)  # its communicators are not in step any more afterwards
    try:
        with pytest.raises((AssertionError, RankFailure), match=r"call \d differs|all_reduce|Gloo|gloo"):
            pools(2).run(task)
    finally:
        pools.close()


def persistent_differ(rank: int, world: int) -> list[list[str]]:
    """Ranks run other modules, whose parameters all stay gathered: allowed, so gathers and reductions interleave in
    different ways."""
    options = {"stage3_param_persistence_threshold": 10**9, "reduce_bucket_size": 1}
    engine = engine_of(Stack(3), 3, world, zero_optimization=options)
    seen: list[list[str]] = []
    for step in range(3):
        engine.module.order = (0, 1, 2) if step < 2 or rank == 0 else (0, 2)
        order: list[str] = []
        with inject(lambda event, order=order: order.append(event.op)):
            engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
        seen.append(order)
    engine.destroy()
    return seen


def test_ranks_may_run_other_modules_whose_parameters_stay_gathered(native_pool: Pools) -> None:
    """On one communicator this was mixed data or a hang. The pool compares what each communicator was asked for."""
    for world in (2, 3):
        native_pool(world).run(persistent_differ)


class Small(nn.Module):
    """A root with a parameter of its own, used last, and a small layer that may be left out at any place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.small, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.where, self.whole = where, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = {"start": "small first last", "middle": "first small last", "end": "first last small"}
        for name in order[self.where].split():
            if name != "small" or self.whole:
                x = torch.tanh(self.get_submodule(name)(x))
        return x * self.scale


def one_rank_runs_a_small_layer(rank: int, world: int, where: str) -> tuple[list[list[str]], list[bytes]]:
    options = {"stage3_param_persistence_threshold": 10**9}
    engine = engine_of(Small(where), 3, world, zero_optimization=options)
    said: list[list[str]] = []
    for step in range(2 * world):
        engine.module.whole = rank == step % world
        with record() as events:
            engine.backward(engine(x_batch(step, rank)).square().mean())
            engine.step()
        said.append([event.label for event in events if event.op == "meet"])
    values = [bits(param.detach().clone()) for param in engine.module.parameters()]
    engine.destroy()
    return said, values


@pytest.mark.parametrize("where", ["start", "middle", "end"])
@pytest.mark.parametrize("rung", ["gloo_pool", "native_pool"])
def test_one_rank_alone_runs_a_small_layer_anywhere(
    rung: str, where: str, request: pytest.FixtureRequest
) -> None:
    """Where it was the last, or the root's own parameter had its gradient before it, ranks said its name at the begin
    of its backward, and parted. Ranks that agreed met before each layer."""
    found = request.getfixturevalue(rung)(2).run(one_rank_runs_a_small_layer, where)
    for said, values in found:
        assert all(words.count("backward") == 1 and len(words) <= 5 for words in said), said
        assert values == found[0][1]


def lanes_of(rank: int, world: int) -> list[str]:
    engine = engine_of(Stack(1), 3, world, zero_optimization={"mics_shard_size": 2})
    group = engine.optimizer.partitions[0].group
    names = [group.on(channel).group_name for channel in (0, 1, 2)]
    again = engine_of(Stack(1), 3, world, zero_optimization={"mics_shard_size": 2})
    other = again.optimizer.partitions[0].group
    assert [other.on(channel).group_name for channel in (1, 2)] == names[1:]  # once for these ranks
    for one in (engine, again):
        one.destroy()
    assert [dist.get_process_group_ranks(group.on(channel)) for channel in (1, 2)] == [list(group.ranks)] * 2
    return names


def test_each_channel_of_a_shard_group_is_a_communicator_that_is_started_once(native_pool: Pools) -> None:
    names = native_pool(4).run(lanes_of)
    assert names[0] == names[1] and names[2] == names[3]
    assert len({name for of_rank in names for name in of_rank}) == 6
