"""The network between two hosts is cut without a word to either side: both end, by name, within the time that is set.

The hosts are network namespaces with a cable (veth) between them, which is pulled at a random moment. What is on its
way is lost and nothing is refused, so neither side sees a connection close.
"""

from __future__ import annotations

import ctypes
import logging
import os
import random
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zeropipe
from tests.helpers.pool import _context
from tests.helpers.train import config
from zeropipe.errors import CommunicationError

LIMIT = 5.0  # s: the timeout of torch.distributed, or the watchdog's time
BUSY = 10.0  # s more, on a machine that does not run this for a while
NETWORK = "10.77.19"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Cable:
    """Two hosts, and what is between them."""

    def __init__(self) -> None:
        self.hosts = [f"zp{os.getpid()}h{host}" for host in range(2)]
        self.ends = [f"zp{os.getpid() % 100000}e{host}" for host in range(2)]

    def lay(self) -> None:
        for host in self.hosts:
            ip("netns", "add", host)
        ip("link", "add", self.ends[0], "type", "veth", "peer", "name", self.ends[1])
        for number, (host, end) in enumerate(zip(self.hosts, self.ends, strict=True)):
            ip("link", "set", end, "netns", host)
            ip("-n", host, "addr", "add", f"{NETWORK}.{number + 1}/24", "dev", end)
            ip("-n", host, "link", "set", end, "up")
            ip("-n", host, "link", "set", "lo", "up")

    def cut(self) -> float:
        ip("-n", self.hosts[1], "link", "set", self.ends[1], "down")
        return time.monotonic()

    def remove(self) -> None:
        for host in self.hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


@pytest.fixture
def cable() -> Iterator[Cable]:
    laid = Cable()
    try:
        laid.lay()
    except (OSError, subprocess.CalledProcessError) as error:
        laid.remove()
        pytest.skip(f"no network namespaces here: {error}")
    try:
        yield laid
    finally:
        laid.remove()


def on_host(rank: int, namespace: str, end: str, folder: str, stage: int, limit: float, guard: float) -> None:
    """One rank, in a process of its own: what it ends with goes into a file."""
    handle = os.open(f"/var/run/netns/{namespace}", os.O_RDONLY)
    assert ctypes.CDLL(None).setns(handle, 0x40000000) == 0  # CLONE_NEWNET
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": f"{NETWORK}.1",
        "MASTER_PORT": "29577",
    }
    os.environ["GLOO_SOCKET_IFNAME"] = end
    said = Path(folder, f"said{rank}")
    handler = logging.FileHandler(said)
    logging.getLogger("zeropipe").addHandler(handler)
    torch.set_num_threads(1)
    # The timeout is of their meeting too, so they begin it together.
    Path(folder, f"is-up{rank}").touch()
    while not Path(folder, f"is-up{1 - rank}").exists():
        time.sleep(0.01)
    zeropipe.init_distributed(timeout=timedelta(seconds=limit))
    watch = {"watchdog": {"seconds": guard, "end": True}} if guard else {}
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8))
    engine, *_ = zeropipe.initialize(model=model, config=config(stage, 2, **watch))
    try:
        while True:
            engine.backward(engine(torch.ones(1, 64)).square().mean())
            engine.step()
            Path(folder, f"trains{rank}").touch()
    except CommunicationError as error:
        Path(folder, f"error{rank}").write_text(f"{time.monotonic()} {error}")
        os._exit(3)  # the others' connections are gone: a clean end would wait for them


def run_and_cut(
    cable: Cable, folder: Path, stage: int, limit: float, guard: float, delay: float
) -> list[Any]:
    """When it was cut, and of each host: exit code, seconds from the cut to its end, what it said."""
    processes = [
        _context().Process(
            target=on_host, args=(rank, cable.hosts[rank], cable.ends[rank], str(folder), stage, limit, guard)
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + 60
        while not all((folder / f"trains{rank}").exists() for rank in range(2)):
            assert time.monotonic() < end and all(p.is_alive() for p in processes), "they do not train"
            time.sleep(0.02)
        time.sleep(delay)
        when, found = cable.cut(), []
        for rank, process in enumerate(processes):
            process.join(LIMIT + BUSY)
            error = folder / f"error{rank}"
            texts = [f.read_text() for f in (folder / f"said{rank}", error) if f.exists()]
            found.append((process.exitcode, time.monotonic() - when, "\n".join(texts)))
        return found
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def check_cut(cable: Cable, folder: Path, by: str, stage: int, delay: float) -> float:
    """By the ``timeout`` of torch.distributed or by the ``watchdog``; the longest time to an end."""
    folder.mkdir(exist_ok=True)
    guard = LIMIT if by == "watchdog" else 0.0
    found = run_and_cut(cable, folder, stage, 600.0 if guard else LIMIT, guard, delay)
    for rank, (code, seconds, text) in enumerate(found):
        assert code == (124 if guard else 3), (rank, found)
        assert seconds < LIMIT + BUSY, (rank, found)
        assert f"rank {rank}" in text
        if guard:
            # The store is on the first host, whose rank sees the other fall silent; the other one sees no store.
            says = (
                "rank 1 says nothing"
                if rank == 0
                else "the store by which ranks hear of each other does not answer"
            )
            assert says in text, found
        else:
            assert (
                "did not complete" in text and "among ranks [0, 1]" in text
            ) or "with ranks [0, 1]" in text, found
    return max(seconds for _, seconds, _ in found)


@pytest.mark.parametrize(
    ("by", "stage"), [pytest.param("timeout", 2, marks=pytest.mark.soak), ("watchdog", 3)]
)
def test_a_cut_network_ends_both_sides_by_name(cable, tmp_path, by, stage):
    check_cut(cable, tmp_path, by, stage, random.uniform(0, 0.2))


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_network_is_cut_at_random_moments(tmp_path):
    rng, worst = random.Random(0), {}
    for number in range(20):
        by, laid = ("timeout", "watchdog")[number % 2], Cable()
        laid.lay()
        try:
            seconds = check_cut(laid, tmp_path / str(number), by, number // 2 % 4, rng.uniform(0, 1))
        finally:
            laid.remove()
        worst[by] = max(worst.get(by, 0.0), seconds)
    print(f"20 of 20 ended by name; at the latest after {worst} s, of {LIMIT} s that were set")
