"""The real code path as one rank of 1,024, through torch's fake process group."""

from __future__ import annotations

from ast import literal_eval

import pytest

from tests.helpers.launch import ROOT, python
from tests.helpers.native import Entry

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
    done = python(script, env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "walked\n"


GROWTH = """
import sys
from tests.helpers.native import Log
log = Log.install()
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import zeropipe, zeropipe.runtime.engine.build
from tests.helpers.models import build
from tests.helpers.zero3 import Stack, settings, x_batch

places = [tuple(map(int, place.split("/"))) for place in sys.argv[1:]]
zeropipe.runtime.engine.build.agree = lambda items, group: None  # the fake group invents what other ranks said
figures = {}

def count(frame, event, arg):
    figures["calls"] += event in ("call", "c_call")

for rank, world in places:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    for stage in (1, 2, 3):
        engine = zeropipe.initialize(model=build(Stack), config=settings(stage, world, gas=2))[0]
        for step in range(3):
            log.take()
            figures["calls"] = 0
            sys.setprofile(count if step == 2 else None)
            for micro in range(2):
                engine.backward(engine(x_batch(step, rank)).square().mean())
                engine.step()
            sys.setprofile(None)
        issued = {key[0]: entries for key, entries in log.take().items()}
        engine.destroy()
        print((rank, world, stage, figures["calls"], issued))
    dist.destroy_process_group()
"""
Step = tuple[int, dict[str, list[Entry]]]  # calls of Python in one step, and what it issued, by communicator
PLACES = [(0, 8), (0, 64), (0, 512), (0, 4096), (0, 1024), (1, 1024), (511, 1024), (1023, 1024)]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], Step]:
    """By rank, number of ranks and stage."""
    script = tmp_path_factory.mktemp("large") / "growth.py"
    script.write_text(GROWTH)
    env = {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = python(script, *(f"{rank}/{world}" for rank, world in PLACES), env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = map(literal_eval, done.stdout.splitlines())
    return {(rank, world, stage): (calls, issued) for rank, world, stage, calls, issued in found}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_call_of_python_more_on_4096_ranks_than_on_8(steps, stage: int) -> None:
    """Counted, not timed: a loop over ranks anywhere in a step shows. Nor does a communicator carry more."""
    found = [steps[0, world, stage] for world in (8, 64, 512, 4096)]
    assert len({calls for calls, _ in found}) == 1, [calls for calls, _ in found]
    counts = [sorted(len(entries) for entries in issued.values()) for _, issued in found]
    assert counts == [counts[0]] * 4


@pytest.mark.slow
def test_a_communicator_for_each_channel_and_one_call_for_a_unit_or_a_bucket(steps) -> None:
    gathers, reductions, norms = sorted(steps[0, 4096, 3][1].values(), key=len, reverse=True)
    # In each of two passes 10 units run forward and backward; all of them would be prefetched for backward, and stay.
    assert [len(gathers), len(reductions), len(norms)] == [2 * 10, 2, 1]
    # A unit of one parameter is gathered by itself.
    assert {op.partition(" of ")[0] for op, _, _ in gathers} <= {
        "all_gather",
        "all_gather_single",
        "all_gather_into_tensor",
    }
    assert sum(op.startswith("all_gather of") for op, _, _ in gathers) >= 2 * 7
    assert {op for op, _, _ in reductions} <= {"reduce_scatter_single", "reduce_scatter_tensor"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_middle_and_last_ranks_issue_what_rank_0_does(steps, stage: int) -> None:
    """Per communicator the same calls with the same bytes in the same order, on ranks 0, 1, 511 and 1023 of 1,024."""
    issued = [steps[rank, 1024, stage][1] for rank in (0, 1, 511, 1023)]
    assert issued == [issued[0]] * 4
