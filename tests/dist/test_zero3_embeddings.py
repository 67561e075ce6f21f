"""Embeddings at stage 3: their backward reads indices and not the table, which is therefore not gathered for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.data import generator
from tests.helpers.zero3 import assert_as_stage, engine_of, gathered
from zeropipe.comm.record import record
from zeropipe.errors import UnavailableParameterError
from zeropipe.runtime.zero.gather.shards import shards_of

VOCABULARY, WIDTH = 24, 16


class Words(nn.Module):
    """Tokens in, one score per token out. ``tied``: the table is the head's weight too."""

    def __init__(self, tied: bool = False, sparse: bool = False, recompute: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0, sparse=sparse)
        self.places = nn.Embedding(8, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.recompute = recompute
        if tied:
            self.head.weight = self.table.weight

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens) + self.table(tokens.flip(-1)) + self.places(torch.arange(tokens.shape[-1]))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = checkpoint(self.embed, tokens, use_reentrant=False) if self.recompute else self.embed(tokens)
        return self.head(torch.tanh(self.mix(h)))


class Penalised(Words):
    """A hook on the table reads it, in a way that backward needs its value for."""

    def __init__(self) -> None:
        super().__init__()
        self.table.register_forward_hook(lambda module, _, out: out * module.weight.square().sum())


def tokens(step: int, rank: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (4, 8), generator=generator(step, rank, 0))


def loss_of(engine: Any, step: int, rank: int) -> torch.Tensor:
    return engine(tokens(step, rank)).square().mean()


def tied() -> nn.Module:
    return Words(tied=True)


def recomputed() -> nn.Module:
    return Words(recompute=True)


def frozen() -> nn.Module:
    model = Words()
    model.table.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("factory", [Words, tied, recomputed, frozen, Penalised])
@pytest.mark.parametrize("world", [1, 2])
def test_the_numbers_are_those_of_stage_0(pool, world, factory):
    assert_as_stage(0, pool, factory, loss_of, world=world)


def gathers_in_backward(rank: int, world: int, factory: Any) -> tuple[list[str], list[str]]:
    engine = engine_of(factory(), 3, world, zero_optimization={"stage3_prefetch_bucket_size": 0})
    for step in range(3):
        loss = loss_of(engine, step, rank)
        with record() as events:
            engine.backward(loss)
        away = gathered(engine.module)
        shape = engine.module.table.weight.data.shape
        engine.step()
        assert tuple(shape) == (0,)
    return [event.label for event in events if event.op == "all_gather"], away


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (Words, ["mix.weight", "mix.bias"]),  # the head stays from forward
        (Penalised, ["mix.weight", "mix.bias", "table.weight"]),
        (recomputed, ["mix.weight", "mix.bias", "table.weight", "places.weight"]),
    ],
)
def test_a_table_is_gathered_for_backward_only_where_something_reads_it(pool, factory, expected):
    for labels, away in pool(2).run(gathers_in_backward, factory):
        assert labels == expected
        assert away == []


def look_while_the_gradient_arrives(rank: int, world: int) -> tuple[str, float, float]:
    engine = engine_of(Words(), 3, world)
    table = engine.module.table.weight
    said = []

    def read(param: torch.Tensor) -> None:
        try:
            param.sum()
        except UnavailableParameterError as error:
            said.append(str(error))

    table.register_post_accumulate_grad_hook(read)
    before = shards_of(table)
    assert before is not None
    engine.backward(loss_of(engine, 0, rank))
    engine.step()
    return said[0], float(before.holds), float(len(said))


def test_a_hook_that_reads_the_table_while_its_gradient_arrives_is_told_how(pool):
    for said, holds, times in pool(2).run(look_while_the_gradient_arrives):
        assert "table.weight" in said
        assert "GatheredParameters" in said
        assert (holds, times) == (0, 1)


def fail_on_the_way(rank: int, world: int) -> tuple[list[str], int, bool]:
    """Backward raises after the tied table's first gradient is under way and before it has arrived."""
    engine = engine_of(tied(), 3, world)
    fails = [True]

    def fail(grad: torch.Tensor) -> torch.Tensor:
        if fails.pop() if fails else False:
            raise RuntimeError("on purpose")
        return grad

    def hook(_: nn.Module, args: Any, out: torch.Tensor) -> None:
        out.register_hook(fail)

    handle = engine.module.places.register_forward_hook(hook)
    loss = loss_of(engine, 0, rank)
    with pytest.raises(RuntimeError, match="on purpose"):
        engine.backward(loss)
    handle.remove()
    engine.zero_grad()
    loss = loss_of(engine, 1, rank)
    engine.backward(loss)
    engine.step()
    shards = shards_of(engine.module.table.weight)
    assert shards is not None
    return gathered(engine.module), shards.holds, bool(torch.isfinite(loss))


def test_an_error_in_backward_leaves_nothing_held(pool):
    for held, holds, finite in pool(2).run(fail_on_the_way):
        assert (held, holds, finite) == ([], 0, True)
