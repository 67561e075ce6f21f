"""Every schedule, run by real ranks without an engine, gives the gradients of plain accumulation, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dist.pipe_models import BASE_SEED, batches, loss_of, plain, specs
from zeropipe.comm.record import record
from zeropipe.runtime.pipe.batch import Batch
from zeropipe.runtime.pipe.executor import Executor, Stage
from zeropipe.runtime.pipe.instructions import Instruction, Op, queues, with_sharding, with_transfers
from zeropipe.runtime.pipe.module import PipelineModule
from zeropipe.runtime.pipe.p2p import Mailbox
from zeropipe.runtime.pipe.schedule import KINDS, find_kind, make_schedule

TRAINING = [kind.name for kind in KINDS if kind.trains]


def build(world: int, schedule: str, chunks: int | None, layers: list[Any], **kwargs: Any) -> PipelineModule:
    return PipelineModule(
        layers,
        num_stages=world,
        schedule=schedule,
        num_chunks=chunks,
        seed_layers=True,
        base_seed=BASE_SEED,
        **kwargs,
    )


def execute(module: PipelineModule, name: str, data: list[Any]) -> Batch:
    """Run ``data``; gradients stay in ``.grad``."""
    schedule = make_schedule(name, module.num_stages, len(data), module.num_chunks)
    tied = {s for plan in module.tie_plans() if plan.crosses for s in plan.stages}
    schedule = with_transfers(with_sharding(schedule, tied_stages=tied))
    stages = {s: Stage(s, lambda v, s=s: module.run_stage(s, v)) for s in module.stages}
    mailbox = Mailbox(module.grid.links, torch.device("cpu"), module.dynamic_shape)
    reduced: list[Instruction] = []
    table = {
        Op.REDUCE_TIED: lambda step: module.allreduce_tied_weight_gradients(),
        Op.REDUCE_GRAD: reduced.append,
    }
    batch = batch_of(data)
    assert Executor(schedule, module.grid.stage_id, stages, mailbox, table).run(batch) is None
    assert all(stage.alive == 0 for stage in stages.values())
    # Once for all stages of the rank, when the last of them is complete; what the table lacks does nothing.
    assert reduced == [s for s in schedule.ranks[module.grid.stage_id] if s.op is Op.REDUCE_GRAD][-1:]
    return batch


def batch_of(data: list[Any]) -> Batch:
    return Batch(len(data), lambda: iter(data), torch.device("cpu"), loss_of, factor=1 / len(data))


def reference(layers: list[Any], data: list[Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Gradients by ``LAYER.NAME`` and the losses of plain accumulation."""
    modules, forward = plain(layers)
    losses = []
    for tokens, labels in data:
        loss = loss_of(forward(tokens), labels)
        losses.append(loss.item())
        (loss / len(data)).backward()
    return {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}, losses


def check(
    module: PipelineModule, batch: Batch, expected: dict[str, torch.Tensor], losses: list[float]
) -> None:
    for index in module.local_layers():
        layer = module.layer_module(index)
        for name, param in layer.named_parameters():
            assert torch.equal(param.grad, expected[f"{index}.{name}"]), f"layer {index} {name}"
    if batch.values:
        assert [value.item() for value in batch.values] == losses


def every_schedule(rank: int, world: int) -> None:
    data = batches(5)
    layers = specs(blocks=2 * world + 1)
    expected, losses = reference(layers, data)
    for name in TRAINING:
        kind = find_kind(name)
        for chunks in {kind.default_chunks, max(kind.chunks[0], min(2, kind.chunks[1]))}:
            module = build(world, name, chunks, layers)
            check(module, execute(module, name, data), expected, losses)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_schedule_equals_accumulation_bitwise(pool, world):
    pool(world).run(every_schedule, timeout=120)


def recomputed(rank: int, world: int) -> None:
    data = batches(3)
    layers = specs(blocks=3)
    expected, losses = reference(layers, data)
    for name in ("1f1b", "zbv"):
        module = build(world, name, None, layers, activation_checkpoint_interval=1)
        check(module, execute(module, name, data), expected, losses)


def test_recomputation_changes_no_bit(pool):
    pool(2).run(recomputed)


def messages(rank: int, world: int) -> tuple[int, int]:
    module = build(world, "1f1b", None, specs(blocks=3))
    data = batches(4)
    schedule = with_transfers(make_schedule("1f1b", world, len(data)))
    stages = {s: Stage(s, lambda v, s=s: module.run_stage(s, v)) for s in module.stages}
    mailbox = Mailbox(module.grid.links, torch.device("cpu"), False)
    executor = Executor(schedule, rank, stages, mailbox, {})
    assert executor.run(batch_of(data)) is None  # tells the forms
    with record() as events:
        assert executor.run(batch_of(data)) is None
    sends = [event for event in events if event.op == "send"]
    own = [m for (source, _), q in queues(schedule).items() if source == rank for m in q]
    assert len(sends) == len(own)
    return len(sends), sum(event.bytes for event in sends)


def test_one_message_for_each_activation_and_nothing_else(pool):
    counts = pool(2).run(messages)
    payload = 2 * 5 * 8 * 4  # batch x seq x width, fp32
    assert counts == [(4, 4 * (64 + payload))] * 2
