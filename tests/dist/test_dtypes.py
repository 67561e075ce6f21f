"""Which dtype everything has in a 16-bit run: what is trained is cast, what a model keeps on purpose stays."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import engine_of, settings, whole, x_batch
from zeropipe.runtime.fp16 import fp16_utils

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
EXTRA: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16": {"fp16": {"enabled": True, "loss_scale": 8.0}},
}
WIDTH = 16
KINDS = ["plain", "converted", "adapters", "head"]


class Kept(nn.Module):
    """Buffers of every dtype, a batch norm, a tie, a frozen layer and an adapter; takes and gives ``first``'s dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.stats, self.norm = nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("angles", torch.arange(5000) / 10000 ** (torch.arange(5000) / 5000))
        self.register_buffer("bias", torch.zeros(WIDTH))
        self.register_buffer("ema", self.first.weight.detach().clone())
        self.register_buffer("narrow", torch.linspace(0, 1, 7, dtype=torch.bfloat16))
        self.register_buffer("wide", torch.linspace(0, 1, 7, dtype=torch.float64))
        self.register_buffer("turns", torch.polar(torch.ones(8).float(), torch.arange(8).float()))
        self.register_buffer("count", torch.arange(4))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("unsaved", torch.rand(9), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.bias += 1e-3
        x = x.to(self.first.weight.dtype)
        low = self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)
        h = self.frozen(self.first(x) + low) + self.bias.to(x.dtype)
        h = self.norm(self.stats(torch.tanh(h)))
        return self.head(self.tied(h).to(self.head.weight.dtype))


def model_of(kind: str, half: torch.dtype) -> nn.Module:
    """As a user prepares it: not at all, by ``convert_network``, adapters or a head in fp32 on a 16-bit base."""
    model = build(Kept)
    if kind == "converted":
        return fp16_utils.convert_network(model, half, keep_fp32=fp16_utils.NORM_LAYERS)
    if kind != "plain":
        wide = (model.down, model.up) if kind == "adapters" else (model.head,)
        kept = {id(p) for module in (*wide, model.stats) for p in module.parameters()}
        for param in model.parameters():
            if id(param) not in kept:
                param.data = param.data.to(half)
                param.requires_grad_(kind != "adapters")
    return model


def plainly(model: nn.Module, kind: str, half: torch.dtype) -> nn.Module:
    """What plain PyTorch trains: parameters in 16 bits but for a batch norm beside wide statistics, buffers as made."""
    model = copy.deepcopy(model)
    if kind == "plain":
        for module in model.modules():
            for param in () if isinstance(module, nn.BatchNorm1d) else module.parameters(recurse=False):
                param.data = param.data.to(half)
    return model


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in (*module.named_parameters(), *module.named_buffers())}


def step(engine: Any, at: int, rank: int) -> None:
    engine.backward(engine(x_batch(at, rank)).float().square().mean())
    engine.step()


def matrix(rank: int, world: int, precision: str, kind: str, folder: str) -> None:
    half = PRECISIONS[precision]
    given = model_of(kind, half)
    plain = plainly(given, kind, half)
    want, begin = dtypes_of(plain), dict(copy.deepcopy(plain).named_buffers())
    for at in range(2):
        plain(x_batch(at, rank))  # what forward does to buffers depends on no weight but for the batch norm's
    for stage, other in ((0, 3), (1, 2), (2, 0), (3, 1)):
        engine = engine_of(copy.deepcopy(given), stage, world, **EXTRA[precision])
        assert dtypes_of(engine.module) == want, stage
        assert_bitwise(dict(engine.module.named_buffers()), begin)
        assert_bitwise(whole(engine.module), whole(plainly(given, kind, half)))
        for at in range(2):
            step(engine, at, rank)
        assert dtypes_of(engine.module) == want, stage
        ours, theirs = dict(engine.module.named_buffers()), dict(plain.named_buffers())
        fixed = [name for name in theirs if not name.startswith("stats.")]
        assert_bitwise({n: ours[n] for n in fixed}, {n: theirs[n] for n in fixed})
        if kind != "converted":  # which casts buffers too
            assert torch.allclose(ours["bias"], torch.full((WIDTH,), 2e-3))
        state = {k: v for k, v in engine.module_state_dict().items() if torch.is_tensor(v)}
        assert {k: v.dtype for k, v in state.items() if k in want} == {k: want[k] for k in state if k in want}
        for row in engine.memory_report():
            assert abs(row.ratio - 1) < 0.005 or row.bytes == row.formula, row
        engine.save_checkpoint(folder, tag=f"{kind}{precision}{stage}")
        weights = whole(engine.module)
        engine.destroy()
        again = engine_of(copy.deepcopy(given), other, world, **EXTRA[precision])
        again.load_checkpoint(folder, tag=f"{kind}{precision}{stage}")
        assert dtypes_of(again.module) == want
        assert_bitwise(whole(again.module), weights)
        saved = set(fixed if rank else theirs) - {"unsaved"}  # rank 0's statistics are saved
        assert_bitwise({n: again.module.get_buffer(n) for n in saved}, {n: ours[n] for n in saved})
        step(again, 2, rank)
        assert dtypes_of(again.module) == want
        again.destroy()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_everything_keeps_the_dtype_that_plain_pytorch_keeps(pool, tmp_path: Path, precision: str, kind: str):
    """Every buffer and every parameter prepared in fp32 was cast to 16 bits: a rotary angle was off by 0.73 rad at
    position 4,097, statistics and router biases stopped moving, adapters lost their low bits."""
    pool(2).run(matrix, precision, kind, str(tmp_path))


class Explicit(Kept):
    """A head in fp32, whatever torch's default dtype is."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH, dtype=torch.float32)


def constructed(default: torch.dtype) -> nn.Module:
    torch.set_default_dtype(default)
    try:
        return build(Kept if default == torch.float32 else Explicit)
    finally:
        torch.set_default_dtype(torch.float32)


def under_init(rank: int, world: int, precision: str, wide: bool) -> None:
    half = PRECISIONS[precision]
    default = torch.float32 if wide else half
    with zeropipe.zero.Init(config_dict_or_path=settings(3, world, **EXTRA[precision])):
        model = constructed(default)
    plain = plainly(constructed(default), "plain" if wide else "head", half)
    assert model.head.weight.dtype == plain.head.weight.dtype
    engine = engine_of(model, 3, world, **EXTRA[precision])
    want = dtypes_of(plain)
    assert dtypes_of(engine.module) == want
    assert_bitwise(dict(engine.module.named_buffers()), dict(plain.named_buffers()))
    assert_bitwise(whole(engine.module), whole(plain))
    step(engine, 0, rank)
    assert dtypes_of(engine.module) == want
    engine.destroy()


@pytest.mark.parametrize("wide", [True, False], ids=["built wide", "built in 16 bits"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_under_init_buffers_and_weights_are_those_of_plain_construction(pool, precision: str, wide: bool):
    """``zero.Init`` built under a 16-bit default dtype: tables were computed, and statistics kept, in 16 bits; and it
    cast a head that the model makes in fp32 among 16-bit layers."""
    pool(2).run(under_init, precision, wide)
