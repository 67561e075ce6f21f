"""The real code path as one rank of 1,024, through torch's fake process group."""

from __future__ import annotations

import pytest

from tests.helpers.launch import python

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import zeropipe
from tests.helpers.data import token_batch
from tests.helpers.models import NastyModel, build
from tests.helpers.train import config
from zeropipe.comm.record import record
import zeropipe.runtime.engine.build

WORLD, RANK = 1024, 517
dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
zeropipe.runtime.engine.build.agree = lambda items, group: None  # the fake group invents what other ranks said
for stage in (0, 1, 2):
    for extra in ({}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "loss_scale": 2.0}}):
        settings = config(stage, WORLD, gas=2, **extra)
        engine, optimizer, *_ = zeropipe.initialize(model=build(NastyModel), config=settings)
        assert engine.train_batch_size() == 2 * WORLD
        with record() as events:
            for micro in range(2):
                loss = engine(*token_batch(0, RANK, micro), wake_dead=True)
                engine.backward(loss)
                engine.step()
        assert engine.global_steps == 1 and engine.global_samples == 2 * WORLD
        (partition,) = optimizer.partitions
        layout = partition.segments[0].layout
        assert layout.num_shards == (WORLD if stage else 1)
        assert partition.values.shard == (RANK if stage else 0)
        assert partition.master.numel() == layout.shard_numel
        if stage:
            assert layout.shard_numel == 16 and layout.padded_numel == 16 * WORLD
        assert {e.group_size for e in events} == {WORLD}
        for row in engine.memory_report():
            assert row.bytes == row.formula, str(row)
        engine.destroy()
print("walked")
"""


@pytest.mark.slow
def test_a_middle_rank_of_1024_walks_every_stage(tmp_path):
    script = tmp_path / "walk.py"
    script.write_text(SCRIPT)
    from tests.helpers.launch import ROOT

    done = python(script, env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "walked\n"
