"""What stage 3 sends and holds: exact lists, bytes against the formulas, peaks against the budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.launch import ROOT, python
from tests.helpers.zero3 import Block, Stack, engine_of, gathered, whole, x_batch
from zeropipe.comm.record import Event, inject, record
from zeropipe.runtime.zero.gather.fetch_plan import show_plan
from zeropipe.runtime.zero.gather.shards import shards_of

NAMES = ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias")
BYTES = {"norm.weight": 64, "norm.bias": 64, "up.weight": 2048, "up.bias": 128, "down.weight": 2048}
BYTES |= {"down.bias": 64, "head.weight": 1024}
TOTAL = 2 * sum(BYTES[name] for name in NAMES) + BYTES["head.weight"]  # bytes of all parameters
PADDING = 0.005  # share of a count that alignment may add; the tensors here are small


def gathers(*units: str) -> list[tuple[str, str, int]]:
    """``b0.norm`` -> the gathers of that unit's parameters."""
    found = []
    for unit in units:
        number, _, part = unit.rpartition(".")
        for name in (n for n in BYTES if n.startswith(part)):
            found.append(("all_gather", f"{number}.{name}".lstrip("."), BYTES[name]))
    return found


FORWARD = gathers(*(f"blocks.{i}.{part}" for i in (0, 1) for part in ("norm", "up", "down")), "head")
BACKWARD = gathers(*(f"blocks.{i}.{part}" for i in (1, 0) for part in ("down", "up", "norm")))


def one_message(first: str, last: str, count: int, size: int) -> tuple[str, str, int]:
    return ("all_gather", f"{first} to {last} ({count} parameters)", size)


# With a prefetch of 600 elements, of which small parameters fill messages.
FORWARD_AHEAD = [
    one_message("blocks.0.norm.weight", "blocks.0.norm.bias", 2, 128),
    *gathers("blocks.0.up", "blocks.0.down")[:3],
    one_message("blocks.0.down.bias", "blocks.1.norm.bias", 3, 192),
    *gathers("blocks.1.up", "blocks.1.down", "head"),
]
BACKWARD_AHEAD = [
    *gathers("blocks.1.up")[:1],
    one_message("blocks.1.up.bias", "blocks.1.norm.bias", 3, 256),
    *gathers("blocks.0.down", "blocks.0.up")[:3],
    one_message("blocks.0.up.bias", "blocks.0.norm.bias", 3, 256),
]


def sent(events: list[Event]) -> list[tuple[str, str, int]]:
    return [(event.op, event.label, event.bytes) for event in events]


def three_steps(rank: int, world: int, zero: dict[str, Any]) -> tuple[list[Any], str]:
    engine = engine_of(Stack(2), 3, world, zero_optimization=zero)
    steps = []
    for step in range(3):
        with record() as events:
            engine.backward(engine(x_batch(step, rank)).square().mean())
            engine.step()
        steps.append(sent(events))
    return steps, show_plan(engine._sharded.coordinator.fetch_plan)


def meeting(what: str) -> tuple[str, str, int]:
    return ("meet", what, 0)


END = [
    meeting("end of backward"),
    meeting("step"),
    meeting("gradients of a step"),
    ("all_reduce", "gradient norm", 24),
]


def test_everything_that_a_step_sends_in_order(pool):
    for steps, shown in pool(2).run(three_steps, {"stage3_prefetch_bucket_size": 0}):
        reduction = [("reduce_to_owners", "gradients", TOTAL)]
        begin = [meeting("forward of Stack"), *FORWARD, meeting("backward")]
        assert steps[0] == [*begin, *gathers("head"), *BACKWARD, *reduction, *END]
        # From then on the last unit of forward, which is the first of backward, stays.
        assert steps[1] == steps[2] == [*begin, *BACKWARD, *reduction, *END]
        assert shown == (
            "F1 fetch 1 | F2 fetch 2 | F3 fetch 3 | F4 fetch 4 | F5 fetch 5 | F6 fetch 6 | "
            "F7 fetch 7 keep | B7 | B6 fetch 6 | B5 fetch 5 | B4 fetch 4 | B3 fetch 3 | B2 fetch 2 | B1 fetch 1"
        )


def test_with_a_prefetch_small_parameters_travel_together_and_what_fits_is_sent_once(pool):
    for steps, shown in pool(2).run(three_steps, {"stage3_prefetch_bucket_size": 600}):
        sent = [event for event in steps[2] if event[0] in ("all_gather", "meet")]
        # Head and the last layer of a block stay, in place of a prefetch of them for backward.
        begin = [meeting("forward of Stack"), *FORWARD_AHEAD, meeting("backward")]
        assert sent[:-3] == [*begin, *BACKWARD_AHEAD]
        assert shown == (
            "F1 fetch 1 2 | F2 fetch 3 4 | F3 fetch 5 | F4 | F5 fetch 6 | F6 fetch 7 keep | F7 keep | "
            "B7 | B6 fetch 5 4 | B5 fetch 3 | B4 | B3 fetch 2 1 | B2 | B1"
        )


def test_small_buckets_are_reduced_in_the_order_of_backward(pool):
    zero = {"stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1}
    for steps, _ in pool(2).run(three_steps, zero):
        sizes = [size for op, _, size in steps[2] if op == "reduce_to_owners"]
        backward = ["head.weight", *[n for _ in (1, 0) for n in reversed(NAMES)]]
        assert sorted(sizes) == sorted(BYTES[name] for name in backward)
        assert sum(sizes) == TOTAL
        # Before the last unit of backward is gathered, all but the last two units' gradients are on their way.
        last = max(
            at for at, event in enumerate(steps[2]) if event[:2] == ("all_gather", "blocks.0.norm.weight")
        )
        assert sum(e[2] for e in steps[2][:last] if e[0] == "reduce_to_owners") >= TOTAL - 2048 - 128 - 128


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_traffic_is_three_times_the_parameters(pool, dtype):
    for moved, parameters in pool(2).run(traffic, dtype, {"stage3_prefetch_bucket_size": 0}):
        assert moved <= 3 * parameters
        assert moved >= 3 * parameters - 1024  # one unit is kept from forward to backward


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_traffic_is_twice_the_parameters_where_all_would_be_gathered_again_at_once(pool, dtype):
    for moved, parameters in pool(2).run(traffic, dtype, {}):
        assert moved == 2 * parameters


def traffic(rank: int, world: int, dtype: str, zero: dict[str, Any]) -> tuple[int, int]:
    extra: dict[str, Any] = {} if dtype == "fp32" else {"bf16": {"enabled": True}}
    engine = engine_of(Stack(), 3, world, zero_optimization=zero, **extra)
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    for step in range(3):
        with record() as events:
            engine.backward(engine(x_batch(step, rank).to(kind)).float().square().mean())
            engine.step()
    moved = sum(e.bytes for e in events if e.op in ("all_gather", "reduce_to_owners"))
    size = 4 if dtype == "fp32" else 2
    return moved, sum(p.ds_numel for p in engine.module.parameters()) * size


class Checkpointed(Stack):
    reentrant = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("plain", [False, True], ids=["engine.backward", "loss.backward"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_traffic_with_checkpointing_is_at_most_four_times_the_parameters(pool, reentrant, plain):
    for moved, parameters in pool(2).run(checkpointed, reentrant, plain):
        assert moved <= 4 * parameters * (1 + PADDING)


def checkpointed(rank: int, world: int, reentrant: bool, plain: bool) -> tuple[int, int]:
    model = Checkpointed()
    model.reentrant = reentrant
    engine = engine_of(model, 3, world)
    for step in range(3):
        with record() as events:
            loss = engine(x_batch(step, rank)).square().mean()
            loss.backward() if plain else engine.backward(loss)
            engine.step()
    moved = sum(e.bytes for e in events if e.op in ("all_gather", "reduce_to_owners"))
    return moved, 4 * sum(p.ds_numel for p in engine.module.parameters())


class Deep(nn.Module):
    """Equal layers: a unit has 64 x 64 + 64 elements."""

    UNIT = 64 * 64 + 64

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def peak(rank: int, world: int, zero: dict[str, Any]) -> int:
    """The most elements gathered at any gather of the third step."""
    engine = engine_of(Deep(), 3, world, zero_optimization=zero)
    seen = [0]

    def look(event: Event) -> None:
        live = sum(shards_of(p).full.untyped_storage().nbytes() for p in engine.module.parameters())
        seen.append(live // 4)

    for step in range(3):
        loss = engine(x_batch(step, rank, width=64)).square().mean()
        with inject(look):
            engine.backward(loss)
            engine.step()
            with torch.no_grad():
                engine(x_batch(step, rank, width=64))
    assert gathered(engine.module) == [] or zero.get("stage3_prefetch_bucket_size")
    return max(seen)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_gathered_at_one_time_are_the_unit_that_runs_and_the_prefetch(pool, ahead):
    zero = {"stage3_prefetch_bucket_size": ahead * Deep.UNIT}
    for most in pool(2).run(peak, zero):
        assert most == (1 + ahead) * Deep.UNIT


def test_live_parameters_are_limited(pool):
    zero = {"stage3_prefetch_bucket_size": 10**9, "stage3_max_live_parameters": 2 * Deep.UNIT}
    for most in pool(2).run(peak, zero):
        assert most == 2 * Deep.UNIT


def test_by_default_little_more_than_a_unit_is_ahead(pool):
    for most in pool(2).run(peak, {"stage3_max_live_parameters": 3 * Deep.UNIT}):
        assert most <= 3 * Deep.UNIT


@pytest.mark.parametrize(("dtype", "per_element"), [("fp32", 16), ("bf16", 14)])
@pytest.mark.parametrize("world", [2, 3])
def test_live_state_between_backward_and_step(pool, world, dtype, per_element):
    for held, numel in pool(world).run(state_bytes, dtype):
        assert per_element * numel / world <= held <= per_element * numel / world * (1 + PADDING)


class Wide(Deep):
    """Larger layers, so that what alignment adds is within PADDING."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(24))


def state_bytes(rank: int, world: int, dtype: str) -> tuple[int, int]:
    extra = {} if dtype == "fp32" else {"bf16": {"enabled": True}}
    engine = engine_of(Wide(), 3, world, **extra)
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    for step in range(2):
        loss = engine(x_batch(step, rank, width=64).to(kind)).float().square().mean()
        engine.backward(loss)
        if step == 0:
            engine.step()
    optimizer = engine.optimizer
    tensors = [p.master for p in optimizer.partitions]
    tensors += [store.shard for store in optimizer.reducer.stores]
    tensors += [g for store in optimizer.reducer.stores for g in store.held]
    tensors += [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]
    tensors += [p.grad for p in engine.module.parameters() if p.grad is not None]
    tensors += [shards_of(p).full for p in engine.module.parameters()]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()), sum(p.ds_numel for p in engine.module.parameters())


def test_a_module_kept_for_its_next_use_is_gathered_once(pool):
    for counts in pool(2).run(repeated):
        assert counts == {"table.weight": 1, "block.up.weight": 1}


class Repeats(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.block = nn.Linear(16, 16), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table(self.block(self.block(self.table(x))))


def repeated(rank: int, world: int) -> dict[str, int]:
    engine = engine_of(Repeats(), 3, world, zero_optimization={"stage3_max_reuse_distance": 10**6})
    engine.eval()
    for step in range(3):
        with record() as events, torch.no_grad():
            engine(x_batch(step, rank))
    return {
        name: sum(e.label == name and e.op == "all_gather" for e in events)
        for name in ("table.weight", "block.up.weight")
    }


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randint(0, 256, (64, 32), dtype=torch.uint8), requires_grad=False)
        self.train_me = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.train_me(x[:, :1] * self.packed.float()[:4] / 255)


def packed_bytes(rank: int, world: int) -> tuple[set[int], torch.Tensor]:
    torch.manual_seed(0)
    engine = engine_of(Quantized(), 3, world)
    with record() as events:
        engine.backward(engine(x_batch(0, rank)).square().mean())
        engine.step()
    sizes = {e.bytes for e in events if e.label == "packed"}
    return sizes, whole(engine.module)["packed"]


def test_quantized_weights_travel_packed(pool):
    torch.manual_seed(0)
    original = Quantized().packed.data
    for sizes, value in pool(2).run(packed_bytes):
        assert sizes == {64 * 32}
        assert torch.equal(value, original)


# ---- gradients launch in the order in which backward completes them ----


class Backwards(nn.Module):
    """Registered in the opposite order of execution: the first bucket of the default order is the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in reversed(self.layers):
            x = torch.tanh(layer(x))
        return x


def most_held(rank: int, world: int, stage: int) -> list[int]:
    """The most whole gradients that waited for their bucket, per step."""
    engine = engine_of(Backwards(), stage, world, zero_optimization={"reduce_bucket_size": 1})
    (store,) = engine.optimizer.reducer.stores
    most = []
    for step in range(3):
        counts = [0]
        with inject(lambda event, counts=counts: counts.append(len(list(store.held)))):
            engine.backward(engine(x_batch(step, rank)).square().mean())
        most.append(max(counts))
        engine.step()
    return most


@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_wait_only_in_the_first_backward(pool, stage):
    for first, second, third in pool(2).run(most_held, stage):
        assert first >= 10
        assert second <= 2
        assert third <= 2


SCRIPT = """
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
import zeropipe, zeropipe.runtime.engine.build
from tests.helpers.data import token_batch
from tests.helpers.models import NastyModel, build
from tests.helpers.zero3 import settings
from zeropipe.comm.record import record

WORLD, RANK = 1024, 517
dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
zeropipe.runtime.engine.build.agree = lambda items, group: None  # the fake group invents what other ranks said
for extra in ({}, {"bf16": {"enabled": True}}):
    model = build(NastyModel)
    engine, optimizer, *_ = zeropipe.initialize(model=model, config=settings(3, WORLD, gas=2, **extra))
    for step in range(3):
        for micro in range(2):
            with record() as events:
                engine.backward(engine(*token_batch(0, RANK, micro), wake_dead=step > 1))
            engine.step()
    assert engine.global_steps == 3
    assert {e.group_size for e in events} == {WORLD}
    (partition,) = optimizer.partitions
    assert partition.values.local_layout.numel == sum(-(-p.ds_numel // WORLD) for p in partition.params)
    engine.destroy()
print("walked")
"""


@pytest.mark.slow
def test_a_middle_rank_of_1024_walks_stage_3(tmp_path):
    script = tmp_path / "walk.py"
    script.write_text(SCRIPT)
    done = python(script, env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "walked\n"
