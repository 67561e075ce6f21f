"""What may travel through a pipeline, what comes back from it, and what happens when something is wrong."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zeropipe
from tests.dist.pipe_models import BASE_SEED, SEQ, VOCAB, WIDTH, Block, Head, batches, loss_of, plain, specs
from tests.dist.test_pipe_engine import MICRO, config, data_of, engine_of, reference
from zeropipe.errors import CommunicationError, ConfigError, UsageError
from zeropipe.runtime.pipe.layers import LayerSpec
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.topology import PipeDataParallelTopology, ProcessTopology


class Carrier(nn.Module):
    """Takes and returns every kind of value that may pass between stages; only ``h`` is computed on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        mask, (ids, scale), nothing, flag = state["mask"], state["pair"], state["nothing"], state["flag"]
        assert mask.dtype == torch.bool
        assert ids.dtype == torch.int64
        assert nothing is None
        assert flag is True
        h = state["h"] + self.linear(state["h"]) * mask.unsqueeze(-1) * scale
        return {"h": h, "mask": mask, "pair": (ids, scale * 1.5), "nothing": None, "flag": flag}


class Enter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
        ids, mask = inputs
        return {
            "h": self.embed(ids),
            "mask": mask,
            "pair": (ids, self.scale * 2),
            "nothing": None,
            "flag": True,
        }


def leave(state: dict[str, Any]) -> torch.Tensor:
    return state["h"] + F.one_hot(state["pair"][0], WIDTH + VOCAB)[..., :WIDTH]


CARRIERS = [LayerSpec(Enter), *[LayerSpec(Carrier) for _ in range(4)], leave, LayerSpec(Head)]


def masked(step: int, sizes: list[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(step)
    found = []
    for length in sizes:
        ids = torch.randint(0, VOCAB, (2, length), generator=generator)
        mask = torch.rand(2, length, generator=generator) > 0.3
        found.append(((ids, mask), torch.randint(0, VOCAB, (2, length), generator=generator)))
    return found


class Wrap(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Any) -> Any:
        return self.function(value)


def carried(rank: int, world: int, schedule: str, sizes: list[int], dynamic: bool) -> None:
    modules = []
    for index, layer in enumerate(CARRIERS):
        torch.manual_seed(BASE_SEED + index)
        modules.append(layer.build() if isinstance(layer, LayerSpec) else Wrap(layer))
    alone = nn.Sequential(*modules)
    data = masked(3, sizes)
    losses = []
    for inputs, labels in data:
        loss = loss_of(alone(inputs), labels)
        (loss / len(data)).backward()
        losses.append(loss.detach())
    settings = config(0, optimizer={"type": "SGD", "params": {"lr": 1.0}})
    engine = engine_of(world, 1, CARRIERS, settings, schedule=schedule, dynamic_shape=dynamic)
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    assert torch.equal(engine.train_batch(iter(data)), torch.stack(losses).mean())
    grads = {name: p.grad for name, p in alone.named_parameters()}
    for name, p in engine.module.named_parameters():
        assert torch.equal(p, before[name] - grads[name]), name


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zbv"])
def test_dicts_tuples_none_bools_and_integers_travel(pool, schedule):
    pool(3).run(carried, schedule, [SEQ] * MICRO, False)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_shapes_may_change_from_one_micro_batch_to_the_next(pool, schedule):
    pool(2).run(carried, schedule, [5, 3, 7, 1], True)


def shape_changes(rank: int, world: int) -> str:
    engine = engine_of(2, 1, CARRIERS, config())
    with pytest.raises((UsageError, CommunicationError)) as caught:
        engine.train_batch(iter(masked(3, [5, 5, 3, 5])))
    engine.train_batch(
        iter(masked(3, [3] * 4))
    )  # no message was lost, and the next batch tells its shapes anew
    return str(caught.value)


def test_a_changed_shape_without_dynamic_shape_is_an_error_on_every_rank(pool):
    first, second = pool(2).run(shape_changes)
    assert "dynamic_shape=True" in first
    assert "micro-batch 2" in first
    assert "pipeline rank 0 failed" in second


def evaluated(rank: int, world: int, schedule: str, stage: int) -> list[Any]:
    layers = specs(blocks=3, dropout=0.5)
    engine = engine_of(2, world // 2, layers, config(stage), schedule=schedule)
    _, forward = plain(specs(blocks=3))
    data = batches(6)
    outputs = [forward(tokens) for tokens, _ in data]
    losses = torch.stack([loss_of(out, labels) for out, (_, labels) in zip(outputs, data, strict=True)])
    loss, logits = engine.eval_batch(iter(data), return_logits=True, num_micro_batches=6)
    assert torch.equal(loss, losses.mean())
    assert (logits is not None) == engine.is_last_stage()
    if logits is not None:
        assert torch.equal(logits, torch.cat(outputs))
    assert engine.module.training
    assert torch.equal(
        torch.stack(engine.eval_batch(iter(data), reduce_output=None, num_micro_batches=2)), losses[:2]
    )
    summed = engine.eval_batch(iter(data), reduce_output="sum", num_micro_batches=3, bcast_loss=False)
    assert (summed is None) == (not engine.is_last_stage())
    _, only = engine.eval_batch(iter([(x, None) for x, _ in data]), return_logits=True, compute_loss=False)
    assert (only is None) == (not engine.is_last_stage())
    engine.train_batch(iter(batches(MICRO)))  # training goes on after an evaluation
    with pytest.raises(UsageError, match="reduce_output"):
        engine.eval_batch(iter(data), reduce_output="max")
    return [loss.item()]


@pytest.mark.parametrize(
    ("world", "schedule", "stage"), [(2, "1f1b", 0), (2, "zbv", 2), (4, "interleaved", 3)]
)
def test_evaluation_gives_losses_and_logits(pool, world, schedule, stage):
    assert len({found[0] for found in pool(world).run(evaluated, schedule, stage)}) == 1


def two_terms(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    main = loss_of(logits, labels)
    z = logits.logsumexp(-1).square().mean()
    return {"loss": main + 1e-2 * z, "main": main, "z": z}


def terms(rank: int, world: int) -> dict[str, float]:
    engine = engine_of(2, 1, specs(blocks=2), config(), loss_fn=two_terms)
    engine.set_batch_fn(lambda batch: (batch["x"], batch["y"]))
    engine.set_dataiterator(iter([{"x": x, "y": y} for x, y in batches(MICRO)]))
    total = engine.train_batch()
    found = {name: value.item() for name, value in engine.loss_terms.items()}
    assert total.item() == pytest.approx(found["main"] + 1e-2 * found["z"], rel=1e-5)
    return found


def test_several_loss_terms_come_back_on_every_rank(pool):
    first, second = pool(2).run(terms)
    assert first == second
    assert set(first) == {"main", "z"}


class Fails(nn.Module):
    """Raises in its third forward."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.ones(())), 0

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3:
            raise ValueError("the layer's own trouble")
        return h * self.weight


def failing(rank: int, world: int, place: int, schedule: str) -> tuple[str, str, float]:
    layers = specs(blocks=6)
    layers[place] = LayerSpec(Fails)
    engine = engine_of(world, 1, layers, config(), partition_method="uniform", schedule=schedule)
    begin = time.monotonic()
    with pytest.raises(Exception) as caught:
        engine.train_batch(iter(batches(MICRO)))
    return type(caught.value).__name__, str(caught.value), time.monotonic() - begin


@pytest.mark.parametrize(("place", "schedule"), [(1, "1f1b"), (4, "zb-h1"), (6, "interleaved")])
def test_a_failing_stage_stops_all_within_seconds(pool, place, schedule):
    found = pool(3).run(failing, place, schedule)
    names = [name for name, _, _ in found]
    assert sorted(names) == ["CommunicationError", "CommunicationError", "ValueError"]
    assert all(seconds < 5 for _, _, seconds in found)
    assert all("failed before it sent" in text for name, text, _ in found if name == "CommunicationError")


def ends_early(rank: int, world: int) -> str:
    engine = engine_of(world, 1, specs(blocks=3), config())
    with pytest.raises((UsageError, CommunicationError)) as caught:
        engine.train_batch(iter(batches(MICRO - 1)))
    return str(caught.value)


def test_an_iterator_that_ends_early_is_an_error_on_every_rank(pool):
    first, middle, last = pool(3).run(ends_early)
    for text in (first, last):
        assert "expected 4 micro-batches, found 3" in text
    assert "failed" in middle


def no_scalar(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits


def bad_loss(rank: int, world: int) -> str:
    engine = engine_of(world, 1, specs(blocks=3), config(), loss_fn=no_scalar)
    with pytest.raises((UsageError, CommunicationError)) as caught:
        engine.train_batch(iter(batches(MICRO)))
    return str(caught.value)


def test_a_loss_that_is_no_scalar_says_so(pool):
    texts = pool(2).run(bad_loss)
    assert "loss function" in texts[1]
    assert "one element" in texts[1]
    assert f"[2, {SEQ}, {VOCAB}]" in texts[1].replace("torch.Size", "").replace("(", "[").replace(")", "]")


def misuse(rank: int, world: int) -> None:
    engine = engine_of(2, 1, specs(blocks=3), config())
    for call in (lambda: engine(1), lambda: engine.backward(1), engine.step):
        with pytest.raises(UsageError, match="train_batch"):
            call()
    with pytest.raises(UsageError, match="to_sequential"):
        engine.module(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UsageError, match="does not fit"):
        engine.set_schedule("0F0,0B0\n1F0,1B0\n")
    with pytest.raises(ConfigError, match=r"'zbv'.*schedule='zbv'"):
        engine_of(2, 1, specs(blocks=3), config(pipeline={"schedule": "zbv"}))
    with pytest.raises(ConfigError, match="num_chunks"):
        engine_of(2, 1, specs(blocks=3), config(pipeline={"num_chunks": 3}))
    with pytest.raises(ConfigError, match="4 stages"):
        PipelineModule(specs(blocks=1), num_stages=2, schedule="interleaved")
    with pytest.raises(ConfigError, match="num_stages does not divide"):
        PipelineModule(specs(blocks=3), num_stages=3)
    with pytest.raises(ConfigError, match="disagree"):
        PipelineModule(specs(blocks=3), num_stages=1, topology=PipeDataParallelTopology(2, 1))
    with pytest.raises(ConfigError, match="does not cover the world"):
        PipelineModule(specs(blocks=3), topology=ProcessTopology(["pipe"], [4]))
    with pytest.raises(ConfigError, match="sample_input"):
        PipelineModule(specs(blocks=3), num_stages=2, partition_method="profile")
    with pytest.raises(UsageError, match="layer 1 cannot be run"):
        PipelineModule([LayerSpec(Block), "no layer"], num_stages=2, partition_method="uniform")


def test_mistakes_name_the_way_out(pool):
    pool(2).run(misuse)


def given_and_measured(rank: int, world: int) -> tuple[tuple[int, ...], int]:
    given = [
        nn.Linear(8, 8),
        nn.BatchNorm1d(8),
        *(nn.Linear(8, 8) for _ in range(3)),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8, 256)),
    ]
    before = {name: value.clone() for name, value in nn.Sequential(*given).state_dict().items()}
    module = PipelineModule(
        given, num_stages=2, schedule="zbv", partition_method="profile", sample_input=torch.randn(4, 8) + 3
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    return module.bounds, len(module.state_dict())


def test_measuring_layers_leaves_them_as_they_were(pool):
    (bounds, first), (other, second) = pool(2).run(given_and_measured)
    assert bounds == other
    assert len(bounds) == 5
    assert first + second == 2 * 4 + 5 + 4  # of Linear, BatchNorm and spectral_norm, each on one rank


def own_schedule(rank: int, world: int) -> None:
    """The user's own plan: 1F1B written down, and a config that chooses among equal cuts."""
    layers = specs(blocks=3)
    _, losses = reference(layers, steps=1)
    engine = engine_of(2, 1, layers, config())
    engine.set_schedule("0F0,0F1,0B0,0F2,0B1,0F3,0B2,0B3\n1F0,1B0,1F1,1I1,1W1,1F2,1B2,1F3,1B3\n")
    assert engine.train_batch(iter(data_of(0))).item() == losses[0]
    engine = engine_of(2, 1, layers, config(pipeline={"schedule": "zb-h1"}))
    assert engine.schedule.name == "zb-h1"
    assert engine.train_batch(iter(data_of(0))).item() == losses[0]


def test_a_schedule_of_the_users_own(pool):
    pool(2).run(own_schedule)


def timeline(rank: int, world: int, folder: str) -> None:
    engine = engine_of(2, 1, specs(blocks=3), config())
    engine.train_batch(iter(batches(MICRO)))
    events = engine.pipeline_timeline(f"{folder}/run.json")
    engine.pipeline_timeline(f"{folder}/run.png")
    assert len(events) == 2 * 2 * MICRO
    assert min(e.start for e in events) >= -1e-3
    for e in events:  # plan and reality: what is needed ends before what needs it begins
        assert e.end >= e.start


def test_a_real_step_is_drawn(pool, tmp_path):
    pool(2).run(timeline, str(tmp_path))
    rows = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    assert sum(row["ph"] == "X" for row in rows) == 2 * 2 * MICRO
    assert (tmp_path / "run.png").stat().st_size > 1000


def sequential(rank: int, world: int, tied: bool, schedule: str) -> None:
    layers = specs(blocks=4, tied=tied)
    engine = engine_of(2, 1, layers, config(), schedule=schedule)
    for step in range(2):
        engine.train_batch(iter(data_of(step)))
    whole = engine.module.to_sequential()
    data = batches(2)
    expected = engine.eval_batch(iter(data), num_micro_batches=2)
    losses = [loss_of(whole(x), y) for x, y in data]
    assert torch.equal(torch.stack(losses).mean(), expected)
    names = [name for name, _ in whole.named_parameters()]
    assert len(names) == len(set(names))
    if tied:
        assert "0.weight" in names
        assert not any(name.startswith("5.") for name in names)
    again = PipelineModule.from_sequential(whole, num_stages=2, loss_fn=loss_of, partition_method="uniform")
    assert bool(again.ties) == tied
    second = zeropipe.initialize(model=again, config=config())[0]
    assert torch.equal(second.eval_batch(iter(data), num_micro_batches=2), expected)
    second.train_batch(iter(batches(MICRO)))


@pytest.mark.parametrize(("tied", "schedule"), [(False, "1f1b"), (True, "1f1b"), (True, "zbv")])
def test_to_sequential_and_back(pool, tied, schedule):
    pool(2).run(sequential, tied, schedule)


def measured(rank: int, world: int, method: str) -> tuple[int, ...]:
    sample = torch.zeros(2, SEQ, dtype=torch.int64)
    return PipelineModule(specs(blocks=6), num_stages=2, partition_method=method, sample_input=sample).bounds


@pytest.mark.parametrize("method", ["memory", "profile"])
def test_measured_cuts_agree_on_all_ranks(pool, method):
    first, second = pool(2).run(measured, method)
    assert first == second
    assert (first[0], first[-1]) == (0, 8)
    assert 0 < first[1] < 8
