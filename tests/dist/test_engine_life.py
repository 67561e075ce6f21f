"""Engines beside each other and one after the other: nothing is shared, nothing stays behind."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator, mlp_batch, token_batch
from tests.helpers.models import MLP, NastyModel, build
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain, weights_of
from tests.helpers.train import config, train

STAGES = (0, 1, 2)
mlp = partial(build, MLP)


def steps_of(engine: Any, rank: int, steps: range) -> None:
    for step in steps:
        engine.backward(engine(*mlp_batch(step, rank)))
        engine.step()


# Many engines in one process.


def three_engines(rank: int, world: int) -> Any:
    """Actor, critic and frozen reference, interleaved; then the same two, one after the other."""
    reference, nothing, *_ = zeropipe.initialize(model=mlp(seed=2), config={"train_batch_size": world})
    assert nothing is None
    actor, *_ = zeropipe.initialize(model=mlp(seed=0), config=config(2, world))
    critic, *_ = zeropipe.initialize(model=mlp(seed=1), config=config(1, world, bf16={"enabled": True}))
    for step in range(3):
        x, y = mlp_batch(step, rank)
        with torch.no_grad():
            target = reference(x, y)
        first, second = actor(x, y), critic(x.bfloat16(), y.bfloat16())
        assert target.grad_fn is None
        critic.backward(second)
        actor.backward(first)
        actor.step()
        critic.step()
    together = weights_of(actor.module), weights_of(critic.module)
    kept = weights_of(reference.module)
    actor.destroy()
    steps_of_critic_only = critic.global_steps
    critic.destroy()
    reference.destroy()
    assert steps_of_critic_only == 3
    assert_bitwise(kept, weights_of(mlp(seed=2)))
    apart = []
    for seed, stage, extra in ((0, 2, {}), (1, 1, {"bf16": {"enabled": True}})):
        engine, *_ = zeropipe.initialize(model=mlp(seed=seed), config=config(stage, world, **extra))
        for step in range(3):
            batch = mlp_batch(step, rank)
            engine.backward(engine(*(t.bfloat16() if extra else t for t in batch)))
            engine.step()
        apart.append(weights_of(engine.module))
        engine.destroy()
    return together, tuple(apart)


def test_actor_critic_and_reference_do_not_touch_each_other(pool):
    for together, apart in pool(2).run(three_engines):
        assert_bitwise(together, apart)


def chained(rank: int, world: int) -> list[Any]:
    """The loss of one engine reaches another through its output."""
    results = []
    for stage in STAGES:
        fp16 = {"fp16": {"enabled": True, "loss_scale": 16.0}}
        encoder, *_ = zeropipe.initialize(model=build(nn.Linear, 16, 16), config=config(stage, world, **fp16))
        head, *_ = zeropipe.initialize(
            model=build(nn.Linear, 16, 16, seed=1),
            config=config(stage, world, fp16={"enabled": True, "loss_scale": 4.0}),
        )
        x = torch.randn(4, 16, generator=generator(rank)).half().requires_grad_()
        for backward in (lambda loss, head=head: head.scale(loss).backward(), head.backward):
            x.grad = None
            backward(head(encoder(x)).float().square().mean())
            results.append(
                (
                    x.grad.float(),
                    zeropipe.utils.safe_get_full_grad(encoder.module.weight),
                    zeropipe.utils.safe_get_full_grad(head.module.weight),
                )
            )
            head.zero_grad()
            encoder.zero_grad()
        head.destroy()
        encoder.destroy()
    return results


def test_engines_in_a_chain_each_apply_their_own_scale(pool):
    runs = pool(2).run(chained)
    encoder, head = build(nn.Linear, 16, 16).half(), build(nn.Linear, 16, 16, seed=1).half()
    for rank in range(2):
        x = torch.randn(4, 16, generator=generator(rank)).half().requires_grad_()
        (head(encoder(x)).float().square().mean() / 2).backward()
        for results in runs[rank]:
            torch.testing.assert_close(results[0], x.grad.float() * 2, rtol=HALF, atol=HALF)
    for results in runs[0]:
        torch.testing.assert_close(results[1], encoder.weight.grad.float(), rtol=HALF, atol=HALF)
        torch.testing.assert_close(results[2], head.weight.grad.float(), rtol=HALF, atol=HALF)


HALF = 4e-3  # fp16 rounds at 5e-4; a wrong scale would be off by a factor of 4 or 16


def fed_back(rank: int, world: int, plain: bool) -> list[Any]:
    """The model is called on its own output, as a recurrent net is, with accumulation."""
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=build(nn.Linear, 16, 16), config=config(stage, world, gas=2))
        for micro in range(2):
            x = torch.randn(4, 16, generator=generator(rank, micro))
            loss = engine(torch.tanh(engine(engine(x)))).square().mean()
            loss.backward() if plain else engine.backward(loss)
            if micro == 0:
                engine.step()
        results.append(zeropipe.utils.safe_get_full_grad(engine.module.weight))
        engine.destroy()
    return results


def test_a_model_that_is_fed_its_own_output_scales_once(pool):
    ours, plain = pool(2).run(fed_back, False), pool(2).run(fed_back, True)
    assert_bitwise(plain, ours)  # 1 / 2 is exact


# Losses and backwards.


def two_losses(rank: int, world: int, how: str) -> list[Any]:
    results = []
    for stage in STAGES:
        model = mlp()
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world))
        for step in range(3):
            (x, y), (v, w) = mlp_batch(step, rank, 0), mlp_batch(step, rank, 1)
            if how == "one backward":
                engine.backward(engine(x, y) + engine(v, w))
            elif how == "two backwards":
                first, second = engine(x, y), engine(v, w)
                engine.backward(first)
                engine.backward(second)
            elif how == "two plain backwards":
                engine(x, y).backward()
                engine(v, w).backward()
            else:
                loss = engine(x, y)
                engine.backward(loss * 0.25, retain_graph=True)
                engine.backward(loss * 0.75)
                engine.backward(engine(v, w))
            engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


def _plain_two(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, *batch: torch.Tensor) -> torch.Tensor:
            return self.inner(*batch[:2]) + self.inner(*batch[2:])

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True)

    batches = lambda step: [(*mlp_batch(step, r, 0), *mlp_batch(step, r, 1)) for r in range(2)]  # noqa: E731
    weights = train_plain(Both, batches, adamw, 3, dtype=dtype).weights
    return {name.removeprefix("inner."): value for name, value in weights.items()}


@pytest.mark.parametrize("how", ["one backward", "two backwards", "two plain backwards", "retained graph"])
def test_several_losses_in_one_step(pool, how):
    plain, referee = _plain_two(torch.float32), _plain_two(torch.float64)
    runs = pool(2).run(two_losses, how)
    for results in runs:
        for weights in results:
            assert_within_referee(weights, plain, referee)
        assert_bitwise(results, runs[0])


def local_steps(rank: int, world: int, plain: bool) -> list[Any]:
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world, gas=3))
        for step in range(3):
            for micro in range(3):
                loss = engine(*mlp_batch(step, rank, micro))
                if micro < 2:
                    with engine.no_sync():
                        loss.backward() if plain else engine.backward(loss)
                else:
                    loss.backward() if plain else engine.backward(loss)
                engine.step()
        results.append(weights_of(engine.module))
        engine.destroy()
    return results


@pytest.mark.parametrize("plain", [False, True])
def test_no_sync_gives_the_same_bits_at_every_stage(pool, plain):
    runs = pool(2).run(local_steps, plain)
    accumulated = pool(2).run(train, mlp, mlp_batch, config(0, 2, gas=3), 3, plain=plain)
    for results in runs:
        for weights in results:
            assert_bitwise(weights, accumulated[0]["weights"])


def never_synced(rank: int, world: int) -> list[Any]:
    """Also the last backward is inside no_sync: step reduces."""
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world))
        for step in range(3):
            with engine.no_sync():
                engine.backward(engine(*mlp_batch(step, rank)))
            engine.step()
        results.append(weights_of(engine.module))
        engine.destroy()
    return results


def test_a_step_reduces_what_no_backward_has_reduced(pool):
    expected = pool(2).run(train, mlp, mlp_batch, config(0, 2), 3)
    for results in pool(2).run(never_synced):
        for weights in results:
            assert_bitwise(weights, expected[0]["weights"])


def some_ranks_skip(rank: int, world: int) -> list[Any]:
    """A rank that has no data for a micro-batch calls only step."""
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world, gas=2))
        for step in range(3):
            for micro in range(2):
                if (step + micro) % world != rank:
                    engine(*mlp_batch(step, rank, micro)).backward()
                engine.step()
        results.append(weights_of(engine.module))
        engine.destroy()
    return results


def test_a_rank_without_data_for_a_micro_step_calls_step_alone(pool):
    runs = pool(2).run(some_ranks_skip)
    for results in runs:
        assert_bitwise(results[:2], [runs[0][0]] * 2)
        for name in results[2]:
            torch.testing.assert_close(results[2][name], runs[0][0][name], rtol=1e-5, atol=1e-6)


# Norms and clipping.


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("clip", [None, 0.0, 0.05, 1e6])
def test_the_norm_and_clipping_are_torchs(pool, world, clip):
    nasty = partial(build, NastyModel)
    batches = lambda step: [token_batch(step, r) for r in range(world)]  # noqa: E731
    absent = clip is None  # the default is 1.0
    bound = 1.0 if absent else (clip or None)
    plain, referee = (
        train_plain(nasty, batches, adamw, 3, clip=bound, dtype=d) for d in (None, torch.float64)
    )
    for stage in STAGES:
        settings = config(stage, world, gradient_clipping=clip)
        if absent:
            del settings["gradient_clipping"]
        for result in pool(world).run(train, nasty, token_batch, settings, 3):
            assert result["norms"] == pytest.approx(referee.grad_norms, rel=NORM_ERROR)
            assert_within_referee(result["weights"], plain.weights, referee.weights)


NORM_ERROR = 1e-5  # fp32 gradients against fp64 ones


# Its end.


def hooks_of(model: nn.Module) -> int:
    count = 0
    for module in model.modules():
        count += sum(len(v) for k, v in vars(module).items() if k.endswith("_hooks") and v is not None)
    for param in model.parameters():
        count += len(param._post_accumulate_grad_hooks or ()) + len(param._backward_hooks or ())
    return count


def tensors_alive() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


def one_life(rank: int, world: int, model: nn.Module, stage: int, extra: dict[str, Any]) -> list[Any]:
    optimizer = adamw(model.parameters())
    data = [tuple(t[0] for t in mlp_batch(i, batch=1)) for i in range(4)]
    settings = config(stage, world, optimizer={"type": None, "params": {}}, **extra)
    engine, zero, loader, schedule = zeropipe.initialize(
        model=model, optimizer=optimizer, training_data=data, config=settings,
        lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1),
    )  # fmt: skip
    for x, y in loader:
        engine.backward(engine(x.to(model.layers[0].weight.dtype), y))
        engine.step()
    gone = [
        weakref.ref(thing) for thing in (engine, zero, zero.reducer, *zero.partitions, *zero.reducer.stores)
    ]
    gone += [weakref.ref(partition.master) for partition in zero.partitions]
    engine.destroy()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert not optimizer.state
    return gone


def destroyed(rank: int, world: int) -> None:
    for stage in STAGES:
        for extra in ({}, {"fp16": {"enabled": True}}):
            model = mlp()
            gone = one_life(rank, world, model, stage, extra)
            gc.collect()
            assert [ref() for ref in gone] == [None] * len(gone)
            assert hooks_of(model) == 0
            for param in model.parameters():
                assert param.grad is None
                assert not [name for name in vars(param) if name.startswith(("_zero", "ds_"))]
                assert param.untyped_storage().nbytes() == param.numel() * param.element_size()
            model.float()(*mlp_batch(0)).backward()  # it is a plain module again


def test_destroy_leaves_nothing_behind(pool):
    pool(2).run(destroyed)


def twenty_lives(rank: int, world: int) -> None:
    model = mlp()
    counts, threads = [], []
    for life in range(20):
        one_life(rank, world, model, life % 3, {})
        counts.append(tensors_alive())
        threads.append(threading.active_count())
    assert counts[1:] == [counts[1]] * 19
    assert threads == [threads[0]] * 20
    assert hooks_of(model) == 0


def test_twenty_engines_on_one_module_do_not_grow(pool):
    pool(2).run(twenty_lives)


def again(rank: int, world: int) -> list[Any]:
    """Two engines one after the other on one module against one plain optimizer that starts anew."""
    results = []
    for stages in ((0, 2), (2, 1), (1, 1)):
        model = mlp()
        for life, stage in enumerate(stages):
            engine, *_ = zeropipe.initialize(model=model, config=config(stage, world))
            steps_of(engine, rank, range(life * 2, life * 2 + 2))
            engine.destroy()
        results.append(weights_of(model))
    return results


def test_a_second_engine_on_the_same_module_starts_anew(pool):
    for results in pool(2).run(again):
        for weights in results:
            assert_bitwise(weights, results[0])


def abandoned(rank: int, world: int) -> None:
    """An engine that is dropped without destroy is collected; its module can be trained again."""
    engine, optimizer, *_ = zeropipe.initialize(model=mlp(), config=config(1, world))
    steps_of(engine, rank, range(1))
    refs = [weakref.ref(engine), weakref.ref(optimizer)]
    del engine, optimizer
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_an_engine_that_is_dropped_is_collected(pool):
    pool(2).run(abandoned)


def compiled(rank: int, world: int) -> Any:
    results = []
    for compile_it in (False, True):
        engine, *_ = zeropipe.initialize(model=mlp(), config=config(2, world))
        if compile_it:
            engine.compile(backend="eager")
        steps_of(engine, rank, range(2))
        results.append(weights_of(engine.module))
        engine.destroy()
    return results


@pytest.mark.slow
def test_a_compiled_module_trains_alike(pool):
    for plain, ours in pool(2).run(compiled):
        assert_bitwise(ours, plain)


def offloaded(rank: int, world: int) -> list[Any]:
    results = []
    for stage in (1, 2):
        for device in ("none", "cpu"):
            zero = {"stage": stage, "offload_optimizer": {"device": device}}
            engine, *_ = zeropipe.initialize(model=mlp(), config=config(stage, world, zero_optimization=zero))
            steps_of(engine, rank, range(3))
            results.append(weights_of(engine.module))
            engine.destroy()
    return results


def test_offloading_to_the_cpu_on_a_cpu_changes_nothing(pool):
    for results in pool(2).run(offloaded):
        for weights in results:
            assert_bitwise(weights, results[0])


def unused_is_an_error(rank: int, world: int) -> None:
    from zeropipe.errors import UsageError

    for stage in STAGES:
        zero = {"stage": stage, "ignore_unused_parameters": False}
        engine, *_ = zeropipe.initialize(
            model=build(NastyModel), config=config(stage, world, zero_optimization=zero)
        )
        engine.backward(engine(*token_batch(0, rank)))
        with pytest.raises(
            UsageError, match=r"'dead.weight', 'dead.bias'.*no gradient on any rank.*Fix:.*ignore_unused"
        ):
            engine.step()
        engine.zero_grad()
        engine.backward(engine(*token_batch(0, rank), wake_dead=True))
        engine.step()
        assert engine.was_step_applied()
        engine.destroy()


def test_unused_parameters_are_an_error_if_asked_for(pool):
    pool(2).run(unused_is_an_error)
