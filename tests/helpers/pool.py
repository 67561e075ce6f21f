"""Worker processes that live for the whole test session, so that a multi-rank test costs milliseconds.

    def test_sum(pool):
        assert pool(2).run(task, 5) == [6, 6]        # task(rank, world, 5) ran on each of two gloo ranks

One pool per world size, started on first use. The workers are forked from a server that has imported torch
once; a pool of four is ready in about 0.2 s. A rank that fails or hangs fails the test with every rank's
traceback, and the pool is thrown away, because what its ranks would do next no longer agrees.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.helpers.native import Issued, compare
from tests.helpers.worker import Reply, Task, main, point, resolve

__all__ = ["Outcome", "PerRank", "Pool", "Pools", "RankFailure", "point"]

START_TIMEOUT = 180.0  # s; the first pool of a session waits for the server's `import torch`
GRACE = 3.0  # s that the other ranks have to finish or fail too, once one has failed
MAX_GROUPS = 40  # process groups that finished tasks may leave behind before the pool is renewed
# Imported once, in the server. None of them starts a thread, which a fork would lose.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest", "pydantic", "ctypes", "random"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class RankFailure(Exception):
    """A rank raised, died or hung; the message has every rank's traceback, first failure first."""


@dataclass(frozen=True, slots=True)
class PerRank:
    """An argument of ``run`` that differs by rank: rank r receives ``values[r]``."""

    values: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task on one rank."""

    rank: int
    kind: str  # "result", "error" (raised), "skipped", "died" (process gone) or "stuck" (still running)
    value: Any = None  # kind "result": what the task returned
    error: str = ""  # kind "error": the traceback; kind "stuck": where it was
    exitcode: int | None = None  # kind "died": as in subprocess, -9 for SIGKILL
    output: str = ""  # what the rank printed during the task
    seconds: float = 0.0  # from the start of the task
    issued: Issued = field(default_factory=dict)  # a native pool: what went over each communicator


class Pools:
    """``pools(world)`` is the pool of that size; the ``pool`` fixture. ``native``: see ``native.py``."""

    def __init__(self, native: bool = False) -> None:
        self._native = native
        self._pools: dict[int, Pool] = {}
        atexit.register(self.close)  # before multiprocessing's own handler, which would wait for the workers

    def __call__(self, world: int) -> Pool:
        if world not in self._pools:
            self._pools[world] = Pool(world, self._native)
        return self._pools[world]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        atexit.unregister(self.close)


class Pool:
    """``world`` processes, each one rank of an initialised gloo process group; ``native``: of one that goes by its
    own algorithms, whose ranks must issue the same collectives in the same order."""

    def __init__(self, world: int, native: bool = False) -> None:
        self.world = world
        self._native = native
        self._crew: _Crew | None = None
        self._outcomes: list[Outcome] = []

    def run(
        self, function: Callable[..., Any], *args: Any, timeout: float = 60.0, **kwargs: Any
    ) -> list[Any]:
        """Run ``function(rank, world, *args, **kwargs)`` on every rank; the results by rank.

        ``function`` must be importable (module level). Arguments and results are pickled, tensors by value.
        Each task starts with ``torch.manual_seed(0)``, one thread, fp32 as default dtype and grad enabled.

        Raises:
            RankFailure: a rank raised, died, or had not finished after ``timeout`` seconds.
        """
        __tracebackhide__ = True
        tasks = _tasks(self.world, function, args, kwargs)
        outcomes = self._attempt(tasks, timeout)
        self._outcomes = outcomes
        if all(o.kind == "skipped" for o in outcomes):
            import pytest

            pytest.skip(outcomes[0].error)
        if any(o.kind != "result" for o in outcomes):
            raise RankFailure(_report(f"{function.__module__}.{function.__qualname__}", outcomes))
        if self._native:
            compare([o.issued for o in outcomes])
        return [o.value for o in outcomes]

    def run_faulty(
        self,
        function: Callable[..., Any],
        *args: Any,
        kill: Mapping[int, float | str] | None = None,
        timeout: float = 30.0,
        **kwargs: Any,
    ) -> list[Outcome]:
        """Run a task in which ranks are meant to fail, in processes of its own; what came of each rank.

        ``kill``: rank -> seconds after the start, or the name of a ``point(name)`` that the task passes.
        Every rank may finish, raise or die in its own time; those that run after ``timeout`` seconds are
        "stuck", with their stacks. Never raises for what a rank did.
        """
        kill = kill or {}
        tasks = _tasks(self.world, function, args, kwargs, kill)
        crew = _Crew(self.world, self._native)
        try:
            times = {rank: when for rank, when in kill.items() if not isinstance(when, str)}
            outcomes = crew.perform(tasks, timeout, grace=None, kill=times)
        finally:
            crew.kill()
        self._outcomes = outcomes
        return outcomes

    def outputs(self) -> list[str]:
        """What each rank printed during the last task (stdout and stderr together)."""
        return [outcome.output for outcome in self._outcomes]

    def pids(self) -> list[int]:
        """The process ids of the ranks; starts them if need be."""
        return self._ready().pids()

    def close(self) -> None:
        """End the processes; the next ``run`` starts new ones."""
        if self._crew is not None:
            self._crew.kill()
            self._crew = None

    def _ready(self) -> _Crew:
        if self._crew is not None and not self._crew.alive():
            self.close()  # a rank died between two tasks
        if self._crew is None:
            self._crew = _Crew(self.world, self._native)
        return self._crew

    def _attempt(self, tasks: Sequence[Task], timeout: float) -> list[Outcome]:
        crew = self._ready()
        sound = False
        try:
            outcomes = crew.perform(tasks, timeout, grace=GRACE)
            sound = all(o.kind in ("result", "skipped") for o in outcomes) and crew.groups_agree()
        finally:  # also on Ctrl-C and pytest-timeout
            if not sound:
                self.close()
        return outcomes


class _Crew:
    """The processes of one life of a pool."""

    def __init__(self, world: int, native: bool) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="zeropipe-pool-"))
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.lifelines: list[Connection] = []
        self.alive_groups, self.made_groups = [0] * world, [0] * world
        context = _context()
        try:
            for rank in range(world):
                ours, theirs = context.Pipe()
                far_end, near_end = context.Pipe(duplex=False)
                args = (rank, world, str(self.folder), theirs, far_end, native)
                # Not a daemon process: tasks may start their own (data loaders do).
                process = context.Process(target=main, args=args, name=f"rank{rank}-of-{world}")
                with _environment():
                    process.start()
                theirs.close()
                far_end.close()
                self.processes.append(process)
                self.connections.append(ours)
                self.lifelines.append(near_end)
            outcomes = self._collect(START_TIMEOUT, GRACE, {}, [0] * world)
            if any(o.kind != "result" for o in outcomes):
                raise RankFailure(_report(f"the start of a pool of {world}", outcomes))
        except BaseException:
            self.kill()
            raise

    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def groups_agree(self) -> bool:
        """Whether the next task can make groups: few are left over, and all ranks name the next one alike."""
        few = 1 <= min(self.alive_groups) <= max(self.alive_groups) <= MAX_GROUPS
        return few and len(set(self.made_groups)) == 1

    def perform(
        self,
        tasks: Sequence[Task],
        timeout: float,
        grace: float | None,
        kill: Mapping[int, float] | None = None,
    ) -> list[Outcome]:
        marks = [self._size(rank) for rank in range(len(tasks))]
        for connection, task in zip(self.connections, tasks, strict=True):
            with contextlib.suppress(OSError):  # it died just now: _collect will say so
                connection.send_bytes(pickle.dumps(task))
        return self._collect(timeout, grace, dict(kill or {}), marks)

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for end in (*self.connections, *self.lifelines):
            end.close()
        for process in self.processes:
            process.join(10)
            with contextlib.suppress(ValueError):
                process.close()
        self.processes, self.connections, self.lifelines = [], [], []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _collect(
        self, timeout: float, grace: float | None, kill: dict[int, float], marks: Sequence[int]
    ) -> list[Outcome]:
        """Wait until every rank has replied or died, or time is up. First failures come with fewer seconds."""
        start = time.monotonic()
        deadline = start + timeout
        done: dict[int, Outcome] = {}
        pending = set(range(len(self.processes)))
        while pending and (now := time.monotonic()) < deadline:
            for rank in [r for r, after in kill.items() if now >= start + after]:
                del kill[rank]
                self.processes[rank].kill()
            alarm = min([deadline, *(start + after for after in kill.values())])
            sources = {self.connections[r]: r for r in pending} | {
                self.processes[r].sentinel: r for r in pending
            }
            ready = {sources[source] for source in wait(list(sources), max(0.0, alarm - now))}
            for rank in sorted(ready):
                outcome = self._outcome(rank, time.monotonic() - start)
                done[rank] = outcome
                pending.discard(rank)
                if grace is not None and outcome.kind not in ("result", "skipped"):
                    deadline = min(deadline, time.monotonic() + grace)
        stacks = self._stacks(sorted(pending))
        for rank in pending:
            done[rank] = Outcome(rank, "stuck", error=stacks[rank], seconds=time.monotonic() - start)
        return [
            replace(o, output=self._output(o.rank, marks))
            for o in (done[rank] for rank in range(len(self.processes)))
        ]

    def _outcome(self, rank: int, seconds: float) -> Outcome:
        """What rank has to say: a reply that it sent before it died counts."""
        try:
            if self.connections[rank].poll():
                reply: Reply = pickle.loads(self.connections[rank].recv_bytes())
                self.alive_groups[rank], self.made_groups[rank] = reply.alive_groups, reply.made_groups
                value = pickle.loads(reply.payload) if reply.payload else None
                return Outcome(rank, reply.kind, value, reply.error, seconds=seconds, issued=reply.issued)
        except (EOFError, ConnectionError):
            pass
        except Exception as error:
            text = f"the task's result cannot be unpickled here: {type(error).__name__}: {error}"
            return Outcome(rank, "error", error=text, seconds=seconds)
        self.processes[rank].join(10)
        return Outcome(rank, "died", exitcode=self.processes[rank].exitcode, seconds=seconds)

    def _stacks(self, ranks: Sequence[int]) -> dict[int, str]:
        """Where each rank is now, by faulthandler, which works in a process that is stuck in C too."""
        files = {rank: self.folder / f"rank{rank}.stacks" for rank in ranks}
        before = {rank: file.stat().st_size if file.exists() else -1 for rank, file in files.items()}
        for rank in ranks:
            if before[rank] >= 0:  # else the handler is not set yet, and the signal would kill it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid, signal.SIGUSR1)
        found = dict.fromkeys(ranks, "")
        for rank in ranks:
            end = time.monotonic() + 1.0
            while before[rank] >= 0 and time.monotonic() < end and files[rank].stat().st_size == before[rank]:
                time.sleep(0.01)
            time.sleep(0.02)
            text = files[rank].read_text()[max(before[rank], 0) :] if before[rank] >= 0 else ""
            threads = [t for t in text.split("\n\n") if "_die_with_parent" not in t]
            found[rank] = "\n\n".join(threads).strip() or "(no stack: the process did not react)"
        return found

    def _size(self, rank: int) -> int:
        return (self.folder / f"rank{rank}.out").stat().st_size

    def _output(self, rank: int, marks: Sequence[int]) -> str:
        file = self.folder / f"rank{rank}.out"
        return file.read_bytes()[marks[rank] :].decode(errors="replace") if file.exists() else ""


def start_server() -> None:
    """Start the server that imports torch, in the background, so that the first pool waits less."""
    from multiprocessing import forkserver

    _context()
    with _environment():
        forkserver.ensure_running()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """The server's environment, which the workers inherit: threads are fixed when torch is imported."""
    extra = dict(ENVIRONMENT)
    if os.path.exists("/sys/class/net/lo"):
        extra.setdefault("GLOO_SOCKET_IFNAME", "lo")  # this machine's name may resolve to nothing
    old = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _tasks(
    world: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    kill: Mapping[int, float | str] | None = None,
) -> list[Task]:
    module, qualname = _name(function)
    for value in (*args, *kwargs.values()):
        if isinstance(value, PerRank) and len(value.values) != world:
            raise ValueError(f"PerRank holds {len(value.values)} values for a pool of {world}")

    def own(value: Any, rank: int) -> Any:
        return value.values[rank] if isinstance(value, PerRank) else value

    tasks = []
    for rank in range(world):
        payload = ([own(a, rank) for a in args], {k: own(v, rank) for k, v in kwargs.items()})
        when = (kill or {}).get(rank, "")
        tasks.append(Task(module, qualname, pickle.dumps(payload), when if isinstance(when, str) else ""))
    return tasks


def _name(function: Callable[..., Any]) -> tuple[str, str]:
    """Module and qualified name, checked: workers import the function, they do not receive its code."""
    module, qualname = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    problem = None
    if not module or not qualname:
        problem = "has no name of its own (a partial or a callable object?)"
    elif "<lambda>" in qualname:
        problem = "is a lambda"
    elif "<locals>" in qualname:
        problem = "is defined inside another function"
    elif module == "__main__":
        problem = "is defined in the script that is run"
    else:
        try:
            if resolve(module, qualname) != function:
                problem = f"is not what {module}.{qualname} names (a decorated function or a bound method?)"
        except (ImportError, AttributeError) as error:
            problem = f"cannot be imported as {module}.{qualname} ({error})"
    if problem:
        raise TypeError(
            f"pool.run cannot send {function!r}: it {problem}. Fix: move it to the top level of a module "
            "under tests/ and pass what it needs as arguments"
        )
    assert module is not None
    assert qualname is not None
    return module, qualname


def _report(what: str, outcomes: Sequence[Outcome]) -> str:
    """Every rank's story, the first to fail first, those that were fine last."""
    order = {"error": 0, "died": 0, "skipped": 1, "stuck": 2, "result": 3}
    lines = [f"{what} failed on {sum(o.kind != 'result' for o in outcomes)} of {len(outcomes)} ranks"]
    for o in sorted(outcomes, key=lambda o: (order[o.kind], o.seconds)):
        title = {
            "error": f"raised after {o.seconds:.2f} s",
            "died": f"died after {o.seconds:.2f} s, exit code {o.exitcode}",
            "stuck": f"was still running after {o.seconds:.2f} s",
            "skipped": "skipped",
            "result": "finished",
        }[o.kind]
        lines.append(f"\n---- rank {o.rank} {title} " + "-" * 40)
        if o.error:
            lines.append(o.error.rstrip())
        if o.kind != "result" and o.output.strip():
            # How it began, too: C++ says why it ends a process before Python's handler prints where that was.
            shown = o.output if len(o.output) <= 6000 else f"{o.output[:2000]}\n[...]\n{o.output[-4000:]}"
            lines.append(f"output of rank {o.rank}:\n{shown.rstrip()}")
    return "\n".join(lines)
