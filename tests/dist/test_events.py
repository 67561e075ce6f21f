"""The collectives of a step, one by one and in bytes, against the traffic that each stage promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.train import config
from zeropipe.comm.record import Event, record

STAGES = (0, 1, 2)
LAYERS = 4
LAYER = 16 * 16  # elements of one layer
P = LAYERS * LAYER  # divisible by the ranks and by ALIGN: no padding


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # []
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.float().square().mean()


def batch(step: int, rank: int, micro: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(4, 16, generator=generator(step, rank, micro)).to(dtype)


def steps(
    rank: int, world: int, stage: int, extra: dict[str, Any], gas: int, how: str = "engine"
) -> list[list[Event]]:
    """Events of two boundaries."""
    engine, *_ = zeropipe.initialize(model=build(Layers), config=config(stage, world, gas=gas, **extra))
    dtype = engine.module.layers[0].weight.dtype
    found = []
    for step in range(2):
        with record() as events:
            for micro in range(gas):
                loss = engine(batch(step, rank, micro, dtype))
                if how == "no_sync" and micro < gas - 1:
                    with engine.no_sync():
                        engine.backward(loss)
                elif how == "plain":
                    loss.backward()
                else:
                    engine.backward(loss)
                engine.step()
        found.append(events)
    engine.destroy()
    return found


def shown(events: list[Event]) -> list[tuple[str, str, int]]:
    return [(e.op, e.label, e.bytes) for e in events]


NORM = ("all_reduce", "gradient norm")


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("size", [4, 2], ids=["fp32", "bf16"])
def test_a_boundary_is_the_promised_traffic(pool, world, size):
    extra = {"bf16": {"enabled": True}} if size == 2 else {}
    gather = [("all_gather", "parameters", P * size)]
    expected = {
        0: [("all_reduce", "gradients", P * size)],  # an all-reduce moves twice its bytes: 2P
        1: [("reduce_to_owners", "gradients", P * size), *gather],
        2: [("reduce_to_owners", "gradients", P * size), *gather],
    }
    for stage in STAGES:
        for rank_events in pool(world).run(steps, stage, extra, 1):
            for events in rank_events:
                found = shown(events)
                norms = [e for e in found if e[:2] == NORM]
                assert len(norms) == 1 and norms[0][2] <= 64  # bytes: a few numbers
                assert [e for e in found if e[:2] != NORM] == expected[stage]
                assert {e.group_size for e in events} == {world}


@pytest.mark.parametrize("how", ["engine", "plain", "no_sync"])
@pytest.mark.parametrize("stage", STAGES)
def test_traffic_does_not_depend_on_the_accumulation(pool, stage, how):
    once = pool(2).run(steps, stage, {}, 1)[0][1]
    for events in pool(2).run(steps, stage, {}, 4, how)[0]:
        if (
            stage == 2 and how != "no_sync"
        ):  # it reduces each micro-batch, and keeps only its shard of the sum
            reductions = [e for e in events if e.label == "gradients"]
            assert len(reductions) == 4
            assert [e for e in events if e.label != "gradients"] == [
                e for e in once if e.label != "gradients"
            ]
        else:
            assert shown(events) == shown(once)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    ("bucket", "buckets"),
    [(1, [LAYER] * 4), (LAYER, [LAYER] * 4), (2 * LAYER, [2 * LAYER] * 2), (3 * LAYER, [3 * LAYER, LAYER])],
)
def test_buckets_are_of_the_configured_size_and_the_last_layers_go_first(pool, bucket, buckets, overlap):
    extra = {"zero_optimization": {"reduce_bucket_size": bucket, "overlap_comm": overlap}}
    for stage in STAGES:
        merged = {"zero_optimization": {"stage": stage, **extra["zero_optimization"]}}
        for events in pool(2).run(steps, stage, merged, 1)[0]:
            assert [e.bytes for e in events if e.label == "gradients"] == [4 * n for n in buckets]
            assert all(e.async_op for e in events if e.label == "gradients")


def odd_ends(rank: int, world: int, kind: str) -> list[Any]:
    found = []
    for stage in STAGES:
        model = build(Layers)
        if kind == "frozen":
            model.layers[0].requires_grad_(False)
        fp16 = {"fp16": {"enabled": True, "loss_scale": 8.0}} if kind == "overflow" else {}
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world, **fp16))
        loss = engine(batch(0, rank, 0, model.layers[0].weight.dtype))
        if kind == "overflow":
            loss = loss * float("inf")
        engine.backward(loss)
        with record() as events:
            engine.step()
        found.append((sorted(e.label for e in events), engine.was_step_applied()))
        engine.destroy()
    return found


def test_a_skipped_step_gathers_nothing(pool):
    expected = ["gradient norm", "overflow"]
    for found in pool(2).run(odd_ends, "overflow"):
        assert found == [(expected, False)] * 3


def test_frozen_parameters_cost_no_traffic(pool):
    for found in pool(2).run(odd_ends, "frozen"):
        assert found == [
            (["gradient norm"], True),
            (["gradient norm", "parameters"], True),
            (["gradient norm", "parameters"], True),
        ]


def forward_only(rank: int, world: int) -> None:
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=build(Layers), config=config(stage, world))
        with record() as events:
            engine.eval()
            with torch.no_grad():
                engine(batch(0, rank, 0, torch.float32))
        assert events == []
        engine.destroy()


def test_evaluation_communicates_nothing(pool):
    pool(2).run(forward_only)


def alone(rank: int, world: int) -> None:
    model = build(Layers)
    engine, *_ = zeropipe.initialize(model=model, config=config(2, world))
    with record() as events:
        engine.backward(engine(batch(0, rank, 0, torch.float32)))
        engine.step()
    # World 1: the same code path, and the seam sends nothing.
    assert all(e.group_size == 1 for e in events)
    engine.destroy()


def test_world_one(pool):
    pool(1).run(alone)
