"""With slots a run ends with the same bits on any number of ranks, at every stage."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.helpers.slots import Odd, digest, make, settings, step, train, train_pipeline, words
from zeropipe.errors import ConfigError, UsageError, ZeropipeError
from zeropipe.pipe import PipelineModule, TiedLayerSpec
from zeropipe.runtime.dataloader import RepeatingLoader
from zeropipe.utils import safe_get_full_grad

STEPS = 3
CURRICULUM = {"enabled": True, "data_sampling": {"enabled": True, "curriculum_learning": {"enabled": True}}}


def one_of_all(found: list[Any]) -> Any:
    """What every rank of every run found, which is one."""
    assert len(set(found)) == 1, found
    return found[0]


@pytest.mark.native
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_digest_at_every_stage_on_1_to_4_ranks(pool, precision):
    configs = [settings(stage, precision=precision) for stage in range(4)]
    runs = [pool(world).run(train, configs, STEPS) for world in (1, 2, 3, 4)]
    one_of_all([result for run in runs for rank in run for result in rank])


@pytest.mark.native
def test_one_digest_of_pipelines_of_one_and_two_stages(pool):
    """Also with recomputation, stages 2 and 3, bf16's masters, and another schedule: losses and other terms as well."""
    configs = [settings(stage) for stage in range(4)]
    shapes = [(1, 1), (2, 2), (3, 1), (4, 2)]
    runs = [pool(world).run(train_pipeline, stages, configs, STEPS) for world, stages in shapes]
    known = one_of_all([result for run in runs for rank in run for result in rank])
    for schedule in ("gpipe", "zb-h1"):
        config = settings(1, pipeline={"schedule": schedule})
        again = pool(2).run(train_pipeline, 2, [config], STEPS, recompute=schedule == "gpipe")
        assert {result for rank in again for result in rank} == {known}


@pytest.mark.soak
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_matrix_after_20_steps(pool, precision):
    """1, 2, 3, 4 and 6 ranks at stages 0 to 3: one digest of the module, one of the pipelines of one and two stages."""
    configs = [settings(stage, precision=precision) for stage in range(4)]
    plain = [pool(world).run(train, configs, 20) for world in (1, 2, 3, 4, 6)]
    one_of_all([result for run in plain for rank in run for result in rank])
    shapes = [(world, stages) for world in (1, 2, 3, 4, 6) for stages in (1, 2) if world % stages == 0]
    piped = [pool(world).run(train_pipeline, stages, configs, 20) for world, stages in shapes]
    one_of_all([result for run in piped for rank in run for result in rank])


@pytest.mark.parametrize("slots", [3, 7])
def test_uneven_shares(pool, slots):
    """Ranks that have one slot less run a pass that counts for nothing."""
    configs = [settings(stage, slots) for stage in range(4)]
    runs = [pool(world).run(train, configs, STEPS) for world in (1, 2, 3)]
    one_of_all([result for run in runs for rank in run for result in rank])


def test_several_backwards_in_a_micro_step(pool):
    configs = [settings(stage, 6) for stage in range(4)]
    runs = [pool(world).run(train, configs, STEPS, 2) for world in (1, 2, 3)]
    two = one_of_all([result for run in runs for rank in run for result in rank])
    assert two != pool(1).run(train, configs[:1], STEPS)[0][0]


def _optimizer(name: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": {"lr": 0.01, **params}}}


@pytest.mark.parametrize(
    ("optimizer", "stages"),
    [
        (_optimizer("OnebitAdam", freeze_step=100), (0, 1)),
        (_optimizer("OnebitLamb", freeze_step=100), (0, 1)),
        (_optimizer("ZeroOneAdam", var_freeze_step=100), (0,)),
        (_optimizer("Muon"), (0, 1, 3)),
        (_optimizer("Lamb"), (0,)),
    ],
    ids=lambda value: value["optimizer"]["type"] if isinstance(value, dict) else "",
)
def test_other_optimizers_and_the_dense_phase_of_the_compressed_ones(pool, optimizer, stages):
    configs = [settings(stage, 6, **optimizer) for stage in stages]
    one_of_all(
        [result for world in (1, 3) for rank in pool(world).run(train, configs, STEPS) for result in rank]
    )


def _compressed(rank: int, world: int) -> str:
    with pytest.raises(UsageError) as raised:
        train(rank, world, [settings(1, 4, **_optimizer("OnebitAdam", freeze_step=2))], 4)
    return str(raised.value)


def test_a_compressed_step_is_refused(pool):
    for text in pool(2).run(_compressed):
        assert "freeze_step" in text


def _frozen_for_a_while(rank: int, world: int, stage: int, bf16: bool) -> list[str]:
    """A layer is frozen, and trained again later; gradients accumulate in another dtype."""
    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if bf16 else {}
    engine, found = make(settings(stage, 6, **more)), []
    for number in range(4):
        engine.module.up.requires_grad_(number not in (1, 2))
        step(engine, number)
        found.append(digest(engine.module))
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, True), (2, True), (3, False)])
def test_a_layer_that_is_frozen_for_a_while(pool, stage, bf16):
    one_of_all(
        [tuple(found) for world in (1, 2, 3) for found in pool(world).run(_frozen_for_a_while, stage, bf16)]
    )


def test_fp16_overflows_alike(pool):
    """The first loss scale is too large: the same steps are skipped, and the scale falls alike."""
    fp16 = {"enabled": True, "initial_scale_power": 17, "hysteresis": 1}
    configs = [settings(stage, 6, fp16=fp16) for stage in range(4)]
    runs = [pool(world).run(train, configs, 8) for world in (1, 2, 3)]
    _, norm, scale = one_of_all([result for run in runs for rank in run for result in rank])
    assert scale < 2.0**17
    assert norm < float("inf")


def test_the_average_is_that_of_the_slots(pool):
    """Of four slots of one value the average is that value, to the bit: sums of two equal numbers are exact."""
    ours = pool(2).run(_average, 4)
    torch.manual_seed(0)
    plain = Odd().eval()
    plain(words(0, 0)).backward()
    for name, grad in ours[0].items():
        expected = plain.get_parameter(name).grad
        assert torch.equal(grad, torch.zeros_like(grad) if expected is None else expected), name


def _average(rank: int, world: int, slots: int) -> dict[str, torch.Tensor]:
    engine = make({**settings(1, slots)})
    engine.eval()
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(words(0, 0)))
        if not engine.is_gradient_accumulation_boundary():
            engine.step()
    found = {n: safe_get_full_grad(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    engine.destroy()
    return found


def _generators(rank: int, world: int) -> list[bool]:
    engine = make(settings(1, 4))
    same = []
    for _ in range(2):
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
        step(engine, 0)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
        same += [torch.equal(before[0], after[0]), before[1] == after[1], bool((before[2] == after[2]).all())]
    engine.destroy()
    return same


def test_the_users_generators_are_left_as_they_were(pool):
    assert all(pool(2).run(_generators)[0])


def _looks(rank: int, world: int, stages: list[int], looks: bool) -> list[str]:
    """Before each step, and so before another slot on each number of ranks, a forward of which nothing is trained."""
    found = []
    for stage in stages:
        engine = make(settings(stage, 6))
        for number in range(2):
            if looks:
                with torch.no_grad():
                    seen = [float(engine(words(9, 0))) for _ in range(2)]
                assert seen[0] != seen[1]  # they draw anew
            step(engine, number)
        found.append(digest(engine.module))
        engine.destroy()
    return found


def test_forwards_without_gradients_do_not_show(pool):
    plain = pool(1).run(_looks, [0], False)[0]
    one_of_all(
        plain
        + [text for world in (1, 2, 3) for rank in pool(world).run(_looks, [0, 3], True) for text in rank]
    )


def _misuses(rank: int, world: int) -> list[str]:
    engine, found = make(settings(1, 4)), []

    def refused(call: Any) -> None:
        with pytest.raises((UsageError, ConfigError)) as raised:
            call()
        found.append(str(raised.value))

    engine.backward(engine(words(0, rank)))
    refused(lambda: safe_get_full_grad(engine.module.embed.weight))
    refused(lambda: engine.set_gradient_accumulation_boundary(True))
    refused(engine.optimizer.step)
    refused(lambda: engine.backward(engine(words(0, rank)), scale_wrt_gas=False))
    refused(lambda: engine.set_train_batch_size(16))
    # Forgotten, the step begins anew, and ends as one that was never disturbed.
    engine.zero_grad()
    step(engine, 0)
    found.append(digest(engine.module))
    engine.destroy()
    return found


def test_a_step_that_is_not_whole_is_refused_and_begins_anew(pool):
    runs = [pool(world).run(_misuses) for world in (1, 2)]
    for run in runs:
        for found in run:
            assert len(found) == 6
            assert all("Fix: " in text for text in found[:5])
    one_of_all(
        [found[5] for run in runs for found in run] + [pool(1).run(train, [settings(1, 4)], 1)[0][0][0]]
    )


def _forgets(rank: int, world: int, stage: int) -> str:
    engine = make(settings(stage, 4))
    with pytest.raises(UsageError) as raised:
        for slot in range(engine.gradient_accumulation_steps()):
            engine.optimizer.zero_grad()
            engine.backward(engine(words(0, slot)))
            engine.step()
    engine.zero_grad()
    step(engine, 0)
    engine.optimizer.zero_grad()
    step(engine, 1)
    engine.destroy()
    return str(raised.value)


def _drops(rank: int, world: int, stage: int) -> str:
    engine = make(settings(stage, 4))
    with pytest.raises(UsageError) as raised:
        for slot in range(engine.gradient_accumulation_steps()):
            engine.module.zero_grad()
            engine.backward(engine(words(0, slot)))
            engine.step()
    engine.zero_grad()
    step(engine, 0)
    engine.module.zero_grad()
    step(engine, 1)
    engine.destroy()
    return str(raised.value)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_that_are_set_to_none_in_the_middle_of_a_step_are_an_error(pool, stage):
    """``module.zero_grad()`` reaches no optimizer: what the slots before had added was lost, in silence."""
    for text in pool(2).run(_drops, stage):
        assert "param.grad = None" in text and "Fix: " in text


@pytest.mark.parametrize("stage", [1, 3])
def test_slots_that_are_forgotten_in_the_middle_of_a_step_are_an_error(pool, stage):
    """Of 4 ranks each has one slot and lost none; of one rank all but the last were lost, in silence."""
    for text in pool(2).run(_forgets, stage):
        assert "optimizer.zero_grad()" in text and "Fix: " in text
    assert "1 micro-step(s) are forgotten" in pool(2).outputs()[0]


def _logged(rank: int, world: int, folder: str) -> list[str]:
    csv = {"enabled": True, "output_path": folder, "job_name": f"on{world}"}
    train(rank, world, [settings(1, 6, csv_monitor=csv)], 3)
    return (
        [p.read_text() for p in sorted(Path(folder).glob(f"on{world}/**/*train_loss*.csv"))]
        if rank == 0
        else []
    )


def test_the_reported_loss_is_that_of_all_slots(pool, tmp_path):
    told = [pool(world).run(_logged, str(tmp_path))[0] for world in (1, 2, 4)]
    assert len(told[0]) == 1
    assert told[0] == told[1] == told[2]


def _samples(rank: int, world: int, folder: str, resumed: bool) -> list[Any]:
    """Two steps, a save, and two more; or those two after a load. Data of the engine's own loader."""
    data = [words(7, at)[0] for at in range(40)]
    engine = make(settings(3 if resumed else 1, 6), training_data=data)
    if resumed:
        engine.load_checkpoint(folder)
    batches = iter(RepeatingLoader(engine.training_dataloader))
    for number in range(4 - engine.global_steps):
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(next(batches)))
            engine.step()
        if number == 1 and not resumed:
            engine.save_checkpoint(folder)
    found = [digest(engine.module), engine.global_steps, engine.get_global_grad_norm()]
    engine.destroy()
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 4)])
def test_a_run_goes_on_on_another_number_of_ranks(pool, tmp_path, before, after):
    """Also at another stage, in the middle of an epoch, and on 4 ranks with uneven shares: the undisturbed bits."""
    whole = pool(before).run(_samples, str(tmp_path), False)
    again = pool(after).run(_samples, str(tmp_path), True)
    one_of_all([tuple(found) for found in [*whole, *again]])


def _threads(rank: int, world: int, folder: str) -> list[str]:
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    engine, log = make(settings(0, 4)), logging.getLogger("zeropipe")
    step(engine, 0)
    engine.save_checkpoint(folder)
    log.addHandler(handler)
    try:
        engine.load_checkpoint(folder)
        before = len(told)
        torch.set_num_threads(2)
        engine.load_checkpoint(folder)
    finally:
        torch.set_num_threads(1)
        log.removeHandler(handler)
        engine.destroy()
    return told[before:]


def test_another_number_of_threads_is_told(pool, tmp_path):
    told = pool(2).run(_threads, str(tmp_path))
    assert any("OMP_NUM_THREADS=1" in text for text in told[0])


def _loaders(rank: int, world: int) -> dict[int, list[list[int]]]:
    """By slot: the samples of its steps, of the engine's loader and of a DataLoader with the engine's sampler."""
    data = list(range(31))
    engine = make(settings(0, 4), training_data=data)
    sampler = engine.slot_sampler(data)
    own = torch.utils.data.DataLoader(data, 2, sampler=sampler)
    found: dict[int, list[list[int]]] = {}
    passes = engine.gradient_accumulation_steps()
    for at, (batch, mine) in enumerate(zip(engine.training_dataloader, own, strict=True)):
        assert batch.tolist() == mine.tolist()
        number = at % passes
        if number < len(engine.slots):
            found.setdefault(engine.slots[number], []).append(batch.tolist())
    engine.destroy()
    return found


def test_samples_are_dealt_to_slots(pool):
    known = pool(1).run(_loaders)[0]
    assert sorted(known) == [0, 1, 2, 3]
    assert {sample for batches in known.values() for batch in batches for sample in batch} == set(range(31))
    for world in (2, 3, 4):
        parts = pool(world).run(_loaders)
        assert {slot: batches for part in parts for slot, batches in part.items()} == known
        assert sum(map(len, parts)) == 4


def _build(rank: int, world: int, config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        make(config)
    return str(raised.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"reproducible": {"slots": 1}}, "at least 2"),
        ({"gradient_accumulation_steps": 3}, "leave it out"),
        ({"train_batch_size": 9}, "set train_batch_size to 8"),
        ({"communication_data_type": "fp16"}, "communication_data_type"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 1}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "zero_hpz_partition_size"),
        ({"data_efficiency": CURRICULUM}, "data_efficiency"),
        ({"train_micro_batch_size_per_gpu": None, "train_batch_size": 7}, "set it to 4"),
    ],
)
def test_what_cannot_be_held_is_refused(pool, more, says):
    for text in pool(2).run(_build, {**settings(1, 4), **more}):
        assert says in text
        assert "Fix: " in text


def _builds(rank: int, world: int) -> dict[str, str]:
    """What is wrong with each model, optimizer, data and mesh."""
    said: dict[str, str] = {}

    def refused(name: str, call: Any) -> None:
        with pytest.raises(ZeropipeError) as raised:
            call()
        said[name] = str(raised.value)

    torch.manual_seed(0)
    table, tied = torch.nn.Embedding(4, 4, max_norm=1.0), [TiedLayerSpec("e", torch.nn.Linear, 4, 4)] * 2
    refused("max_norm", lambda: make(settings(1, 4), lambda: table))
    refused("norms are sums over shards", lambda: make(settings(1, 4, **_optimizer("Lamb"))))
    refused("IterableDataset", lambda: make(settings(1, 4), training_data=torch.utils.data.ChainDataset([])))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    refused("mesh", lambda: make(settings(3, 4), mesh_param=mesh))
    across = {**settings(1, 4), "sequence_parallel_size": 2}
    refused("sequences", lambda: make(across))
    crossing = PipelineModule(layers=tied, num_stages=2, loss_fn=torch.nn.functional.mse_loss)
    refused("stages share", lambda: make(settings(1, 4), lambda: crossing))
    usual = settings(0)
    del usual["reproducible"]
    engine = make(usual)
    refused("no slots", lambda: engine.slots)
    engine.destroy()
    return said


def test_what_models_data_and_meshes_cannot_hold_is_refused(pool):
    for said in pool(2).run(_builds):
        assert len(said) == 7
        for name, text in said.items():
            assert name in text and "Fix: " in text
