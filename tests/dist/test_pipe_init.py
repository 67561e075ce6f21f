"""A pipeline built under zero.Init: the numbers of one built without it, and the memory of its shards."""

from __future__ import annotations

import gc
import resource
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.dist.pipe_models import SEQ, batches, loss_of, specs
from tests.dist.test_pipe_engine import config, data_of
from tests.helpers.referee import assert_bitwise
from zeropipe import utils
from zeropipe.errors import DesyncError, UsageError
from zeropipe.runtime.pipe.layers import LayerSpec
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.topology import PipeDataParallelTopology, PipelineParallelGrid

STEPS = 3
BF16 = {"bf16": {"enabled": True}}


def context(how: str, grid: PipelineParallelGrid, settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """``how``: what tells zero.Init the ranks that share a stage's parameters."""
    if how == "without":
        return nullcontext()
    given: dict[str, Any] = {"mpu": grid}
    if how == "data_parallel_group":
        given = {how: grid.get_data_parallel_group()}
    return zeropipe.zero.Init(config_dict_or_path=settings, **given)


def train(
    rank: int, world: int, how: str, stage: int, kind: str = "specs", extra: dict[str, Any] | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of training and evaluation, and the whole fp32 parameters of this rank's layers."""
    topology = PipeDataParallelTopology(2, world // 2)
    grid = PipelineParallelGrid(topology)
    settings = config(stage, **(extra or {}))
    given: dict[str, Any] = {"topology": topology, "loss_fn": loss_of, "seed_layers": True}
    if kind == "zbv":
        given["schedule"] = "zbv"
    if kind == "memory":
        given |= {"partition_method": "memory", "sample_input": torch.zeros(2, SEQ, dtype=torch.int64)}
    torch.manual_seed(11)
    with context(how, grid, settings):
        layers = specs(blocks=6 if kind == "zbv" else 3, tied=kind in ("tied", "zbv"))
        module = PipelineModule([s.build() for s in layers] if kind == "modules" else layers, **given)
    if how != "without" and stage == 3:
        for name, param in module.named_parameters():
            assert param.numel() == 0 or param.ds_numel == 0, name
            assert param.partition_numel() == -(-param.ds_numel // (world // 2)), name
    engine = zeropipe.initialize(model=module, config=settings)[0]
    dp, replica = grid.data_parallel_size, grid.data_parallel_id
    losses = [engine.train_batch(iter(data_of(s, replica, dp))).item() for s in range(STEPS)]
    losses.append(engine.eval_batch(iter(batches(8, seed=9)[replica::dp])).item())
    weights = {name: utils.safe_get_full_fp32_param(param) for name, param in module.named_parameters()}
    engine.destroy()
    return losses, weights


def test_it_trains_like_stages_0_to_3_without(pool):
    ours = [pool(4).run(train, how, 3) for how in ("mpu", "data_parallel_group")]
    for stage in (0, 1, 2, 3):
        for found in (*ours, pool(4).run(train, "mpu", stage)):  # below stage 3 the context does nothing
            assert_bitwise(found, pool(4).run(train, "without", stage), f"stage {stage}")


@pytest.mark.parametrize("kind", ["tied", "zbv", "modules", "memory"])
def test_whatever_the_layers_are(pool, kind):
    """``modules``: built layers in place of specs. ``memory``: each layer is built and run to be weighed, too."""
    assert_bitwise(pool(4).run(train, "mpu", 3, kind), pool(4).run(train, "without", 3, kind))


def test_in_16_bits(pool):
    found = pool(4).run(train, "mpu", 3, "specs", BF16)
    assert_bitwise(found, pool(4).run(train, "without", 3, "specs", BF16))


def alike(rank: int, world: int) -> None:
    """Stages of the same layers: nothing tells while they are built that other ranks build others."""
    settings = config(3)
    layers = [LayerSpec(nn.Linear, 16, 16) for _ in range(4)]
    with zeropipe.zero.Init(config_dict_or_path=settings):
        module = PipelineModule(layers, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    with pytest.raises(UsageError, match=r"mpu=PipelineParallelGrid\(topology\)"):
        zeropipe.initialize(model=module, config=settings)


def unlike(rank: int, world: int) -> None:
    with pytest.raises(DesyncError, match=r"zero\.Init"), zeropipe.zero.Init(config_dict_or_path=config(3)):
        PipelineModule(specs(3), num_stages=2, loss_fn=loss_of)


@pytest.mark.parametrize("stages", [alike, unlike])
def test_without_the_grid_it_is_refused(pool, stages):
    pool(2).run(stages)


def resident_growth(rank: int, world: int, layers: int, width: int) -> tuple[int, int]:
    """How much resident memory grows while a pipeline is built, and the bytes of this rank's stage."""

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    topology = PipeDataParallelTopology(2, world // 2)
    grid = PipelineParallelGrid(topology)
    with zeropipe.zero.Init(mpu=grid):  # what the first use costs
        nn.Linear(8, 8)
    before = resident()
    with zeropipe.zero.Init(mpu=grid):
        square = [LayerSpec(nn.Linear, width, width + 64 * (i % 5), bias=False) for i in range(layers)]
        module = PipelineModule(square, topology=topology, loss_fn=loss_of)
    return resident() - before, sum(p.ds_numel for p in module.parameters()) * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_building_takes_the_memory_of_the_shards(pool):
    for grown, stage in pool(4).run(resident_growth, 64, 1024):
        assert stage > 140e6
        assert grown < stage / 2 + 40e6, f"grew by {grown / 1e6:.0f} MB, half a stage is {stage / 2e6:.0f} MB"
