"""Compressed optimizers in a pipeline and with tensor-parallel slices: checkpoints at the same and at other cuts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import zeropipe
from tests.dist import test_pipe_engine as pipes
from tests.dist.pipe_models import BASE_SEED, VOCAB, WIDTH, Head, batches, loss_of, specs
from tests.dist.test_onebit_checkpoints import OPTIONS, debts
from tests.dist.test_pipe_combinations import SlicedMLP
from tests.helpers.pool import Pools
from zeropipe.layout.flat import FlatShards
from zeropipe.runtime.fp16.onebit.rank_state import groups_of
from zeropipe.runtime.pipe.layers import LayerSpec
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.topology import PipeModelDataParallelTopology


def pipe_config(name: str, stage: int, dp: int) -> dict[str, Any]:
    params = {"lr": 1e-2, **OPTIONS[name]}
    types = {"adam": "OneBitAdam", "lamb": "OneBitLamb", "zero-one": "ZeroOneAdam"}
    if name == "zero-one" and stage:
        params["local_step_clipper"] = 1
    return pipes.config(
        stage,
        optimizer={"type": types[name], "params": params},
        gradient_accumulation_steps=pipes.MICRO * 2 // dp,
    )


def pipe_train(engine: Any, first: int, count: int) -> list[float]:
    """The same batches at any number of replicas."""
    dp, replica = engine.grid.data_parallel_size, engine.grid.data_parallel_id
    data = [batches(pipes.MICRO * 2, seed=100 + step)[replica::dp] for step in range(first, first + count)]
    return [engine.train_batch(iter(entry)).item() for entry in data]


def pipe_save(rank: int, size: int, name: str, pp: int, stage: int, folder: str) -> dict[str, Any]:
    """What was saved, and how the saving run goes on."""
    engine = pipes.engine_of(pp, size // pp, specs(blocks=3), pipe_config(name, stage, size // pp))
    pipe_train(engine, 0, 11)
    engine.save_checkpoint(folder)
    base = engine.optimizer.optimizer
    found = {"mine": copy.deepcopy(base.rank_state()), "compressed": base.wants_local_gradients()}
    found["losses"] = pipe_train(engine, 11, 6)
    engine.destroy()
    return found


def pipe_load(rank: int, size: int, name: str, pp: int, stage: int, folder: str) -> dict[str, Any]:
    engine = pipes.engine_of(pp, size // pp, specs(blocks=3), pipe_config(name, stage, size // pp))
    assert engine.load_checkpoint(folder)[0] is not None
    mine = copy.deepcopy(engine.optimizer.optimizer.rank_state())
    losses = pipe_train(engine, 11, 6)
    engine.destroy()
    return {"mine": mine, "losses": losses}


def debts_by_name(states: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the average is owed of each tensor of all pipeline stages: see ``debts``."""
    found: dict[str, torch.Tensor] = {}
    for stage in groups_of(states):
        for lane, entry in enumerate(stage[0]["lanes"]):
            layout = FlatShards.from_json(entry["layout"])
            owed = debts(stage, lane, "adam")
            for index, spec in enumerate(layout.tensors):
                start, stop = layout.tensor_range(index)
                found[spec.name] = owed[start:stop]
    return found


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("adam", (4, 2, 0), (4, 2, 1)),
        ("adam", (4, 2, 1), (2, 1, 0)),
        ("adam", (2, 1, 0), (4, 2, 1)),
        ("adam", (4, 2, 0), (4, 4, 0)),
        ("lamb", (4, 2, 0), (4, 1, 1)),
        ("lamb", (4, 2, 1), (2, 2, 0)),
        ("zero-one", (4, 2, 0), (2, 1, 0)),
    ],
)
def test_a_pipeline_cut_in_another_way_keeps_the_debts(
    pool: Pools, tmp_path: Path, name: str, source: tuple[int, int, int], target: tuple[int, int, int]
) -> None:
    (size, *cut), (other, *again) = source, target
    saved = pool(size).run(pipe_save, name, *cut, str(tmp_path), timeout=90)
    found = pool(other).run(pipe_load, name, *again, str(tmp_path), timeout=90)
    before = debts_by_name([entry["mine"] for entry in saved])
    after = debts_by_name([entry["mine"] for entry in found])
    assert before.keys() == after.keys() and any(value.any() for value in before.values())
    for tensor, owed in before.items():
        # a mean over other numbers of ranks: fp32 rounding of values of this size
        assert torch.allclose(after[tensor], owed, rtol=0, atol=1e-6 * float(owed.abs().max())), tensor
    ours, theirs = found[0]["losses"], saved[0]["losses"]
    if name != "zero-one":  # whose ranks had stepped apart
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)  # the same weights, cut differently
    assert max(ours) < 1.1 * max(theirs)  # it goes on as the saving run does


@pytest.mark.parametrize("name", ["adam", "lamb", "zero-one"])
def test_a_pipeline_goes_on_to_the_bit(pool: Pools, tmp_path: Path, name: str) -> None:
    saved = pool(4).run(pipe_save, name, 2, 0, str(tmp_path), timeout=90)
    found = pool(4).run(pipe_load, name, 2, 0, str(tmp_path), timeout=90)
    assert all(entry["compressed"] for entry in saved)
    assert [entry["losses"] for entry in found] == [entry["losses"] for entry in saved]


def sliced(rank: int, world: int, mp: int, stage: int) -> Any:
    topology = PipeModelDataParallelTopology(num_pp=1, num_mp=mp, num_dp=world // mp)
    place: dict[str, Any] = {"rank": topology.get_coord(rank).model, "size": mp}
    blocks = [LayerSpec(SlicedMLP, place) for _ in range(2)]
    layers = [LayerSpec(torch.nn.Embedding, VOCAB, WIDTH), *blocks, LayerSpec(Head)]
    module = PipelineModule(layers, topology=topology, loss_fn=loss_of, seed_layers=True, base_seed=BASE_SEED)
    place["group"] = module.grid.slice_group
    return zeropipe.initialize(model=module, config=pipe_config("adam", stage, world // mp))[0]


def sliced_run(rank: int, world: int, mp: int, stage: int, folder: str, saves: bool) -> dict[str, Any]:
    engine = sliced(rank, world, mp, stage)
    if saves:
        pipe_train(engine, 0, 8)
        engine.save_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    mine = copy.deepcopy(engine.optimizer.optimizer.rank_state())
    slice_ = engine.grid.get_slice_parallel_rank()
    losses = pipe_train(engine, 8, 5)
    engine.destroy()
    return {"mine": mine, "slice": slice_, "losses": losses}


@pytest.mark.parametrize(("size", "stage", "other", "then"), [(4, 1, 4, 1), (4, 0, 2, 1), (2, 1, 4, 0)])
def test_each_tensor_parallel_slice_keeps_its_debts(
    pool: Pools, tmp_path: Path, size: int, stage: int, other: int, then: int
) -> None:
    saved = pool(size).run(sliced_run, 2, stage, str(tmp_path), True, timeout=90)
    found = pool(other).run(sliced_run, 2, then, str(tmp_path), False, timeout=90)
    for place in (0, 1):
        before, after = (
            debts_by_name([entry["mine"] for entry in run if entry["slice"] == place])
            for run in (saved, found)
        )
        for tensor, owed in before.items():
            # means over other numbers of ranks: fp32 rounding of values of this size
            assert torch.allclose(after[tensor], owed, rtol=0, atol=1e-6 * float(owed.abs().max())), tensor
        assert size < 4 or any(owed.any() for owed in before.values())
    if size == other:
        assert [entry["losses"] for entry in found] == [entry["losses"] for entry in saved]
    assert max(found[0]["losses"]) < 1.1 * max(saved[0]["losses"])
