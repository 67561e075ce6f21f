"""Ranks of one host read each other's memory: the same bits as by messages, who is found, and what ends how."""

from __future__ import annotations

import errno
import gc
import logging
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.dist.test_pipe_checkpoint import load, save
from tests.helpers.data import gpt_batch
from tests.helpers.models import TinyGPT, build
from tests.helpers.pool import PerRank, Pools, point
from tests.helpers.train import config, train
from tests.helpers.zero3 import Stack, engine_of
from zeropipe import zero
from zeropipe.comm import collectives as comm
from zeropipe.comm.agreement import meet
from zeropipe.comm.collectives import expose
from zeropipe.comm.group import new_group, world
from zeropipe.comm.host.board import RING
from zeropipe.comm.host.choosing import VARIABLE, choose_transport
from zeropipe.comm.host.near import NearTalk
from zeropipe.comm.host.one_sided import LEAST, ONE_SIDED
from zeropipe.comm.host.reading import Memory
from zeropipe.comm.record import SEAM, record
from zeropipe.errors import CommunicationError, DesyncError, UsageError

SOON = 5.0  # s in which every rank has its error; its group waits for 1 s, and this machine is busy
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64]


@contextmanager
def by_messages() -> Iterator[None]:
    """Words and tensors go by gloo, as between hosts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONE_SIDED, "least", 2**62)
        patch.setattr(ONE_SIDED, "within", lambda group: False)
        yield


@contextmanager
def checked() -> Iterator[None]:
    """Who reads compares what it has read with what was published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONE_SIDED, "checks", True)
        yield


def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    made = torch.Generator().manual_seed(1000 * rank + numel)
    return (torch.randn(numel, generator=made) * 100).to(dtype)


def everything(rank: int, size: int, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """What each collective makes of the same values."""
    g, mine = world(), values(rank, numel * size, dtype)
    summed, part, whole = mine.clone(), torch.empty(numel, dtype=dtype), torch.empty_like(mine)
    comm.all_reduce(summed, g)
    comm.reduce_scatter(part, mine, g, op="max")
    comm.all_gather(whole, part, g)
    crossed, spread = torch.empty_like(mine), mine.clone()
    comm.all_to_all(crossed, mine, g)
    comm.broadcast(spread, size - 1, g)
    sent, got = mine[: numel // 2], torch.empty(numel // 2, dtype=dtype)
    works = [comm.send(sent, (rank + 1) % size, g, async_op=True)]
    works.append(comm.recv(got, (rank - 1) % size, g, async_op=True))
    own = torch.empty(numel, dtype=dtype)
    cuts = [(owner, mine[owner * numel :][:numel]) for owner in range(size)]
    works.append(comm.reduce_to_owners(cuts, [own], g, async_op=True, channel=2))
    for work in works:
        work.wait()
    return [summed, part, whole, crossed, spread, got, own]


def both_ways(rank: int, size: int, numel: int, dtype: torch.dtype) -> bool:
    assert ONE_SIDED.within(world())
    found = everything(rank, size, numel, dtype)
    with by_messages():
        expected = everything(rank, size, numel, dtype)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dtype", KINDS)
def test_the_bits_are_those_of_messages(pool: Pools, size: int, dtype: torch.dtype) -> None:
    """A few elements, and more than are added at a time."""
    for numel in (3, 70_001):
        assert all(pool(size).run(both_ways, numel, dtype))


def trained(rank: int, size: int, stage: int, way: Any) -> dict[str, Any]:
    with way():
        return train(rank, size, partial(build, TinyGPT), gpt_batch, config(stage, size, gas=2), 3)


# Who is found.


def refusing(error: int) -> Any:
    def read(self: Memory, *args: int) -> None:
        raise OSError(error, os.strerror(error))

    return read


def begin_anew(rank: int, size: int, way: str, blind: bool, folder: str) -> tuple[bool, list[int], str]:
    """A world of its own, in which this rank is set up as told: whether all are near, who is, and the error."""
    dist.destroy_process_group()
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    os.environ[VARIABLE], ONE_SIDED.least = way, LEAST
    if blind:
        Memory.read = refusing(errno.EPERM)  # type: ignore[method-assign]
    try:
        choose_transport(world())
    except UsageError as error:
        return False, [], str(error)
    g = world()
    near = [member for member in range(size) if ONE_SIDED.peer(g, member, LEAST) is not None]
    ones = torch.full((250_000,), float(rank + 1))
    comm.all_reduce(ones, g)
    assert torch.equal(ones, torch.full((250_000,), size * (size + 1) / 2))
    return ONE_SIDED.within(g), near, ""


def test_a_rank_that_may_not_read_goes_by_messages_and_the_others_do_not(pool: Pools, tmp_path: Any) -> None:
    """Both directions of a pair, or none: the first two still read each other."""
    outcomes = pool(3).run_faulty(begin_anew, "auto", PerRank([False, False, True]), str(tmp_path))
    assert [o.value for o in outcomes] == [(False, [1], ""), (False, [0], ""), (False, [], "")], outcomes


@pytest.mark.parametrize(
    ("way", "near"), [("messages", []), ("native", []), ("one_sided", [1]), ("auto", [1]), ("", [1])]
)
def test_the_variable_forces_one(pool: Pools, tmp_path: Any, way: str, near: list[int]) -> None:
    outcomes = pool(2).run_faulty(begin_anew, way, False, str(tmp_path))
    assert outcomes[0].value == (bool(near), near, ""), outcomes


def mixed(rank: int, size: int, blind: bool, folder: str, way: Any, zero_config: dict[str, Any]) -> Any:
    """Trains at stage 3 in a world of which only some share a memory; how many values were read in place."""
    begin_anew(rank, size, "auto", blind, folder)
    settings = config(3, size, gas=2, zero_optimization={"stage": 3, **zero_config})
    with way(), record() as events, pytest.MonkeyPatch.context() as patch:
        exposed: list[str] = []
        found = NearTalk.read

        def read(self: NearTalk, word: Any, early: bool) -> int:
            exposed.append(word.text)
            return found(self, word, early)

        patch.setattr(NearTalk, "read", read)
        trained = train(rank, size, partial(build, TinyGPT), gpt_batch, settings, 3)
    assert any(event.op == "all_gather" for event in events)
    return trained["losses"], trained["weights"], len(exposed)


def test_a_world_of_several_hosts_trains_the_same_and_shards_inside_a_host_are_read_in_place(
    pool: Pools, tmp_path: Any
) -> None:
    """Whoever may not read stands for a rank of another host: of four, two that share their memory and two that do not,
    with shards among all, and among either two (MiCS)."""
    nothing = {"stage3_param_persistence_threshold": 0}
    for number, zero_config in enumerate([nothing, {**nothing, "mics_shard_size": 2}]):
        results = []
        for way in (checked, by_messages):
            folder = tmp_path / f"{number} {way.__name__}"
            folder.mkdir()
            blind = PerRank([False, False, True, True])
            outcomes = pool(4).run_faulty(mixed, blind, str(folder), way, zero_config)
            results.append([outcome.value for outcome in outcomes])
            assert all(outcome.kind == "result" for outcome in outcomes), outcomes
        for found, expected in zip(*results, strict=True):
            assert found[0] == expected[0]
            assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
        assert [bool(value[2]) for value in results[0]] == [bool(number), bool(number), False, False]
        assert not any(value[2] for value in results[1])


@pytest.mark.parametrize(
    ("ways", "blind", "says"),
    [
        (
            ["sideways", "sideways"],
            False,
            "expected one of auto, one_sided, messages, native on all ranks",
        ),
        (["messages", "auto"], False, "found 'messages', 'auto'"),
        (["one_sided", "one_sided"], True, "cannot read each other's memory"),
    ],
)
def test_what_cannot_be_is_refused_on_all_ranks(
    pool: Pools, tmp_path: Any, ways: list[str], blind: bool, says: str
) -> None:
    outcomes = pool(2).run_faulty(begin_anew, PerRank(ways), blind, str(tmp_path))
    assert all(says in o.value[2] and f"[rank {o.rank}]" in o.value[2] for o in outcomes), outcomes


def turned_away(rank: int, size: int, folder: str) -> list[str]:
    """It is said once, on the first rank."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("zeropipe")
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    assert begin_anew(rank, size, "auto", rank == 1, folder) == (False, [], "")
    choose_transport(world())
    return said


def test_that_it_goes_by_messages_is_said_once(pool: Pools, tmp_path: Any) -> None:
    outcomes = pool(2).run_faulty(turned_away, str(tmp_path))
    assert [len(o.value) for o in outcomes] == [1, 0], outcomes
    assert "by messages between ranks 0 and 1:" in outcomes[0].value[0]


def lacks(rank: int, size: int, what: str, folder: str) -> Any:
    """Of rank 1 the system refuses ``what``, as where its descriptors or threads are used up."""

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    def starts(thread: threading.Thread) -> None:
        if thread.name == "zeropipe reader":
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            places = {"pipe": (os, "pipe"), "memfd": (os, "memfd_create"), "mmap": (mmap, "mmap")}
            if what == "thread":
                patch.setattr(threading.Thread, "start", starts)
            else:
                patch.setattr(*places[what], refuses)
        return begin_anew(rank, size, "auto", False, folder)


@pytest.mark.parametrize("what", ["pipe", "thread", "memfd", "mmap"])
def test_where_one_rank_lacks_what_it_takes_all_go_by_messages(pool: Pools, tmp_path: Any, what: str) -> None:
    """A rank that had found out after the others counted on it raised alone, and they waited."""
    outcomes = pool(2).run_faulty(lacks, what, str(tmp_path))
    assert [o.value for o in outcomes] == [(False, [], "")] * 2, outcomes


def agreed(rank: int, size: int, way: str, folder: str) -> list[str]:
    """What is said in order to choose, where the ranks know that they ask for the same."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
    os.environ[VARIABLE] = way
    with record() as events:
        choose_transport(agreed=world())
    assert ONE_SIDED.met(world())
    return [event.label for event in events]


@pytest.mark.parametrize(("way", "said"), [("", 3), ("messages", 0), ("native", 0), ("auto", 3)])
def test_no_word_is_needed_where_nobody_asks_for_it(pool: Pools, tmp_path: Any, way: str, said: int) -> None:
    outcomes = pool(2).run_faulty(agreed, way, str(tmp_path))
    assert [o.value for o in outcomes] == [["transports"] * said] * 2, outcomes


def initialized(rank: int, size: int, way: str) -> str:
    os.environ[VARIABLE] = way
    try:
        train(rank, size, partial(build, TinyGPT), gpt_batch, config(1, size), 1)
    except DesyncError as error:
        return str(error)
    return ""


def test_ranks_that_ask_for_different_ways_learn_it_from_initialize(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(initialized, PerRank(["", "messages"]))
    assert all(f"{VARIABLE}: rank 1 has 'messages'" in o.value for o in outcomes), outcomes


def test_unset_is_auto(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(initialized, PerRank(["", "auto"]))
    assert [o.value for o in outcomes] == ["", ""], outcomes


def named_memory(rank: int, size: int) -> tuple[list[str], list[str]]:
    """What this process has mapped or open that has a name in some file system in memory, and the shared memory that it
    has without one."""
    assert both_ways(rank, size, 70_001, torch.float32)
    exposed = expose(1000, torch.float32, world(), 1)
    assert exposed is not None
    with open("/proc/self/maps") as maps:
        there = [line.split(maxsplit=5)[5].strip() for line in maps if "/dev/shm" in line or "memfd" in line]
    named: list[str] = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that of the listing itself is gone
            name = os.readlink(f"/proc/self/fd/{number}")
            if "/dev/shm" in name or "memfd" in name:
                there.append(name)
                if os.stat(f"/proc/self/fd/{number}").st_nlink:
                    named.append(name)
    return named + [name for name in there if "/dev/shm" in name], there


def test_there_is_no_file_that_a_kill_could_leave(pool: Pools) -> None:
    """Nor one that a container's small /dev/shm could have no room for: the memory of words and of masters is of no
    file system that somebody has mounted, and is gone with those who have it mapped."""
    for named, there in pool(2).run(named_memory):
        assert named == []
        assert set(there) == {"/memfd:zeropipe words (deleted)", "/memfd:zeropipe shards (deleted)"}


LARGE = 2**26  # bytes


def shared_memory() -> int:
    """Bytes of this host's memory that is nobody's alone."""
    with open("/proc/meminfo") as lines:
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


def expose_much(rank: int, size: int) -> int:
    before = shared_memory()
    comm.barrier(world())
    exposed = expose(LARGE // 4, torch.float32, world(), 1)
    assert exposed is not None
    exposed.own.fill_(1)
    comm.barrier(world())
    made = shared_memory() - before
    comm.barrier(world())
    point("exposed")
    return made


def test_no_memory_is_left_by_a_kill(pool: Pools) -> None:
    before = shared_memory()
    outcomes = pool(2).run_faulty(expose_much, kill={0: "exposed", 1: "exposed"})
    assert [outcome.kind for outcome in outcomes] == ["died", "died"], outcomes
    for made in pool(2).run(expose_much):
        assert made > 1.5 * LARGE, "what is measured below"
    pool(2).close()
    end = time.monotonic() + SOON
    while shared_memory() > before + LARGE // 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert shared_memory() < before + LARGE // 2


def let_go_of(rank: int, size: int) -> list[int]:
    """How often memory of masters is mapped: while an engine has it, and after that has gone."""

    def mapped() -> int:
        gc.collect()
        with open("/proc/self/maps") as maps:
            return sum("zeropipe shards" in line for line in maps)

    counts = [mapped()]
    for _ in range(2):
        engine = engine_of(Stack(2), 3, size)
        counts.append(mapped())
        engine.destroy()
        zero.unshard_module(engine.module)
        del engine
        counts.append(mapped())
    return counts


@pytest.mark.parametrize("size", [2, 3])
def test_memory_that_masters_lay_in_goes_with_the_engine(pool: Pools, size: int) -> None:
    for before, here, after, again, end in pool(size).run(let_go_of):
        assert here - before == again - after == size
        assert after == end == before


def forked(rank: int, size: int) -> bool:
    """A child has its parent's lines and must not keep them, or nobody would see the parent die."""
    child = os.fork()
    if not child:
        os._exit(0 if ONE_SIDED.peer(world(), 1 - rank, LEAST) is None else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and both_ways(
        rank, size, 5000, torch.float32
    )


def test_a_forked_child_takes_no_part(pool: Pools) -> None:
    assert all(pool(2).run(forked))


def asked_in_a_child(rank: int, size: int, stage: int) -> list[str]:
    torch.manual_seed(0)
    engine = engine_of(nn.Linear(8, 8), stage, size)
    calls: list[Callable[[], object]] = [lambda: comm.all_reduce(torch.ones(9), world(), label="metrics")]
    if stage == 3:
        calls.append(engine.module.state_dict)
    texts = []
    for call in calls:
        receives, sends = os.pipe()
        child = os.fork()
        if not child:
            text = "no error"
            try:
                call()
            except UsageError as error:
                text = str(error)
            finally:
                os.write(sends, text.encode())
                os._exit(0)
        os.close(sends)
        with os.fdopen(receives) as told:
            texts.append(told.read())
        os.waitpid(child, 0)
    engine.backward(engine(torch.ones(1, 8)).sum())  # of which nothing is wrong afterwards
    engine.step()
    engine.destroy()
    return texts


@pytest.mark.parametrize("stage", [0, 3])
def test_a_collective_in_a_forked_child_is_an_error_and_the_ranks_go_on(pool: Pools, stage: int) -> None:
    for rank, texts in enumerate(pool(2).run(asked_in_a_child, stage)):
        assert "all_reduce 'metrics'" in texts[0]
        for text in texts:
            assert f"[rank {rank}]" in text
            assert "forked" in text
            assert "before the fork" in text


# When memory may be written again.


def change_too_soon(rank: int, size: int) -> str:
    g, tensor = world(), torch.ones(100_000)
    ONE_SIDED.checks = True
    try:
        if rank == 0:
            work = comm.send(tensor, 1, g, async_op=True)
            tensor.add_(1)
            comm.all_reduce(torch.ones(1), g)
            work.wait()
        else:
            comm.all_reduce(torch.ones(1), g)
            comm.recv(tensor, 0, g)
    except CommunicationError as error:
        return str(error)
    return ""


def test_values_that_change_before_they_are_read_are_found(pool: Pools) -> None:
    """The instrument of the test below: each reader compares what it has read with what was published."""
    outcomes = pool(2).run_faulty(change_too_soon)
    assert "rank 0 has changed what it sent before it was read" in outcomes[1].value, outcomes


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_stage_writes_what_others_still_read(pool: Pools, stage: int) -> None:
    for size in (2, 3):
        found = pool(size).run(trained, stage, checked)
        expected = pool(size).run(trained, stage, by_messages)
        for one, other in zip(found, expected, strict=True):
            assert one["losses"] == other["losses"]
            assert all(torch.equal(one["weights"][n], other["weights"][n]) for n in other["weights"])


def late_reader(rank: int, size: int) -> float:
    """A send is over when it was read, and not before; a receive that is asked for is read whatever its rank does."""
    g, tensor = world(), torch.full((100_000,), float(rank))
    if rank == 0:
        work = comm.send(tensor, 1, g, async_op=True)
        assert not work.done()
        comm.all_reduce(torch.ones(1), g)  # now it is asked for
        work.wait()
        tensor.fill_(7.0)
        comm.barrier(g)
        return 0.0
    time.sleep(0.1)
    work = comm.recv(tensor, 0, g, async_op=True)
    comm.all_reduce(torch.ones(1), g)
    comm.barrier(g)  # the sender has been let go by a rank that waits for something else
    work.wait()
    return float(tensor.sum())


def test_a_send_is_over_when_it_was_read(pool: Pools) -> None:
    assert pool(2).run(late_reader) == [0.0, 0.0]


def full_line(rank: int, size: int) -> bool:
    """Rank 1 does not hear for a while, rank 0 says more than the line has room for, and then says nothing more."""
    g = new_group([1, 0], timedelta(seconds=5))  # in their order it would be the world
    assert g is not None
    peer, many, hears = ONE_SIDED.peer(g, 1 - g.rank, 1), 600, threading.Event()
    assert peer is not None
    if rank == 1:
        listen = ONE_SIDED.listen
        ONE_SIDED.listen = lambda peer: hears.wait() and listen(peer)  # type: ignore[method-assign]
    comm.barrier(g)
    mine, tensor = torch.ones(8), torch.zeros(8)
    if rank == 0:
        works = [comm.send(mine, 1 - g.rank, g, tag=1, async_op=True) for _ in range(many)]
        works.append(comm.send(mine, 1 - g.rank, g, tag=2, async_op=True))
        full = peer.is_full
        comm.barrier(g)
        for work in reversed(works):
            work.wait()
        return full
    comm.barrier(g)
    hears.set()
    for tag in [2] + many * [1]:
        comm.recv(tensor.zero_(), 1 - g.rank, g, tag=tag)
        assert torch.equal(tensor, mine)
    return True


def test_words_that_a_line_had_no_room_for_leave_as_soon_as_it_has(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(full_line)
    assert [o.value for o in outcomes] == [True, True], outcomes


def without_grad(rank: int, size: int) -> float:
    with torch.inference_mode():
        tensor = torch.ones(5000)
        comm.all_reduce(tensor, world())
    return float(tensor.sum())


def test_what_inference_mode_has_made_is_summed(pool: Pools) -> None:
    assert pool(2).run(without_grad) == [10_000.0] * 2


def wordless(rank: int, size: int) -> str:
    """A read that fails with an error of no text."""

    def fail(self: Memory, *args: int) -> None:
        raise MemoryError

    if rank == 1:
        Memory.read = fail  # type: ignore[method-assign]
    try:
        comm.broadcast(torch.ones(10), 0, world())
    except CommunicationError as error:
        return str(error)
    return ""


def test_a_read_that_fails_without_a_text_is_no_value(pool: Pools) -> None:
    outcomes = pool(2).run_faulty(wordless)
    assert "MemoryError" in outcomes[1].value, outcomes
    assert outcomes[0].value, outcomes


def piped(rank: int, size: int, folder: str, way: Any) -> dict[str, Any]:
    with way():
        save(rank, size, folder, 2, 1, "1f1b", True)
        return load(rank, size, folder, 2, 1, "1f1b", True)


@pytest.mark.parametrize("size", [2, 4])
def test_pipelines_and_their_checkpoints(pool: Pools, tmp_path: Any, size: int) -> None:
    found = pool(size).run(piped, str(tmp_path / "here"), checked, timeout=90)
    expected = pool(size).run(piped, str(tmp_path / "there"), by_messages, timeout=90)
    for one, other in zip(found, expected, strict=True):
        assert one["losses"] == other["losses"]
        for kind in ("masters", "moments"):
            assert all(torch.equal(one[kind][name], other[kind][name]) for name in other[kind])


# Waiting for who reads, and for who is behind.


def wait_on_the_board(rank: int, size: int, way: str) -> tuple[str, str]:
    """What rank 0 is told that waits for the others in vain, and what it is said to wait for meanwhile."""
    g = new_group(list(reversed(range(size))), timedelta(seconds=1))  # in their order it would be the world
    assert g is not None
    exposed = expose(1000, torch.float32, g, 1)
    assert exposed is not None
    rows = torch.empty(size, 1000).unbind()
    works = [
        comm.read_exposed(rows, exposed.every, exposed.talk, label="layer 1", async_op=True)
        for _ in range(2 if rank and way == "write" else 1)
    ]
    works[0].wait()
    if rank:
        time.sleep(2.5)  # it says nothing more, or wants to read once more and does not
        return "", ""
    awaited: list[str] = []
    threading.Timer(0.5, lambda: awaited.append(str(SEAM.awaited))).start()
    try:
        if way == "write":
            comm.read_exposed(rows, exposed.every, exposed.talk, label="layer 1", async_op=True)
            exposed.before_write()
        for number in range(2 * RING):
            exposed.talk.say(f"word {number}")
    except CommunicationError as error:
        return str(error), awaited[0]
    return "", ""


@pytest.mark.parametrize(
    ("way", "what"),
    [("write", "others to read what is about to be written"), ("words", "room to say 'word 128'")],
)
@pytest.mark.parametrize("size", [2, 3])
def test_a_wait_on_the_board_names_itself(pool: Pools, size: int, way: str, what: str) -> None:
    outcomes = pool(size).run_faulty(wait_on_the_board, way)
    told, awaited = outcomes[0].value
    assert awaited.startswith(f"[rank 0] {what}") and awaited.endswith(f"(with ranks {[*range(size)]})"), (
        outcomes
    )
    assert told.startswith(f"{awaited} did not complete: Timed out waiting"), outcomes


def note_that_is_heard(rank: int, size: int) -> int | None:
    """Rank 0 reads while the others have come to a meeting after that, which has a note of its own kind."""
    g = world()
    exposed = expose(1000, torch.float32, g, 1)
    assert exposed is not None
    talk, rows = exposed.talk, torch.empty(size, 1000).unbind()
    meet("forward", g, channel=1)
    talk.promise()
    comm.barrier(g)
    if rank == 0:
        comm.barrier(g)
    work = comm.read_exposed(rows, exposed.every, talk, label="layer", note=2, early=True, async_op=True)
    work.wait()
    end = talk.say("end of backward", 9)
    if rank:
        comm.barrier(g)
    end.meet()
    exposed.before_write()
    return work.lowest_note


@pytest.mark.parametrize("size", [2, 3])
def test_notes_of_meetings_are_none_of_reads(pool: Pools, size: int) -> None:
    """A rank took "nothing was written", which others said at the end of backward, for the number of reductions that
    they had started, and waited for one that they start after it."""
    assert pool(size).run(note_that_is_heard)[0] in (0, 2)
