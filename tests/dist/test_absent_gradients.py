"""A custom function whose backward gives a gradient on one rank and None on another: None counts as zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import Block, engine_of, whole, x_batch

Gradients = tuple[torch.Tensor | None, torch.Tensor | None, None]


class Mixing(torch.autograd.Function):
    """x @ weight; ``leaves_out`` names the gradients that it does not give, ``how``: as None or as zeros."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, wanted: tuple[str, str]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.wanted = wanted
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Gradients:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        left_out, how = ctx.wanted
        given: dict[str, torch.Tensor | None] = {"x": grad @ weight.t(), "weight": x.t() @ grad}
        for name in left_out.split():
            given[name] = None if how == "none" else torch.zeros_like(given[name])
        return given["x"], given["weight"], None


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)
        self.wanted = ("", "none")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Mixing.apply(x, self.weight, self.wanted)


class Model(nn.Module):
    """One mix runs twice, between blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.middle, self.last = Block(), Mix(), Block(), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.mix(self.middle(self.mix(self.first(x)))))


CASES = ["weight", "x", "x weight"]


def fit(
    rank: int, world: int, stage: int, left_out: str, how: str, leaf: bool, zero: dict[str, Any], plain: bool
) -> dict[str, torch.Tensor]:
    """The odd rank leaves gradients out in every second step; in the first one too."""
    model = build(Model)
    if leaf:
        zeropipe.zero.set_z3_leaf_modules(model, [Mix])
    batches = {"gradient_accumulation_steps": 2, "train_batch_size": 2 * world}
    engine = engine_of(model, stage, world, zero_optimization=zero, **batches)
    for step in range(4):
        for micro in range(2):
            odd = rank == 1 and (step + micro) % 2 == 0
            model.mix.wanted = (left_out if odd else "", how)
            loss = engine(x_batch(step, rank, micro)).square().mean()
            loss.backward() if plain else engine.backward(loss)
            engine.step()
    return whole(engine.module)


@pytest.mark.parametrize("left_out", CASES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_one_rank_does_not_give_counts_as_zero(pool, stage, left_out):
    zero = {"reduce_bucket_size": 1}
    expected = pool(2).run(fit, stage, left_out, "zeros", False, zero, False)[0]
    for ours in pool(2).run(fit, stage, left_out, "none", False, zero, False):
        assert_bitwise(ours, expected)


@pytest.mark.parametrize("zero", [{}, {"stage3_param_persistence_threshold": 10**6}], ids=["away", "whole"])
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_so_it_does_in_leaf_modules_and_with_a_plain_backward(pool, zero, leaf, plain):
    expected = pool(2).run(fit, 3, "x weight", "zeros", leaf, zero, plain)[0]
    for ours in pool(2).run(fit, 3, "x weight", "none", leaf, zero, plain):
        assert_bitwise(ours, expected)


def nobody(rank: int, world: int, stage: int, leaf: bool) -> dict[str, torch.Tensor]:
    """No rank gives the mix a gradient: as in plain PyTorch it keeps its value, also with weight decay."""
    model = build(Model)
    if leaf:
        zeropipe.zero.set_z3_leaf_modules(model, [Mix])
    decay = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.5}}
    engine = engine_of(model, stage, world, optimizer_section=decay)
    model.mix.wanted = ("weight", "none")
    for step in range(2):
        engine.backward(engine(x_batch(step, rank)).square().mean())
        engine.step()
    return whole(engine.module)


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_parameter_that_no_rank_gives_a_gradient_keeps_its_value(pool, stage, leaf):
    untouched = build(Model).mix.weight.detach()
    for ours in pool(2).run(nobody, stage, leaf):
        assert torch.equal(ours["mix.weight"], untouched)
