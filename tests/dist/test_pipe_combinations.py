"""The pipeline with the rest: tensor slices on the model axis, 16 bits, compressed optimizers, offload."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.dist.pipe_models import BASE_SEED, VOCAB, WIDTH, Head, batches, loss_of, specs
from tests.dist.test_pipe_engine import MICRO, config, engine_of
from zeropipe.comm.collectives import all_reduce
from zeropipe.runtime.pipe.layers import LayerSpec
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.topology import PipeModelDataParallelTopology

SLICED = 1e-5  # relative; slices sum over the inner dim in two parts
HIDDEN = 16


class _Copy(torch.autograd.Function):
    """Identity whose backward sums over the model axis: the entrance of a column-parallel layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = grad.contiguous().clone()
        all_reduce(total, ctx.group, label="tensor parallel")
        return total, None


class _Sum(torch.autograd.Function):
    """Sum over the model axis whose backward is the identity: the exit of a row-parallel layer."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        total = x.contiguous().clone()
        all_reduce(total, group, label="tensor parallel")
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class SlicedMLP(nn.Module):
    """Column- then row-parallel; ``place``: a holder of (group, rank, size), filled when the grid is known."""

    def __init__(self, place: dict[str, Any]) -> None:
        super().__init__()
        self.place = place
        self.norm = nn.LayerNorm(WIDTH)
        up, down = nn.Linear(WIDTH, HIDDEN, bias=False).weight, nn.Linear(HIDDEN, WIDTH, bias=False).weight
        rank, size = place["rank"], place["size"]
        self.up = nn.Parameter(up.detach().chunk(size, 0)[rank].clone())
        self.down = nn.Parameter(down.detach().chunk(size, 1)[rank].clone())
        self.up.tensor_model_parallel = self.down.tensor_model_parallel = True

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = _Copy.apply(self.norm(h), self.place["group"])
        return h + _Sum.apply(torch.tanh(x @ self.up.T) @ self.down.T, self.place["group"])


def sliced(rank: int, world: int, pp: int, mp: int, dp: int, stage: int) -> tuple[list[float], float]:
    topology = PipeModelDataParallelTopology(num_pp=pp, num_mp=mp, num_dp=dp)
    place: dict[str, Any] = {"rank": topology.get_coord(rank).model, "size": mp}
    layers = [
        LayerSpec(nn.Embedding, VOCAB, WIDTH),
        *[LayerSpec(SlicedMLP, place) for _ in range(3)],
        LayerSpec(Head),
    ]
    module = PipelineModule(
        layers,
        topology=topology,
        loss_fn=loss_of,
        seed_layers=True,
        base_seed=BASE_SEED,
        partition_method="uniform",
    )
    place["group"] = module.grid.slice_group
    settings = config(stage, gradient_clipping=0.1, gradient_accumulation_steps=MICRO // dp)
    engine = zeropipe.initialize(model=module, config=settings)[0]
    losses = []
    for step in range(3):
        data = batches(MICRO, seed=step)[engine.grid.data_parallel_id :: dp]
        losses.append(engine.train_batch(iter(data)).item())
    return losses, engine.get_global_grad_norm()


@pytest.mark.native
@pytest.mark.parametrize(("pp", "mp", "dp", "stage"), [(2, 2, 1, 1), (1, 2, 2, 2), (2, 2, 1, 3)])
def test_tensor_slices_train_like_the_whole(pool, pp, mp, dp, stage):
    alone = pool(1).run(sliced, 1, 1, 1, stage)[0]
    for losses, norm in pool(4).run(sliced, pp, mp, dp, stage):
        assert losses == pytest.approx(alone[0], rel=SLICED)
        assert norm == pytest.approx(alone[1], rel=1e-3)


def falls(rank: int, world: int, settings: dict[str, Any], schedule: str) -> list[float]:
    engine = engine_of(2, 2, specs(blocks=3), {**config(), **settings}, schedule=schedule)
    data = batches(MICRO * 2, seed=5)[engine.grid.data_parallel_id :: 2]
    return [engine.train_batch(iter(data)).item() for _ in range(8)]


@pytest.mark.native
@pytest.mark.parametrize(
    ("settings", "schedule"),
    [
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, "zbv"),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 3}}, "1f1b"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "1f1b"),
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-2, "freeze_step": 3}}}, "zb-h1"),
        (
            {"optimizer": {"type": "Lamb", "params": {"lr": 5e-2}}, "zero_optimization": {"stage": 1}},
            "interleaved",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "1f1b"),
    ],
)
def test_it_trains_with(pool, settings, schedule):
    found = pool(4).run(falls, settings, schedule)
    assert all(losses == found[0] for losses in found)
    assert found[0][-1] < 0.9 * found[0][0]
