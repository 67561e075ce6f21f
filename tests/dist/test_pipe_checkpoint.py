"""A checkpoint of a pipeline loads at any other cut, replica count and ZeRO stage, and training goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.dist.pipe_models import batches, loss_of, plain, specs
from tests.dist.test_pipe_engine import MICRO, compare, config, engine_of, reference

BEFORE, AFTER = 2, 3
LAYERS = {False: specs(blocks=4), True: specs(blocks=4, tied=True)}


def steps(engine: Any, first: int, count: int) -> list[float]:
    """The reference has two replicas; with fewer, a replica takes the batches of several."""
    dp, replica = engine.grid.data_parallel_size, engine.grid.data_parallel_id
    found = []
    for step in range(first, first + count):
        data = batches(MICRO * 2, seed=100 + step)
        found.append(engine.train_batch(iter(data[replica::dp])).item())
    return found


def settings(stage: int, dp: int) -> dict[str, Any]:
    return config(stage, gradient_accumulation_steps=MICRO * 2 // dp)


def save(rank: int, world: int, folder: str, pp: int, stage: int, schedule: str, tied: bool) -> None:
    engine = engine_of(pp, world // pp, LAYERS[tied], settings(stage, world // pp), schedule=schedule)
    steps(engine, 0, BEFORE)
    engine.save_checkpoint(folder, client_state={"note": 7})
    engine.destroy()


def load(rank: int, world: int, folder: str, pp: int, stage: int, schedule: str, tied: bool) -> dict[str, Any]:
    """The masters right after loading, and the losses of going on."""
    engine = engine_of(pp, world // pp, LAYERS[tied], settings(stage, world // pp), schedule=schedule)
    path, client = engine.load_checkpoint(folder)
    assert path is not None
    assert client["note"] == 7
    assert engine.global_steps == BEFORE
    masters = {
        n: zeropipe.utils.safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()
    }
    moments = {
        n: zeropipe.utils.safe_get_full_optimizer_state(p, "exp_avg").clone()
        for n, p in engine.module.named_parameters()
    }
    losses = steps(engine, BEFORE, AFTER)
    engine.destroy()
    return {"masters": masters, "moments": moments, "losses": losses}


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((4, 2, 2, "1f1b"), (4, 2, 2, "1f1b")),
        ((4, 2, 2, "1f1b"), (2, 1, 3, "1f1b")),
        ((4, 2, 3, "1f1b"), (4, 4, 0, "1f1b")),
        ((2, 2, 1, "zbv"), (4, 2, 2, "interleaved")),
        ((1, 1, 0, "1f1b"), (3, 3, 1, "zb-h1")),
    ],
)
def test_any_cut_loads_at_any_other(pool, tmp_path, source, target):
    world, pp, stage, schedule = source
    pool(world).run(save, str(tmp_path), pp, stage, schedule, False, timeout=90)
    same = pool(world).run(load, str(tmp_path), pp, stage, schedule, False, timeout=90)
    world, pp, stage, schedule = target
    other = pool(world).run(load, str(tmp_path), pp, stage, schedule, False, timeout=90)
    for kind in ("masters", "moments"):
        before = {name: value for found in same for name, value in found[kind].items()}
        after = {name: value for found in other for name, value in found[kind].items()}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert other[0]["losses"] == pytest.approx(same[0]["losses"], rel=1e-5)
