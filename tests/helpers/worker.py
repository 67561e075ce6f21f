"""The loop that a pool's worker process runs: receive a task, run it, send back what came of it.

Kept apart from the pool so that a worker imports only what it needs, and so that nothing here can start
processes. See ``pool.py`` for the parent's side.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import os
import pickle
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests.helpers.native import BACKEND, Issued, Log

GLOO_TIMEOUT = timedelta(minutes=10)  # longer than any task may take: the pool's own timeout reports better


@dataclass(frozen=True, slots=True)
class Task:
    """One call, by name, so that no code is pickled."""

    module: str
    qualname: str
    payload: bytes  # pickled (args, kwargs)
    die_at: str = ""  # name of the point() at which this rank kills itself


@dataclass(frozen=True, slots=True)
class Reply:
    kind: str  # "result", "error" or "skipped"
    payload: bytes = b""  # pickled result
    error: str = ""  # traceback, or the reason of the skip
    alive_groups: int = 0  # process groups in the worker afterwards, the default one included
    made_groups: int = 0  # torch's counter of groups made so far, which names the next one
    issued: Issued = field(default_factory=dict)  # a native pool: what went over each communicator


@dataclass(slots=True)
class _Worker:
    """What ``point`` needs to know; one per process, set before each task."""

    die_at: str = ""
    seen: list[str] = field(default_factory=list)


_worker = _Worker()


def point(name: str) -> None:
    """A place in a task where ``run_faulty(kill={rank: name})`` kills this rank, as ``kill -9`` would."""
    _worker.seen.append(name)
    if _worker.die_at == name:
        os.kill(os.getpid(), signal.SIGKILL)


def resolve(module: str, qualname: str) -> Any:
    """The object that ``module.qualname`` names."""
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found


def main(
    rank: int, world: int, folder: str, tasks: Connection, lifeline: Connection, native: bool = False
) -> None:
    """Entry of a worker process; returns (and so ends the process) when the pool closes the connection."""
    gc.freeze()  # what the server imported is never garbage, and touching it would unshare its memory
    _redirect(f"{folder}/rank{rank}.out")
    threading.Thread(target=_die_with_parent, args=(lifeline,), name="lifeline", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool decides what Ctrl-C means
    stacks = open(f"{folder}/rank{rank}.stacks", "w")  # noqa: SIM115  # faulthandler keeps it open
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(file=sys.stderr)

    import tests.helpers.rewrite  # noqa: F401  # a failing assert in a rank shows its values

    try:
        import torch.distributed as dist

        store = dist.FileStore(f"{folder}/store", world)
        log = Log.install() if native else None
        backend = BACKEND if native else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=GLOO_TIMEOUT)
        _share_memory()
        _reset()
        tasks.send_bytes(pickle.dumps(Reply("result", b"", "", *_groups())))
    except BaseException:
        tasks.send_bytes(pickle.dumps(Reply("error", error=traceback.format_exc())))
        return
    while True:
        try:
            task = pickle.loads(tasks.recv_bytes())
        except EOFError:
            os._exit(0)  # not a clean exit: gloo's own shutdown may wait for peers that are gone
        reply = _run(rank, world, task)
        _reset()
        if log is not None:
            reply = replace(reply, issued=log.take())
        sys.stdout.flush()
        sys.stderr.flush()
        tasks.send_bytes(pickle.dumps(reply))


def _share_memory() -> None:
    """As ``initialize`` does, for tasks that make no engine."""
    from zeropipe.comm.group import world
    from zeropipe.comm.host.choosing import choose_transport

    choose_transport(world())


def _run(rank: int, world: int, task: Task) -> Reply:
    _worker.die_at, _worker.seen = task.die_at, []
    try:
        function: Callable[..., Any] = resolve(task.module, task.qualname)
        args, kwargs = pickle.loads(task.payload)
        value = function(rank, world, *args, **kwargs)
        del args, kwargs
    except BaseException as error:
        text = traceback.format_exc()
        kind = "error"
        outcomes = sys.modules.get("_pytest.outcomes")
        if outcomes is not None and isinstance(error, outcomes.Skipped):
            kind, text = "skipped", str(error)
        del error
        return Reply(kind, b"", text, *_groups())
    try:
        return Reply("result", pickle.dumps(value), "", *_groups())
    except BaseException:
        text = f"the task's result ({type(value).__name__}) cannot be sent back:\n{traceback.format_exc()}"
        return Reply("error", b"", text, *_groups())


def _groups() -> tuple[int, int]:
    import torch.distributed as dist

    if not dist.is_initialized():
        return 0, 0
    world = dist.distributed_c10d._world
    return len(world.pg_names), world.group_count


def _reset() -> None:
    """Each task starts from the same process state."""
    import torch

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.set_autocast_enabled("cpu", False)
    torch.manual_seed(0)
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    gc.collect()


def _redirect(path: str) -> None:
    """Send this process's output, C++'s too, to a file that the pool quotes when something is wrong."""
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _die_with_parent(lifeline: Connection) -> None:
    """End this process, however stuck, once the pool's process is gone.

    Blocks until the parent's end of the pipe closes, which the kernel does even after ``kill -9``.
    """
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGKILL)


def sleep_without_gil(seconds: float) -> None:
    """Block in C without releasing the GIL: the worst kind of stuck rank, for the pool's own tests."""
    libc = ctypes.PyDLL(None)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        libc.usleep(ctypes.c_uint(200_000))
