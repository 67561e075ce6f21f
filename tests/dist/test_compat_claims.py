"""Where a script written for DeepSpeed gets something better without asking; docs/from-deepspeed.md names these."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zeropipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.train import config

PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 8}},
}


def step_counts(rank: int, world: int, stage: int, precision: str) -> list[set[float]]:
    engine, optimizer, *_ = zeropipe.initialize(
        model=build(MLP), config=config(stage, world, **PRECISIONS[precision])
    )
    counts = []
    for step in range(3):
        counts.append({float(state["step"]) for state in optimizer.state.values() if "step" in state})
        engine.backward(engine(*(t.to(next(engine.parameters()).dtype) for t in mlp_batch(step, rank))))
        engine.step()
    engine.destroy()
    return counts


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_building_the_engine_is_no_step(pool, stage, precision):
    """Adam's bias correction counts steps: one taken while the optimizer is built would change the first updates."""
    for counts in pool(2).run(step_counts, stage, precision):
        assert counts[1:] == [{1.0}, {2.0}]
        assert counts[0] <= {0.0}


class Wrapper(torch.optim.Optimizer):
    """What Accelerate puts around the returned optimizer."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]
    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:
        pass  # Accelerate has stepped in backward


def one_cycle(rank: int, world: int, stage: int) -> list[float]:
    engine, optimizer, *_ = zeropipe.initialize(model=build(MLP), config=config(stage, world))
    schedule = torch.optim.lr_scheduler.OneCycleLR(Wrapper(optimizer), max_lr=0.1, total_steps=10)
    rates = []
    for step in range(3):
        engine.backward(engine(*mlp_batch(step, rank)))
        engine.step()
        schedule.step()
        rates += engine.get_lr()
    engine.destroy()
    return rates


@pytest.mark.parametrize("stage", [0, 3])
def test_a_schedule_that_reads_defaults_is_built_on_the_returned_optimizer(pool, stage):
    plain = torch.optim.AdamW(build(MLP).parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(plain, max_lr=0.1, total_steps=10)
    expected = []
    for _ in range(3):
        plain.step()
        schedule.step()
        expected.append(schedule.get_last_lr()[0])
    for rates in pool(2).run(one_cycle, stage):
        assert rates == expected


def norms(rank: int, world: int, stage: int) -> float:
    engine, *_ = zeropipe.initialize(model=build(MLP), config=config(stage, world))
    engine.backward(engine(*mlp_batch(0, rank)))
    engine.step()
    norm = engine.get_global_grad_norm()
    engine.destroy()
    return norm


def test_the_gradient_norm_is_there_at_every_stage(pool):
    model = build(MLP)
    for rank in range(2):
        (model(*mlp_batch(0, rank)) / 2).backward()
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    for stage in range(4):
        for found in pool(2).run(norms, stage):
            assert found == pytest.approx(expected, rel=1e-6)  # other orders of additions
