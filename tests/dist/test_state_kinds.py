"""What of an optimizer's state belongs to a parameter's elements: reports, access and steps of a kind of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from zeropipe import utils


class OwnStep(torch.optim.Adam):
    """Its own ``step`` makes it unknown, so at stages 0 and 3 it steps parameter by parameter."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Scaled(nn.Module):
    """A linear layer and a factor of no dims, or of one element."""

    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.factor = nn.Parameter(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.layer(x) * self.factor).square().mean()


def one_step(rank: int, world: int, stage: int, dims: int) -> tuple[set[str], Any, float, Any, Any]:
    model = build(lambda: Scaled(torch.ones((1,) * dims)))
    engine, optimizer, *_ = zeropipe.initialize(
        model=model,
        optimizer=OwnStep(model.parameters(), lr=0.01),
        config=config(
            stage, world, optimizer={"type": None, "params": {}}, zero_allow_untested_optimizer=True
        ),
    )
    engine.backward(engine(torch.ones(4, 16)))
    engine.step()
    keys = optimizer.partitions[0].state.keys()
    counts = utils.safe_get_full_optimizer_state(model.layer.weight, "step")
    ratio = engine.memory_report()[2].ratio
    given = torch.arange(256.0).view(16, 16)
    utils.safe_set_full_optimizer_state(model.layer.weight, given, "exp_avg")
    utils.safe_set_full_optimizer_state(model.factor, torch.full((1,) * dims, 3.0), "exp_avg_sq")
    read = utils.safe_get_full_optimizer_state(model.layer.weight, "exp_avg")
    square = utils.safe_get_full_optimizer_state(model.factor, "exp_avg_sq")
    engine.destroy()
    return keys, counts, ratio, read, square


@pytest.mark.parametrize("dims", [0, 1])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_count_is_never_a_moment_and_state_that_was_set_is_there(pool, stage, dims):
    """The step of a parameter without dims counted as one value per element of every parameter (a third more bytes in
    the report, a weight full of ones under ``step``), and what was set went into a copy where parameters are stepped
    one by one."""
    for keys, counts, ratio, read, square in pool(2).run(one_step, stage, dims):
        assert keys == {"exp_avg", "exp_avg_sq"}
        assert counts is None
        assert 0.8 < ratio <= 1.0  # the formula counts padding, which state that is made one by one has not
        assert_bitwise(read, torch.arange(256.0).view(16, 16))
        assert_bitwise(square, torch.full((1,) * dims, 3.0))
