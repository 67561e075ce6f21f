"""A rank that is alive and does not move is named, with its stack, within the time that the user set.

Each rank of a case trains two steps; then one of them stands still, in the way and at the place that the case says,
until it has been named (or long enough to be), and all go on.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import zeropipe
from tests.helpers.train import config
from zeropipe.runtime.pipe.module import PipelineModule

SECONDS = 1.5  # that the user set
BUSY = 8.0  # more, on a machine that does not run this for a while; `make soak` allows a tenth of the time
LONG = 2 * SECONDS  # of a call that nobody can end
LONGEST = 20.0  # that a rank which nobody names stands still


class Heard(logging.Handler):
    """What the watchdog said on this rank, and when; a file tells the others that it did."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.said: list[tuple[float, str]] = []
        self._flag = flag

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "watchdog" in text:
            self.said.append((time.monotonic(), text))
            self._flag.touch()


def _wait_for(flag: Path) -> None:
    end = time.monotonic() + LONGEST
    while not flag.exists() and time.monotonic() < end:
        time.sleep(0.05)


def loops(flag: Path) -> None:
    end = time.monotonic() + LONGEST
    while not flag.exists() and time.monotonic() < end:
        pass


def sleeps(flag: Path) -> None:
    time.sleep(LONG)


def keeps_the_interpreter(flag: Path) -> None:
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(LONG * 1e6)))  # one call, in which no thread runs Python


def waits_for_a_lock(flag: Path) -> None:
    lock = threading.Lock()
    lock.acquire()
    threading.Thread(target=lambda: (_wait_for(flag), lock.release())).start()
    lock.acquire()


def is_stopped(flag: Path) -> None:
    time.sleep(0.2)  # looks of the watchdog, so that it is seen here
    os.kill(os.getpid(), signal.SIGSTOP)


KINDS: dict[str, Callable[[Path], None]] = {
    "loop": loops,
    "sleep": sleeps,
    "C": keeps_the_interpreter,
    "lock": waits_for_a_lock,
    "SIGSTOP": is_stopped,
}


class Trap(nn.Module):
    """Hands on what it gets; where it is armed, its rank stands still."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place, self.stand = place, None
        self.linear = nn.Linear(8, 8)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.linear(h)
        if self.place == "forward":
            self.spring()
        if self.place == "backward" and h.requires_grad:
            h.register_hook(lambda grad: self.spring())
        return h

    def spring(self) -> None:
        stand, self.stand = self.stand, None
        if stand is not None:
            stand()

    def get_extra_state(self) -> Any:
        if self.place == "save":
            self.spring()
        return 0

    def set_extra_state(self, state: Any) -> None: ...


def _engine(
    stage: int, world: int, trap: Trap, seconds: float, pipeline: bool
) -> tuple[Any, Callable[[int], None]]:
    guard = {"seconds": seconds}
    if pipeline:
        layers = [nn.Linear(8, 8), trap, nn.Linear(8, 8), nn.Linear(8, 8)]
        model = PipelineModule(layers, num_stages=world, loss_fn=lambda out, _: out.square().mean())
        settings = config(stage, 1, gas=2, watchdog=guard)
        engine, *_ = zeropipe.initialize(model=model, config=settings)

        def step(rank: int) -> None:
            engine.train_batch(iter([(torch.ones(2, 8), torch.ones(2))] * 2))

        return engine, step
    engine, *_ = zeropipe.initialize(
        model=nn.Sequential(nn.Linear(8, 8), trap, nn.Linear(8, 8)),
        config=config(stage, world, watchdog=guard),
    )

    def step(rank: int) -> None:
        engine.backward(engine(torch.ones(2, 8) * rank).square().mean())
        engine.step()

    return engine, step


def stands_still(
    rank: int, world: int, stage: int, kind: str, place: str, odd: int, folder: str, pipeline: bool = False
) -> tuple[float, list[tuple[float, str]]]:
    """When the odd rank began to stand still (0 elsewhere), and what was said on this rank."""
    torch.manual_seed(0)
    flag, began = Path(folder) / "named", [0.0]
    trap = Trap(place)
    engine, step = _engine(stage, world, trap, SECONDS, pipeline)
    for _ in range(2):
        step(rank)
    heard = Heard(flag)
    logger = logging.getLogger("zeropipe")
    logger.addHandler(heard)
    if rank != odd and kind == "SIGSTOP":
        threading.Thread(target=_wake, args=(flag, Path(folder) / "stopped"), daemon=True).start()

    def stand() -> None:
        began[0] = time.monotonic()
        (Path(folder) / "stopped").write_text(str(os.getpid()))
        KINDS[kind](flag)

    try:
        if rank == odd:
            trap.stand = stand
        if place == "outside":
            trap.spring()
        step(rank)
        if place == "save":
            engine.save_checkpoint(str(Path(folder) / "checkpoints"))
        step(rank)
        time.sleep(0.3)  # who moves again says so
    finally:
        logger.removeHandler(heard)
        engine.destroy()
    assert not [t for t in threading.enumerate() if "watchdog" in t.name]
    return began[0], heard.said


def _wake(flag: Path, stopped: Path) -> None:
    """From another rank: let the stopped one go on once it was named."""
    _wait_for(flag)
    os.kill(int(stopped.read_text()), signal.SIGCONT)


def check_named(results: list[Any], odd: int, kind: str, slack: float = BUSY) -> float:
    """Seconds from standing still to its naming."""
    began = results[odd][0]
    said = sorted(entry for _, entries in results for entry in entries)
    reports = [(when, text) for when, text in said if "moves again" not in text]
    assert len(reports) == 1, "\n".join(f"{when - began:.2f} {text}" for when, text in said)
    when, text = reports[0]
    assert when - began <= SECONDS + slack, (when - began, text)
    lines = text.splitlines()
    assert f"rank {odd}" in lines[0], text
    # A loop may keep even the looks of its own rank from running, where others want the processors too.
    assert "says nothing" in lines[0] or ("is stuck" in lines[0] and kind not in ("SIGSTOP", "C")), text
    if kind == "SIGSTOP":
        assert "stopped by a signal" in lines[0], text
    marked = [line for line in lines if "<--" in line]
    assert len(marked) == 1 and f"rank {odd} " in marked[0], text
    # Where it stands, in its own file, and the innermost call last.
    stack = lines[lines.index(next(line for line in lines if "innermost call last" in line)) + 1 :]
    assert any("test_watchdog.py" in frame and KINDS[kind].__name__ in frame for frame in stack), text
    # And what the others wait for.
    others = [line for line in lines[1:] if line.startswith("  rank ") and "<--" not in line]
    assert others and all("waits for" in line for line in others), text
    assert [text for _, text in said if f"rank {odd} moves again" in text], said
    return when - began


@pytest.mark.parametrize(
    ("stage", "kind", "place", "pipeline"),
    [
        (0, "sleep", "outside", False),
        (1, "loop", "backward", False),
        (2, "C", "forward", False),
        (3, "SIGSTOP", "forward", False),
        (1, "lock", "save", False),
        (1, "loop", "forward", True),
    ],
)
def test_a_rank_that_stands_still_is_named_with_its_stack(pool, tmp_path, stage, kind, place, pipeline):
    results = pool(2).run(stands_still, stage, kind, place, 0 if pipeline else 1, str(tmp_path), pipeline)
    check_named(results, 0 if pipeline else 1, kind)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_every_way_to_stand_still_at_every_place(pool, tmp_path):
    cases = [
        (s, k, p, False) for s in range(4) for k in KINDS for p in ("forward", "backward", "outside", "save")
    ]
    cases += [(s, k, p, True) for s in (0, 1, 3) for k in KINDS for p in ("forward", "backward", "save")]
    seconds = []
    for number, (stage, kind, place, pipeline) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        odd = 0 if pipeline else number % 2
        # The pool's store is a file that grows with every look, and is read from its begin.
        if number % 4 == 0:
            pool(2).close()
        results = pool(2).run(stands_still, stage, kind, place, odd, str(folder), pipeline)
        seconds.append((check_named(results, odd, kind), stage, kind, place, pipeline))
    late = [case for case in seconds if case[0] > SECONDS]
    print(f"{len(cases)} of {len(cases)} named; set {SECONDS} s, at the latest {max(seconds)}, late: {late}")
    assert len(late) <= len(cases) // 20, late


def all_wait(rank: int, world: int, folder: str) -> list[tuple[float, str]]:
    """Rank 1 goes to a barrier of its own, while rank 0 waits for it in a step."""
    flag = Path(folder) / "named"
    own = dist.new_group(list(range(world)))
    engine, step = _engine(2, world, Trap(""), SECONDS, False)
    step(rank)
    heard = Heard(flag)
    logging.getLogger("zeropipe").addHandler(heard)
    try:
        if rank == 0:
            threading.Thread(target=lambda: (_wait_for(flag), dist.barrier(own))).start()
        else:
            dist.barrier(own)
        step(rank)
        time.sleep(0.3)
    finally:
        logging.getLogger("zeropipe").removeHandler(heard)
        engine.destroy()
    return heard.said


def test_ranks_that_all_wait_are_named_with_their_calls(pool, tmp_path):
    said = sorted(entry for entries in pool(2).run(all_wait, str(tmp_path)) for entry in entries)
    texts = [text for _, text in said]
    assert len(texts) == 2 and "no rank moves for 1.2 s" in texts[0] and "move again" in texts[1], texts
    assert "waits for reduce_to_owners 'gradients' among ranks [0, 1]" in texts[0]
    assert "waits in barrier() of torch.distributed, which the program calls" in texts[0]
    assert "test_watchdog.py" in texts[0] and "in all_wait" in texts[0]


def for_good(rank: int, world: int, kind: str, folder: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    engine, *_ = zeropipe.initialize(
        model=model, config=config(1, world, watchdog={"seconds": SECONDS, "end": True})
    )
    for number in range(1000):
        engine.backward(engine(torch.ones(2, 8)).square().mean())
        engine.step()
        if number == 3 and rank == 1:
            while kind == "loop":
                pass
            is_stopped(Path(folder))


@pytest.mark.parametrize(
    ("kind", "code"), [("loop", 124), pytest.param("SIGSTOP", -signal.SIGKILL, marks=pytest.mark.soak)]
)
def test_a_run_that_is_stuck_ends_on_every_rank(pool, tmp_path, kind, code):
    outcomes = pool(2).run_faulty(for_good, kind, str(tmp_path))
    assert [(o.kind, o.exitcode) for o in outcomes] == [("died", 124), ("died", code)], outcomes
    assert any("the run ends with exit code 124: rank 1 is stuck" in o.output for o in outcomes), outcomes


def slow(rank: int, world: int, folder: str) -> list[tuple[float, str]]:
    """One rank works for longer than the time set, in ways that move, while the other waits for it."""
    engine, step = _engine(1, world, Trap(""), SECONDS, False)
    step(rank)
    heard = Heard(Path(folder) / "named")
    logging.getLogger("zeropipe").addHandler(heard)
    try:
        end = time.monotonic() + 1.6 * SECONDS
        while rank == 1 and time.monotonic() < end:  # validates with the engine
            with torch.no_grad():
                engine(torch.ones(2, 8))
            time.sleep(0.2)
        step(rank)
        end = time.monotonic() + 1.6 * SECONDS
        while rank == 0 and time.monotonic() < end:  # code that is new all the time, as a compiler's is
            space: dict[str, Any] = {"time": time}
            exec(f"def new():\n    time.sleep(0.2)\n    return {time.monotonic()}", space)
            space["new"]()
        step(rank)
    finally:
        logging.getLogger("zeropipe").removeHandler(heard)
        engine.destroy()
    return heard.said


def test_who_is_slow_is_not_named(pool, tmp_path):
    assert pool(2).run(slow, str(tmp_path)) == [[], []]
