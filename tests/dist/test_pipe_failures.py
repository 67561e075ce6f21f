"""A batch that fails on one rank of a pipeline: an error on every rank, nothing half done, and a retry that works."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropipe
from tests.dist.pipe_models import batches, loss_of, specs
from tests.dist.test_pipe_engine import MICRO, config, data_of, engine_of
from zeropipe.errors import CommunicationError, UsageError
from zeropipe.runtime.pipe.layers import LayerSpec

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zb-h1", "interleaved-zb", "zbv", "dualpipev"]


class Failing(torch.autograd.Function):
    """The identity; its backward asks ``layer`` first."""

    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, layer: Fails) -> torch.Tensor:
        ctx.layer = layer
        return h.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        ctx.layer.ask("backward")
        return grad, None


class Fails(nn.Module):
    """Raises ``error`` once, in the call of ``where`` (forward or backward) with number ``at``."""

    def __init__(self, where: str, at: int, error: type[BaseException]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 1.5))
        self.plan, self.error, self.calls = (where, at), error, {"forward": 0, "backward": 0}

    def ask(self, where: str) -> None:
        self.calls[where] += 1
        if (where, self.calls[where]) == self.plan:
            raise self.error("the layer's own trouble")

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.ask("forward")
        return Failing.apply(h, self) * self.weight


def retried(
    rank: int, world: int, place: int, schedule: str, stage: int, where: str, error: type[BaseException]
) -> list[str]:
    """Losses and weights of three steps, of which the second fails once, against three that do not."""
    pp, seen = 2, []
    results = []
    for at in (MICRO + 3, 10**6):
        layers = specs(blocks=6)
        layers[place] = LayerSpec(Fails, where, at, error)
        engine = engine_of(
            pp, world // pp, layers, config(stage), partition_method="uniform", schedule=schedule
        )
        losses = []
        for step in range(3):
            data = data_of(step, engine.grid.data_parallel_id, world // pp)
            if (step, at) == (1, MICRO + 3):
                with pytest.raises((error, CommunicationError)) as caught:
                    engine.train_batch(iter(data))
                seen = [type(caught.value).__name__, str(caught.value)]
                engine.eval_batch(iter(data))
                assert engine.global_steps == 1
            losses.append(engine.train_batch(iter(data)).item())
        weights = {
            n: zeropipe.utils.safe_get_full_fp32_param(p).clone() for n, p in engine.module.named_parameters()
        }
        results.append((losses, weights))
        engine.destroy()
    (losses, weights), (want, right) = results
    assert losses == want
    for name, value in weights.items():
        assert torch.equal(value, right[name]), name
    return seen


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("place", "where"), [(1, "forward"), (1, "backward"), (6, "forward"), (6, "backward")]
)
def test_a_layer_that_raises_once_leaves_nothing_half_done(pool, schedule, place, where):
    """Every such error stopped the engine for good, although no message need be lost."""
    found = pool(2).run(retried, place, schedule, 0, where, ValueError)
    assert sorted(name for name, _ in found) == ["CommunicationError", "ValueError"]
    assert all("rank" in text for name, text in found if name == "CommunicationError")


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize(("schedule", "stage"), [("1f1b", 1), ("zb-h1", 2), ("zbv", 3)])
def test_the_same_with_replicas_and_shards(pool, schedule, stage, error):
    """Replicas learn of it although they exchange no messages with the pipeline that failed."""
    found = pool(4).run(retried, 6, schedule, stage, "forward", error)
    assert [name for name, _ in found].count("CommunicationError") == 2


def data_fails(rank: int, world: int, how: str) -> list[str]:
    engine = engine_of(world, 1, specs(blocks=3), config())
    engine.train_batch(iter(data_of(0)))

    def bad() -> Iterator[Any]:
        yield from data_of(1)[:2]
        if how == "raises":
            raise OSError("a shard of the data cannot be read")

    for call in (engine.train_batch, engine.eval_batch):
        good = how == "short on one rank" and rank != world - 1
        with pytest.raises((OSError, UsageError, CommunicationError)) as caught:
            call(iter(data_of(1)) if good else bad())
    before = engine.eval_batch(iter(data_of(1)))
    engine.train_batch(iter(data_of(1)))
    assert engine.eval_batch(iter(data_of(1))) < before
    return [type(caught.value).__name__, str(caught.value)]


@pytest.mark.parametrize("how", ["short", "short on one rank", "raises"])
def test_data_that_ends_early_or_raises_stops_one_batch_on_all_ranks(pool, how):
    """The engine was of no more use afterwards, although nothing had been computed."""
    found = pool(3).run(data_fails, how)
    wrong = {
        "short": "ended inside a step",
        "short on one rank": "ended inside a step",
        "raises": "cannot be read",
    }
    assert wrong[how] in found[2][1]
    assert found[1][0] == "CommunicationError"
    assert (found[0][0] == "CommunicationError") == (how == "short on one rank")


class Samples(torch.utils.data.Dataset[Any]):
    def __init__(self, count: int) -> None:
        self.batch = batches(1, size=count)[0]

    def __len__(self) -> int:
        return len(self.batch[0])

    def __getitem__(self, index: int) -> Any:
        return self.batch[0][index], self.batch[1][index]


def no_data(rank: int, world: int) -> None:
    engine = engine_of(2, 1, specs(blocks=3), config(dataloader_drop_last=True))
    engine.set_dataloader(engine.deepspeed_io(Samples(1)))
    for _ in range(2):
        with pytest.raises(UsageError, match="gives no micro-batch"):
            engine.train_batch()
    engine.set_dataloader(iter(batches(MICRO)))  # gives its batches once
    engine.train_batch()
    with pytest.raises(UsageError, match="gives no micro-batch"):
        engine.train_batch()
    engine.set_dataloader(engine.deepspeed_io(Samples(3)))  # one micro-batch in each round
    engine.train_batch()


def test_a_loader_without_a_batch_is_an_error(pool):
    """`train_batch()` went round it for ever."""
    pool(2).run(no_data, timeout=60)


class Terms:
    """A loss with the terms that the test asks for."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        value = loss_of(logits, labels)
        return {"loss": value, **{name: value.detach() * len(name) for name in self.names}}


def other_terms(rank: int, world: int) -> None:
    terms = Terms()
    engine = engine_of(2, world // 2, specs(blocks=3), config(), loss_fn=terms)
    for names in ([], ["ab"], ["ab", "c"], [], ["d"]):
        terms.names = names
        for call in (engine.eval_batch, engine.train_batch):
            loss = call(iter(batches(MICRO)))
            assert {n: v.item() for n, v in engine.loss_terms.items()} == pytest.approx(
                {name: loss.item() * len(name) for name in names}
            )
    terms.names = ["nothing"] if rank % 2 else []
    if world == 4:
        with pytest.raises(UsageError, match="other terms on rank 3 than on rank 2"):
            engine.train_batch(iter(batches(MICRO)))
    terms.names = ["d"]
    engine.train_batch(iter(batches(MICRO)))


@pytest.mark.parametrize("world", [2, 4])
def test_the_loss_may_have_other_terms_from_batch_to_batch(pool, world):
    """An evaluation that returned an accuracy too left the other stages in a broadcast."""
    pool(world).run(other_terms)


def bad_term(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    return {"loss": loss_of(logits, labels), "note": "a text"}


def named_term(rank: int, world: int) -> str:
    engine = engine_of(2, 1, specs(blocks=3), config(), loss_fn=bad_term)
    with pytest.raises((UsageError, CommunicationError)) as caught:
        engine.train_batch(iter(batches(MICRO)))
    return str(caught.value)


def test_a_term_that_is_no_number_is_named(pool):
    assert "'note'" in pool(2).run(named_term)[1]


def left_over(rank: int, world: int) -> None:
    engine = engine_of(2, 1, specs(blocks=3), config())
    engine.clock.micro_steps = (
        MICRO + 1
    )  # as a checkpoint says that was taken in the middle of an accumulation
    before = [p.detach().clone() for p in engine.module.parameters()]
    engine.train_batch(iter(batches(MICRO)))
    assert engine.global_steps == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    engine.set_gradient_accumulation_boundary(False)
    engine.train_batch(iter(batches(MICRO)))
    assert engine.global_steps == 2


def test_a_batch_always_ends_in_a_step(pool):
    """After a checkpoint from the middle of an accumulation no batch was stepped, in silence."""
    pool(2).run(left_over)


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def wide(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        engine = engine_of(2, world // 2, [LayerSpec(Double) for _ in range(2)], config(), loss_fn=F.mse_loss)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        with torch.no_grad():
            want = F.mse_loss(engine.module.to_sequential()(x), x)
        assert torch.equal(engine.train_batch(iter([(x, x)] * MICRO)), want)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_loss_of_an_fp64_model_is_fp64(pool):
    pool(2).run(wide)


class Halves(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.linear = first, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.first(x))


IN_PLACE = [nn.ReLU(inplace=True), nn.Hardtanh(inplace=True), nn.Dropout(0.0, inplace=True)]


def in_place(rank: int, world: int) -> None:
    for schedule in SCHEDULES:
        for stage in (0, 2):
            for first in IN_PLACE:
                torch.manual_seed(0)
                layers = [nn.Linear(8, 8), *[Halves(first) for _ in range(7)]]
                x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
                with torch.no_grad():
                    want = F.mse_loss(nn.Sequential(*layers)(x), x)
                engine = engine_of(
                    2,
                    1,
                    layers,
                    config(stage),
                    loss_fn=F.mse_loss,
                    schedule=schedule,
                    partition_method="uniform",
                )
                assert torch.equal(engine.train_batch(iter([(x, x)] * MICRO)), want)
                engine.eval_batch(iter([(x, x)] * MICRO))
                engine.destroy()


def test_stages_may_begin_with_a_layer_that_works_in_place(pool):
    """An error about a leaf variable, and only where the cut fell."""
    pool(2).run(in_place)
