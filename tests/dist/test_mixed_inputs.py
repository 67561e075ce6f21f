"""Models that keep some tensors wide in a 16-bit run: torch's layers take what those make of their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from tests.dist.test_dtypes import EXTRA, PRECISIONS
from tests.helpers.models import build
from tests.helpers.zero3 import engine_of, x_batch

WIDTH = 16


class Positions(nn.Module):
    """A table of positions in a buffer, added to activations; attention, convolution, recurrence, norms behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(WIDTH), persistent=False)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.conv, self.lstm = nn.Conv1d(1, 1, 3, padding=1), nn.LSTM(WIDTH, WIDTH)
        self.norms = nn.Sequential(nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), nn.PReLU())
        self.groups, self.batch = nn.GroupNorm(2, WIDTH), nn.BatchNorm1d(WIDTH)
        self.instance = nn.InstanceNorm1d(WIDTH, affine=True, track_running_stats=True)
        self.loss = nn.CrossEntropyLoss(weight=torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        assert x.dtype == self.first.weight.dtype
        h = x + self.table  # fp32 from here on, until a layer gives 16 bits
        h = h + self.norms(h)
        h = (h + self.table)[:, None]
        h = h + self.attention(h, key=h, value=h + self.table)[0] + self.layer(h)
        h = self.conv(h + self.table) + self.lstm(h + self.table)[0]
        flat = (h + self.table)[:, 0]
        flat = (
            self.groups(flat)
            + self.batch(flat)
            + self.instance((flat + self.table)[..., None].expand(-1, -1, 3))[..., 0]
        )
        return self.loss(flat.to(x.dtype), torch.arange(len(flat), device=x.device))


class Wide(nn.Module):
    """Layers in fp32 between 16-bit ones, without any cast."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.router, self.gru = nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH)
        self.norm, self.groups, self.batch = (
            nn.LayerNorm(WIDTH),
            nn.GroupNorm(2, WIDTH),
            nn.BatchNorm1d(WIDTH),
        )

    def prepared(self, half: torch.dtype) -> Wide:
        self.to(half)
        for module in (self.router, self.gru, self.norm, self.groups, self.batch):
            module.float()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for layer in (self.router, lambda t: self.gru(t)[0], self.norm, self.groups, self.batch):
            h = h + layer(h)
            assert h.dtype == self.first.weight.dtype
        return self.last(h).float().square().mean()


class Reparametrized(nn.Module):
    """What torch multiplies weights with goes with the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.b = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.c = parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.d = prune.l1_unstructured(nn.Linear(WIDTH, WIDTH), "weight", 0.5)
        self.register_buffer("table", torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.a, self.b, self.c, self.d):
            x = layer(x + self.table)
        return x.float().square().mean()


def trains(rank: int, world: int, factory: type[nn.Module], stages: tuple[int, ...], precision: str) -> None:
    half = PRECISIONS[precision]
    first: list[float] | None = None
    for stage in stages:
        model = build(factory)
        model = model.prepared(half) if isinstance(model, Wide) else model
        hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
        engine = engine_of(model, stage, world, **EXTRA[precision])
        losses = []
        for step in range(3):
            loss = engine(x_batch(step, rank).to(half))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        first = losses if first is None else first
        assert losses == first and all(loss == loss for loss in losses), stage
        twin = copy.deepcopy(engine.module) if stage < 3 and factory is not Reparametrized else None
        if twin is not None:
            torch.manual_seed(0)
            assert torch.isfinite(twin(x_batch(0, rank).to(half)))
        engine.destroy()
        assert hooks == sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("factory", [Positions, Wide])
def test_layers_take_what_wide_tensors_make_of_their_inputs(pool, factory: type[nn.Module], precision: str):
    """A table that stays fp32 made activations fp32, which torch's 16-bit layers refuse; layers kept in fp32 refused
    16-bit activations."""
    pool(2).run(trains, factory, (0, 1, 2, 3), precision)


def test_what_reparametrizations_multiply_weights_with_goes_with_them(pool):
    pool(2).run(trains, Reparametrized, (0, 1, 2), "bf16")


class Own(nn.Linear):
    """A router that computes in fp32 by itself: what it gives stays what it gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float())


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, WIDTH))
        self.router = Own(WIDTH, WIDTH)
        self.register_buffer("table", torch.rand(WIDTH))

    def forward(self, x: torch.Tensor, mixed: bool) -> torch.Tensor:
        assert self.router(x).dtype == torch.float32
        return F.linear(x + self.table if mixed else x, self.weight)


def functions(rank: int, world: int) -> None:
    engine = engine_of(build(Functional), 3, world, **EXTRA["bf16"])
    x = x_batch(0, rank).bfloat16()
    engine(x, False)
    with pytest.raises(RuntimeError) as caught:
        engine(x, True)
    note = "".join(caught.value.__notes__)
    assert "'table' (float32)" in note and "data_types.buffer_dtype" in note
    engine.destroy()
    extra = {**EXTRA["bf16"], "data_types": {"buffer_dtype": "bf16"}}
    engine = engine_of(build(Functional), 3, world, **extra)
    assert engine.module.table.dtype == torch.bfloat16 and engine(x, True).dtype == torch.bfloat16
    engine.destroy()


def test_an_error_about_dtypes_in_the_models_own_code_names_the_wide_tensors_and_the_key(pool):
    pool(2).run(functions)


def forced(rank: int, world: int, factory: Callable[[], Any]) -> None:
    for stage in (0, 3):
        extra = {**EXTRA["bf16"], "data_types": {"param_dtype": "bf16", "buffer_dtype": "bf16"}}
        engine = engine_of(factory(), stage, world, **extra)
        tensors = (*engine.module.parameters(), *engine.module.buffers())
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.bfloat16}
        engine.backward(engine(x_batch(0, rank).bfloat16()))
        engine.step()
        engine.destroy()


def all_wide() -> nn.Module:
    return build(Wide).prepared(torch.bfloat16)


def test_the_two_keys_cast_everything(pool):
    pool(2).run(forced, all_wide)
