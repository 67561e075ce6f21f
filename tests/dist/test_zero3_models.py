"""Models that do unusual things with their parameters train at stage 3 as at stage 0, bit for bit."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.zero3 import WIDTH, Block, Stack, assert_as_stage, assert_as_stage_0, x_batch

# ---- control flow that changes between steps, the same on all ranks ----

ORDERS = [(0, 1, 2), (0, 2), (2, 1, 0), (0, 1, 2), (1, 1, 0, 2), (0, 1, 2), (2,)]


def changing(engine: Any, step: int, rank: int) -> torch.Tensor:
    engine.module.order = ORDERS[step % len(ORDERS)]
    return engine(x_batch(step, rank)).square().mean()


def test_layers_dropped_swapped_and_repeated_between_steps(pool):
    assert_as_stage_0(pool, Stack, changing, steps=len(ORDERS))


@pytest.mark.parametrize(
    "zero",
    [
        {"stage3_prefetch_bucket_size": 0},
        {"stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": 1500},
        {"stage3_max_reuse_distance": 10**9},
        {"stage3_max_live_parameters": 0},
        {"reduce_bucket_size": 1},
        {"reduce_bucket_size": 0},
        {"overlap_comm": False},
        {"stage3_param_persistence_threshold": 40},
        {"stage3_param_persistence_threshold": 10**6, "stage3_model_persistence_threshold": 600},
    ],
    ids=lambda zero: ",".join(zero),
)
def test_no_budget_changes_a_number(pool, zero):
    assert_as_stage_0(pool, Stack, changing, steps=4, zero_optimization=zero)


# ---- parameters used elsewhere than in their own module ----


class External(nn.Module):
    """Uses of other modules' parameters: read directly, returned, a view returned, through out_proj's way."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH)
        self.giver = Giver()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.reader = Reader(self.table)
        self.own = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.table(x[:, 0].abs().long() % 8) + x
        bias, view = self.giver()
        h = F.linear(h, view) + bias
        h = h + self.attention(h[None], h[None], h[None], need_weights=False)[0][0]
        return self.reader(h) * self.own + self.table.weight.mean()


class Giver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(WIDTH))
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.bias, self.weight.t()


class Reader(nn.Module):
    """Uses a parameter that another module owns, which it does not register."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.tables = [table]
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(x) @ self.tables[0].weight.t() @ self.tables[0].weight


def test_parameters_used_outside_of_their_module(pool):
    assert_as_stage_0(pool, External, steps=3)


class Returns(nn.Module):
    """The root itself hands out a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.code = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.code[: WIDTH // 2]


def returned_loss(engine: Any, step: int, rank: int) -> torch.Tensor:
    hidden, code = engine(x_batch(step, rank))
    return (hidden @ code.t()).square().mean() + code.square().sum()


def test_the_root_returns_a_view_of_a_parameter(pool):
    assert_as_stage_0(pool, Returns, returned_loss, steps=3)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.table(x.abs().long() % 32)))


def test_tied_weights(pool):
    assert_as_stage_0(pool, Tied, steps=3)


class Recursive(nn.Module):
    """A module that calls itself, and a child several times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
        x = torch.tanh(self.inner(x)) * self.gain
        return x if depth == 0 else self(x, depth - 1) + self.inner(x)


def test_recursion_and_repeated_calls(pool):
    assert_as_stage_0(pool, Recursive, steps=3)


# ---- what goes in and out ----


class Answer(NamedTuple):
    value: torch.Tensor
    note: str


class Box:
    """An object that pytree does not know."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, box: Box, *, answer: dict[str, Answer]) -> Box:
        return Box(self.linear(box.value) * self.gain * answer["a"].value)


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Wraps(), Wraps()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        box = self.first(Box(x), answer={"a": Answer(x, "x")})
        return self.second(box, answer={"a": Answer(box.value, "y")}).value


def test_tensors_inside_objects_dicts_and_tuples(pool):
    assert_as_stage_0(pool, Containers, steps=3)


class Inplace(nn.Module):
    """Outputs that are changed in place, and one that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.block = Block()
        self.unused = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        y *= 2.0
        a, b = y.chunk(2, -1)
        h = F.relu(self.block(a), inplace=True)
        self.unused(h)
        return h + b


def test_outputs_changed_in_place_or_unused(pool):
    assert_as_stage_0(pool, Inplace, steps=3)


# ---- activation checkpointing ----


class Checkpointed(Stack):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class Reentrant(Checkpointed):
    reentrant = True


class EarlyStop(Checkpointed):
    """Its blocks save nothing of their last layer, so recomputation stops inside them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block(x) + 1.0, x, use_reentrant=False)
        return self.head(x)


class WholeCheckpointed(Checkpointed):
    """All blocks in one, and some of them in another inside it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(checkpoint(self.run, x, use_reentrant=False))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.blocks[0], self.blocks[1](self.blocks[2](x)), use_reentrant=False)


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("model", [Checkpointed, Reentrant, EarlyStop, WholeCheckpointed])
def test_activation_checkpointing(pool, model, plain):
    assert_as_stage_0(pool, model, steps=3, plain=plain)


# ---- frozen, low-rank, quantized ----


class LowRank(nn.Module):
    """A frozen layer with a trained low-rank side path."""

    def __init__(self, width: int = WIDTH, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Quantized(nn.Module):
    """A frozen layer of packed bytes: value = (byte - 128) x scale."""

    def __init__(self, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__()
        low = 0 if dtype is torch.uint8 else -128
        packed = torch.randint(low, low + 256, (WIDTH, WIDTH), dtype=dtype)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(torch.full((WIDTH, 1), 0.01), requires_grad=False)
        self.adapter = LowRank()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.packed.float() - (128 if self.packed.dtype is torch.uint8 else 0)) * self.scale
        return self.adapter(F.linear(x, weight))


class LowRankStack(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([LowRank(), Quantized(), LowRank(), Quantized(torch.int8)])
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


class CheckpointedLowRank(LowRankStack):
    def __init__(self) -> None:
        super().__init__(checkpointed=True)


@pytest.mark.parametrize("model", [LowRankStack, CheckpointedLowRank])
def test_frozen_low_rank_and_quantized_weights(pool, model):
    assert_as_stage_0(pool, model, steps=3)


def unfreezing(engine: Any, step: int, rank: int) -> torch.Tensor:
    if step == 2:
        engine.module.layers[0].base.requires_grad_(True)
    return engine(x_batch(step, rank)).square().mean()


def test_parameters_unfrozen_in_the_middle_of_a_run(pool):
    assert_as_stage_0(pool, LowRankStack, unfreezing, steps=4)


# ---- gradients through the loop's other shapes ----


def two_backwards(engine: Any, step: int, rank: int) -> torch.Tensor:
    out = engine(x_batch(step, rank))
    engine.backward(out.square().mean(), retain_graph=True)
    return out.abs().mean()


def two_forwards(engine: Any, step: int, rank: int) -> torch.Tensor:
    first = engine(x_batch(step, rank))
    with torch.no_grad():
        target = engine(x_batch(step + 9, rank))
    return (first - engine(x_batch(step, rank, 1))).square().mean() + (first - target).square().mean()


def eval_between(engine: Any, step: int, rank: int) -> torch.Tensor:
    with torch.no_grad():
        engine(x_batch(step, rank, 7))
    with torch.inference_mode():
        engine(x_batch(step, rank, 8))
    return engine(x_batch(step, rank)).square().mean()


def through_the_input(engine: Any, step: int, rank: int) -> torch.Tensor:
    x = x_batch(step, rank).requires_grad_()
    (slope,) = torch.autograd.grad(engine(x).square().mean(), x)
    return engine(x.detach() - slope).square().mean()


@pytest.mark.parametrize("loss_of", [two_backwards, two_forwards, eval_between, through_the_input])
def test_more_than_one_forward_or_backward(pool, loss_of):
    assert_as_stage(2, pool, Stack, loss_of, steps=3)


@pytest.mark.parametrize("plain", [False, True])
def test_accumulation(pool, plain):
    assert_as_stage(2, pool, Stack, steps=3, gas=3, plain=plain)


def accumulate_here(engine: Any, step: int, rank: int) -> torch.Tensor:
    """Two micro-steps without a reduction, then the one whose backward the caller runs."""
    for micro in (1, 2):
        with engine.no_sync():
            engine.backward(engine(x_batch(step, rank, micro)).square().mean())
    return engine(x_batch(step, rank)).square().mean()


def test_no_sync(pool):
    assert_as_stage_0(pool, Stack, accumulate_here, steps=3)
