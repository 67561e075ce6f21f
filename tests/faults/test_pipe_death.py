"""A rank that dies in the middle of a pipeline stops the others in seconds."""

from __future__ import annotations

import time

from tests.dist.pipe_models import batches, specs
from tests.dist.test_pipe_engine import MICRO, config, engine_of
from tests.helpers.worker import point
from zeropipe.errors import CommunicationError


def trains_until_it_breaks(rank: int, world: int) -> float:
    engine = engine_of(world, 1, specs(blocks=4), config())
    engine.train_batch(iter(batches(MICRO)))
    begin = time.monotonic()
    point("trained")
    try:
        engine.train_batch(iter(batches(MICRO)))
    except CommunicationError:
        return time.monotonic() - begin
    raise AssertionError("nothing happened")


def test_a_killed_rank_stops_the_others(pool):
    outcomes = pool(3).run_faulty(trains_until_it_breaks, kill={1: "trained"}, timeout=50)
    assert [o.kind for o in outcomes] == ["result", "died", "result"], [o.error for o in outcomes]
    assert all(o.value < 10 for o in outcomes if o.kind == "result")
