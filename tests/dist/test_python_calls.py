"""How many calls of Python one small layer costs in a step: a number, which a busy machine does not change."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.pool import Pools
from tests.helpers.zero3 import WIDTH, engine_of, x_batch

FEW, MANY = 24, 72
# Where a rank that waits looks for its peer again and again, as often as the machine has it: not counted.
WAITS = os.path.join("comm", "host", "")


def calls_of_a_step(rank: int, world: int, stage: int, layers: int) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
    engine = engine_of(model, stage, world)
    count = 0

    def see(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call" and WAITS not in frame.f_code.co_filename

    found = []
    for step in range(10):
        data, count = x_batch(step, rank), 0
        sys.setprofile(see)
        engine.backward(engine(data).square().mean())
        engine.step()
        sys.setprofile(None)
        found.append(count)
    engine.destroy()
    return min(found[3:])  # the plan is made after the first, the order of gradients after the second


def of_one_layer(rank: int, world: int, stage: int) -> float:
    few, many = (calls_of_a_step(rank, world, stage, layers) for layers in (FEW, MANY))
    return (many - few) / (MANY - FEW)


# Of weight and bias, forward and backward. torch's own calls are among them: 3 of a layer, and 2 of each that has
# hooks; the hooks on the parameters are 2 each.
@pytest.mark.parametrize(("world", "stage", "most"), [(1, 0, 16), (1, 2, 16), (1, 3, 85), (2, 3, 95)])
def test_a_small_layer_costs_a_known_number_of_calls(
    pool: Pools, world: int, stage: int, most: float
) -> None:
    for calls in pool(world).run(of_one_layer, stage):
        assert calls <= most, f"{calls:.1f} calls of Python for one layer in a step, at most {most}"
