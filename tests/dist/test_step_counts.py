"""What a step asks of a device, counted on CPUs on the path that NCCL takes: kernels beside plain PyTorch's, copies by
parameter, collectives. ``benchmarks/counts`` has the same figures beside peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.counts.counting import Counting, Counts

from tests.helpers.meetings import PARTS, as_on_device
from tests.helpers.models import build
from tests.helpers.pool import Pools
from tests.helpers.zero3 import Stack, engine_of, x_batch
from zeropipe.tensor.host import HOST

DEPTHS = (2, 4)
PARAMETERS = 6  # of a block, in three units
BF16 = {"bf16": {"enabled": True, "check_grad_overflow": False}}

Figures = dict[str, dict[str, int]]  # by part


def figures(found: dict[str, Counts]) -> Figures:
    return {part: found[part].figures() for part in PARTS}


def of_plain(depth: int, dtype: torch.dtype) -> Figures:
    """The same model in plain PyTorch, in one process."""
    model = build(Stack, depth).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for at in range(2):
        with Counting() as forward:
            loss = model(x_batch(at, 0).to(dtype)).float().square().mean()
        with Counting() as backward:
            loss.backward()
        with Counting() as step:
            optimizer.step()
            optimizer.zero_grad()
    return figures({"forward": forward, "backward": backward, "step": step})


def of_engine(
    rank: int, world: int, stage: int, depth: int, extra: dict[str, Any], micro_steps: int = 1
) -> Figures:
    engine = engine_of(build(Stack, depth), stage, world, **extra)
    dtype = next(engine.module.parameters()).dtype

    def micro_step(at: int) -> None:
        x = x_batch(at, rank).to(dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()

    with HOST.afar():
        for at in range(3 * micro_steps):
            micro_step(at)
        with as_on_device(engine) as found:
            for at in range(micro_steps):
                micro_step(at)
    engine.destroy()
    return figures(found)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_starts_few_kernels_beside_those_of_the_model(
    native_pool: Pools, stage: int, dtype: str
) -> None:
    """A bucket was filled by a copy for each parameter, and the norm took nine small kernels."""
    plain = of_plain(2, torch.float32 if dtype == "fp32" else torch.bfloat16)
    units = 3 * 2 + 1
    for ours in native_pool(2).run(of_engine, stage, 2, {} if dtype == "fp32" else BF16):
        more = {part: ours[part]["launches"] - plain[part]["launches"] for part in PARTS}
        # One kernel puts a unit's shards in place for its gather, one a bucket's gradients for their reduction. The
        # outputs and losses that a test casts are none of the engine's.
        gathers = units if stage == 3 else 0
        assert more["forward"] <= gathers
        assert more["backward"] <= gathers + 4
        # The norm (2), what ranks sum (2), its root (1), a copy of the step count, which a step that raised needs
        # (1); in 16 bits gradients are cast (1) and, where gathers do not read masters, values rounded (1).
        assert more["step"] <= (6 if dtype == "fp32" else 8)
        assert sum(ours[part]["meetings"] for part in PARTS) == 0


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_copies_grow_with_parameters_alone(native_pool: Pools, stage: int) -> None:
    """Stage 3 copies a shard before each gather and each gradient once; the others each gradient once."""
    small, large = (native_pool(2).run(of_engine, stage, depth, BF16)[0] for depth in DEPTHS)
    copies = [sum(found[part]["copies"] for part in PARTS) for found in (small, large)]
    a_parameter = (copies[1] - copies[0]) / (PARAMETERS * (DEPTHS[1] - DEPTHS[0]))
    assert a_parameter <= (3 if stage == 3 else 1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_neither_kernels_nor_collectives_grow_with_the_ranks(native_pool: Pools, stage: int) -> None:
    two, three = (native_pool(world).run(of_engine, stage, 2, BF16)[0] for world in (2, 3))
    for part in PARTS:
        # Three ranks need padding, which is filled once a bucket; and what gloo cannot do for them in place is no
        # kernel of ours.
        assert abs(three[part]["launches"] - two[part]["launches"]) <= 1
        assert three[part]["collectives"] == two[part]["collectives"]


def test_collectives_of_a_step(native_pool: Pools) -> None:
    """Beside gathers: the gradients (one bucket here), the norm with what ranks must know, the new values."""
    for stage, expected in ((0, 2), (1, 3), (2, 3)):
        ours = native_pool(2).run(of_engine, stage, 2, BF16)[0]
        assert sum(ours[part]["collectives"] for part in PARTS) == expected


@pytest.mark.parametrize("stage", [1, 3])
def test_accumulation_adds_no_meeting_and_no_step(native_pool: Pools, stage: int) -> None:
    extra = {**BF16, "train_batch_size": 8, "gradient_accumulation_steps": 4}
    once = native_pool(2).run(of_engine, stage, 2, BF16)[0]
    found = native_pool(2).run(of_engine, stage, 2, extra, 4)[0]
    assert found["step"]["launches"] == once["step"]["launches"]
    assert found["forward"]["launches"] == 4 * once["forward"]["launches"]
    assert all(found[part]["meetings"] == 0 for part in PARTS)
