"""A pipeline in 16 bits: what is kept wide stays on every stage, and travels between stages as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.train import config
from zeropipe.pipe import PipelineModule

WIDTH, MICRO = 16, 2
BF16 = {"bf16": {"enabled": True}}


class Table(nn.Module):
    """Adds an fp32 table: what follows, on this stage or the next, gets fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def layers(kind: str) -> list[nn.Module]:
    """16-bit layers, then nothing but fp32 norms; or a table at the end of the first stage."""
    if kind == "table":
        return [
            build(nn.Linear, WIDTH, WIDTH),
            Table(),
            build(nn.Linear, WIDTH, WIDTH),
            nn.BatchNorm1d(WIDTH),
        ]
    norms = [nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)]
    return [*(build(nn.Linear, WIDTH, WIDTH, seed=s).bfloat16() for s in range(2)), *norms]


def mean_square(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (out.float() - y).square().mean()


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = [torch.randn(4, WIDTH, generator=generator(7, micro)) for micro in range(MICRO)]
    return [(x.bfloat16(), x) for x in made]


def run(rank: int, world: int, kind: str, stages: int, stage: int) -> tuple[float, dict[str, str]]:
    torch.manual_seed(0)
    module = PipelineModule(
        copy.deepcopy(layers(kind)), num_stages=stages, loss_fn=mean_square, partition_method="uniform"
    )
    engine = zeropipe.initialize(model=module, config=config(stage, world // stages, gas=MICRO, **BF16))[0]
    loss: Any = [engine.train_batch(iter(data())).item() for _ in range(2)][-1]
    found = {name: str(t.dtype) for name, t in (*module.named_parameters(), *module.named_buffers())}
    engine.destroy()
    return loss, found


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", ["table", "norms"])
def test_a_cut_changes_no_dtype_and_no_loss(pool, kind: str, stage: int):
    """A stage of nothing but fp32 norms was cast, because no 16-bit layer lay on it; the next stage's layers refused
    what the stage before made fp32."""
    whole = pool(1).run(run, kind, 1, 0)[0]
    found = pool(2).run(run, kind, 2, stage)
    assert {name: dtype for _, dtypes in found for name, dtype in dtypes.items()} == whole[1]
    assert {loss for loss, _ in found} == {whole[0]}
