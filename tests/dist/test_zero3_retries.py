"""An exception at any collective of a pass, on every rank, then the same pass again: the bits of a run without it.

A gather that raised after its parameter was marked as under way made every later forward fail.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Block, engine_of, gathered, whole, x_batch
from zeropipe.comm.record import Event, inject, record
from zeropipe.errors import DesyncError

STEPS = 3
AT = 1  # the step in which it happens: the plan of the first one is replayed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        self.block, self.last = Block(), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(x + self.table(torch.arange(4)))).square().mean()


class Injected(RuntimeError):
    """What goes wrong."""


def run_pass(engine: Any, step: int, rank: int) -> None:
    engine.backward(engine(x_batch(step, rank)))


def events_of_a_pass(rank: int, world: int, zero: dict[str, Any]) -> int:
    engine = engine_of(build(Model), 3, world, zero_optimization=zero)
    for step in range(AT + 1):
        with record() as events:
            run_pass(engine, step, rank)
        engine.step()
    engine.destroy()
    return len(events)


def fit(rank: int, world: int, zero: dict[str, Any], raises_at: int | None) -> dict[str, torch.Tensor]:
    """Train; in one step the pass is broken at its event number ``raises_at``, given up and run again."""
    engine = engine_of(build(Model), 3, world, zero_optimization=zero)
    for step in range(STEPS):
        if step == AT and raises_at is not None:
            passed: list[Event] = []

            def fault(event: Event, passed: list[Event] = passed) -> None:
                passed.append(event)
                if len(passed) == raises_at + 1:
                    raise Injected(f"at {event}")

            with pytest.raises(Injected), inject(fault):
                run_pass(engine, step, rank)
            engine.zero_grad()
        run_pass(engine, step, rank)
        engine.step()
        assert gathered(engine.module) == []
    values = whole(engine.module)
    engine.destroy()
    return values


@pytest.mark.parametrize(
    "zero",
    [{}, {"mics_shard_size": 1}, {"stage3_max_reuse_distance": 10**9}],
    ids=["all", "replicas", "kept"],
)
def test_a_pass_that_raised_at_any_collective_can_be_run_again(pool, zero):
    expected = pool(2).run(fit, zero, None)[0]
    for at in range(pool(2).run(events_of_a_pass, zero)[0]):
        for ours in pool(2).run(fit, zero, at):
            assert_bitwise(ours, expected)


class RaisesBetween(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, bad: bool) -> torch.Tensor:
        x = self.a(x)
        if bad:
            raise ValueError("of one rank")
        return self.b(x)  # whose weight and bias are under way together


def destroyed_after_parting(rank: int, world: int) -> str:
    engine = engine_of(RaisesBetween(), 3, world)
    with pytest.raises((ValueError, DesyncError)) as caught:
        # Where shards are read in place, a rank that is quicker hears of it when it wants to go back.
        engine.backward(engine(torch.ones(1, 16), rank == 0).sum())
    engine.destroy()
    return caught.typename


def test_an_engine_whose_ranks_have_parted_can_be_destroyed(pool):
    """It raised once more, for the gathers that were under way beside the one that heard of it."""
    first, second = pool(2).run_faulty(destroyed_after_parting)
    assert (first.kind, second.kind) == ("result", "result"), first.error + second.error
    assert (first.value, second.value) == ("ValueError", "DesyncError")
