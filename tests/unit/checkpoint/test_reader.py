"""A load reads what it needs from any layout, in time that grows with the number of tensors and no faster."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from zeropipe.checkpoint.loader import load
from zeropipe.checkpoint.save.records import FlatState, Grid, LocalState, ModelState
from zeropipe.checkpoint.save.saver import Saver
from zeropipe.comm.group import SELF
from zeropipe.layout.flat import FlatShards, TensorSpec

MOST = 3.0  # times by which the CPU time per tensor may rise over eight times as many: quadratic time gives 8
FEW, MANY = 250, 2000


def state(count: int, apart: bool, value: float) -> LocalState:
    """``count`` tensors of 4 elements with masters and moments: one flat for all, or one for each (``apart``)."""
    specs = [TensorSpec(f"layer.{i}.weight", (4,), "float32") for i in range(count)]
    groups = [(spec,) for spec in specs] if apart else [tuple(specs)]
    flats = []
    for group in groups:
        layout = FlatShards(group, 1)
        run = torch.arange(layout.shard_numel, dtype=torch.float32) * value
        if apart:
            run += 4 * int(group[0].name.split(".")[1]) * value
        tensors = {"fp32": run, "exp_avg": run + value}
        flats.append(FlatState(group[0].name, layout, 0, tensors, {"step": torch.tensor(3.0 * value)}))
    return LocalState(Grid(), 3 if apart else 1, "float32", ModelState({}), tuple(flats))


def seconds(folder: Path, count: int, apart: bool) -> float:
    """CPU seconds for each tensor of a load into the other layout; checks that every element came."""
    Saver(SELF).save(folder, f"saved{count}", state(count, apart, 1.0))
    spent = []
    for _ in range(2):
        into = state(count, not apart, 0.0)
        started = time.process_time()
        found = load(folder, f"saved{count}", into)
        spent.append(time.process_time() - started)
        assert found is not None
        for key, first in (("fp32", 0.0), ("exp_avg", 1.0)):
            values = torch.cat([found[0].flats[flat.name].tensors[key] for flat in into.flats])
            assert torch.equal(values, torch.arange(4 * count) + first)
    return min(spent) / count


@pytest.mark.process
def test_reading_another_layout_takes_linear_time(tmp_path: Path) -> None:
    """Each parameter of stage 3 was looked for among all, and all of them in each flat: 2,000 tensors took 81 s."""
    for apart in (False, True):
        folder = tmp_path / str(apart)
        few, many = seconds(folder, FEW, apart), seconds(folder, MANY, apart)
        assert many <= MOST * few, f"{few * 1e6:.0f} and {many * 1e6:.0f} us a tensor"
