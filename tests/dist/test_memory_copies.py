"""Copies in memory: what they hold is what a checkpoint on disk would, whatever died and whoever reads them."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers.checkpointing import assert_same_state, make_engine, pieces, train, weights, whole
from tests.helpers.pool import Pools
from zeropipe.checkpoint.memory.pieces import Digest, Packed, Slot, seal_of
from zeropipe.checkpoint.memory.shelf import Shelf
from zeropipe.errors import UsageError
from zeropipe.runtime.resilience.copies import ENGINES

State = tuple[Any, Any, list[float]]


def engine_of(folder: str, stage: int, precision: str, seed: int = 0, **memory: Any) -> Any:
    os.makedirs(folder, exist_ok=True)
    gc.collect()  # what an earlier task of this process has dropped
    return make_engine(
        stage,
        precision,
        seed=seed,
        checkpoint={"memory": {"every": 1, "folder": folder} | memory},
    )


def dies(rank: int, world: int, folder: str, stage: int, precision: str) -> None:
    """Train on from what is there, save on disk what is in memory, and go without a word."""
    engine = engine_of(folder, stage, precision, seed=rank)
    client = {"epoch": 0}
    engine.resume(client_state=client)
    for _ in range(3):
        client["epoch"] += 1
        train(engine, 1, rank)
    engine.save_checkpoint(f"{folder}/disk", client_state={"epoch": client["epoch"]})


def state_of(engine: Any, rank: int) -> State:
    return pieces(engine), weights(engine), [*engine.get_lr(), engine.loss_scale, *train(engine, 2, rank)]


def goes_on(
    rank: int, world: int, folder: str, stage: int, precision: str, memory: bool
) -> tuple[Any, State]:
    engine = engine_of(folder, stage, precision, seed=5 + rank, every=1 if memory else 0)
    found = engine.resume(f"{folder}/disk")
    told = found.step, found.source, found.why, found.client_state
    return told, state_of(engine, rank)


KINDS = ["fp32", "bf16", "fp16"]
# A part that has every stage and every precision; the rest are long.
QUICK = [(0, "bf16"), (1, "fp16"), (2, "fp32"), (3, "bf16")]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        pytest.param(stage, kind, marks=[] if (stage, kind) in QUICK else pytest.mark.soak)
        for stage in range(4)
        for kind in KINDS
    ],
)
def test_sizes_change_and_the_bits_are_those_of_a_checkpoint(
    pool: Pools, tmp_path: Path, stage: int, precision: str
) -> None:
    folder = str(tmp_path)
    for number, ranks in enumerate((4, 3)):
        pool(ranks).run(dies, folder, stage, precision)
        others = 3 if ranks == 4 else 4
        memory, disk = (pool(others).run(goes_on, folder, stage, precision, kind) for kind in (True, False))
        for (told, (_, held, after)), (on_disk, (_, wanted, losses)) in zip(memory, disk, strict=True):
            assert told[:2] == (5 * number + 3, "memory"), told
            assert on_disk[:2] == (5 * number + 3, "disk"), on_disk
            assert told[3] == on_disk[3] == {"epoch": 3}
            assert after == losses
            assert all(torch.equal(held[name], wanted[name]) for name in wanted)
        assert_same_state(whole([state[0] for _, state in memory]), whole([state[0] for _, state in disk]))


# Pieces that are damaged or gone.


def damaged(rank: int, world: int, folder: str, times: int) -> list[str]:
    """Damage one piece of the newest step, in another way each time: what a run goes on from, and why."""
    engine = engine_of(folder, 1, "fp32")
    train(engine, 3, rank)
    engine.copies.settle()
    everyone_is_here()
    older = pieces_at(folder, 2)
    newest = pieces_at(folder, 3)
    assert len(older) == len(newest) == world
    del engine
    engine = engine_of(folder, 1, "fp32", seed=1)
    chance = random.Random(0)  # a resume gives the process's own generator its state back
    told = []
    for number in range(times):
        victim = newest[number % world]
        whole_file = victim.read_bytes() if rank == 0 else b""
        if rank == 0:
            damage(victim, whole_file, number, chance)
        everyone_is_here()
        found = engine.resume()
        told.append(f"{found.step} {found.source} {found.why}")
        everyone_is_here()
        if rank == 0:
            victim.write_bytes(whole_file)
    everyone_is_here()
    told.append(f"{engine.resume().step}")
    return told


def everyone_is_here() -> None:
    dist.barrier()


def pieces_at(folder: str, step: int) -> list[Path]:
    found = ((path, seal_of(path)) for path in sorted(Path(folder).glob("zeropipe-*/*")))
    return [path for path, seal in found if seal is not None and seal.step == step]


def damage(path: Path, whole_file: bytes, number: int, chance: random.Random) -> None:
    size = len(whole_file)
    if number % 5 == 0:
        path.unlink()
    elif number % 5 == 1:
        os.truncate(path, chance.randrange(size))
    elif number % 5 == 2:  # the head
        flip(path, chance.randrange(200), chance)
    elif number % 5 == 3:  # any byte of the state
        flip(path, chance.randrange(4096, size), chance)
    else:  # a page of another step
        other = path.with_name(path.name[:-1] + ("0" if path.name[-1] == "1" else "1")).read_bytes()
        at = next(at for at in range(4096, size, 4096) if other[at : at + 4096] != whole_file[at : at + 4096])
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(other[at : at + 4096])


def flip(path: Path, at: int, chance: random.Random) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << chance.randrange(8))]))


@pytest.mark.parametrize("times", [20, pytest.param(100, marks=pytest.mark.soak)])
def test_damaged_pieces_are_found_and_not_used(pool: Pools, tmp_path: Path, times: int) -> None:
    for told in pool(2).run(damaged, str(tmp_path), times, timeout=120.0):
        assert [text.split()[:2] for text in told[:-1]] == [["2", "memory"]] * times
        assert told[-1] == "3"
        reasons = ("checksum does not match", "truncated", "nothing is left", "head has changed")
        assert all(any(reason in text for reason in reasons) for text in told[:-1])


# Their life.


def lives(rank: int, world: int, folder: str) -> list[str]:
    """What is wrong with the files, through a life of two engines."""
    wrong = []
    engines = [engine_of(folder, 1, "fp32"), engine_of(folder, 1, "fp32", every=2)]
    for engine in engines:
        train(engine, 3, rank)
        engine.copies.settle()
    everyone_is_here()
    steps = [len(pieces_at(folder, step)) for step in (1, 2, 3)]
    if steps != [0, 2 * world, world]:
        wrong.append(f"pieces of steps 1, 2, 3: {steps}")
    everyone_is_here()
    for engine in engines:
        engine.destroy()
    everyone_is_here()
    if os.listdir(folder):
        wrong.append(f"left: {os.listdir(folder)}")
    return wrong


def test_a_run_that_ends_well_leaves_nothing(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(lives, str(tmp_path)) == [[], []]


def has_nothing_left_to_do(rank: int, world: int, folder: str) -> tuple[Any, int]:
    engine = engine_of(folder, 1, "fp32")
    found = engine.resume()
    engine.destroy()
    everyone_is_here()
    return (found.step, found.source), len(os.listdir(folder))


def test_a_life_that_makes_no_copy_takes_away_what_it_has_gone_on_from(pool: Pools, tmp_path: Path) -> None:
    """A rank was killed after the last step; who came back had nothing to do, and left the copies behind."""
    pool(2).run(dies, str(tmp_path / "all"), 1, "fp32")
    shutil.rmtree(tmp_path / "all" / "disk")
    assert pool(2).run(has_nothing_left_to_do, str(tmp_path / "all")) == [((3, "memory"), 0)] * 2


def destroys_while_an_error_passes(rank: int, world: int, folder: str) -> tuple[bool, int]:
    engine = engine_of(folder, 1, "fp32")
    with pytest.raises(ZeroDivisionError):
        try:
            train(engine, 2, rank)
            raise ZeroDivisionError
        finally:
            engine.destroy()
    everyone_is_here()
    left = bool(os.listdir(folder))
    everyone_is_here()
    with pytest.MonkeyPatch.context() as patch:  # the process ends well
        patch.delattr(sys, "last_value", raising=False)
        ENGINES._end()
    everyone_is_here()
    return left, len(os.listdir(folder))


def test_an_engine_that_is_destroyed_while_an_error_passes_keeps_its_copies(
    pool: Pools, tmp_path: Path
) -> None:
    """``finally: engine.destroy()`` took away what the next life of the run goes on from."""
    assert pool(2).run(destroys_while_an_error_passes, str(tmp_path)) == [(True, 0)] * 2


def has_no_room(rank: int, world: int, folder: str) -> str:
    engine = engine_of(folder, 2, "fp32")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Shelf, "room", lambda shelf: 1000)
        with pytest.raises(UsageError) as error:
            train(engine, 1, rank)
    # The step was taken, and the run may go on without.
    train(engine, 1, rank)
    return f"{engine.global_steps} {error.value}"


def test_a_folder_that_is_too_small_is_an_error_of_all_ranks_before_it_is_written(
    pool: Pools, tmp_path: Path
) -> None:
    for text in pool(2).run(has_no_room, str(tmp_path)):
        assert text.startswith("2 [rank 1] copies in memory have no room") and "found 1000 bytes" in text
    for text in pool(2).run(absent, str(tmp_path / "absent")):
        assert "can be written" in text


def absent(rank: int, world: int, folder: str) -> str:
    engine = engine_of(folder, 2, "fp32")
    everyone_is_here()
    if rank == 0:
        os.rmdir(folder)
    everyone_is_here()
    found = engine.resume()
    assert found.source == "nothing" and "no copies" in found.why
    with pytest.raises(UsageError) as error:
        train(engine, 1, rank)
    return str(error.value)


def interrupted(rank: int, world: int, folder: str) -> list[Any]:
    """Copies that fail in all ways: what is left is the one before, and training goes on."""
    engine = engine_of(folder, 1, "fp32")
    train(engine, 2, rank)
    found = []

    def newest() -> tuple[int, str]:
        engine.copies.settle()
        everyone_is_here()
        other = engine_of(folder, 1, "fp32", seed=1)
        other.copies._shelf = engine.copies.shelf()
        told = other.resume()
        return told.step, told.source if told.step else told.why

    # [1] An error in the middle of a copy, on one rank.
    engine.copies.settle()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(Digest, "add", lambda self, memory: 1 // 0)
        train(engine, 1, rank)
        engine.copies.settle()
    found.append(newest())
    train(engine, 1, rank)
    found.append(newest())
    # [2] Memory that is gone, on the other.
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(Slot, "begin", no_room)
        train(engine, 1, rank)
    found.append(newest())
    train(engine, 1, rank)
    # [3] The program writes to moments while they are copied: that one is not used, and later ones are whole.
    state = next(iter(engine.optimizer.optimizer.state.values()))
    with pytest.MonkeyPatch.context() as patch:
        late = Event()
        copy = Packed.finish
        patch.setattr(Packed, "finish", lambda self, *args: (late.wait(), copy(self, *args))[1])
        train(engine, 1, rank)
        state["exp_avg"].mul_(0.5)
        late.set()
        engine.copies.settle()
    found.append(newest())
    train(engine, 1, rank)
    state["exp_avg"].mul_(0.5)
    found.append(newest())
    return found


def no_room(slot: Slot, nbytes: int) -> torch.Tensor:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_copy_that_fails_leaves_the_one_before(pool: Pools, tmp_path: Path) -> None:
    wanted = [(step, "memory") for step in (2, 4, 4, 6, 8)]
    assert pool(2).run(interrupted, str(tmp_path)) == [wanted] * 2
    first, second = pool(2).outputs()
    assert "copies in memory, step 3: ZeroDivisionError" in second
    assert "No space left on device" in first
    assert all("was written to after the step" in text for text in (first, second))


# Several hosts.


def of_hosts(
    rank: int,
    world: int,
    folder: str,
    hosts: list[str],
    stage: int,
    steps: int,
    precision: str = "fp32",
    **memory: Any,
) -> Any:
    """Go on from what is there, on hosts of such names, and die."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROPIPE_HOST", hosts[rank])
        engine = engine_of(folder, stage, precision, seed=rank, **memory)
        found = engine.resume(f"{folder}/disk")
        told = found.step, found.source, found.why
        losses = train(engine, steps, rank)
        engine.copies.settle()
        engine.copies._life.guests.wait()
        everyone_is_here()
        return told, losses, engine.copies.shelf().folder


def lose(folders: Sequence[Path], *ranks: int) -> None:
    for folder in {folders[rank] for rank in ranks}:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("stage", "precision"), [(1, "fp32"), pytest.param(3, "bf16", marks=pytest.mark.soak)]
)
def test_one_host_may_be_lost_and_the_next_one_has_its_pieces(
    pool: Pools, tmp_path: Path, stage: int, precision: str
) -> None:
    undisturbed = [
        losses
        for _, losses, _ in pool(4).run(
            of_hosts, str(tmp_path / "a"), ["a", "a", "b", "b"], stage, 8, precision
        )
    ]
    for lost in (0, 2):
        folder = str(tmp_path / f"lost {lost}")
        first = pool(4).run(of_hosts, folder, ["a", "a", "b", "b"], stage, 4, precision)
        lose([place for *_, place in first], lost)
        # A new host in its place, then all on one.
        second = pool(4).run(
            of_hosts, folder, ["a", "a", "c", "c"] if lost else ["c", "c", "b", "b"], stage, 2, precision
        )
        third = pool(4).run(of_hosts, folder, ["a"] * 4 if lost else ["b"] * 4, stage, 2, precision)
        for rank in range(4):
            assert second[rank][0][:2] == (4, "memory"), second[rank][0]
            assert third[rank][0][:2] == (6, "memory"), third[rank][0]
            assert first[rank][1] + second[rank][1] + third[rank][1] == undisturbed[rank]


def test_of_four_hosts_neighbours_lost_together_are_too_many(pool: Pools, tmp_path: Path) -> None:
    hosts = list("abcd")
    for number, (lost, copies, source) in enumerate(
        [((1, 3), 1, "memory"), ((1, 2), 1, "disk"), ((1, 2), 2, "memory"), ((0, 1, 3), 3, "memory")]
    ):
        folder = str(tmp_path / str(number))
        first = pool(4).run(of_hosts_saved, folder, hosts, 2, copies=copies)
        lose([place for *_, place in first], *lost)
        for told, *_ in pool(4).run(of_hosts, folder, hosts, 2, 1, copies=copies):
            assert told[:2] == ((5 if source == "memory" else 3), source), told
            assert source == "memory" or "of rank 1 of 4 nothing is left" in told[2], told


def of_hosts_saved(rank: int, world: int, folder: str, hosts: list[str], stage: int, **memory: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROPIPE_HOST", hosts[rank])
        engine = engine_of(folder, stage, "fp32", **memory)
        train(engine, 3, rank)
        engine.save_checkpoint(f"{folder}/disk")
        train(engine, 2, rank)
        engine.copies.settle()
        engine.copies._life.guests.wait()
        everyone_is_here()
        return (), [], engine.copies.shelf().folder


# Processes that end. (Kills under torchrun: tests/faults/test_survival.py.)

SCRIPT = """
import os, sys
import torch
import zeropipe

def main(folder, how):
    torch.manual_seed(0)
    memory = {"every": 1, "folder": folder}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW"}, "checkpoint": {"memory": memory}}
    engine = zeropipe.initialize(model=torch.nn.Linear(4, 4), config=config)[0]
    print("from", engine.resume().step)
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 4)).sum())
        engine.step()
    if how == "raises":
        raise ValueError(how)
    if how == "dies":
        os.kill(os.getpid(), 9)

main(sys.argv[1], os.environ["HOW"])
"""


@pytest.mark.soak
def test_a_process_that_ends_well_takes_its_copies_along_and_no_other_does(tmp_path: Path) -> None:
    left = []
    for how in ("raises", "dies", "returns", "returns"):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path)]  # the same, as only then it is the same run
        environment = {**os.environ, "HOW": how}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        left.append((done.stdout.strip(), bool(os.listdir(tmp_path))))
    assert left[0] == ("from 0", True)
    # What a kill leaves of its last step may be half a copy.
    assert left[1][1]
    assert left[2] in [("from 4", False), ("from 3", False)]
    assert left[3] == ("from 0", False)
