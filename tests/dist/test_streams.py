"""Streams without a GPU: a stand-in device writes down who uses what memory after which event (``stand_in.py``).

No engine has a pair of accesses that nothing orders, or memory that is given back before its last use; and where such
a fault is put into the code, it is found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import zeropipe
from tests.helpers.data import token_batch
from tests.helpers.models import NastyModel, build
from tests.helpers.pool import Pools
from tests.helpers.referee import assert_bitwise
from tests.helpers.stand_in import stand_in
from tests.helpers.zero3 import Stack, engine_of, whole, x_batch
from zeropipe.comm.collectives import reduce_run
from zeropipe.runtime.zero.gather.own_shard import Gather
from zeropipe.runtime.zero.gather.shards import Shards
from zeropipe.runtime.zero.hold import grads
from zeropipe.runtime.zero.hold.offload import Files
from zeropipe.runtime.zero.hold.window import Begun, Stored
from zeropipe.streams import STREAMS, Side, Streams
from zeropipe.streams.ring import Ring

OPTIMIZER, PARAMS = {"offload_optimizer": {"device": "cpu"}}, {"offload_param": {"device": "cpu"}}
FILES = {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}
SMALL = {"reduce_bucket_size": 600, "stage3_prefetch_bucket_size": 1500, "allgather_bucket_size": 512}
SOME_STAY = {"stage3_param_persistence_threshold": 100}
# What works beside the computation: shards into gathers, gradients on their way out, a backend's communicators.
PLACES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage1": (1, {}),
    "stage1-optimizer": (1, OPTIMIZER),
    "stage2": (2, {}),
    "stage2-optimizer": (2, OPTIMIZER),
    "stage3": (3, {}),
    "stage3-persistent": (3, SOME_STAY),
    "stage3-optimizer": (3, OPTIMIZER),
    "stage3-params": (3, PARAMS),
    "stage3-both": (3, OPTIMIZER | PARAMS),
    "stage3-both-persistent": (3, OPTIMIZER | PARAMS | SOME_STAY),
    "mics": (3, {"mics_shard_size": 1}),
    "mics-both": (3, OPTIMIZER | PARAMS | {"mics_shard_size": 1}),
}
Values = dict[str, torch.Tensor]


def stop(*_: object) -> None:
    raise InterruptedError


def train(rank: int, world: int, stage: int, zero: dict[str, Any], gas: int, bf16: bool) -> Values:
    dtype, extra = torch.float32, dict[str, Any](gas=gas, gradient_clipping=0.5)
    if bf16:
        dtype, extra["bf16"] = torch.bfloat16, {"enabled": True}
    engine = engine_of(build(Stack), stage, world, zero_optimization=SMALL | zero, **extra)
    for step in range(3):
        engine.module.order = (0, 1, 2) if step < 2 else (0, 1)
        with engine.module.blocks[1].register_forward_pre_hook(stop), pytest.raises(InterruptedError):
            engine(x_batch(step, rank).to(dtype))  # what was gathered ahead goes unused
        for micro in range(gas):
            engine.backward(engine(x_batch(step, rank, micro).to(dtype)).float().square().mean())
            engine.step()
        with torch.no_grad():  # gathers that no backward follows
            engine(x_batch(step, rank).to(dtype))
        head = engine.module.head.weight
        with zeropipe.zero.GatheredParameters(head, modifier_rank=0), torch.no_grad():
            head.mul_(0.5)
    values = whole(engine.module)
    engine.destroy()
    return values


def compared(rank: int, world: int, *args: Any) -> tuple[list[str], set[str]]:
    """The findings, and what worked. A device of its own changes no bit."""
    expected = train(rank, world, *args)
    with stand_in(native=world > 1) as device:
        values = train(rank, world, *args)
    assert_bitwise(values, expected)
    return list(device.findings), device.streams


@pytest.mark.parametrize(
    ("world", "gas", "bf16"),
    [
        (1, 1, False),
        (2, 2, True),
        pytest.param(2, 1, False, marks=pytest.mark.soak),
        pytest.param(1, 2, True, marks=pytest.mark.soak),
    ],
    ids=["1-fp32", "2-accumulated-bf16", "2-fp32", "1-accumulated-bf16"],
)
@pytest.mark.parametrize("place", PLACES)
def test_every_use_is_ordered(native_pool: Pools, world: int, place: str, gas: int, bf16: bool) -> None:
    stage, zero = PLACES[place]
    for findings, streams in native_pool(world).run(compared, stage, zero, gas, bf16):
        assert findings == []
        assert {"host", "compute"} <= streams
        assert "IN" in streams or (stage < 3 and not zero)
        assert "OUT" in streams or "offload_optimizer" not in zero
        assert any(name.startswith("backend") for name in streams) == (world > 1)


# Models and settings that are not kind: odd shapes and dtypes, layers that are used twice, late or never, files.
UNKIND: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
    "accumulated": (2, 2, OPTIMIZER, {"gas": 2}),
    "states come and go": (2, 3, {}, {"bf16": {"enabled": True}}),
    "fp16": (2, 3, OPTIMIZER | PARAMS, {"fp16": {"enabled": True, "initial_scale_power": 8}, "gas": 2}),
    "files": (2, 3, FILES, {"bf16": {"enabled": True}, "gas": 2}),
    "Lamb": (2, 3, OPTIMIZER, {"optimizer_section": {"type": "Lamb", "params": {"lr": 1e-3}}}),
    "two hops": (4, 3, {"mics_shard_size": 4, "mics_hierarchical_params_gather": True}, {}),
}


def train_nasty(rank: int, world: int, name: str, folder: str) -> Values:
    _, stage, zero, extra = UNKIND[name]
    if name == "files":
        zero = {key: {**place, "nvme_path": folder} for key, place in zero.items()}
    engine = engine_of(build(NastyModel), stage, world, zero_optimization=SMALL | zero, **extra)
    for step in range(3):
        for micro in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*token_batch(step, rank, micro), wake_dead=step == 1))
            engine.step()
        if name == "states come and go":
            engine.offload_states(pin_memory=step > 0)
            if step == 1:
                engine.reload_states(non_blocking=True)
    values = whole(engine.module)
    engine.destroy()
    return values


def compared_nasty(rank: int, world: int, name: str, folder: str) -> list[str]:
    expected, zeros = train_nasty(rank, world, name, folder), Files.zeros
    with (
        stand_in(native=world > 1) as device,
        patch.object(Files, "zeros", lambda *args: device.host_memory(zeros(*args))),
    ):
        values = train_nasty(rank, world, name, folder)
    assert_bitwise(values, expected)
    return list(device.findings)


@pytest.mark.parametrize("name", UNKIND)
def test_unkind_models_are_ordered_too(native_pool: Pools, tmp_path: Path, name: str) -> None:
    world = UNKIND[name][0]
    assert native_pool(world).run(compared_nasty, name, str(tmp_path)) == [[]] * world


# ---- faults ----

Plant = Callable[[], Any]
PLANTS: dict[str, tuple[Plant, str, int, bool, int, str]] = {}


def plant(
    place: str, found: str, gas: int = 1, bf16: bool = False, world: int = 1
) -> Callable[[Plant], Plant]:
    def keep(make: Plant) -> Plant:
        PLANTS[make.__name__] = make, place, gas, bf16, world, found
        return make

    return keep


@plant("stage3", "compute writes .*, then IN reads")
def a_gather_begins_before_the_step_is_over() -> Any:
    @contextmanager
    def beside(self: Streams, side: Side, after: object) -> Iterator[None]:
        with self._driver.on(self._sides[side]):
            yield

    return patch.object(Streams, "_beside", beside)


@plant("stage3", "IN writes .*, then compute reads")
def a_unit_computes_before_its_gather_has_arrived() -> Any:
    return patch.object(Streams, "wait", lambda self, moment: None)


@plant("stage3", "IN writes .*, then compute reads")
def the_end_of_a_gather_is_marked_before_its_copy() -> Any:
    begin = Gather.__init__

    def marked_early(self: Gather, members: Any, *how: Any) -> None:
        early = STREAMS.of(members[0].full.device).mark()
        begin(self, members, *how)
        self._filled = early

    return patch.object(Gather, "__init__", marked_early)


@plant("stage3", "given back while IN writes")
def a_gather_that_nobody_used_is_given_back_while_it_is_under_way() -> Any:
    release = Shards.release

    def at_once(self: Shards, leave: bool = False) -> None:
        if self._gather is not None:
            self.give_up(free=True)
        release(self, leave)

    return patch.object(Shards, "release", at_once)


@plant("stage3", "backend .* writes .*, then OUT reads", gas=2, world=2)
def a_reduction_is_stored_before_it_has_arrived() -> Any:
    def stored(self: Stored, streams: Streams, begun: Begun, then: Any) -> None:
        self._streams, self._begun = streams, begun
        with streams.beside(Side.OUT):
            for step in begun.work._steps:
                step()
            begun.work._steps.clear()
            begun.work.wait()
            then()
            self._moment = streams.mark()

    return patch.object(Stored, "__init__", stored)


@plant("stage3", "given back while (OUT|backend)", gas=2, world=2)
def the_memory_of_a_reduction_is_given_back_at_once() -> Any:
    store = Stored.__init__

    def forgets(self: Stored, streams: Streams, begun: Begun, then: Any) -> None:
        store(self, streams, Begun(begun.work, []), then)

    return patch.object(Stored, "__init__", forgets)


@plant("stage2", "OUT writes .*, then compute", gas=2, world=2)
def a_step_begins_before_gradients_are_stored() -> Any:
    return patch.object(Stored, "wait", lambda self: None)


@plant("stage3", "backend .*, then compute writes", world=2)
def what_a_collective_sends_is_written_while_it_travels() -> Any:
    def written(run: Any, *args: Any, **kwargs: Any) -> Any:
        work = reduce_run(run, *args, **kwargs)
        run.whole.zero_()
        return work

    return patch.object(grads, "reduce_run", written)


@plant("stage3-both", "OUT writes .*, then host reads")
def the_host_steps_before_gradients_have_arrived() -> Any:
    return patch.object(Streams, "host_turn", lambda self: None)


@plant("stage3-both", "(OUT writes .*, then host reads|host reads .*, then OUT writes)", gas=2)
def a_slot_is_emptied_before_it_has_arrived() -> Any:
    def free(self: Ring, slot: Any) -> None:
        slot.moment = None
        if slot.arrival is not None:
            slot.arrival.store()
            slot.arrival = None

    return patch.object(Ring, "_free", free)


@plant("stage3-optimizer", "IN reads .*, then host writes", bf16=True)
def a_slot_is_filled_again_while_it_travels() -> Any:
    def turn(self: Ring, nbytes: int) -> torch.Tensor:
        slot = self._slots[0]
        if slot.memory.numel() < nbytes:
            slot.memory = self._driver.pinned(nbytes)
        return slot.memory[:nbytes]

    return patch.object(Ring, "turn", turn)


@plant("stage1-optimizer", "IN writes .*, then compute reads")
def a_forward_begins_before_new_values_have_come() -> Any:
    def bring(self: Streams, target: torch.Tensor, source: torch.Tensor, done: Any = None) -> None:
        with self.beside(Side.IN):
            self.copy(target, source, done)

    return patch.object(Streams, "bring", bring)


@plant("stage2-optimizer", "backend .* writes .*, then OUT reads", world=2)
def an_average_leaves_for_the_host_before_it_is_made() -> Any:
    def stored(self: Stored, streams: Streams, begun: Begun, then: Any) -> None:
        self._streams, self._begun = streams, begun
        with streams.beside(Side.OUT):
            then()
            begun.work.wait()
            self._moment = streams.mark()

    return patch.object(Stored, "__init__", stored)


def faulty(rank: int, world: int, name: str) -> list[str]:
    make, place, gas, bf16, _, _ = PLANTS[name]
    with stand_in(native=world > 1) as device, make():
        train(rank, world, *PLACES[place], gas, bf16)
    return list(device.findings)


@pytest.mark.parametrize("name", PLANTS)
def test_a_fault_is_found(native_pool: Pools, name: str) -> None:
    *_, world, expected = PLANTS[name]
    findings = native_pool(world).run(faulty, name)[0]
    assert any(re.search(expected, finding) for finding in findings), findings
