"""What a forward writes into its own parameters stays, and is the same on every rank: plain PyTorch's with all batches.

Stage 3 used to drop it with the gathered value: ``Embedding(max_norm=)`` gave back rows of any length, a codebook
never moved, a weight clipped in forward was not. Where it stayed (persistent parameters) ranks parted in silence.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropipe
from tests.helpers.data import generator
from tests.helpers.models import build
from tests.helpers.referee import assert_bitwise
from tests.helpers.zero3 import engine_of, whole
from zeropipe.errors import UsageError

ROWS, WIDTH = 12, 16
KEPT = {"stage3_param_persistence_threshold": 10**6}  # everything stays gathered


class Tables(nn.Module):
    """An embedding that shortens the rows it reads; ``tied``: its table is the head's weight, too."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, max_norm=1.0)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids).mean(1))


class Clipped(nn.Module):
    """``how``: the ways in which code writes to a weight of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, ROWS, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "data":
            self.weight.data.clamp_(-0.5, 0.5)
        elif self.how == "no_grad":
            with torch.no_grad():
                self.weight.clamp_(-0.5, 0.5)
        elif self.how == "detach":
            self.weight.detach().clamp_(-0.5, 0.5)
        elif self.how == "set":
            self.weight.data = self.weight.data.clamp(-0.5, 0.5)
        out = self.head(x @ self.weight)
        if self.how == "twice":
            with torch.no_grad():
                self.weight.mul_(0.9)
        return out


class Codebook(nn.Module):
    """Frozen codes that follow the mean of what is seen; ``alike``: seen by all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.codes = nn.Parameter(torch.randn(4, WIDTH), requires_grad=False)
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.training:
            seen = h.detach().mean(0) if self.seen is None else self.seen
            self.codes.data.mul_(0.9).add_(seen, alpha=0.1)
        return (h @ self.codes.t()).square().mean()


def ids_of(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(step, rank)
    return torch.randint(ROWS - 3, (4, 2), generator=g), torch.randint(ROWS, (4,), generator=g)


def x_of(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=generator(step, rank))


def loss_of(model: Any, step: int, rank: int) -> torch.Tensor:
    module = getattr(model, "module", model)
    if isinstance(module, Tables):
        ids, targets = ids_of(step, rank)
        return F.cross_entropy(model(ids), targets)
    return model(x_of(step, rank)).square().mean()


def trained(
    rank: int, world: int, factory: Any, args: tuple[Any, ...], stage: int, extra: dict[str, Any]
) -> dict[str, torch.Tensor]:
    engine = engine_of(
        build(factory, *args), stage, world, zero_optimization=extra.get("zero", {}), **_rest(extra)
    )
    for step in range(3):
        engine.backward(loss_of(engine, step, rank))
        engine.step()
    if stage == 3:
        with torch.no_grad():
            loss_of(engine, 3, rank)  # an evaluation shortens rows too
    values = whole(engine.module)
    engine.destroy()
    return values


def _rest(extra: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in extra.items() if key != "zero"}


def plainly(
    factory: Any, args: tuple[Any, ...], world: int, evaluated: bool = True
) -> dict[str, torch.Tensor]:
    """One process: every rank's forward, then every rank's backward, as one batch of all would be."""
    model = build(factory, *args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    for step in range(3):
        losses = [loss_of(model, step, rank) for rank in range(world)]
        optimizer.zero_grad()
        for loss in losses:
            (loss / world).backward()
        optimizer.step()
    with torch.no_grad():
        for rank in range(world if evaluated else 0):
            loss_of(model, 3, rank)
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def longest_difference(ours: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - value).abs().max()) for name, value in right.items())


ADAM_NOISE = 1e-5  # sums over ranks in another order, through three steps of Adam at lr 0.01


@pytest.mark.parametrize("extra", [{}, {"zero": KEPT}], ids=["sharded", "persistent"])
@pytest.mark.parametrize(("world", "tied"), [(1, True), (2, False), (3, False)])
def test_rows_shortened_for_each_ranks_batch_are_those_of_one_batch_of_all(pool, world, tied, extra):
    right = plainly(Tables, (tied,), world)
    results = pool(world).run(trained, Tables, (tied,), 3, extra)
    for ours in results:
        assert longest_difference(ours, right) < ADAM_NOISE
        assert_bitwise(ours, results[0])


@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_below_stage_3_replicas_shorten_the_same_rows_at_the_boundary(pool, stage, precision):
    """Each rank shortened the rows of its own batch, and replicas parted in silence."""
    results = pool(2).run(trained, Tables, (False,), stage, precision)
    for ours in results:
        assert_bitwise(ours, results[0])
    if not precision:
        right = plainly(Tables, (False,), 2, evaluated=False)
        assert longest_difference(results[0], right) < ADAM_NOISE


@pytest.mark.parametrize("extra", [{}, {"zero": KEPT}], ids=["sharded", "persistent"])
@pytest.mark.parametrize("how", ["data", "no_grad", "detach", "set"])
def test_a_weight_clipped_in_forward_stays_clipped(pool, how, extra):
    right = plainly(Clipped, (how,), 2)
    for ours in pool(2).run(trained, Clipped, (how,), 3, extra):
        assert longest_difference(ours, right) < ADAM_NOISE
        assert float(ours["weight"].abs().max()) <= 0.5


def swaps(rank: int, world: int) -> bool:
    """Puts another value there for the product alone, as quantized training does."""

    class Swapped(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.weight.data
            self.weight.data = kept.round()
            out = super().forward(x)
            self.weight.data = kept
            return out

    engine = engine_of(build(lambda: nn.Sequential(Swapped(WIDTH, WIDTH), nn.Linear(WIDTH, 4))), 3, world)
    before = whole(engine.module)
    with torch.no_grad():
        engine(x_of(0, rank))
    after = whole(engine.module)
    engine.destroy()
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_value_that_is_put_back_before_the_forward_ends_was_never_written(pool):
    assert all(pool(2).run(swaps))


def codes(rank: int, world: int, alike: bool, extra: dict[str, Any]) -> Any:
    model = build(Codebook)
    if alike:
        model.seen = torch.ones(WIDTH)
    engine = engine_of(model, 3, world, zero_optimization=extra)
    try:
        for step in range(3):
            engine.backward(engine(x_of(step, rank)))
            engine.step()
    except UsageError as error:
        said = str(error)
        before = whole(engine.module)["codes"]
        model.eval()
        engine.backward(engine(x_of(0, rank)))  # what was written is dropped, and training goes on
        engine.step()
        after = whole(engine.module)["codes"]
        engine.destroy()
        return said, before, after
    values = whole(engine.module)
    engine.destroy()
    return "", values["codes"], values["codes"]


@pytest.mark.parametrize("extra", [{}, KEPT], ids=["sharded", "persistent"])
def test_codes_that_every_rank_moves_alike_move(pool, extra):
    right = build(Codebook).codes.detach()
    for _ in range(3):
        right = right * 0.9 + 0.1
    for said, ours, _ in pool(2).run(codes, True, extra):
        assert said == ""
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("extra", [{}, KEPT], ids=["sharded", "persistent"])
def test_codes_that_ranks_move_apart_are_refused_by_name_on_every_rank(pool, extra):
    first = build(Codebook).codes.detach()
    for said, before, after in pool(2).run(codes, False, extra):
        assert "'codes'" in said
        assert "different values" in said
        assert torch.equal(before, first)
        assert torch.equal(after, first)


def in_16_bits(rank: int, world: int, zero: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    engine = engine_of(build(Tables, False), 3, world, bf16={"enabled": True}, zero_optimization=zero)
    engine.backward(loss_of(engine, 0, rank))
    engine.step()
    table = engine.module.table.weight
    before = zeropipe.utils.safe_get_full_fp32_param(table)
    with torch.no_grad():
        loss_of(engine, 1, rank)
    after, shown = zeropipe.utils.safe_get_full_fp32_param(table), whole(engine.module)["table.weight"]
    engine.destroy()
    return before, after, shown


@pytest.mark.parametrize("zero", [{}, {"mics_shard_size": 1}], ids=["sharded", "replicas"])
def test_the_master_of_a_16_bit_weight_has_it_and_other_elements_keep_their_bits(pool, zero):
    read = torch.cat([ids_of(1, rank)[0].reshape(-1) for rank in range(2)]).unique()
    unread = [row for row in range(ROWS) if row not in read.tolist()]
    for before, after, shown in pool(2).run(in_16_bits, zero):
        assert torch.equal(after[unread], before[unread])
        assert float(after[read].norm(dim=1).max()) < 1.01
        assert torch.equal(shown, after.bfloat16())
