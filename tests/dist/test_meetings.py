"""Host and device meet at most once in a step, and not at all where the host needs no number: counted on CPUs, with
every tensor taken for a device's (``HOST.afar``) on the path that NCCL takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.counts.counting import Counting
from torch import nn

import zeropipe
from tests.dist.pipe_models import batches, loss_of, specs
from tests.helpers.meetings import as_on_device, either, meetings
from tests.helpers.models import build
from tests.helpers.pool import Pools
from tests.helpers.referee import assert_bitwise
from tests.helpers.train import config
from tests.helpers.zero3 import Stack, engine_of, whole, x_batch
from zeropipe.pipe import PipelineModule
from zeropipe.tensor.host import HOST

STEPS = 3
FREE = {"bf16": {"enabled": True, "check_grad_overflow": False}}
CHECKED = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
CLIP = {"gradient_clipping": 0.1}
PERSISTENT = {"zero_optimization": {"stage3_param_persistence_threshold": 10**9}}

# Config, meetings in a step.
CASES: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    (CLIP, 0),
    (FREE, 0),
    ({**FREE, **CLIP}, 0),
    ({**FREE, "train_batch_size": 4, "gradient_accumulation_steps": 2}, 0),
    ({**FREE, **CLIP, **PERSISTENT}, 0),
    # Whether the step is taken at all hangs on the gradients.
    (CHECKED, 1),
    ({**FP16, **CLIP, **PERSISTENT}, 1),
]
OPTIMIZERS = ["Lamb", "Muon", "Lion", "SGD", "Adagrad", "Adam"]


class Odd(nn.Module):
    """Layers, and parameters that only some ranks, some steps or nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Stack(2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.sometimes, self.somewhere, self.never = (nn.Linear(16, 16) for _ in range(3))
        self.on: tuple[str, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.on:
            x = x + getattr(self, name)(x)
        return self.stack(x) * self.scale


def step(engine: Any, at: int, rank: int) -> None:
    for _ in range(engine.gradient_accumulation_steps()):
        # What the model computes in is the caller's business, and no part of what is counted.
        x = x_batch(at, rank).to(next(engine.module.parameters()).dtype)
        engine.backward(engine(x).float().square().mean())
        engine.step()


def met(rank: int, world: int, stage: int, cases: list[tuple[dict[str, Any], int]]) -> list[list[str]]:
    """By case: who made host and device meet in the last of a few steps."""
    found = []
    for extra, _ in cases:
        engine = engine_of(build(Stack, 2), stage, world, **extra)
        with HOST.afar():
            for at in range(STEPS):
                step(engine, at, rank)
            with as_on_device(engine) as counts:
                step(engine, STEPS, rank)
        found.append(meetings(counts))
        engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_meets_the_host_once_where_it_may_be_skipped_and_never_else(
    native_pool: Pools, stage: int
) -> None:
    cases = [
        (c if stage == 3 else {k: v for k, v in c.items() if k != "zero_optimization"}, n) for c, n in CASES
    ]
    for of_rank in native_pool(2).run(met, stage, cases):
        assert [len(who) for who in of_rank] == [most for _, most in cases], repr(of_rank)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_no_optimizer_meets_the_host(native_pool: Pools, stage: int) -> None:
    cases = [
        ({"optimizer_section": {"type": kind, "params": {"lr": 1e-3}}, **CLIP}, 0) for kind in OPTIMIZERS
    ]
    for of_rank in native_pool(2).run(met, stage, cases):
        assert of_rank == [[]] * len(OPTIMIZERS)


def unused(
    rank: int, world: int, stage: int, afar: bool
) -> tuple[list[list[str]], dict[str, torch.Tensor], list[float]]:
    """Meetings by step, the weights and the norms of a model that does not use all of itself."""
    engine = engine_of(build(Odd), stage, world, **CLIP)
    found, norms = [], []
    for at in range(5):
        engine.module.on = (
            *(("sometimes",) if at in (1, 2, 4) else ()),
            *(("somewhere",) if rank == 0 and stage < 3 else ()),  # at stage 3 ranks run the same modules
        )
        with either(afar), as_on_device(engine) if afar else either(False) as counts:
            step(engine, at, rank)
        found.append(meetings(counts) if counts else [])
        norms.append(engine.get_global_grad_norm())
    values = whole(engine.module)
    engine.destroy()
    return found, values, norms


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("world", [1, 3])
def test_unused_parameters_cost_one_meeting_and_are_stepped_as_on_a_cpu(
    native_pool: Pools, stage: int, world: int
) -> None:
    """It was one for each parameter of each partition, and one more for every run of elements that was left out."""
    here = native_pool(world).run(unused, stage, False)
    for (found, values, norms), (_, known, known_norms) in zip(
        native_pool(world).run(unused, stage, True), here, strict=True
    ):
        # A group of one knows by itself who used what.
        assert [len(who) for who in found] == [0 if world == 1 else 1] * 5, found
        assert norms == pytest.approx(known_norms, rel=1e-6)
        assert_bitwise(values, known)


def both_ways(rank: int, world: int, stage: int, extra: dict[str, Any]) -> list[Any]:
    """Weights and norms, as on a CPU and as on a device."""
    made = []
    for afar in (False, True):
        engine = engine_of(build(Stack, 2), stage, world, **extra)
        norms = []
        for at in range(4):
            with either(afar):
                step(engine, at, rank)
                norms.append(engine.get_global_grad_norm())
            if at == 1:  # an edit between steps, of one element and of a whole
                with torch.no_grad():
                    for param in engine.module.parameters():
                        if param.numel() and stage < 3:
                            param.view(-1)[0] = 0.25
                    if stage == 3 and extra.get("zero_optimization"):
                        engine.module.blocks[0].norm.weight.mul_(1.5)
                        engine.module.head.weight.view(-1)[3] = -0.0
        made.append((whole(engine.module), norms))
        engine.destroy()
    return made


EITHER = [(stage, extra) for stage in range(4) for extra in (CLIP, {**CHECKED, **CLIP})]
EITHER += [(3, {**FREE, **PERSISTENT}), (3, {**PERSISTENT, **CLIP})]


@pytest.mark.parametrize(("stage", "extra"), EITHER, ids=str)
def test_the_ways_of_a_device_give_the_bits_of_the_ways_of_a_cpu(
    native_pool: Pools, stage: int, extra: dict[str, Any]
) -> None:
    for (values, norms), (afar, afar_norms) in native_pool(2).run(both_ways, stage, extra):
        assert_bitwise(afar, values)
        assert afar_norms == pytest.approx(norms, rel=1e-6)


def overflowing(rank: int, world: int, stage: int) -> list[Any]:
    """What is known of steps of which the second overflows on rank 1 alone."""
    engine = engine_of(build(Stack, 2), stage, world, **FP16)
    seen = []
    with HOST.afar():
        for at in range(3):
            x = x_batch(at, rank).half()
            loss = engine(x).float().square().mean()
            engine.backward(loss * (float("inf") if (at, rank) == (1, 1) else 1.0))
            engine.step()
            bad = engine.optimizer.last_nonfinite
            seen.append((engine.optimizer.overflow, engine.skipped_steps, bad and (bad.rank, bad.micro_step)))
    text = str(engine.optimizer.last_nonfinite)
    engine.destroy()
    return [*seen, text]


@pytest.mark.parametrize("stage", [0, 3])
def test_an_overflow_is_seen_without_a_look_at_each_gradient(native_pool: Pools, stage: int) -> None:
    """A look was six kernels a parameter; now it is one, and counts of inf and NaN are not taken on a device."""
    for *seen, text in native_pool(2).run(overflowing, stage):
        assert seen == [(False, 0, None), (True, 1, (1, 1)), (False, 1, (1, 1))]
        assert "has inf or NaN in" in text and "rank 1" in text


def frozen(rank: int, world: int, stage: int) -> tuple[list[list[str]], dict[str, torch.Tensor]]:
    """A model with a frozen part, which is set free in the middle."""
    model = build(Odd)
    model.on = ("sometimes",)
    for unwanted in (model.never, model.somewhere):
        unwanted.requires_grad_(False)
    model.sometimes.requires_grad_(False)
    engine = engine_of(model, stage, world)
    found = []
    for at in range(4):
        model.sometimes.requires_grad_(at >= 2)
        with as_on_device(engine) as counts:
            step(engine, at, rank)
        found.append(meetings(counts))
    values = whole(engine.module)
    engine.destroy()
    return found, values


@pytest.mark.parametrize("stage", [0, 2])
def test_a_frozen_part_costs_one_meeting_and_may_be_set_free(native_pool: Pools, stage: int) -> None:
    for found, values in native_pool(2).run(frozen, stage):
        # A second look at the sums, with what woke; what ranks then say to each other are the host's own objects, and
        # the order of new buckets is learned once.
        once = [
            [who for who in of_step if "native.py" not in who and "reducer.py" not in who]
            for of_step in found
        ]
        assert [len(who) for who in once] == [1, 1, 2, 1], found
        start = dict(build(Odd).named_parameters())
        assert not torch.equal(values["sometimes.weight"], start["sometimes.weight"])


def of_pipeline(rank: int, world: int, extra: dict[str, Any], stages: int) -> tuple[list[str], float]:
    """Who made host and device meet in one batch of a pipeline, and its loss."""
    module = PipelineModule(specs(3), num_stages=stages, loss_fn=loss_of, partition_method="uniform")
    settings = config(1, world // stages, gas=4, **extra)
    engine = zeropipe.initialize(model=module, config=settings)[0]
    with HOST.afar():
        for _ in range(2):
            engine.train_batch(iter(batches(4)))
        with Counting() as counts:
            loss = engine.train_batch(iter(batches(4)))
    value = loss.item()
    engine.destroy()
    return counts.where, value


@pytest.mark.parametrize(("extra", "most"), [(FREE, 1), (CHECKED, 2)], ids=["free", "checked"])
def test_a_batch_of_a_pipeline_reads_once_whether_all_came_through(
    native_pool: Pools, extra: dict[str, Any], most: int
) -> None:
    """It was once for each micro-batch's loss, and twice more."""
    found = native_pool(2).run(of_pipeline, extra, 2)
    assert [len(who) for who, _ in found] == [most] * 2, found
    assert found[0][1] == found[1][1]
