"""A model built under zero.Init costs its shards, in resident memory too."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

import zeropipe


def resident_growth(rank: int, world: int, layers: int, width: int) -> tuple[int, int]:
    """How much resident memory grows while square layers are built as shards, and the bytes of the whole model."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    with zeropipe.zero.Init():  # what the first use costs
        torch.nn.Linear(8, 8)
    before = resident()
    with zeropipe.zero.Init():
        model = torch.nn.ModuleList(
            torch.nn.Linear(width, width + 64 * (i % 5), bias=False) for i in range(layers)
        )
    return resident() - before, sum(p.ds_numel for p in model.parameters()) * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_building_leaves_no_memory_behind(pool):
    for grown, whole in pool(2).run(resident_growth, 40, 1024):
        assert whole > 160e6
        assert grown < whole / 2 + 48e6, (
            f"grew by {grown / 1e6:.0f} MB, half of the model is {whole / 2e6:.0f} MB"
        )
