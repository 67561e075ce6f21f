"""What scripts ask an engine and its optimizer beside forward, backward and step, at every stage."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import zeropipe
from tests.dist.pipe_models import specs
from tests.dist.test_pipe_engine import config as pipe_config
from tests.dist.test_pipe_engine import engine_of
from tests.dist.test_pipe_engine import train as train_pipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from tests.unit.compat.conftest import forget
from zeropipe.compat.finder import install_as_deepspeed
from zeropipe.errors import ConfigError, UsageError
from zeropipe.runtime.engine.settings import Settings

STAGES = (0, 1, 2, 3)
mlp = partial(build, MLP)


def engine_at(stage: int, world: int, **extra: Any) -> Any:
    settings = config(stage, world, **extra)
    settings["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)  # all of it travels
    return zeropipe.initialize(model=mlp(), config=settings)[0]


def weights(engine: Any) -> dict[str, torch.Tensor]:
    engine.destroy()
    return weights_of(engine.module)


# ---- accumulation that the user counts, and reductions that he asks for ----


def steps_of(
    engine: Any, rank: int, micros: Callable[[int], int], around: Callable[..., Any], last: bool
) -> None:
    """``micros(step)`` backwards in each of 3 steps inside ``around``; ``last``: the others end with ``step`` too."""
    for step in range(3):
        count = micros(step)
        with around(engine):
            for micro in range(count):
                engine.backward(engine(*mlp_batch(step, rank, micro)))
                if last and micro + 1 < count:
                    engine.step()
        engine.step()


def unmanaged(rank: int, world: int) -> None:
    def nothing(engine: Any) -> Any:
        return contextlib.nullcontext()

    for stage in STAGES:
        managed = engine_at(stage, world, gas=2)
        steps_of(managed, rank, lambda step: 2, nothing, last=True)
        mine = engine_at(stage, world, gas=2, managed_gradient_accumulation=False)
        assert not mine.is_gradient_accumulation_boundary()
        steps_of(mine, rank, lambda step: 2, nothing, last=False)
        assert (mine.global_steps, mine.micro_steps, mine.global_samples) == (3, 3, 3 * 2 * world)
        assert managed.global_steps == 3
        assert_bitwise(weights(mine), weights(managed), f"stage {stage}")

        # Another number in each step, which no count could know: as one window of as many backwards.
        other = engine_at(stage, world, gas=2, managed_gradient_accumulation=False)
        steps_of(other, rank, lambda step: step + 1, nothing, last=False)
        forced = engine_at(stage, world, gas=2)
        for step in range(3):
            for micro in range(step + 1):
                forced.set_gradient_accumulation_boundary(micro == step)
                forced.backward(forced(*mlp_batch(step, rank, micro)))
                forced.step()
        assert_bitwise(weights(other), weights(forced), f"stage {stage}")


def test_without_managed_accumulation_every_step_is_one(pool):
    pool(2).run(unmanaged)


def coalesced(rank: int, world: int) -> None:
    for stage in STAGES:
        held = engine_at(stage, world, gas=2)
        steps_of(held, rank, lambda step: 2, lambda e: e.no_sync(), last=False)  # a step outside reduces
        engine = engine_at(stage, world, gas=2)
        for step in range(3):
            with engine.coalesce_grad_reduction(), zeropipe.comm.record() as events:
                for micro in range(2):
                    engine.backward(engine(*mlp_batch(step, rank, micro)))
                moved = {event.op for event in events if event.bytes}
                assert moved <= {"all_gather"}, f"stage {stage} reduced inside"
            engine.set_gradient_accumulation_boundary(True)
            found = zeropipe.utils.safe_get_full_grad(next(engine.module.parameters()))
            with zeropipe.comm.record() as events:
                engine.allreduce_gradients(bucket_size=5)  # nothing is left to reduce
            assert not [event for event in events if event.label == "gradients"]
            assert found is not None and found.abs().sum() > 0
            engine.step()
        held.destroy()
        assert engine.global_steps == 3
        ours = weights(engine)
        plain = engine_at(stage, world, gas=2)
        steps_of(plain, rank, lambda step: 2, lambda e: contextlib.nullcontext(), last=True)
        for name, value in weights(plain).items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)


def test_a_block_reduces_once_when_it_ends(pool):
    pool(2).run(coalesced)


def reduced_by_hand(rank: int, world: int) -> None:
    for stage in STAGES:
        asked, plain = engine_at(stage, world), engine_at(stage, world)
        asked.allreduce_gradients()  # before any backward there is nothing, and the window stays empty
        for step in range(3):
            for engine in (asked, plain):
                engine.backward(engine(*mlp_batch(step, rank, 0)))
            asked.allreduce_gradients()
            for engine in (asked, plain):
                engine.step()
            asked.allreduce_gradients()
        assert_bitwise(weights(asked), weights(plain), f"stage {stage}")


def test_gradients_may_be_reduced_by_hand(pool):
    pool(2).run(reduced_by_hand)


# ---- the optimizer ----


def through_the_optimizer(rank: int, world: int) -> None:
    for stage in STAGES:
        for extra in ({}, {"fp16": {"enabled": True, "initial_scale_power": 8}}):
            ours, plain = (engine_at(stage, world, gas=2, gradient_clipping=0.5, **extra) for _ in range(2))
            optimizer = ours.optimizer
            assert optimizer.dynamic_loss_scale is bool(extra) is ours.dynamic_loss_scale()
            assert (optimizer.clip_grad, optimizer.cpu_offload) == (0.5, False)
            for step in range(2):
                for micro in range(2):
                    x, y = mlp_batch(step, rank, micro)
                    if extra:
                        x, y = x.half(), y.half()
                    optimizer.backward(ours(x, y) / 2)
                    ours.step()
                    plain.backward(plain(x, y))
                    plain.step()
            optimizer.refresh_fp32_params()
            assert ours.optimizer.grad_norm == plain.optimizer.grad_norm
            assert_bitwise(weights(ours), weights(plain), f"stage {stage} {extra}")
    with pytest.raises(UsageError, match=r"optimizer.backward: .*engine"):
        optimizer.backward(torch.ones((), requires_grad=True))


def test_a_backward_of_the_optimizer_is_the_engines(pool):
    pool(2).run(through_the_optimizer)


# ---- what it says of itself ----


def answers(rank: int, world: int) -> None:
    for stage in STAGES:
        engine = engine_at(
            stage, world, gas=2, steps_per_print=7, wall_clock_breakdown=True, sparse_gradients=True,
            zero_optimization={"stage": stage, "reduce_bucket_size": 1234},
        )  # fmt: skip
        samples, micro, gas = engine.get_batch_info()
        assert (samples(), micro(), gas()) == (2 * world, 1, 2)
        assert (engine.steps_per_print(), engine.wall_clock_breakdown()) == (7, True)
        assert (engine.local_rank, engine.global_rank, engine.world_size) == (0, rank, world)
        assert (engine.dp_world_size, engine.mp_world_size, engine.pipeline_parallelism) == (world, 1, False)
        total = torch.tensor([1.0 + rank])
        dist.all_reduce(total, group=engine.data_parallel_group)
        assert total.item() == sum(range(1, world + 1))
        assert (engine.optimizer_name(), engine.optimizer_params()["lr"]) == ("AdamW", 0.01)
        assert (engine.scheduler_name(), engine.get_mom()) == (None, [(0.9, 0.999)])
        assert (engine.zero_reduce_bucket_size(), engine.zero_optimization_stage()) == (1234, stage)
        assert engine.zero_optimization_partition_weights() is (stage == 3)
        assert engine.zero_offload_optimizer() is engine.zero_offload_param() is None
        assert engine.sparse_gradients_enabled() is True
        engine.set_train_micro_batch_size(3)
        assert (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) == (6 * world, 3)
        with pytest.raises(ConfigError, match="set_train_micro_batch_size"):
            engine.set_train_micro_batch_size(0)
        # Every question has an answer: no key was renamed under one of them.
        for name, asked in vars(Settings).items():
            if getattr(asked, "__name__", "") == "said":  # of a key of the configuration
                getattr(engine, name)()
        engine.destroy()


def test_it_answers_for_its_configuration_and_place(pool):
    pool(2).run(answers)


def test_one_process_needs_no_torchrun(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    engine = engine_at(2, 1)
    assert (engine.local_rank, engine.global_rank, engine.world_size) == (0, 0, 1)
    engine.destroy()


def timed(rank: int, world: int) -> None:
    for stage in STAGES:
        engine = engine_at(stage, world, gas=2)
        timer = engine.tput_timer
        assert timer.avg_samples_per_sec() == -math.inf
        for step in range(4):
            for micro in range(2):
                engine.backward(engine(*mlp_batch(step, rank, micro)))
                engine.step()
        timer.update_epoch_count()
        assert (timer.epoch_count, timer.global_step_count, timer.batch_size) == (1, 4, 2 * world)
        stats = timer.stats()
        assert stats.steps == 2  # after two of warm-up
        assert timer.avg_samples_per_sec() == pytest.approx(2 * 2 * world / stats.seconds)
        # A script that measures by itself does not stop the engine's next step.
        timer.start()
        timer.stop(global_step=True)
        engine.backward(engine(*mlp_batch(0, rank, 0)))
        timer.stop()
        engine.step()
        engine.destroy()


def test_the_throughput_timer_runs_unasked(pool):
    pool(2).run(timed)


# ---- data ----


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def test_what_a_loader_yields_goes_through_the_users_function():
    engine, _, loader, _ = zeropipe.initialize(
        model=mlp(), training_data=Numbers(), config=config(0, 1) | {"train_batch_size": 2}
    )
    engine.set_data_post_process_func(lambda batch, state: (batch * 10, state["samples"]))
    found = list(loader)
    assert sorted(x for batch, _ in found for x in batch.flatten().tolist()) == [10.0 * i for i in range(8)]
    assert [place for _, place in found] == [2, 4, 6, 0]  # the last one ends the epoch
    bare = engine_at(0, 1)
    with pytest.raises(UsageError, match=r"no loader of its own.*Fix: give initialize training_data"):
        bare.set_data_post_process_func(lambda batch, state: batch)
    engine.destroy()
    bare.destroy()


# ---- what is printed under the name deepspeed ----


@contextlib.contextmanager
def named_deepspeed() -> Iterator[io.StringIO]:
    forget()
    install_as_deepspeed()
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            yield out
    finally:
        forget()


def printed(rank: int, world: int, every: float | None) -> tuple[str, float | None]:
    extra = {} if every is None else {"steps_per_print": every}
    with named_deepspeed() as out:
        engine = engine_at(2, world, **extra)
        for step in range(10):
            engine.backward(engine(*mlp_batch(step, rank, 0)))
            engine.step()
        said = engine.steps_per_print()
        engine.destroy()
    return out.getvalue(), said


def test_an_engine_prints_where_deepspeed_does(pool):
    (first, said), (second, _) = pool(2).run(printed, None)
    assert (second, said) == ("", 10)
    assert "[Rank 0] step=10, skipped=0, lr=[0.01], mom=[(0.9, 0.999)]\n" in first
    assert first.count("[Rank 0] step=10,") == 1 and "RunningAvgSamplesPerSec=" in first
    assert pool(2).run(printed, math.inf) == [("", math.inf)] * 2
    (first, said), _ = pool(2).run(printed, 4)
    assert (said, [f"step={n}, " in first for n in (4, 8, 10)]) == (4, [True, True, False])


def printed_by_a_pipeline(rank: int, world: int) -> tuple[str, list[float]]:
    with named_deepspeed() as out:
        engine = engine_of(2, 1, specs(2), pipe_config(1, steps_per_print=2))
        losses = train_pipe(engine, 4)
        assert engine.pipeline_parallelism and engine.tput_timer.global_step_count == 4
        assert engine.mp_world_size == 2 and engine.dp_world_size == 1
        engine.destroy()
    return out.getvalue(), losses


def test_a_pipeline_prints_its_loss(pool):
    (first, losses), (second, _) = pool(2).run(printed_by_a_pipeline)
    assert second == ""
    lines = first.splitlines()
    assert [line.split(" iter time (s): ")[0] for line in lines] == [
        f"steps: {step} loss: {losses[step - 1]:.4f}" for step in (2, 4)
    ]
    assert all(float(line.split("samples/sec: ")[1]) > 0 for line in lines)


def test_without_the_name_nothing_is_printed(pool):
    pool(2).run(silent)
    assert pool(2).outputs() == ["", ""]


def silent(rank: int, world: int) -> None:
    engine = engine_at(1, world, steps_per_print=1)
    engine.backward(engine(*mlp_batch(0, rank, 0)))
    engine.step()
    engine.destroy()
