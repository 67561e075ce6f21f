"""MiCS: shards in groups, replicas across; parameters stay in a group, gradients cross once per boundary."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.dist.test_data_parallel import STEPS, adamw, gpt, nasty
from tests.dist.test_zero3 import NOTHING_PERSISTS, train3
from tests.helpers.data import global_batches, gpt_batch, token_batch
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain
from tests.helpers.train import config
from zeropipe.errors import ConfigError


def mics(world: int, size: int, **extra: Any) -> dict[str, Any]:
    zero = {"stage": 3, "mics_shard_size": size, **NOTHING_PERSISTS, **extra.pop("zero", {})}
    return config(3, world, zero_optimization=zero, **extra)


@pytest.mark.parametrize("world", [1, 2])
def test_one_replica_is_stage_3(pool, world):
    expected = pool(world).run(train3, nasty, token_batch, config(3, world), STEPS)
    ours = pool(world).run(train3, nasty, token_batch, mics(world, world), STEPS)
    for mine, other in zip(ours, expected, strict=True):
        assert_bitwise(mine["weights"], other["weights"])


def _batches(world: int, gas: int, step: int) -> list[Any]:
    return global_batches(gpt_batch, step, world, gas)


@pytest.mark.native
@pytest.mark.parametrize(("world", "size", "gas"), [(4, 2, 1), (4, 2, 2), (3, 1, 2)])
def test_groups_times_replicas_is_the_referee(pool, world, size, gas):
    clip = 0.5  # below every norm of the run: the norm over shards and replicas must count each element once
    settings = mics(world, size, gas=gas, gradient_clipping=clip)
    ours = pool(world).run(train3, gpt, gpt_batch, settings, STEPS)
    batches = partial(_batches, world, gas)
    plain32 = train_plain(gpt, batches, adamw, STEPS, clip=clip, dtype=None)
    plain64 = train_plain(gpt, batches, adamw, STEPS, clip=clip)
    for result in ours:
        assert_bitwise(result["weights"], ours[0]["weights"])  # the replicas do not drift apart
    assert_within_referee(ours[0]["weights"], plain32.weights, plain64.weights)


def test_two_by_two_is_stage_3_on_four_bitwise_where_the_sums_are_exact(pool):
    """Every rank has the same batch, so that all averages are exact in any order."""
    ours = pool(4).run(train3, gpt, _same_batch, mics(4, 2), STEPS)
    expected = pool(4).run(train3, gpt, _same_batch, config(3, 4), STEPS)
    assert_bitwise(ours[3]["weights"], expected[0]["weights"])


def _same_batch(step: int, rank: int, micro: int) -> Any:
    return gpt_batch(step)


@pytest.mark.native
@pytest.mark.parametrize("reach", ["mics_shard_size", "zero_hpz_partition_size", "mesh"])
def test_parameters_stay_in_their_group_and_gradients_cross_once(pool, reach):
    for events, shard, replicas in pool(4).run(_events, reach):
        assert shard in ((0, 1), (2, 3))
        assert replicas in ((0, 2), (1, 3))
        moved = [e for e in events if e.op in ("all_gather", "reduce_to_owners")]
        assert len(moved) > 10
        assert {e.ranks for e in moved} == {shard}
        crossing = [e for e in events if not set(e.ranks) <= set(shard)]
        large = [e for e in crossing if e.label != "gradient norm"]
        assert [(e.op, e.ranks, e.label) for e in large] == [
            ("all_reduce", replicas, "gradients of replicas")
        ]
        total = sum(e.bytes for e in moved if e.op == "reduce_to_owners")
        assert large[0].bytes * 2 * 3 == pytest.approx(total, abs=4096)  # a shard; 3 micro-steps; padding
        assert sum(e.bytes for e in crossing) - large[0].bytes <= 64  # the norm


def _mesh_of_other_names(rank: int, world: int, names: tuple[str, ...] | None) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    import zeropipe

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    with pytest.raises(ConfigError, match=r"mesh_param.*data_parallel"):
        zeropipe.initialize(model=gpt(), config=config(3, 4), mesh_param=mesh)


@pytest.mark.parametrize("names", [("dp", "fsdp"), None])
def test_a_mesh_whose_axes_mean_nothing_here_is_refused(pool, names):
    pool(4).run(_mesh_of_other_names, names)


def _events(rank: int, world: int, reach: str) -> Any:
    import zeropipe
    from zeropipe.comm.record import record

    settings = config(3, 4, gas=3, zero_optimization={"stage": 3, **NOTHING_PERSISTS})
    mesh = None
    if reach == "mesh":
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    else:
        settings["zero_optimization"][reach] = 2
    engine, optimizer, _, _ = zeropipe.initialize(model=gpt(), config=settings, mesh_param=mesh)
    partition = optimizer.partitions[0]
    for step in range(2):
        with record() as events:
            for micro in range(3):
                engine.backward(engine(*gpt_batch(step, rank, micro)))
                engine.step()
    result = events, partition.group.ranks, partition.values.replicas.ranks
    engine.destroy()
    return result


def test_a_gradient_read_between_micro_steps_is_averaged_over_all_and_nothing_is_lost(pool):
    ours = pool(4).run(_train_and_look, mics(4, 2, gas=2), 2)
    plain32 = train_plain(gpt, partial(_batches, 4, 2), adamw, 2, dtype=None)
    plain64 = train_plain(gpt, partial(_batches, 4, 2), adamw, 2)
    for weights, grads in ours:
        assert_bitwise(grads, ours[0][1])
        assert_within_referee(weights, plain32.weights, plain64.weights)


def _train_and_look(rank: int, world: int, settings: dict[str, Any], steps: int) -> Any:
    import zeropipe
    from zeropipe.utils import safe_get_full_fp32_param, safe_get_full_grad

    engine, _, _, _ = zeropipe.initialize(model=gpt(), config=settings)
    named = dict(engine.module.named_parameters())
    grads = {}
    for step in range(steps):
        for micro in range(2):
            engine.backward(engine(*gpt_batch(step, rank, micro)))
            grads = {name: safe_get_full_grad(param) for name, param in named.items()}
            engine.step()
    weights = {name: safe_get_full_fp32_param(param) for name, param in named.items()}
    engine.destroy()
    return weights, grads


def test_an_overflow_in_one_replica_skips_the_step_in_all(pool):
    settings = mics(4, 2, fp16={"enabled": True, "initial_scale_power": 4, "hysteresis": 1})
    assert pool(4).run(_overflow, settings) == [(1, 8.0)] * 4


def _overflow(rank: int, world: int, settings: dict[str, Any]) -> Any:
    import zeropipe

    engine, optimizer, _, _ = zeropipe.initialize(model=gpt(), config=settings)
    loss = engine(*gpt_batch(0, rank))
    engine.backward(loss * float("inf") if rank == 3 else loss)
    engine.step()
    result = engine.skipped_steps, optimizer.loss_scale
    engine.destroy()
    return result


def test_a_size_that_does_not_divide_the_ranks_is_refused(pool):
    assert pool(3).run(_refused) == ["use one of 1, 3"] * 3


def _refused(rank: int, world: int) -> str:
    import zeropipe

    with pytest.raises(ConfigError) as error:
        zeropipe.initialize(model=gpt(), config=mics(3, 2))
    return next(part for part in ("use one of 1, 3",) if part in str(error.value))


@pytest.mark.native
@pytest.mark.parametrize("name", ["MiCS_Init", "Init"])
def test_a_model_built_as_shards_in_groups_trains_to_the_same_bits(pool, name):
    expected = pool(4).run(train3, gpt, gpt_batch, mics(4, 2), 2)
    for result in pool(4).run(_built_sharded, name):
        assert_bitwise(result, expected[0]["weights"])


def _built_sharded(rank: int, world: int, name: str) -> Any:
    import torch

    import zeropipe
    from tests.helpers.models import TinyGPT
    from zeropipe.utils import safe_get_full_fp32_param

    settings = mics(4, 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rank)  # rank 0's values count, in every replica
        with getattr(zeropipe.zero, name)(config_dict_or_path=settings):
            model = TinyGPT()
    engine = zeropipe.initialize(model=model, config=settings)[0]
    for step in range(2):
        engine.backward(engine(*gpt_batch(step, rank)))
        engine.step()
    weights = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
    engine.destroy()
    return weights


def test_mics_init_insists_on_a_size(pool):
    assert pool(1).run(_no_size) == [True]


def _no_size(rank: int, world: int) -> bool:
    import zeropipe

    with pytest.raises(ConfigError, match="mics_shard_size"):
        zeropipe.zero.MiCS_Init(config_dict_or_path=config(3, 1))
    return True


@pytest.mark.native
@pytest.mark.parametrize("later", ["mics", "stage 3", "stage 1"])
def test_a_checkpoint_of_groups_goes_on_in_any_shape(pool, tmp_path, later):
    settings = mics(4, 2) if later == "mics" else config(int(later[-1]), 4)
    for saved, loaded in pool(4).run(_save_and_load, settings, tmp_path):
        assert_bitwise(loaded, saved)


def _save_and_load(rank: int, world: int, settings: dict[str, Any], folder: Any) -> Any:
    """(master, moment) of every parameter: when saved with MiCS, and after a load under ``settings``."""
    import zeropipe
    from zeropipe.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    def state(engine: Any) -> Any:
        trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        return {
            n: (safe_get_full_fp32_param(p), safe_get_full_optimizer_state(p, "exp_avg_sq"))
            for n, p in trained.items()
        }

    first = zeropipe.initialize(model=nasty(), config=mics(4, 2))[0]
    first.backward(first(*token_batch(0, rank)))
    first.step()
    first.save_checkpoint(folder)
    saved = state(first)
    first.destroy()
    second = zeropipe.initialize(model=nasty(), config=settings)[0]
    second.load_checkpoint(folder)
    loaded = state(second)
    second.destroy()
    return saved, loaded
