"""Asynchronous saves: killed at any moment, late on one rank, failed on one rank, under one tag or many."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpointing import make_engine, train
from zeropipe.checkpoint.loader import open_source
from zeropipe.checkpoint.save import ownership, saver
from zeropipe.checkpoint.save import tags as publishing
from zeropipe.checkpoint.save.tags import choose
from zeropipe.checkpoint.save.verify import verify
from zeropipe.errors import CheckpointError
from zeropipe.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

KILLS = 8  # in the ordinary run; `make soak` does two hundred


def weight_sum(engine: Any) -> float:
    return engine.module.wide.weight.double().sum().item()


# Killed while saves under one tag follow each other.


def save_under_one_tag(rank: int, world: int, folder: str, delay: float) -> None:
    """The last rank kills itself after ``delay`` seconds; the first writes down what each save must hold."""
    engine = make_engine(1)
    engine.save_checkpoint(f"{folder}/saves", tag="last")
    if rank == world - 1:
        threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    while True:
        train(engine, 1, rank)
        if rank == 0:
            with open(f"{folder}/log", "a") as log:
                log.write(f"{engine.global_steps} {weight_sum(engine)!r}\n")
        engine.save_checkpoint(f"{folder}/saves", tag="last", async_save=True)


def load_last(rank: int, world: int, folder: str) -> Any:
    engine = make_engine(2, seed=1)
    path, _ = engine.load_checkpoint(f"{folder}/saves")
    found = engine.global_steps, weight_sum(engine)
    engine.save_checkpoint(f"{folder}/saves", tag="last")  # what was left does not stand in the way
    return path, *found


def killed_under_one_tag(pool: Any, folder: Path, delay: float) -> None:
    folder.mkdir(exist_ok=True)
    outcomes = pool(2).run_faulty(save_under_one_tag, str(folder), delay, timeout=60.0)
    assert outcomes[1].kind == "died", outcomes
    assert outcomes[0].kind in ("error", "died"), outcomes[0]  # told, not stuck
    first = choose(folder / "saves", None).candidates[0]
    assert first.tag == "last" and all(finding.good for finding in verify(first.path)), first.path
    lines = (folder / "log").read_text().split("\n")[:-1] if (folder / "log").exists() else []
    sums = dict(line.split() for line in lines)
    for path, step, total in pool(2).run(load_last, str(folder)):
        assert Path(path) == first.path
        # A save begins when the one before it is complete.
        assert step >= len(sums) - 2 and (step == 0 or repr(total) == sums[str(step)])
    assert all(finding.good for finding in verify(folder / "saves/last"))
    # The text of `latest` on its way there, a few bytes, may wait for `prune`.
    assert [p.name for p in (folder / "saves").iterdir() if p.name.startswith(".") and p.is_dir()] == []


@pytest.mark.parametrize("seed", range(KILLS))
def test_a_kill_among_saves_under_one_tag_leaves_a_whole_one(pool: Any, tmp_path: Path, seed: int) -> None:
    """The first rank emptied the folder of the next save while the last one was still being published from it."""
    killed_under_one_tag(pool, tmp_path, random.Random(seed).uniform(0.0, 0.3))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_two_hundred_kills_under_one_tag(pool: Any, tmp_path: Path) -> None:
    rng = random.Random(0)
    for index in range(200):
        killed_under_one_tag(pool, tmp_path / str(index), rng.uniform(0.0, 0.4))


# Late on one rank.


def late_publisher(rank: int, world: int, folder: str) -> list[int]:
    """Rank 1 is the one to publish, and takes its time, while rank 0 goes on to the next save."""
    engine = make_engine(1)
    real_commit, real_write = publishing.commit, saver.write
    engine.save_checkpoint(folder, tag="last")

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return real_commit(*args, **kwargs)

    def slow(*args: Any, **kwargs: Any) -> Any:
        part = real_write(*args, **kwargs)
        time.sleep(0.1)
        return part

    steps = []
    if rank == 1:
        publishing.commit, saver.write = late, slow
    try:
        for _ in range(3):
            train(engine, 1, rank)
            engine.save_checkpoint(folder, tag="last", async_save=True)
            steps.append(open_source(folder).train_state(0).global_steps)
        engine.wait_for_checkpoint()
    finally:
        publishing.commit, saver.write = real_commit, real_write
    engine.save_checkpoint(folder, tag="end", save_latest=False)
    return steps


def test_a_save_under_the_same_tag_waits_for_the_last_one_on_every_rank(pool: Any, tmp_path: Path) -> None:
    """Two asynchronous saves under one tag destroyed the only checkpoint."""
    for steps in pool(2).run(late_publisher, str(tmp_path)):
        assert all(step in (i, i + 1) for i, step in enumerate(steps)), steps
    assert open_source(tmp_path, "last").train_state(0).global_steps == 3
    assert all(finding.good for finding in verify(tmp_path / "last"))


# Failed on one rank.


def fails_on_one(rank: int, world: int, folder: str, bad: int, then: str) -> Any:
    """What each call raised on this rank, for a program that catches what it gets and goes on."""
    engine = make_engine(1)
    train(engine, 1, rank)
    engine.save_checkpoint(folder, tag="a")
    real = saver.write
    done: list[str] = []

    def call(name: str, function: Any) -> None:
        try:
            function()
            done.append(f"{name} ok")
        except CheckpointError as error:
            right = "No space left on device" in str(error) and f"[rank {bad}]" in str(error)
            done.append(f"{name} raised" if right else str(error))

    def full(work: Path, outgoing: Any) -> Any:
        real(work, outgoing)
        raise OSError(28, "No space left on device")

    if rank == bad:
        saver.write = full
    engine.save_checkpoint(folder, tag="b", async_save=True)
    if "wait" in then:
        call("wait", engine.wait_for_checkpoint)
    engine.checkpoints.saver._join()
    saver.write = real
    if "step" in then:
        for _ in range(3):
            call("step", lambda: train(engine, 1, rank))
    if "load" in then:
        call("load", lambda: engine.load_checkpoint(folder))
    for tag in ("c", "d"):
        call(f"save {tag}", lambda tag=tag: engine.save_checkpoint(folder, tag=tag))
    return done


@pytest.mark.parametrize("then", ["save", "wait", "step", "wait, step", "load"])
@pytest.mark.parametrize("bad", [0, 1])
def test_a_failure_of_one_rank_is_every_ranks(pool: Any, tmp_path: Path, bad: int, then: str) -> None:
    """The next save hung for ever: whether a rank took part in a collective was decided by what it knew itself."""
    ranks = pool(2).run(fails_on_one, str(tmp_path), bad, then)
    alike = [[entry for entry in done if not entry.startswith("wait")] for done in ranks]
    assert alike[0] == alike[1]
    assert ranks[bad].count("wait raised") == ("wait" in then)
    for done in ranks:
        raised = [entry for entry in done if entry.endswith("raised")]
        assert 1 <= len(raised) <= 2 and done[-1] == "save d ok"
        assert "wait raised" in raised or len(raised) == 1
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert "b" not in names and "d" in names and not [n for n in names if n.startswith(".")]


def ends_after_a_failure(rank: int, world: int, folder: str) -> str:
    """Rank 1 fails while rank 0 still writes; then both end without another save."""
    engine = make_engine(1)
    real = saver.write

    def write(work: Path, outgoing: Any) -> Any:
        if rank == 1:
            raise OSError(28, "No space left on device")
        part = real(work, outgoing)
        time.sleep(0.3)
        return part

    saver.write = write
    text = ""
    try:
        engine.save_checkpoint(folder, tag="b", async_save=True)
        if rank == 1:
            engine.checkpoints.saver._join()
        train(engine, 1, rank)
    except CheckpointError as error:
        text = str(error)
    finally:
        engine.destroy()
        saver.write = real
    return text


def test_a_run_that_ends_after_a_failed_save_leaves_nothing(pool: Any, tmp_path: Path) -> None:
    texts = pool(2).run(ends_after_a_failure, str(tmp_path))
    assert texts[0] == texts[1] and "[rank 1]" in texts[0]
    assert list(tmp_path.iterdir()) == []


def cleaned_meanwhile(rank: int, world: int, folder: str) -> int:
    """As ``prune`` in another process does, at every moment of saves."""
    engine = make_engine(1)
    stop = threading.Event()
    removed = 0

    def clean() -> None:
        nonlocal removed
        while not stop.is_set():
            for path in ownership.leftovers(Path(folder)):
                ownership.clear(path)
                removed += path.name.endswith(".incomplete")
            time.sleep(0.001)

    cleaner = threading.Thread(target=clean)
    if rank == 0:
        cleaner.start()
    for number in range(8):
        train(engine, 1, rank)
        engine.save_checkpoint(folder, tag=f"t{number % 3}", async_save=number % 4 != 3)
    engine.save_checkpoint(folder, tag="end")
    stop.set()
    if rank == 0:
        cleaner.join()
    return removed


def test_cleaning_up_while_a_save_goes_on_takes_nothing_from_it(pool: Any, tmp_path: Path) -> None:
    """What another process calls left over was being written, and training ended with an error."""
    assert pool(2).run(cleaned_meanwhile, str(tmp_path)) == [0, 0]
    for tag in ("t0", "t1", "t2", "end"):
        assert all(finding.good for finding in verify(tmp_path / tag))


# All ranks write into one place.


def export_at_once(rank: int, world: int, folder: str, out: str, size: str, safe: bool) -> None:
    convert_zero_checkpoint_to_fp32_state_dict(folder, out, max_shard_size=size, safe_serialization=safe)


def saved(rank: int, world: int, folder: str) -> None:
    make_engine(2).save_checkpoint(folder, tag="a")


def test_every_rank_may_export_into_one_folder(pool: Any, tmp_path: Path) -> None:
    """They wrote into the same temporary files: one rank raised, or the weights were mixed."""
    run = str(tmp_path / "run")
    pool(2).run(saved, run)
    for number, (size, safe) in enumerate([("5GB", True), ("2KB", True), ("5GB", False), ("2KB", False)]):
        alone, together = tmp_path / f"alone{number}", tmp_path / f"together{number}"
        for _ in range(2):
            pool(2).run(export_at_once, run, str(together), size, safe)
        convert_zero_checkpoint_to_fp32_state_dict(run, alone, max_shard_size=size, safe_serialization=safe)
        assert sorted(p.name for p in together.iterdir()) == sorted(p.name for p in alone.iterdir())
        for path in alone.glob("*.safetensors"):
            assert path.read_bytes() == (together / path.name).read_bytes()
