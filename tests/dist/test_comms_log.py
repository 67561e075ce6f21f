"""The section ``comms_logger``: how often, how much and how long, and nothing at all where it is not asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

import zeropipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.train import config, train
from zeropipe.comm.collectives import all_reduce
from zeropipe.comm.group import world as everyone
from zeropipe.comm.record import SEAM, record
from zeropipe.comm.summary import CommsLog, Tally

mlp = partial(build, MLP)


def counted(
    rank: int, world: int, section: dict[str, Any]
) -> tuple[dict[tuple[str, int], int], list[Tally], Any]:
    SEAM.log.reset()
    try:
        with record() as events:
            train(rank, world, mlp, mlp_batch, config(3, world, comms_logger=section), 2)
        seen: dict[tuple[str, int], int] = {}
        for event in events:
            if event.ranks:
                seen[event.op, event.bytes] = seen.get((event.op, event.bytes), 0) + 1
        return seen, SEAM.log.tallies(), list(SEAM.log.lines())
    finally:
        SEAM.log.stop()
        SEAM.log.reset()


def test_every_collective_is_counted_with_its_bytes_and_time(pool):
    for seen, tallies, lines in pool(2).run(counted, {"enabled": True}):
        found: dict[tuple[str, int], int] = {}
        for one in tallies:
            found[one.op, one.bytes] = found.get((one.op, one.bytes), 0) + one.count
        # What initialize sent before the engine was whole is in the record alone.
        assert found == {key: seen[key] for key in found}
        assert {op for op, _ in found} == {"all_gather", "reduce_to_owners", "all_reduce"}
        assert all(one.seconds > 0 for one in tallies if one.bytes)
        assert len(lines) == 1 + len(tallies)


def test_only_what_was_named_and_nothing_unless_asked_for(pool):
    for _, tallies, _ in pool(2).run(
        counted, {"enabled": True, "prof_all": False, "prof_ops": ["all_reduce"]}
    ):
        assert {one.op for one in tallies} == {"all_reduce"}
    for _, tallies, lines in pool(2).run(counted, {"enabled": False}):
        assert tallies == [] and len(lines) == 1


def test_operations_may_be_named_as_deepspeeds_configurations_do(pool):
    named = {
        "enabled": True,
        "prof_all": False,
        "prof_ops": ["reduce_scatter_tensor", "all_gather_into_tensor"],
    }
    for _, tallies, _ in pool(2).run(counted, named):
        assert {one.op for one in tallies} == {"reduce_to_owners", "all_gather"}


def summed(rank: int, world: int) -> int:
    SEAM.log.reset()
    SEAM.log.start()
    try:
        for _ in range(3):
            all_reduce(torch.ones(1000), everyone())
        SEAM.log.stop()
        zeropipe.comm.log_summary(show_straggler=True)
        return SEAM.log.tallies()[0].count
    finally:
        SEAM.log.reset()


def test_the_summary_is_collective_and_counts_what_ran(pool):
    assert pool(2).run(summed) == [3, 3]


def test_bandwidth_of_the_bus_is_the_formula():
    log = CommsLog()
    log.start()
    call = object()
    log.began(call, "all_reduce", 8_000, 4)
    log.ended(call)
    log.ended(call)  # a second wait counts nothing
    (tally,) = log.tallies()
    assert tally.bus_bytes == 8_000 * 2 * 3 / 4 and tally.count == 1
    assert Tally("all_gather", 8_000, 4).bus_bytes == 8_000 * 3 / 4
    assert "all_reduce" in list(log.lines())[1]
