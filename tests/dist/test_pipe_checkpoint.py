"""A checkpoint of a pipeline loads at any other cut, replica count and ZeRO stage, and training goes on bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.dist.pipe_models import batches, loss_of, plain, specs
from tests.dist.test_pipe_engine import MICRO, config, engine_of

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


def load(
    rank: int, world: int, folder: str, pp: int, stage: int, schedule: str, tied: bool
) -> dict[str, Any]:
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
    if source[2] < 3:
        files = {path.name for path in (tmp_path / f"global_step{BEFORE}").glob("layer_*")}
        assert files == {f"layer_{n:02d}-model_00-model_states.pt" for n in range(6)}
        embedding = torch.load(tmp_path / f"global_step{BEFORE}" / "layer_00-model_00-model_states.pt")
        assert list(embedding) == ["weight"]
    for kind in ("masters", "moments"):
        before = {name: value for found in same for name, value in found[kind].items()}
        after = {name: value for found in other for name, value in found[kind].items()}
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert other[0]["losses"] == pytest.approx(same[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_tied_layers_load_at_any_cut(pool, tmp_path, stage):
    pool(2).run(save, str(tmp_path), 2, stage, "1f1b", True, timeout=90)
    same = pool(2).run(load, str(tmp_path), 2, stage, "1f1b", True, timeout=90)
    if stage < 3:
        assert len(list(tmp_path.glob("*/layer_*"))) == 6  # the tied weight in the files of both its layers
    for world, pp in ((1, 1), (3, 3)):
        other = pool(world).run(load, str(tmp_path), pp, 2, "1f1b", True, timeout=90)
        before = {name: value for found in same for name, value in found["masters"].items()}
        for found in other:
            assert all(torch.equal(before[name], value) for name, value in found["masters"].items())


def without_pipeline(
    rank: int, world: int, folder: str, tied: bool, saves: str | None
) -> dict[str, torch.Tensor]:
    """A plain module of the same layers goes on from a pipeline's checkpoint."""
    if tied:
        engine = engine_of(1, world, LAYERS[tied], settings(1, world))
        model: nn.Module = engine.module.to_sequential()
    else:
        model = nn.Sequential(*plain(LAYERS[tied])[0])
    plain_engine = zeropipe.initialize(model=model, config=settings(1, world))[0]
    path, _ = plain_engine.load_checkpoint(folder)
    assert path is not None
    found = {
        n: zeropipe.utils.safe_get_full_fp32_param(p).clone()
        for n, p in plain_engine.module.named_parameters()
    }
    for x, y in batches(MICRO * 2, seed=100 + BEFORE)[rank::world]:
        plain_engine.backward(loss_of(plain_engine(x), y))
        plain_engine.step()
    if saves is not None:
        plain_engine.save_checkpoint(saves, client_state={"note": 7}, tag="plain")
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_from_a_pipeline_to_none_and_back(pool, tmp_path, tied):
    pool(2).run(save, str(tmp_path / "a"), 2, 1, "1f1b", tied, timeout=90)
    piped = pool(2).run(load, str(tmp_path / "a"), 2, 1, "1f1b", tied, timeout=90)
    alone = pool(2).run(without_pipeline, str(tmp_path / "a"), tied, str(tmp_path / "b"), timeout=90)[0]
    before = {name: value for found in piped for name, value in found["masters"].items()}
    assert before.keys() == alone.keys()
    assert all(torch.equal(before[name], value) for name, value in alone.items())
    pool(2).run(loads_back, str(tmp_path / "b"), tied)


def loads_back(rank: int, world: int, folder: str, tied: bool) -> None:
    engine = engine_of(2, 1, LAYERS[tied], settings(2, 1))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    assert engine.global_steps == BEFORE + 1
    steps(engine, BEFORE + 1, 1)
