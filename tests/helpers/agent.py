"""An agent as torchrun's, which starts all ranks anew when one ends, in milliseconds instead of seconds.

    agent process (has imported torch and zeropipe; forked from the pool's server)
      |- fork: rank 0 ... rank N-1 of life 0 --- one dies -> SIGTERM to the others, wait
      |- fork: rank 0 ... rank N-1 of life 1 --- all end well -> done

    lives = survive(task, args, worlds=[4, 4, 3], harms=[[Harm(rank=2, event=17)], []])

``task(*args)`` runs in each rank with torchrun's environment. A rank does itself what a `Harm` says: at the
``event``-th collective after ``arm()``, or ``delay`` seconds later, it is sent a signal.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.pool import _context, _environment
from tests.helpers.worker import resolve

STOPPED_WITHIN = 30.0  # s that torchrun gives ranks after SIGTERM


@dataclass(frozen=True, slots=True)
class Harm:
    """What happens to a rank of one life."""

    rank: int
    event: int = 0  # the collective, counted from ``arm()``, at which it happens
    delay: float = 0.0  # s after it
    number: int = signal.SIGKILL
    label: str = ""  # only collectives whose label has this count


@dataclass(slots=True)
class Life:
    """One start of all ranks."""

    world: int
    began: float  # s, of the monotonic clock
    ended: dict[int, float] = field(default_factory=dict)  # by rank
    codes: dict[int, int] = field(default_factory=dict)  # as in subprocess: -9 for SIGKILL
    output: dict[int, str] = field(default_factory=dict)

    @property
    def well(self) -> bool:
        return not any(self.codes.values())

    def text(self) -> str:
        return "\n".join(f"--- rank {r} ({self.codes[r]}):\n{t[-3000:]}" for r, t in self.output.items())


def survive(
    task: Callable[..., object],
    args: Sequence[Any],
    worlds: Sequence[int],
    harms: Sequence[Sequence[Harm]] = (),
    timeout: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Life]:
    """Run ``task(*args)`` until a life ends well or ``worlds`` has no more; each life once all of the last are gone."""
    context = _context()
    ours, theirs = context.Pipe()
    asked = (task.__module__, task.__qualname__, args, list(worlds), list(harms), environment or {})
    with _environment():
        process = context.Process(target=_agent, args=(theirs, pickle.dumps(asked)))
        process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise TimeoutError(f"no end after {timeout} s")
        return ours.recv()
    finally:
        process.kill()  # its ranks end with it: PR_SET_PDEATHSIG
        process.join(10)


def arm() -> None:
    """From here on a rank's collectives count for its harms."""
    from zeropipe.comm.record import SEAM

    harms: list[Harm] = pickle.loads(bytes.fromhex(os.environ["TEST_HARMS"]))
    if not harms:
        return
    seen = [0] * len(harms)

    def listen(event: Any) -> None:
        for at, harm in enumerate(harms):
            if harm.label not in event.label:
                continue
            if seen[at] == harm.event:
                later = f", {1000 * harm.delay:.0f} ms later" if harm.delay else ""
                os.write(1, f"harmed at {event.op} {event.label!r}{later}\n".encode())
                if harm.delay:
                    threading.Timer(harm.delay, os.kill, (os.getpid(), harm.number)).start()
                else:
                    os.kill(os.getpid(), harm.number)
            seen[at] += 1

    SEAM.listeners.append(listen)


def _agent(replies: Connection, asked: bytes) -> None:
    module, qualname, args, worlds, harms, environment = pickle.loads(asked)
    # Whatever a rank imports is imported here, once.
    import zeropipe.entry  # noqa: F401
    from zeropipe.runtime.resilience import loop  # noqa: F401

    task = resolve(module, qualname)
    lives = []
    with tempfile.TemporaryDirectory(prefix="zeropipe-agent-") as folder:
        for number, world in enumerate(worlds):
            mine = harms[number] if number < len(harms) else []
            lives.append(_live(Path(folder), number, world, mine, len(worlds) - 1, task, args, environment))
            if lives[-1].well:
                break
    replies.send(lives)


def _live(
    folder: Path,
    number: int,
    world: int,
    harms: Sequence[Harm],
    restarts: int,
    task: Callable[..., object],
    args: Sequence[Any],
    environment: dict[str, str],
) -> Life:
    life, ranks = Life(world, time.monotonic()), {}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            told = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "TORCHELASTIC_RESTART_COUNT": number, "TORCHELASTIC_MAX_RESTARTS": restarts,
                "TORCHELASTIC_RUN_ID": f"test-{os.getppid()}", "TEST_BEGAN": life.began,
                "TEST_HARMS": pickle.dumps([h for h in harms if h.rank == rank]).hex(),
            }  # fmt: skip
            os.environ.update({name: str(value) for name, value in told.items()} | environment)
            _rank(f"{folder}/{number}-{rank}", task, args)
        ranks[pid] = rank
    deadline = None
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = ranks.pop(pid)
            life.codes[rank], life.ended[rank] = os.waitstatus_to_exitcode(status), time.monotonic()
            if life.codes[rank] and deadline is None:
                deadline = time.monotonic() + STOPPED_WITHIN
                for other in ranks:
                    os.kill(other, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.005)
    for rank in sorted(life.codes):
        life.output[rank] = Path(f"{folder}/{number}-{rank}").read_text(errors="replace")
    return life


def _rank(output: str, task: Callable[..., object], args: Sequence[Any]) -> None:
    """In a new process, which does not return."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with the agent
    atexit._clear()  # the agent's own
    out = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        task(*args)
        code = 0
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else 1
    except BaseException as error:
        sys.last_value = error  # as an interpreter does
        traceback.print_exc()
    with suppress(Exception):  # as an interpreter that ends: writers are waited for
        threading._shutdown()
        atexit._run_exitfuncs()
    os._exit(code)
