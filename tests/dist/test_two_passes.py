"""Two reduced backwards in one window, in which ranks use different parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config

WIDTH = 16
# (rank, backward) -> the branches that it uses
USES = {
    "first here, then there": {(0, 0): "a", (0, 1): "b", (1, 0): "b", (1, 1): "a"},
    "only in one backward of one rank": {(0, 0): "ab", (0, 1): "a", (1, 0): "a", (1, 1): "a"},
    "only in the second": {(0, 0): "a", (0, 1): "ab", (1, 0): "a", (1, 1): "a"},
}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))

    def forward(self, x: torch.Tensor, used: str) -> torch.Tensor:
        return sum(((getattr(self, name) * x).sum() for name in used), start=torch.zeros(()))


def value(rank: int, backward: int) -> torch.Tensor:
    return torch.arange(WIDTH) * 4.0 + rank * 8 + backward * 16  # sums and halves of these are exact


def train(rank: int, world: int, stage: int, case: str) -> dict[str, torch.Tensor]:
    settings = config(stage, world, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    engine, *_ = zeropipe.initialize(model=Branches(), config=settings)
    for _ in range(2):
        for backward in range(2):
            engine.backward(engine(value(rank, backward), USES[case][rank, backward]))
        engine.step()
    weights = weights_of(engine.module)
    engine.destroy()
    return weights


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("case", USES)
def test_no_rank_forgets_what_another_had(pool, stage, case):
    expected = {name: torch.zeros(WIDTH) for name in "ab"}
    for (rank, backward), used in USES[case].items():
        for name in used:
            expected[name] -= 2 * value(rank, backward) / 2  # two steps, the average of two ranks
    for weights in pool(2).run(train, stage, case):
        assert_bitwise(weights, expected)
