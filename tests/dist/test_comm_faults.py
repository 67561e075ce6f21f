"""A rank that dies or stays away gives the others an error within seconds, never a hang."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch

from tests.helpers.pool import Pools
from zeropipe.comm import collectives as comm
from zeropipe.comm.group import new_group, world
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
