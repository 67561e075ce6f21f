"""The pool itself: everything else stands on it, so it must fail well."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.helpers.pool import PerRank, Pools, RankFailure, point
from tests.helpers.worker import sleep_without_gil


def echo(rank: int, world: int, *args: object, **kwargs: object) -> tuple[object, ...]:
    return (rank, world, args, kwargs)


def pid(rank: int, world: int) -> int:
    return os.getpid()


def reduce_ones(rank: int, world: int) -> torch.Tensor:
    total = torch.full((3,), float(rank + 1))
    dist.all_reduce(total)
    return total


def raise_on(rank: int, world: int, bad: int) -> None:
    if rank == bad:
        value = 41
        assert value == 42, "the odd one"
    dist.barrier()


def raise_everywhere(rank: int, world: int) -> None:
    raise ValueError(f"message of rank {rank}")


def hang_in_collective(rank: int, world: int) -> None:
    if rank == 0:
        dist.barrier()  # the others never come


def hang_in_c(rank: int, world: int) -> None:
    if rank == 1:
        sleep_without_gil(60)


def exit_with(rank: int, world: int, code: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os._exit(code)
    dist.barrier()


def spoil_state(rank: int, world: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    torch.manual_seed(99 + rank)


def show_state(rank: int, world: int) -> tuple[object, ...]:
    state = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    return (*state, torch.rand(1).item())


def talk(rank: int, world: int) -> None:
    print(f"out {rank}")
    print(f"err {rank}", file=sys.stderr)


def make_groups(rank: int, world: int, count: int) -> int:
    for _ in range(count):
        dist.new_group(list(range(world)))
    return os.getpid()


def leave_the_group(rank: int, world: int) -> int:
    dist.destroy_process_group()
    return os.getpid()


def unsendable(rank: int, world: int) -> object:
    return (lambda: rank) if rank == 1 else None


def skip_all(rank: int, world: int) -> None:
    pytest.skip("not today")


def pass_points(rank: int, world: int) -> int:
    point("before")
    dist.barrier()
    point("middle")
    dist.barrier()
    return rank


def wait_for_nobody(rank: int, world: int) -> None:
    while True:
        time.sleep(0.1)


def finish_train_step(rank: int, world: int) -> float:
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return model.weight.sum().item()


@pytest.fixture
def fresh() -> Pools:
    """Pools of our own, so that what is broken here does not touch the session's."""
    pools = Pools()
    yield pools
    pools.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_runs_once_in_one_group(pool: Pools, world: int) -> None:
    assert pool(world).run(echo, 1, key="v") == [(r, world, (1,), {"key": "v"}) for r in range(world)]
    total = float(sum(range(1, world + 1)))
    for tensor in pool(world).run(reduce_ones):
        assert tensor.tolist() == [total] * 3


def test_processes_are_reused_and_differ(pool: Pools) -> None:
    first, second = pool(2).run(pid), pool(2).run(pid)
    assert first == second == pool(2).pids()
    assert len({*first, os.getpid()}) == 3


def test_a_task_in_running_ranks_costs_milliseconds(pool: Pools) -> None:
    pool(2).run(pid)
    best = min(_timed(pool, pid) for _ in range(5))
    assert best < 0.5  # about 0.01 s on an idle machine


def _timed(pool: Pools, task: object) -> float:
    start = time.perf_counter()
    pool(2).run(task)
    return time.perf_counter() - start


def test_tensors_travel_both_ways(pool: Pools) -> None:
    sent = torch.arange(5, dtype=torch.bfloat16)
    for _, _, (received,), _ in pool(2).run(echo, sent):
        assert received.dtype == torch.bfloat16
        assert torch.equal(received, sent)


def test_arguments_may_differ_by_rank(pool: Pools) -> None:
    assert [r[2] for r in pool(2).run(echo, PerRank("ab"), 7)] == [("a", 7), ("b", 7)]
    with pytest.raises(ValueError, match="3 values for a pool of 2"):
        pool(2).run(echo, PerRank([1, 2, 3]))


def test_one_failing_rank_fails_with_every_ranks_story(fresh: Pools) -> None:
    before = fresh(3).run(pid)
    with pytest.raises(RankFailure) as caught:
        fresh(3).run(raise_on, 1)
    text = str(caught.value)
    assert text.index("rank 1 raised") < text.index("rank 0 was still running")
    assert "rank 2 was still running" in text
    assert "the odd one" in text
    assert "assert 41 == 42" in text  # rewritten in the worker
    assert "in raise_on" in text
    assert set(before).isdisjoint(fresh(3).run(pid))  # the pool was renewed, and works
    for process in before:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_each_ranks_own_exception_is_shown(fresh: Pools) -> None:
    with pytest.raises(RankFailure) as caught:
        fresh(2).run(raise_everywhere)
    assert "ValueError: message of rank 0" in str(caught.value)
    assert "ValueError: message of rank 1" in str(caught.value)


def test_a_rank_that_hangs_is_named_with_its_stack(fresh: Pools) -> None:
    fresh(2).run(pid)
    start = time.monotonic()
    with pytest.raises(RankFailure) as caught:
        fresh(2).run(hang_in_collective, timeout=1.0)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    assert re.search(r"rank 0 was still running[\s\S]*in hang_in_collective", text)
    assert "rank 1 finished" in text
    assert "_die_with_parent" not in text
    assert fresh(2).run(echo)[1][0] == 1


def test_a_rank_that_never_releases_the_interpreter_is_named_too(fresh: Pools) -> None:
    fresh(2).run(pid)
    with pytest.raises(RankFailure, match=r"rank 1 was still running[\s\S]*in hang_in_c"):
        fresh(2).run(hang_in_c, timeout=1.0)


def test_a_rank_that_dies_is_told_with_its_last_words(fresh: Pools) -> None:
    with pytest.raises(RankFailure) as caught:
        fresh(2).run(exit_with, 7)
    assert "rank 1 died" in str(caught.value)
    assert "exit code 7" in str(caught.value)
    assert "last words" in str(caught.value)


def test_a_rank_killed_between_tasks_is_replaced(fresh: Pools) -> None:
    victim = fresh(2).pids()[0]
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.1)
    assert victim not in fresh(2).run(pid)


def test_state_is_reset_between_tasks(pool: Pools) -> None:
    fresh_state = pool(2).run(show_state)
    pool(2).run(spoil_state)
    assert pool(2).run(show_state) == fresh_state
    assert fresh_state[0] == fresh_state[1]
    assert fresh_state[0][:3] == (torch.float32, True, 1)


def test_output_is_kept_per_rank_and_task(pool: Pools) -> None:
    pool(2).run(talk)
    assert pool(2).outputs() == ["out 0\nerr 0\n", "out 1\nerr 1\n"]
    pool(2).run(pid)
    assert pool(2).outputs() == ["", ""]


def test_a_few_left_over_groups_are_fine_many_renew_the_pool(fresh: Pools) -> None:
    first = fresh(2).run(make_groups, 3)
    assert fresh(2).run(make_groups, 3) == first
    assert fresh(2).run(make_groups, 40) == first
    assert fresh(2).run(pid) != first


def test_a_task_may_end_the_default_group(fresh: Pools) -> None:
    first = fresh(2).run(leave_the_group)
    assert fresh(2).run(reduce_ones)[0].tolist() == [3.0] * 3
    assert fresh(2).run(pid) != first


def test_functions_that_cannot_be_sent_are_refused(pool: Pools) -> None:
    def nested(rank: int, world: int) -> None: ...

    for function, why in (
        (lambda rank, world: None, "is a lambda"),
        (nested, "inside another function"),
        (partial(echo), "has no name"),
    ):
        with pytest.raises(TypeError, match=why):
            pool(2).run(function)


def test_a_result_that_cannot_be_pickled_is_told(fresh: Pools) -> None:
    with pytest.raises(RankFailure, match=r"rank 1 raised[\s\S]*cannot be sent back"):
        fresh(2).run(unsendable)


def test_a_task_can_skip(pool: Pools) -> None:
    with pytest.raises(pytest.skip.Exception, match="not today"):
        pool(2).run(skip_all)


def test_autograd_and_optimizers_work_in_forked_workers(pool: Pools) -> None:
    first, second = pool(2).run(finish_train_step)
    assert first == second


def test_kill_at_a_named_point(pool: Pools) -> None:
    outcomes = pool(3).run_faulty(pass_points, kill={1: "middle"})
    assert [o.kind for o in outcomes] == ["error", "died", "error"]
    assert outcomes[1].exitcode == -signal.SIGKILL
    assert "in pass_points" in outcomes[0].error
    outcomes = pool(2).run_faulty(pass_points, kill={1: "a point that is never passed"})
    assert [(o.kind, o.value) for o in outcomes] == [("result", 0), ("result", 1)]


def test_kill_after_a_time_and_stuck_ranks_are_bounded(pool: Pools) -> None:
    start = time.monotonic()
    outcomes = pool(2).run_faulty(wait_for_nobody, kill={0: 0.3}, timeout=1.5)
    assert time.monotonic() - start < 20
    assert (outcomes[0].kind, outcomes[0].exitcode) == ("died", -signal.SIGKILL)
    assert outcomes[1].kind == "stuck"
    assert "in wait_for_nobody" in outcomes[1].error
    assert pool(2).run(echo)[0][0] == 0  # the session's own pool was not touched
