"""Optimizers and precisions at stage 3 give what the other stages give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import WIDTH, Stack, engine_of, fit, gathered, settings, whole, x_batch

ELEMENTWISE = [
    {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
    {"type": "Adam", "params": {"lr": 0.01}},
    {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
    {"type": "Adagrad", "params": {"lr": 0.01}},
    {"type": "Lion", "params": {"lr": 0.001}},
]
# Sums over a whole tensor are formed from each rank's part, so their last bits depend on the cut.
REDUCED_ULPS = 2e-5  # relative, after three steps

SIXTEEN = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 64.0}},
    "bf16, fp32 accumulation": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


@pytest.mark.parametrize("optimizer", ELEMENTWISE, ids=lambda o: o["type"])
def test_elementwise_optimizers(pool, optimizer):
    expected = pool(2).run(fit, 0, Stack, steps=3, optimizer_section=optimizer)[0]
    for ours in pool(2).run(fit, 3, Stack, steps=3, optimizer_section=optimizer):
        assert_bitwise(ours, expected)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("kind", ["Lamb", "Muon"])
def test_optimizers_that_see_whole_tensors(pool, world, kind):
    params = {"lr": 0.01} if kind == "Lamb" else {"lr": 0.01, "momentum": 0.9}
    section = {"type": kind, "params": params}
    expected = pool(world).run(fit, 0, Stack, steps=3, optimizer_section=section)[0]
    for ours in pool(world).run(fit, 3, Stack, steps=3, optimizer_section=section):
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=REDUCED_ULPS, atol=REDUCED_ULPS, msg=name)


def half_loss(engine: Any, step: int, rank: int) -> torch.Tensor:
    dtype = engine.module.head.weight.dtype
    return engine(x_batch(step, rank).to(dtype)).float().square().mean()


@pytest.mark.parametrize("precision", SIXTEEN, ids=str)
def test_16_bits(pool, precision):
    extra = SIXTEEN[precision]
    expected = pool(2).run(fit, 2, Stack, half_loss, steps=3, **extra)[0]
    for ours in pool(2).run(fit, 3, Stack, half_loss, steps=3, **extra):
        assert_bitwise(ours, expected)


def overflowing(rank: int, world: int, stage: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    extra = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}
    engine = engine_of(build(Stack), stage, world, **extra)
    seen = []
    for step in range(4):
        x = x_batch(step, rank).half()
        if step == 1 and rank == 1:
            x = x * float("inf")
        engine.backward(engine(x).float().square().mean())
        engine.step()
        seen.append((engine.skipped_steps, engine.optimizer.loss_scale))
        assert gathered(engine.module) == []
    return whole(engine.module), seen


def test_an_overflow_on_one_rank_skips_the_step_on_all(pool):
    expected = pool(2).run(overflowing, 2)
    for (ours, seen), (theirs, scales) in zip(pool(2).run(overflowing, 3), expected, strict=True):
        assert seen == scales
        assert [skipped for skipped, _ in seen] == [0, 1, 1, 1]
        assert_bitwise(ours, theirs)


@pytest.mark.parametrize("clip", [0.01, 10.0])
def test_clipping(pool, clip):
    # The norm is a sum over shards: its last bit depends on where they are cut, and so does what it scales.
    expected = pool(2).run(fit, 0, Stack, steps=3, gradient_clipping=clip)[0]
    for ours in pool(2).run(fit, 3, Stack, steps=3, gradient_clipping=clip):
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=REDUCED_ULPS, atol=REDUCED_ULPS, msg=name)


def grouped(rank: int, world: int, stage: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    model = build(Stack)
    bias = [p for n, p in model.named_parameters() if n.endswith("bias")]
    rest = [p for n, p in model.named_parameters() if not n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": 0.02}, {"params": bias, "weight_decay": 0.0}], lr=0.01
    )
    engine = zeropipe.initialize(model=model, optimizer=optimizer, config=settings(stage, world))[0]
    for step in range(3):
        engine.optimizer.param_groups[0]["lr"] *= 0.5
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    return whole(engine.module), [len(g["params"]) for g in optimizer.param_groups]


def test_several_param_groups(pool):
    expected = pool(2).run(grouped, 0)[0][0]
    for ours, sizes in pool(2).run(grouped, 3):
        assert_bitwise(ours, expected)
        assert sizes == [1, 1]


class Mixed(nn.Module):
    """A 16-bit layer among fp32 ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.low = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.low(self.first(x).bfloat16()).float()


def test_parameters_of_several_dtypes(pool):
    expected = pool(2).run(fit, 2, Mixed, steps=3)[0]
    for ours in pool(2).run(fit, 3, Mixed, steps=3):
        assert_bitwise(ours, expected)
