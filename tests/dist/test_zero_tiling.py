"""TiledLinear under stage 3: one tile is gathered at a time, and the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.dist.test_zero3 import NOTHING_PERSISTS
from tests.helpers.data import generator
from tests.helpers.referee import assert_bitwise, assert_within_referee, train_plain
from tests.helpers.train import config
from zeropipe.runtime.zero.tiling import TiledLinear

INPUTS, OUTPUTS = 60, 52
STEPS = 3
BUDGETS = {**NOTHING_PERSISTS, "stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}


class _Net(nn.Module):
    def __init__(self, in_splits: int, out_splits: int, scaled: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        plain = nn.Linear(INPUTS, OUTPUTS)
        self.layer: nn.Module = plain
        # Where the input needs no gradient a tile is done when its own gradients are, else when the input's is.
        self.scale = nn.Parameter(torch.ones(())) if scaled else 1.0
        if in_splits:
            self.layer = TiledLinear(
                INPUTS, OUTPUTS, in_splits=in_splits, out_splits=out_splits, init_linear=plain
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x * self.scale).square().mean()


def _batch(step: int, rank: int) -> tuple[torch.Tensor]:
    return (torch.randn(4, INPUTS, generator=generator(step, rank)),)


def _train(
    rank: int, world: int, splits: tuple[int, int], built: bool, scaled: bool = False
) -> dict[str, Any]:
    """The whole weight and bias after training, and the most elements that were gathered at one time."""
    import zeropipe
    from zeropipe.runtime.zero.gather.shards import Shards
    from zeropipe.runtime.zero.param import ZeroParamStatus
    from zeropipe.utils import safe_get_full_fp32_param

    settings = config(3, world, zero_optimization={"stage": 3, **BUDGETS})
    if built:
        with zeropipe.zero.Init(config_dict_or_path=settings):
            model = _Net(*splits, scaled)
    else:
        model = _Net(*splits, scaled)
    engine = zeropipe.initialize(model=model, config=settings)[0]
    shards = [param._zero.shards for param in engine.module.parameters()]
    peak = 0
    finish = Shards.finish_gather

    def watched(self: Shards) -> None:
        nonlocal peak
        finish(self)
        peak = max(peak, sum(s.numel for s in shards if s.state.status is not ZeroParamStatus.NOT_AVAILABLE))

    Shards.finish_gather = watched  # type: ignore[method-assign]
    try:
        for step in range(STEPS):
            engine.backward(engine(*_batch(step, rank)))
            engine.step()
    finally:
        Shards.finish_gather = finish  # type: ignore[method-assign]
    named = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    engine.destroy()
    return {"whole": _whole(named, *splits), "peak": peak}


def _whole(named: dict[str, torch.Tensor], in_splits: int, out_splits: int) -> dict[str, torch.Tensor]:
    """The tiles put together."""
    if not in_splits:
        return {"weight": named["layer.weight"], "bias": named["layer.bias"]}
    rows = range(out_splits)
    tile = "layer.linears.{}.{}.{}".format
    weight = [torch.cat([named[tile(o, i, "weight")] for i in range(in_splits)], 1) for o in rows]
    bias = [named[tile(o, in_splits - 1, "bias")] for o in rows]
    return {"weight": torch.cat(weight), "bias": torch.cat(bias)}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("splits", [(2, 2), (3, 5), (1, 4)])
def test_the_peak_is_one_tile(pool, splits, scaled):
    plain = pool(2).run(_train, (0, 0), False, scaled)
    assert plain[0]["peak"] == INPUTS * OUTPUTS + OUTPUTS + scaled
    for result in pool(2).run(_train, splits, False, scaled):
        tile = -(-INPUTS // splits[0]) * -(-OUTPUTS // splits[1]) + -(-OUTPUTS // splits[1])
        assert result["peak"] <= tile + scaled
        expected = _referee(torch.float64, scaled)
        assert_within_referee(result["whole"], _referee(None, scaled), expected)


def test_one_tile_is_a_linear_bit_for_bit(pool):
    plain = pool(2).run(_train, (0, 0), False)
    tiled = pool(2).run(_train, (1, 1), False)
    assert_bitwise(tiled[1]["whole"], plain[1]["whole"])


@pytest.mark.parametrize("splits", [(1, 1), (2, 3)])
def test_built_as_shards_it_is_the_same(pool, splits):
    """``init_linear`` is shards then, too: copying gathers it and each tile."""
    expected = pool(2).run(_train, splits, False)
    built = pool(2).run(_train, splits, True)
    assert_bitwise(built[0]["whole"], expected[0]["whole"])


def _referee(dtype: torch.dtype | None, scaled: bool) -> dict[str, torch.Tensor]:
    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)

    trained = train_plain(
        lambda: _Net(0, 0, scaled),
        lambda step: [_batch(step, rank) for rank in range(2)],
        adamw,
        STEPS,
        dtype=dtype,
    )
    return {name.removeprefix("layer."): value for name, value in trained.weights.items() if name != "scale"}
