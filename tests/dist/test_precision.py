"""bf16 and fp16: the stages agree bit for bit, overflow is decided once, and each dtype is the one configured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import generator, token_batch
from tests.helpers.models import NastyModel, TinyGPT, build
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from zeropipe.errors import LossScaleError
from zeropipe.utils import safe_get_full_fp32_param

STAGES = (0, 1, 2)
STEPS = 4
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
STATIC = {"fp16": {"enabled": True, "loss_scale": 64.0}}


def every_stage(rank: int, world: int, model: Any, extra: dict[str, Any], gas: int = 1) -> list[Any]:
    """Per stage: weights, masters and norms."""
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=build(model), config=config(stage, world, gas=gas, **extra))
        norms = []
        for step in range(STEPS):
            for micro in range(gas):
                engine.backward(engine(*token_batch(step, rank, micro)))
                engine.step()
            norms.append(engine.get_global_grad_norm())
        masters = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters()}
        results.append((weights_of(engine.module), masters, norms, engine.loss_scale))
        engine.destroy()
    return results


@pytest.mark.native
@pytest.mark.parametrize("extra", [BF16, FP16, STATIC], ids=["bf16", "fp16", "static scale"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("world", [2, 3])
def test_the_stages_agree_bitwise(pool, extra, clip, world):
    runs = pool(world).run(every_stage, NastyModel, {**extra, "gradient_clipping": clip})
    dtype = torch.bfloat16 if "bf16" in extra else torch.float16
    for results in runs:
        for weights, masters, *_ in results:
            assert_bitwise((weights, masters), runs[0][0][:2])
            for name, value in weights.items():
                assert value.dtype == dtype
                if masters[name] is not None:
                    assert_bitwise(value, masters[name].to(dtype), name)
        for other in results[1:]:
            assert other[2] == pytest.approx(results[0][2], rel=1e-12)  # fp64 sums in another order


def test_accumulation_agrees_at_stages_0_and_1(pool):
    # Stage 2 reduces every micro-batch and adds in its shard: another order of additions.
    for extra in (BF16, FP16):
        runs = pool(2).run(every_stage, TinyGPT_tokens, extra, 2)
        for results in runs:
            assert_bitwise(results[1][:2], runs[0][0][:2])


class TinyGPT_tokens(TinyGPT):
    def __init__(self) -> None:
        super().__init__(vocab=11, width=16, layers=1, seq=5)


# Overflow.


class Exploding(nn.Module):
    """Three layers; the gradient of ``layers.1.weight`` gets an inf where the second argument says so."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor, explode: bool) -> torch.Tensor:  # []
        for i, layer in enumerate(self.layers):
            weight = layer.weight
            if explode and i == 1:
                weight = _Explode.apply(weight)
            x = torch.tanh(x @ weight.T)
        return x.float().square().mean()


class _Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        bad = grad.clone()
        bad[3, 5] = float("inf")
        return bad


def x_of(step: int, rank: int, micro: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(4, 16, generator=generator(step, rank, micro)).to(dtype)


OVERFLOWS = (1, 2, 4)  # steps
GAS = 2


def overflow_run(rank: int, world: int, plain: bool) -> list[Any]:
    results = []
    for stage in STAGES:
        settings = config(
            stage,
            world,
            gas=GAS,
            fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 2, "loss_scale_window": 2},
            scheduler={"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
        )
        engine, optimizer, _, schedule = zeropipe.initialize(model=build(Exploding), config=settings)
        seen = []
        for step in range(8):
            for micro in range(GAS):
                bad = step in OVERFLOWS and rank == 1 and micro == 1
                loss = engine(x_of(step, rank, micro), bad)
                engine.scale(loss).backward() if plain else engine.backward(loss)
                engine.step()
            found = optimizer.last_nonfinite
            seen.append(
                (
                    optimizer.overflow,
                    engine.was_step_applied(),
                    engine.loss_scale,
                    schedule.last_epoch,
                    engine.skipped_steps,
                    None if found is None else (found.name, found.rank, found.micro_step, found.num_inf),
                )
            )
        results.append((seen, weights_of(engine.module)))
        engine.destroy()
    return results


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "engine.scale"])
def test_overflow_on_one_rank_skips_the_step_everywhere(pool, plain):
    for results in pool(2).run(overflow_run, plain):
        for seen, weights in results:
            assert_bitwise(weights, results[0][1] if weights is not results[2][1] else weights)
            overflow, applied, scale, epoch, skipped, found = map(list, zip(*seen, strict=True))
            assert overflow == [step in OVERFLOWS for step in range(8)]
            assert applied == [not bad for bad in overflow]
            # The first overflow uses up the hysteresis, the next ones halve; two clean steps let it grow again.
            assert scale == [256, 256, 128, 128, 64, 64, 64, 128]
            assert epoch == [1, 1, 1, 2, 2, 3, 4, 5]
            assert skipped == [0, 1, 2, 2, 3, 3, 3, 3]
            for step in OVERFLOWS:
                assert found[step] == ("layers.1.weight", 1, step * GAS + 1, 1)


def at_the_minimum(rank: int, world: int, policy: str) -> list[Any]:
    results = []
    for stage in STAGES:
        fp16 = {
            "enabled": True,
            "initial_scale_power": 1,
            "hysteresis": 1,
            "min_loss_scale": 1.0,
            "on_min_scale": policy,
        }
        engine, *_ = zeropipe.initialize(model=build(Exploding), config=config(stage, world, fp16=fp16))
        error = ""
        start = weights_of(engine.module)
        for step in range(3):
            engine.backward(engine(x_of(step, rank, 0), rank == 0))
            try:
                engine.step()
            except LossScaleError as caught:
                error = str(caught)
        assert_bitwise(weights_of(engine.module), start)
        assert engine.loss_scale == 1.0
        engine.backward(engine(x_of(9, rank, 0), False))  # the run can go on
        engine.step()
        assert engine.was_step_applied()
        assert not torch.equal(engine.module.layers[0].weight, start["layers.0.weight"])
        results.append((error, engine.skipped_steps))
        engine.destroy()
    return results


@pytest.mark.parametrize("policy", ["raise", "skip", "warn"])
def test_the_policy_at_the_minimum_scale(pool, policy):
    runs = pool(2).run(at_the_minimum, policy)
    for results in runs:
        for error, skipped in results:
            if policy == "raise":
                assert skipped == 1  # the two that raised were no steps
                for part in ("at its minimum", "layers.1.weight", "rank 0", "micro-step", "Fix:", "bf16"):
                    assert part in error
            else:
                assert (error, skipped) == ("", 3)
    assert all(("step skipped" in text) == (policy == "warn") for text in pool(2).outputs())


def bf16_nonfinite(rank: int, world: int, check: bool) -> list[Any]:
    results = []
    for stage in STAGES:
        extra = {"bf16": {"enabled": True, "check_grad_overflow": check}}
        engine, *_ = zeropipe.initialize(model=build(Exploding), config=config(stage, world, **extra))
        for step in range(2):
            engine.backward(engine(x_of(step, rank, 0, torch.bfloat16), step == 1 and rank == 0))
            engine.step()
        weight = engine.module.layers[1].weight
        results.append((engine.skipped_steps, bool(torch.isfinite(weight).all())))
        engine.destroy()
    return results


@pytest.mark.parametrize("check", [True, False])
def test_bf16_skips_a_step_with_inf_if_asked_to(pool, check):
    for results in pool(2).run(bf16_nonfinite, check):
        assert results == [(1, True) if check else (0, False)] * 3


def skipped_is_as_if_it_never_was(rank: int, world: int) -> list[Any]:
    """A run with an overflow at step 2 against one without that batch."""
    ends = []
    for bad_at in (None, 2):
        for stage in STAGES:
            settings = config(stage, world, fp16={"enabled": True, "loss_scale": 128.0})
            engine, *_ = zeropipe.initialize(model=build(Exploding), config=settings)
            for step in range(5):
                if step == 2 and bad_at is None:
                    continue
                engine.backward(engine(x_of(step, rank, 0), step == bad_at and rank == 0))
                engine.step()
            ends.append(weights_of(engine.module))
            engine.destroy()
    return ends


def test_a_skipped_step_changes_nothing(pool):
    for ends in pool(2).run(skipped_is_as_if_it_never_was):
        for end in ends:
            assert_bitwise(end, ends[0])


# Dtypes of accumulation and of traffic.


class Adder(nn.Module):
    """Its gradient is its input, so that the sum of gradients is known exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64))
        self.other = nn.Parameter(torch.zeros(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # []
        return (self.weight * x).float().sum() + (self.other * x[:32]).float().sum()


MICROS = 64


def many_micro_batches(rank: int, world: int, extra: dict[str, Any], local: bool) -> list[Any]:
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(
            model=Adder(), config=config(stage, world, gas=MICROS, **BF16, **extra)
        )
        for micro in range(MICROS):
            x = torch.full((64,), 1.0 if micro == 0 else 2.0**-9).bfloat16()
            if local and micro < MICROS - 1:
                with engine.no_sync():
                    engine.backward(engine(x), scale_wrt_gas=False)
            else:
                engine.backward(engine(x), scale_wrt_gas=False)
            if micro < MICROS - 1:
                engine.step()
        weight = zeropipe.utils.safe_get_full_grad(engine.module.weight)
        other = zeropipe.utils.safe_get_full_grad(engine.module.other)
        results.append((weight[0].item(), other[0].item(), engine.optimizer.reducer.stores[0].buffer.dtype))
        engine.destroy()
    return results


@pytest.mark.parametrize("local", [False, True], ids=["reduced", "no_sync"])
@pytest.mark.parametrize("bucket", [1, 10**9])
def test_gradients_accumulate_in_the_configured_dtype(pool, local, bucket):
    zero = {"zero_optimization": {"reduce_bucket_size": bucket}}
    exact = 1.0 + (MICROS - 1) * 2.0**-9
    wide = {**zero, "data_types": {"grad_accum_dtype": "fp32"}}
    for results in pool(2).run(many_micro_batches, wide, local):
        assert results == [(exact, exact, torch.float32)] * 3
    for results in pool(2).run(many_micro_batches, zero, local):
        assert results == [(1.0, 1.0, torch.bfloat16)] * 3  # each 2**-9 is half an ulp of 1: lost


def average(rank: int, world: int, extra: dict[str, Any]) -> list[Any]:
    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=Adder(), config=config(stage, world, **BF16, **extra))
        engine.backward(engine(torch.full((64,), 1.0 + rank * 2.0**-7).bfloat16()))
        found = [zeropipe.utils.safe_get_full_grad(p)[0].item() for p in engine.module.parameters()]
        results.append(found)
        engine.destroy()
    return results


@pytest.mark.parametrize("bucket", [1, 10**9])
def test_an_average_is_rounded_only_to_the_configured_dtype(pool, bucket):
    zero = {"zero_optimization": {"reduce_bucket_size": bucket}}
    for results in pool(2).run(average, {**zero, "data_types": {"grad_accum_dtype": "fp32"}}):
        assert results == [[1 + 2.0**-8] * 2] * 3
    for results in pool(2).run(average, zero):
        assert results == [[1.0] * 2] * 3  # halfway between two bf16 values: to the even one


def traffic(rank: int, world: int, extra: dict[str, Any]) -> list[Any]:
    from zeropipe.comm.record import record

    results = []
    for stage in STAGES:
        engine, *_ = zeropipe.initialize(model=build(Exploding), config=config(stage, world, **extra))
        with record() as events:
            dtype = torch.bfloat16 if "bf16" in extra else torch.float32
            engine.backward(engine(x_of(0, rank, 0, dtype), False))
            engine.step()
        results.append(sum(e.bytes for e in events if e.label == "gradients"))
        engine.destroy()
    return results


@pytest.mark.parametrize(
    ("extra", "size"),
    [
        ({}, 4),
        ({"communication_data_type": "bf16"}, 2),
        (BF16, 2),
        ({**BF16, "communication_data_type": "fp32"}, 4),
        ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, 4),
        ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "bf16"}, 2),
    ],
    ids=str,
)
def test_gradients_travel_in_the_configured_dtype(pool, extra, size):
    for results in pool(2).run(traffic, extra):
        assert results == [3 * 256 * size] * 3


# Autocast.


class Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor, *, named: dict[str, torch.Tensor]) -> torch.Tensor:  # []
        y = self.layer(x + named["x"])
        self.seen.append((x.dtype, named["x"].dtype, named["count"].dtype, y.dtype))
        return y.float().mean()


def autocast(rank: int, world: int, extra: dict[str, Any]) -> Any:
    engine, *_ = zeropipe.initialize(model=build(Recorder), config=config(1, world, **extra))
    x = torch.ones(2, 16)
    engine.backward(engine(x, named={"x": x, "count": torch.ones(1, dtype=torch.int64)}))
    engine.step()
    seen = engine.module.seen
    found = (*seen[0], engine.module.layer.weight.dtype)
    engine.destroy()
    return found


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"torch_autocast": {"enabled": True}}, ("float32", "float32", "int64", "bfloat16", "float32")),
        (
            {"torch_autocast": {"enabled": True, "dtype": "fp16"}},
            ("float32", "float32", "int64", "float16", "float32"),
        ),
        (
            {"fp16": {"enabled": True, "auto_cast": True, "loss_scale": 2.0}},
            ("float16", "float16", "int64", "float16", "float16"),
        ),
        (
            {"fp16": {"enabled": False, "auto_cast": True}},
            ("float32", "float32", "int64", "float32", "float32"),
        ),
    ],
    ids=["autocast", "autocast fp16", "auto_cast", "auto_cast without fp16"],
)
def test_autocast_and_auto_cast(pool, extra, expected):
    for found in pool(2).run(autocast, extra):
        assert found == tuple(getattr(torch, name) for name in expected)


# Scale 1 is no scaler; fp64 stays fp64.


def fp64(rank: int, world: int, gas: int) -> list[Any]:
    results = []
    for stage in STAGES:
        model = build(Exploding).double()
        engine, *_ = zeropipe.initialize(model=model, config=config(stage, world, gas=gas))
        for step in range(3):
            for micro in range(gas):
                x = torch.randn(4, 16, generator=generator(step, rank, micro), dtype=torch.float64)
                engine.backward(engine(x, False))
                engine.step()
        results.append(weights_of(model))
        engine.destroy()
    return results


def test_a_model_in_fp64_keeps_its_precision(pool):
    runs = pool(2).run(fp64, 1)
    model = build(Exploding).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for step in range(3):
        for rank in range(2):
            x = torch.randn(4, 16, generator=generator(step, rank, 0), dtype=torch.float64)
            (model(x, False) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for results in runs:
        for weights in results:
            assert_bitwise(weights, weights_of(model))
