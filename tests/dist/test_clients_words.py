"""Errors in clients' words: what resizes, merges or replaces weights under an engine is named as the user wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.zero3 import engine_of
from zeropipe.errors import UnavailableParameterError, UsageError
from zeropipe.runtime.zero.gather.clients import FIXES

WIDTH = 16


class Clientlike(nn.Module):
    """An embedding and a low-rank update, with the calls of transformers and of peft that touch them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        return self.b(self.a(h)) + h

    def merge(self) -> None:
        with torch.no_grad():
            self.embed.weight += self.embed.weight @ (self.b.weight @ self.a.weight).T

    def merge_and_unload(self) -> None:
        self.merge()

    def merge_adapter(self) -> None:
        self.merge()

    def unmerge_adapter(self) -> None:
        self.merge()

    def unload(self) -> None:
        self.merge()

    def add_weighted_adapter(self) -> None:
        self.merge()

    def resize_token_embeddings(self, size: int) -> None:
        old, width = self.embed.weight.size()  # transformers unpacks it
        grown = nn.Embedding(size, width)
        grown.weight.data[:old] = self.embed.weight.data
        self.embed.weight.data = grown.weight.data

    def generate(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embed.weight @ self.embed.weight[0]


def step(engine: Any) -> None:
    engine.backward(engine(torch.arange(8)).square().mean())
    engine.step()


def errors(rank: int, world: int) -> None:
    tokens = torch.arange(8)
    for call in FIXES:
        engine = engine_of(Clientlike(), 3, world)
        step(engine)
        arguments = {"resize_token_embeddings": (40,), "generate": (tokens,)}.get(call, ())
        text = rf"tests's {call}\(\): .*'(embed|a|b).weight'.*Fix: {re.escape(FIXES[call])}"
        with pytest.raises(UnavailableParameterError, match=text):
            getattr(engine.module, call)(*arguments)
        step(engine)  # nothing was lost
        # As the message says.
        if "GatheredParameters" in FIXES[call]:
            with zeropipe.zero.GatheredParameters(engine.module.parameters(), modifier_rank=0):
                getattr(engine.module, call)()
        elif call == "generate":
            with zeropipe.zero.unsharded(engine.module):
                engine.module.generate(tokens)
        else:
            module = engine.module
            engine.destroy()
            zeropipe.zero.unshard_module(module).resize_token_embeddings(40)
            engine = engine_of(module, 3, world)
            assert engine.module.embed.weight.ds_shape == (40, WIDTH)
        step(engine)
        engine.destroy()


def test_a_clients_call_is_named_with_what_to_do(pool):
    pool(2).run(errors)


CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda module: setattr(module.embed.weight, "data", torch.ones(3, WIDTH)),
    lambda module: module.resize_token_embeddings(40),
)


def reshaped(rank: int, world: int) -> None:
    for stage in (0, 1, 2):
        for change in CHANGES:
            engine = engine_of(Clientlike(), stage, world)
            step(engine)
            change(engine.module)
            with pytest.raises(
                UsageError, match=r"'embed.weight' .*resize_token_embeddings\(\).*Fix: .*destroy"
            ):
                step(engine)
            engine.destroy()
    engine = engine_of(Clientlike(), 3, world)
    with pytest.raises(UnavailableParameterError, match=r"giving it another value .*'embed.weight'"):
        CHANGES[0](engine.module)
    step(engine)
    engine.destroy()


def test_another_shape_is_refused_before_anything_is_computed(pool):
    pool(2).run(reshaped)
