"""Ranks of one host that fail at any moment, while the others read their memory: all are told, by name, and soon."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from datetime import timedelta
from itertools import count
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import zeropipe
from tests.helpers.data import gpt_batch
from tests.helpers.models import TinyGPT, build
from tests.helpers.pool import Pools
from tests.helpers.train import config
from zeropipe.comm import collectives as comm
from zeropipe.comm.agreement import meet
from zeropipe.comm.collectives import expose
from zeropipe.comm.group import new_group, world
from zeropipe.comm.host.choosing import choose_transport
from zeropipe.comm.host.one_sided import ONE_SIDED
from zeropipe.errors import CommunicationError, DesyncError

SOON = 5.0  # s in which every rank has its error; its group waits for 1 s, and this machine is busy
LATEST = 10.0  # s, of engines, whose groups wait for 2 s


ENDS = ["killed", "stopped", "raising", "slow"]
SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


def step_for_ever(rank: int, size: int, how: str, victim: int, delay: float, stage: int) -> str:
    """Trains until the victim fails; returns what the others are told, and after which time."""
    began = [float("inf")]

    def fail() -> None:
        began[0] = time.monotonic()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)

    g = new_group(list(reversed(range(size))), timedelta(seconds=1))  # in their order it would be the world
    assert g is not None
    choose_transport(g)
    shard, whole = torch.ones(30_000), torch.ones(30_000 * size)
    exposed = expose(30_000, torch.float32, g, 1) if stage else None
    if rank == victim:
        threading.Timer(delay, fail).start()
    try:
        while True:
            if rank == victim and began[0] < time.monotonic():
                if how == "raising":
                    raise KeyError("a fault")
                time.sleep(2.0)  # longer than the group waits
            works = [comm.all_gather(whole, shard, g, async_op=True, channel=1)]
            works.append(comm.reduce_scatter(shard, whole, g, op="avg", async_op=True))
            for work in works:
                work.wait()
            if exposed is not None:
                meet("forward", g, channel=1)
                exposed.talk.promise()
                rows = whole.view(size, -1).unbind()
                comm.read_exposed(rows, exposed.every, exposed.talk, label="shard", early=True)
                exposed.before_write()
                exposed.own.add_(1)
                comm.all_reduce(whole, g)
    except CommunicationError as error:
        return f"told: {error}"
    except KeyError:
        os._exit(3)


def fails(pool: Pools, seed: int) -> None:
    chance = random.Random(seed)
    size, how = chance.choice([2, 3, 4]), ENDS[seed % len(ENDS)]
    victim, delay, stage = chance.randrange(size), chance.uniform(0, 0.3), chance.randrange(2)
    kill = {victim: SOON} if how == "stopped" else {}
    outcomes = pool(size).run_faulty(step_for_ever, how, victim, delay, stage, kill=kill, timeout=2 * SOON)
    for outcome in outcomes:
        if outcome.rank != victim or how == "slow":
            assert outcome.kind == "result" and outcome.value.startswith("told: [rank "), (seed, how, outcome)
            assert outcome.seconds < SOON, (seed, how, outcome)


@pytest.mark.parametrize("seed", range(len(ENDS)))
def test_a_rank_that_fails_is_an_error_on_all_others(pool: Pools, seed: int) -> None:
    fails(pool, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
def test_a_rank_that_fails_at_any_moment_is_an_error_on_all_others(pool: Pools, seed: int) -> None:
    fails(pool, 1000 + seed)


# The same of engines.


def train_for_ever(rank: int, size: int, how: str, victim: int, delay: float, stage: int, folder: str) -> str:
    """What the others are told, and how many seconds after the fault."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=2))
    engine, *_ = zeropipe.initialize(model=build(TinyGPT), config=config(stage, size, gas=2))
    assert ONE_SIDED.within(world())
    comm.barrier(world())
    fails_at = time.monotonic() + delay
    if rank == victim and how in SIGNALS:
        threading.Timer(delay, os.kill, (os.getpid(), SIGNALS[how])).start()
    try:
        for number in count():
            for micro in range(2):
                engine.backward(engine(*gpt_batch(number, rank, micro)))
                if rank == victim and time.monotonic() > fails_at:
                    if how == "raising":
                        raise KeyError("a fault")
                    time.sleep(6.0)  # longer than the group waits
                engine.step()
    except (CommunicationError, DesyncError) as error:
        return f"{time.monotonic() - fails_at:.1f} {error}"
    except KeyError:
        os._exit(3)
    return "never"


def engines_fail(pool: Pools, folder: Path, seed: int) -> None:
    chance = random.Random(seed)
    size, how, stage = chance.choice([2, 3]), ENDS[seed % len(ENDS)], seed // len(ENDS) % 4
    victim, delay = chance.randrange(size), chance.uniform(0, 0.5)
    kill = {victim: 12.0} if how == "stopped" else {}
    outcomes = pool(size).run_faulty(
        train_for_ever, how, victim, delay, stage, str(folder), kill=kill, timeout=30
    )
    for outcome in outcomes:
        if outcome.rank != victim or how == "slow":
            assert outcome.kind == "result", (seed, how, outcome)
            after, told = outcome.value.split(" ", 1)
            assert float(after) < LATEST and told.startswith("[rank "), (seed, how, outcome)
    assert not [name for name in os.listdir("/dev/shm") if "zeropipe" in name]


@pytest.mark.parametrize("seed", [12, 10])
def test_an_engine_whose_rank_fails_is_an_error_on_all_others(pool: Pools, tmp_path: Path, seed: int) -> None:
    """Killed at stage 3, raising at stage 2."""
    engines_fail(pool, tmp_path, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100))
def test_an_engine_whose_rank_fails_at_any_moment_is_an_error_on_all_others(
    pool: Pools, tmp_path: Path, seed: int
) -> None:
    engines_fail(pool, tmp_path, 1000 + seed)
