"""Shards that the ranks of a host read where they lie: whoever writes to them, by whatever way, changes nothing of what
the slowest rank has asked for before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.data import mlp_batch
from tests.helpers.models import MLP, build
from tests.helpers.zero3 import settings
from zeropipe import zero
from zeropipe.comm.host.near import NearTalk
from zeropipe.runtime.zero.gather.shards import shards_of
from zeropipe.utils import safe_get_full_fp32_param, safe_get_local_fp32_param, safe_set_full_fp32_param

DELAY = 0.002  # s


@contextmanager
def slow(here: bool) -> Iterator[None]:
    """Inside, this rank reads late."""

    def read(talk: NearTalk, *what: Any) -> int:
        time.sleep(DELAY)
        return usual(talk, *what)

    usual = NearTalk.read
    NearTalk.read = read if here else usual  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        NearTalk.read = usual  # type: ignore[method-assign]


def start(world: int, frozen: bool = False) -> Any:
    model = build(MLP)
    if frozen:
        model.layers[0].requires_grad_(False)
    engine = zeropipe.initialize(model=model, config=settings(3, world))[0]
    owns = [shards_of(p).own for p in model.parameters()]
    assert all((own.exposed is not None) == (world > 1) for own in owns)
    return engine


def train(engine: Any, rank: int, step: int = 0, then: bool = True) -> None:
    engine.backward(engine(*mlp_batch(step, rank)))
    if then:
        engine.step()


def masters(engine: Any) -> list[torch.Tensor]:
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def by_hand(engine: Any) -> None:
    for master in masters(engine):
        master.data.add_(1.0)


def by_piece(engine: Any) -> None:
    for param in engine.module.parameters():
        piece = safe_get_local_fp32_param(param)
        if piece is not None:
            piece.add_(1.0)


def by_value(engine: Any) -> None:
    for param in engine.module.parameters():
        value = safe_get_full_fp32_param(param)
        safe_set_full_fp32_param(param, value + 1.0)


def by_load(engine: Any) -> None:
    state = engine.optimizer.state_dict()
    state["fp32_masters"] = [master.detach() + 1.0 for master in masters(engine)]
    engine.optimizer.load_state_dict(state)


WAYS = {way.__name__: way for way in (by_hand, by_piece, by_value, by_load)}


def written(rank: int, world: int, late: int) -> Any:
    """What a state dict, an evaluation and a backward showed, each right before somebody writes; and the last one."""
    engine = start(world)
    train(engine, rank)
    found = []
    with slow(rank == late):
        for write in WAYS.values():
            found.append({name: value.clone() for name, value in engine.module.state_dict().items()})
            write(engine)
            with torch.no_grad():
                found.append({"loss": engine(*mlp_batch(1, 0))})
            write(engine)
            engine.backward(engine(*mlp_batch(1, 0)))
            write(engine)
            engine.step()
    found.append(dict(engine.module.state_dict()))
    engine.destroy()
    return found


@pytest.mark.parametrize(("world", "slowest"), [(2, (0, 1)), (3, (1,))])
def test_a_write_changes_nothing_of_what_was_read_before(pool, world, slowest):
    reference = None
    for late in slowest:
        for found in pool(world).run(written, late):
            reference = reference or found
            for expected, seen in zip(reference, found, strict=True):
                assert expected.keys() == seen.keys()
                assert all(torch.equal(expected[name], value) for name, value in seen.items())


def ahead(rank: int, world: int, folder: str) -> None:
    """Gathers that were begun and not waited for have the values of when they were begun, whatever follows."""
    engine = start(world)
    train(engine, rank)
    engine.save_checkpoint(folder)
    for step, then in enumerate(("step", "load", "set")):
        before = {name: value.clone() for name, value in engine.module.state_dict().items()}
        with slow(rank == step % world):
            if then == "step":
                train(engine, rank, 1, then=False)
            begun = zero.unshard(engine.module)
            if then == "step":
                engine.step()
            elif then == "load":
                engine.load_checkpoint(folder)
            else:
                by_hand_all(engine)
            begun.wait()
        for name, param in engine.module.named_parameters():
            if then == "step":
                assert torch.equal(param, before[name]), then
        zero.reshard(engine.module)
        assert any(not torch.equal(value, before[name]) for name, value in engine.module.state_dict().items())
    engine.destroy()


def by_hand_all(engine: Any) -> None:
    for partition in engine.optimizer.partitions:
        partition.values.before_write()
    by_hand(engine)


@pytest.mark.parametrize("world", [2, 3])
def test_what_was_begun_before_a_write_is_as_it_was(pool, world, tmp_path: Path):
    pool(world).run(ahead, str(tmp_path))


class Many(nn.Module):
    """More parameters than words that a rank may be ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.every = nn.ParameterList([nn.Parameter(torch.full((3,), float(i))) for i in range(300)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.sum()
        for param in self.every:
            total = total + (param * x).sum()
        return total


def many(rank: int, world: int) -> None:
    engine = zeropipe.initialize(model=Many(), config=settings(3, world))[0]
    with zero.GatheredParameters(list(engine.module.every)):
        assert all(torch.equal(p, torch.full((3,), float(i))) for i, p in enumerate(engine.module.every))
    zero.unshard(engine.module).wait()
    zero.reshard(engine.module)
    engine.backward(engine(torch.ones(3)))
    engine.step()
    engine.destroy()


def test_more_gathers_may_be_begun_than_there_is_room_for_words(pool):
    pool(2).run(many)


def frozen(rank: int, world: int) -> None:
    """Frozen shards are read in place as well, before and after they are cast, moved and trained."""
    engine = start(world, frozen=True)
    layer = engine.module.layers[0]
    own = shards_of(layer.weight).own
    for step in range(2):
        train(engine, rank, step)
    engine.offload_states()
    engine.reload_states()
    assert all(shards_of(p).own.exposed is not None for p in engine.module.parameters())
    with zero.GatheredParameters(layer.weight, modifier_rank=0), torch.no_grad():
        layer.weight.fill_(float(rank))
    value = engine.module.state_dict()["layers.0.weight"]
    assert torch.equal(value, torch.zeros_like(value))
    layer.requires_grad_(True)
    train(engine, rank, 2)
    assert own is shards_of(layer.weight).own and own.exposed is not None
    assert not torch.equal(engine.module.state_dict()["layers.0.weight"], value)
    engine.destroy()
    assert all(shards_of(p).own.exposed is None for p in engine.module.parameters())
    value = shards_of(layer.weight).settled()
    assert torch.equal(value, engine.module.state_dict()["layers.0.weight"])


def test_frozen_shards_are_read_in_place(pool):
    pool(2).run(frozen)
