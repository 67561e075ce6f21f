"""Moments and masters in bf16: half the bytes, the same bits at every stage and after a resume; and it trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.referee import assert_bitwise, weights_of
from tests.helpers.train import config
from tests.helpers.zero3 import whole
from zeropipe.errors import UnsupportedOptimizerError
from zeropipe.layout.flat import flat_shards
from zeropipe.runtime.zero.hold.rounding import Rounding
from zeropipe.runtime.zero.hold.values import Segment
from zeropipe.utils import safe_get_full_fp32_param

MASTERS, STATES = "bf16_master_weights_and_grads", "bf16_optimizer_states"
BOTH = (MASTERS, STATES)


def segments(names: list[tuple[str, int]], shards: int, shard: int) -> list[Segment]:
    layout = flat_shards([(name, (numel,), "bfloat16") for name, numel in names], shards, 16)
    found = []
    for index in range(len(names)):
        piece = next((p for p in layout.tensor_pieces(index) if p.shard == shard), None)
        start, stop = (0, 0) if piece is None else (piece.offset, piece.offset + piece.numel)
        found.append(Segment(layout, index, piece, start, stop, ()))
    return found


def test_rounding_is_to_a_neighbour_by_chance_and_right_on_average():
    numel = 40_000
    rounding = Rounding(segments([("a", numel)], 1, 0))
    elements = rounding.elements(slice(0, numel), torch.device("cpu"))
    torch.manual_seed(0)
    for values in (torch.full((numel,), 1.0 + 2**-10), -torch.rand(numel) - 0.5, torch.randn(numel) * 1e-30):
        rounded = torch.stack(
            [rounding.rounded(values, elements, "exp_avg", step).float() for step in range(64)]
        )
        # bf16 has 7 bits after the first: a neighbour is less than 2**-7 of the value away.
        assert ((rounded - values).abs() < 2**-7 * values.abs()).all()
        error = ((rounded.double().mean(0) - values.double()) / values.abs().double()).mean().abs()
        spread = 2**-8 / math.sqrt(numel * 64)
        assert error < 5 * spread, (error, spread)
    # What is exact stays, also what is no number.
    exact = torch.tensor([0.0, -0.0, 1.5, -(2.0**-126), math.inf, -math.inf])
    assert torch.equal(rounding.rounded(exact, elements[:6], "k", 1).float(), exact)
    assert rounding.rounded(torch.tensor([math.nan]), elements[:1], "k", 1).isnan().all()
    # Steps, keys and elements draw independently.
    half = torch.full((numel,), 1.0 + 2**-8)
    draws = [rounding.rounded(half, elements, key, step) > 1 for key, step in (("k", 1), ("k", 2), ("l", 1))]
    assert all(abs(float(draw.double().mean()) - 0.5) < 0.02 for draw in draws)
    for a, b in ((0, 1), (0, 2)):
        assert abs(float((draws[a] == draws[b]).double().mean()) - 0.5) < 0.02
    assert abs(float((draws[0][1:] == draws[0][:-1]).double().mean()) - 0.5) < 0.02


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_an_element_draws_the_same_however_it_is_cut(shards):
    names = [("layer.weight", 50), ("scalar", 1), ("none", 0), ("layer.bias", 23)]
    uncut = Rounding(segments(names, 1, 0))
    wanted = uncut.elements(slice(0, 80), torch.device("cpu"))[:74]
    found = []
    for shard in range(shards):
        rounding = Rounding(segments(names, shards, shard))
        size = segments(names, shards, shard)[0].layout.shard_numel
        own = rounding.elements(slice(0, size), torch.device("cpu"))
        picked = torch.tensor([0, size - 1, size // 2])
        assert torch.equal(rounding.elements(picked, torch.device("cpu")), own[picked])
        found.append(own)
    assert torch.equal(torch.cat(found)[:74], wanted)


class Small(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.late, self.scalar = nn.Linear(width, width), nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, ids: torch.Tensor, late: bool = False) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        x = self.norm(x) * self.scalar
        x = self.late(x) if late else x
        return (x @ self.embed.weight.T).float().log_softmax(-1)[..., 3].mean().neg()


def settings(stage: int, world: int, keys: tuple[str, ...], **extra: Any) -> dict[str, Any]:
    return config(stage, world, bf16={"enabled": True, **dict.fromkeys(keys, True)}, **extra)


def batch(step: int) -> torch.Tensor:
    return torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))  # of every rank


def trained(
    rank: int, world: int, stage: int, keys: tuple[str, ...], folder: str = "", stop: int = -1, **extra: Any
) -> dict[str, Any]:
    """Six steps, with what no step uses before the third; from step ``stop`` on in another engine."""
    made = settings(stage, world, keys, gradient_clipping=0.5, **extra)
    engine, *_ = zeropipe.initialize(model=Small(), config=made)
    for step in range(6):
        if step == stop:
            engine.save_checkpoint(folder)
            engine.destroy()
            engine, *_ = zeropipe.initialize(model=Small(), config=made)
            engine.load_checkpoint(folder)
        engine.backward(engine(batch(step), late=step > 2))
        engine.step()
    state = engine.optimizer.partitions[0].state
    moments = {key: state.shard(key) for key in sorted(state.keys())}
    result = {
        "moment_bytes": sum(m.numel() * m.element_size() for m in moments.values()),
        "dtypes": {m.dtype for m in moments.values()},
        "master": engine.optimizer.partitions[0].master.dtype,
        "ratios": [row.ratio for row in engine.memory_report()],
        "whole": safe_get_full_fp32_param(engine.module.embed.weight).dtype,
    }
    result["weights"] = whole(engine.module)
    engine.destroy()
    return result


@pytest.mark.parametrize("keys", [(STATES,), (MASTERS,), BOTH])
def test_every_stage_and_number_of_ranks_gives_the_same_bits_in_fewer_bytes(pool, keys):
    plain = pool(1).run(trained, 0, ())[0]
    alone = pool(1).run(trained, 0, keys)[0]
    assert alone["dtypes"] == {torch.bfloat16 if STATES in keys else torch.float32}
    assert alone["master"] == (torch.bfloat16 if MASTERS in keys else torch.float32)
    assert alone["whole"] == torch.float32
    assert alone["moment_bytes"] * (2 if STATES in keys else 1) == plain["moment_bytes"]
    for stage in range(4):
        for found in pool(2).run(trained, stage, keys):
            assert_bitwise(found["weights"], alone["weights"])
            assert found["ratios"][2] == pytest.approx(1.0, abs=0.35 if stage == 3 else 0.01)
    changed = any(not torch.equal(alone["weights"][n], plain["weights"][n]) for n in plain["weights"])
    assert changed  # it is another rounding


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["AdamW", "Lion", "SGD"])
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(pool, tmp_path, stage, kind):
    params = {"lr": 0.01} | ({"momentum": 0.9} if kind == "SGD" else {})
    extra = {"optimizer": {"type": kind, "params": params}}
    through = pool(2).run(trained, stage, BOTH, **extra)
    resumed = pool(2).run(trained, stage, BOTH, str(tmp_path), 4, **extra)
    for one, other in zip(through, resumed, strict=True):
        assert_bitwise(one["weights"], other["weights"])


def into_other(
    rank: int, world: int, folder: str, before: tuple[str, ...], after: tuple[str, ...]
) -> set[Any]:
    engine, *_ = zeropipe.initialize(model=Small(), config=settings(2, world, before))
    for step in range(2):
        engine.backward(engine(batch(step)))
        engine.step()
    engine.save_checkpoint(folder)
    engine.destroy()
    engine, *_ = zeropipe.initialize(model=Small(), config=settings(3, world, after))
    engine.load_checkpoint(folder)
    engine.backward(engine(batch(2)))
    engine.step()
    state = engine.optimizer.partitions[0].state
    return {state.shard(key).dtype for key in sorted(state.keys())} | {
        engine.optimizer.partitions[0].master.dtype
    }


def test_a_checkpoint_goes_over_from_one_kind_to_the_other(pool, tmp_path):
    assert pool(2).run(into_other, str(tmp_path / "a"), (), BOTH) == [{torch.bfloat16}] * 2
    assert pool(2).run(into_other, str(tmp_path / "b"), BOTH, ()) == [{torch.float32}] * 2


def raised_in_between(rank: int, world: int, fail: bool) -> dict[str, Any]:
    engine, *_ = zeropipe.initialize(model=Small(), config=settings(1, world, BOTH))
    for step in range(3):
        engine.backward(engine(batch(step)))
        inner = type(engine.optimizer.optimizer)
        if fail and step == 1:
            original = inner.step
            inner.step = lambda *_, **__: (_ for _ in ()).throw(MemoryError("short of it"))
            try:
                with pytest.raises(MemoryError):
                    engine.step()
            finally:
                inner.step = original
        engine.step()
    return weights_of(engine.module)


def test_a_step_that_is_tried_again_draws_the_same_bits(pool):
    for one, other in zip(
        pool(2).run(raised_in_between, False), pool(2).run(raised_in_between, True), strict=True
    ):
        assert_bitwise(one, other)


def offloaded(rank: int, world: int, stage: int, place: dict[str, Any]) -> dict[str, Any]:
    extra = {"zero_optimization": {"stage": stage, "offload_optimizer": place}}
    return trained(rank, world, stage, BOTH, **extra)["weights"]


def test_offloaded_state_has_the_same_bits(pool, tmp_path):
    wanted = pool(2).run(trained, 3, BOTH)[0]["weights"]
    for place in ({"device": "cpu"}, {"device": "nvme", "nvme_path": str(tmp_path)}):
        assert_bitwise(pool(2).run(offloaded, 3, place)[0], wanted)


def refused(rank: int, world: int) -> str:
    made = settings(1, world, (STATES,), optimizer={"type": "Lamb", "params": {"lr": 0.1}})
    with pytest.raises(UnsupportedOptimizerError) as caught:
        zeropipe.initialize(model=Small(), config=made)
    return str(caught.value)


def test_an_optimizer_that_needs_whole_tensors_is_refused(pool):
    assert all("cannot keep its state" in text and "AdamW" in text for text in pool(2).run(refused))
