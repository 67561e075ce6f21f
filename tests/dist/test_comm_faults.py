"""A rank that dies or stays away gives the others an error within seconds, never a hang."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch

from tests.helpers.pool import Pools
from zeropipe.comm import collectives as comm
from zeropipe.comm.group import new_group, start_groups, world
from zeropipe.comm.leases import LEASES
from zeropipe.errors import CommunicationError

SOON = 15.0  # s; on an idle machine it is milliseconds
NUMELS = [10, 200_000]
OPERATIONS = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all"]


def start(operation: str, numel: int) -> comm.Work:
    g = world()
    whole, part = torch.ones(numel * g.size), torch.ones(numel)
    if operation == "all_reduce":
        return comm.all_reduce(whole, g, label="doomed", async_op=True)
    if operation == "reduce_scatter":
        return comm.reduce_scatter(part, whole, g, label="doomed", async_op=True)
    if operation == "all_gather":
        return comm.all_gather(whole, part, g, label="doomed", async_op=True)
    if operation == "broadcast":
        return comm.broadcast(whole, 1, g, label="doomed", async_op=True)
    return comm.all_to_all(torch.empty_like(whole), whole, g, label="doomed", async_op=True)


def lose_rank_1(rank: int, size: int, operation: str, numel: int) -> str:
    comm.all_reduce(torch.ones(1), world())
    if rank == 1:
        time.sleep(0.2)
        os._exit(9)
    begun = time.monotonic()
    with pytest.raises(CommunicationError) as caught:
        start(operation, numel).wait()
    assert time.monotonic() - begun < SOON
    return str(caught.value)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_rank_that_dies_is_an_error_on_the_other(pool: Pools, operation: str) -> None:
    outcomes = pool(2).run_faulty(lose_rank_1, operation, 50_000)
    assert (outcomes[1].kind, outcomes[1].exitcode) == ("died", 9)
    assert outcomes[0].kind == "result", outcomes[0].error
    assert "[rank 0]" in outcomes[0].value
    assert f"{operation} 'doomed' among ranks [0, 1]" in outcomes[0].value
    assert "Fix:" in outcomes[0].value


@pytest.mark.parametrize("numel", NUMELS)
def test_every_survivor_of_four_is_told(pool: Pools, numel: int) -> None:
    outcomes = pool(4).run_faulty(lose_rank_1, "all_reduce", numel)
    assert outcomes[1].kind == "died"
    for survivor in (0, 2, 3):
        assert outcomes[survivor].kind == "result", outcomes[survivor].error


def exchange_with_the_lost(rank: int, size: int, operation: str) -> list[str]:
    """The first error is of the one who waits; from then on the connection is known to be closed."""
    comm.all_reduce(torch.ones(1), world())
    if rank == 1:
        os._exit(9)
    exchange, errors = comm.send if operation == "send" else comm.recv, []
    for _ in range(3):
        with pytest.raises(CommunicationError) as caught:
            exchange(torch.ones(50_000), 1, world(), label="doomed")
        errors.append(str(caught.value))
    return errors


@pytest.mark.parametrize("operation", ["send", "recv"])
def test_a_message_to_a_rank_that_is_known_to_be_gone_is_the_same_error(pool: Pools, operation: str) -> None:
    outcome = pool(2).run_faulty(exchange_with_the_lost, operation)[0]
    assert outcome.kind == "result", outcome.error
    assert all(f"[rank 0] {operation} 'doomed'" in error and "Fix:" in error for error in outcome.value)


def wait_for_rank_1(rank: int, size: int, operation: str) -> str:
    g = new_group([1, 0], timeout=timedelta(seconds=1))
    assert g is not None
    if rank == 1:
        return ""  # alive, but it never takes part
    begun = time.monotonic()
    if operation == "recv":
        work = comm.recv(torch.empty(4), 1 - g.rank, g, label="lonely", async_op=True)
    else:
        work = comm.all_reduce(torch.ones(9000), g, label="lonely", async_op=True)
    with pytest.raises(CommunicationError) as caught:
        work.wait()
    assert time.monotonic() - begun < SOON
    return str(caught.value)


@pytest.mark.parametrize("operation", ["all_reduce", "recv"])
def test_a_rank_that_stays_away_is_an_error_after_the_groups_timeout(pool: Pools, operation: str) -> None:
    outcomes = pool(2).run_faulty(wait_for_rank_1, operation)
    assert [o.kind for o in outcomes] == ["result", "result"], outcomes[0].error
    assert f"{operation} 'lonely'" in outcomes[0].value


# Where ranks have no tags: the backend's own collectives, each channel on a communicator of its own.


def begun_alone(rank: int, size: int, channels: list[int], limit: float, aborts: bool = False) -> list[str]:
    """All ranks but rank 1 begin a collective on each of ``channels`` and wait for it, or for the watchdog's abort."""
    started = start_groups([tuple(range(size - 1, -1, -1))], timedelta(seconds=limit))
    group = LEASES.with_lanes(*started.values(), 2)
    assert all(group.on(c) is not group.pg for c in (1, 2)) and group.timeout == timedelta(seconds=limit)
    comm.all_reduce(torch.ones(2), group, label="the last that all did")
    if rank == 1:
        time.sleep(1.5 * limit)  # alive, but it never takes part
        return []
    shard, whole = torch.ones(3), torch.ones(3 * size)
    run = comm.Run(whole, 0, 3)
    begin = [
        lambda: comm.all_reduce(whole, group, label="the norm", async_op=True),
        lambda: comm.all_gather_many([whole], [shard], group, label="block.0", async_op=True, channel=1),
        lambda: comm.reduce_run(run, shard, group, label="bucket 4", async_op=True, channel=2),
    ]
    works = [begin[channel]() for channel in channels]
    if aborts:
        time.sleep(limit)
        os.abort()
    told = []
    for work in works:
        with pytest.raises(CommunicationError) as caught:
            work.wait()
        told.append(str(caught.value))
    return told


LABELS = ["all_reduce 'the norm'", "all_gather 'block.0'", "reduce_to_owners 'bucket 4'"]


@pytest.mark.parametrize(("size", "channel"), [(2, 0), (3, 1), (3, 2)])
def test_a_native_collective_that_does_not_end_names_itself_and_what_came_before(
    native_pool: Pools, size: int, channel: int
) -> None:
    outcomes = native_pool(size).run_faulty(begun_alone, [channel], limit=1.0)
    for rank in set(range(size)) - {1}:
        assert outcomes[rank].kind == "result", outcomes[rank].error
        (told,) = outcomes[rank].value
        assert f"[rank {rank}] {LABELS[channel]} among ranks" in told
        assert "all_reduce 'the last that all did'" in told and LABELS[channel] in told.split("last calls")[1]


def test_it_is_said_before_a_watchdog_ends_the_process(native_pool: Pools) -> None:
    """In NCCL's abort no Python runs, and what it prints has no names."""
    outcomes = native_pool(3).run_faulty(begun_alone, [0, 1, 2], limit=4.0, aborts=True)
    for rank in (0, 2):
        assert (outcomes[rank].kind, outcomes[rank].exitcode) == ("died", -signal.SIGABRT)
        for label in LABELS:
            assert f"[rank {rank}] {label} among ranks [0, 1, 2] has not completed" in outcomes[rank].output
        assert "The last calls of this rank: all_reduce 'the last that all did', " in outcomes[rank].output
    assert outcomes[1].kind == "result" and "has not completed" not in outcomes[1].output
