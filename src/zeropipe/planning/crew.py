"""Real ranks on this machine, forked from a process that has computed nothing yet, so that a start costs no import."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from zeropipe.comm.group import init_distributed
from zeropipe.errors import UsageError

_GRACE = 2.0  # seconds that the others have once one has failed


def _play(task: Callable[[int], Any], rank: int, size: int, store: str, out: Connection) -> None:
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
        )
        init_distributed(init_method=f"file://{store}", rank=rank, world_size=size)
        found: tuple[bool, Any] = True, task(rank)
    except BaseException:  # a signal's too: whoever waits is told what the rank was doing
        found = False, traceback.format_exc()
    out.send(found)
    out.close()
    # Not through the interpreter's end, which would wait for what other ranks hold.
    os._exit(0)


def crew(task: Callable[[int], Any], size: int, seconds: float = 120.0) -> list[Any]:
    """What ``task(rank)`` returns on each of ``size`` ranks of a world; its results travel as pickles.

    Raises UsageError where a rank raises (with its traceback), dies, or has not ended after ``seconds``.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ends = [context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            context.Process(target=_play, args=(task, rank, size, store, ends[rank][1]), daemon=True)
            for rank in range(size)
        ]
        try:
            for process, (_, out) in zip(processes, ends, strict=True):
                process.start()
                out.close()
            return _collect([end for end, _ in ends], seconds)
        finally:
            for process in processes:
                if process.is_alive() and process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
                process.join()


def _collect(ends: list[Connection], seconds: float) -> list[Any]:
    results: dict[int, Any] = {}
    failed: dict[int, str] = {}
    until = time.monotonic() + seconds
    while len(results) + len(failed) < len(ends):
        left = [rank for rank in range(len(ends)) if rank not in results and rank not in failed]
        ready = wait([ends[rank] for rank in left], max(0.0, until - time.monotonic()))
        if not ready:
            late = "waits for the others" if failed else f"no end after {seconds:.0f} s"
            failed.update(dict.fromkeys(left, late))
        for rank in left:
            if ends[rank] not in ready:
                continue
            try:
                fine, value = ends[rank].recv()
            except EOFError:
                fine, value = False, "died"
            (results if fine else failed)[rank] = value
            if not fine:
                until = min(until, time.monotonic() + _GRACE)
    if failed:
        raise UsageError(
            f"{len(failed)} of {len(ends)} ranks failed",
            found="; ".join(f"[rank {r}] {e}" for r, e in failed.items()),
        )
    return [results[rank] for rank in range(len(ends))]
