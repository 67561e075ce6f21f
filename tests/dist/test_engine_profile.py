"""The section ``flops_profiler``: one profile, at the step that it names, and the same training with or without it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config, train
from zeropipe.runtime.flops import flops_to_string, get_model_profile, params_to_string

mlp = partial(build, MLP)


def profiled(rank: int, world: int, stage: int, section: dict[str, Any]) -> dict[str, Any]:
    settings = config(stage, world, gas=2, flops_profiler=section)
    return train(rank, world, mlp, mlp_batch, settings, 3)


@pytest.mark.parametrize("stage", [0, 3])
def test_one_profile_at_its_step_and_the_same_weights(pool, tmp_path, stage):
    file = tmp_path / "profile.txt"
    section = {"enabled": True, "profile_step": 1, "output_file": str(file)}
    watched = pool(2).run(profiled, stage, section)
    plain = pool(2).run(profiled, stage, {"enabled": False})
    for one, other in zip(watched, plain, strict=True):
        assert_bitwise(one["weights"], other["weights"])
    lines = file.read_text().splitlines()
    assert lines[0].endswith("MLP at step 1")
    flops, macs, params = get_model_profile(mlp(), args=mlp_batch(0, 0, 0), print_profile=False)
    # Sharded parameters count whole.
    assert f"parameters                {params}" in lines
    assert f"forward MACs              {macs}" in lines and f"forward FLOPs             {flops}" in lines


def in_a_pipeline(rank: int, world: int, folder: str) -> int:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 10), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 2)]
    module = zeropipe.PipelineModule(
        layers, num_stages=2, loss_fn=nn.MSELoss(), partition_method="uniform", dynamic_shape=False
    )
    section = {"enabled": True, "profile_step": 0, "output_file": f"{folder}/profile.txt"}
    settings = config(1, world // 2, gas=3, flops_profiler=section)
    engine, *_ = zeropipe.initialize(model=module, config=settings)
    batches = iter([(torch.ones(4, 6), torch.ones(4, 2))] * 6)
    for _ in range(2):
        engine.train_batch(batches)
    return sum(p.numel() for p in engine.module.parameters())


@pytest.mark.parametrize("world", [2, 4])
def test_a_pipeline_tells_of_each_stage(pool, tmp_path, world):
    counts = pool(world).run(in_a_pipeline, str(tmp_path))
    text = Path(tmp_path / "profile.txt").read_text()
    first, second = text.split("pipeline stage 1 of 2: ")
    assert first.startswith("pipeline stage 0 of 2: FLOPs profile of PipelineModule at step 0")
    # Three micro-batches of four rows, forward.
    for part, flops, numel in (
        (first, 2 * 12 * (60 + 100), params_to_string(counts[0])),
        (second, 2 * 12 * 20, params_to_string(counts[-1])),
    ):
        assert f"forward FLOPs             {flops_to_string(flops)}" in part
        assert f"parameters                {numel}" in part
