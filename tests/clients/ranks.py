"""Fresh ranks for each scenario, without paying for the clients' imports each time.

    def test_losses(ranks):
        assert ranks.run("trainer_tasks.losses", 2, stage=3)[0] == ...   # ran on two new processes

Clients keep much state in their process (Accelerate's is a set of singletons), so every run gets processes of its
own, with the environment that torchrun gives. They are forked from a server that has imported the clients once:
a second instead of twenty. Tasks are named by text, so that the tests themselves import no client.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.helpers.pool import Outcome, RankFailure, _report

PRELOAD = [
    *("torch", "torch.distributed", "torch._dynamo", "numpy", "pytest", "pydantic"),
    *("transformers", "transformers.trainer", "transformers.models.llama.modeling_llama", "datasets"),
    *("accelerate", "peft", "trl", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"),
    *("trl.trainer.grpo_trainer", "lightning.pytorch", "lightning.fabric"),
]
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
}
GRACE = 5.0  # s that the other ranks have to fail too, once one has failed


class Ranks:
    """Runs tasks of ``tests.clients`` on ranks; the ``ranks`` fixture."""

    def run(self, task: str, world: int = 2, *, timeout: float = 150.0, **kwargs: Any) -> list[Any]:
        """The results of ``tests.clients.<task>(rank, world, **kwargs)``, by rank.

        Raises:
            RankFailure: a rank raised, died, or had not finished after ``timeout`` seconds; with every story.
        """
        __tracebackhide__ = True
        folder = Path(tempfile.mkdtemp(prefix="zeropipe-clients-"))
        try:
            outcomes = _perform(task, world, timeout, kwargs, folder)
            if any(o.kind != "result" for o in outcomes):
                raise RankFailure(_report(task, outcomes))
            return [o.value for o in outcomes]
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def start_server() -> None:
    """Let the clients load in the background while pytest goes on."""
    from multiprocessing import forkserver

    os.environ.update(SETTINGS)
    _context()
    forkserver.ensure_running()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _perform(task: str, world: int, timeout: float, kwargs: dict[str, Any], folder: Path) -> list[Outcome]:
    from torch.distributed import TCPStore

    start_server()
    # As torchrun does: the launcher holds the store, so that no port is looked for twice.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = []
    start = time.monotonic()
    for rank in range(world):
        process = _context().Process(target=_main, args=(task, rank, world, store.port, str(folder), kwargs))
        process.start()
        processes.append(process)
    done: dict[int, float] = {}
    deadline = start + timeout
    try:
        while len(done) < world and (now := time.monotonic()) < deadline:
            sentinels = {p.sentinel: r for r, p in enumerate(processes) if r not in done}
            for sentinel in wait(list(sentinels), deadline - now):
                rank = sentinels[sentinel]
                processes[rank].join()
                done[rank] = time.monotonic() - start
                if processes[rank].exitcode != 0:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return [
            _outcome(r, p, folder, done.get(r), time.monotonic() - start) for r, p in enumerate(processes)
        ]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()


def _outcome(rank: int, process: Any, folder: Path, seconds: float | None, now: float) -> Outcome:
    output = (folder / f"{rank}.out").read_text(errors="replace") if (folder / f"{rank}.out").exists() else ""
    if seconds is None:
        return Outcome(
            rank, "stuck", error=_stack(process, folder / f"{rank}.out"), output=output, seconds=now
        )
    result = folder / f"{rank}.result"
    if not result.exists():
        return Outcome(rank, "died", exitcode=process.exitcode, output=output, seconds=seconds)
    kind, value = pickle.loads(result.read_bytes())
    if kind == "error":
        return Outcome(rank, kind, error=value, output=output, seconds=seconds)
    return Outcome(rank, kind, value, output=output, seconds=seconds)


def _stack(process: Any, file: Path) -> str:
    """Where a rank is that did not finish; it writes its stacks on SIGUSR1."""
    import signal

    before = file.stat().st_size
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    return file.read_bytes()[before:].decode(errors="replace")


def _main(task: str, rank: int, world: int, port: int, folder: str, kwargs: dict[str, Any]) -> None:
    gc.freeze()
    out = os.open(f"{folder}/{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    import signal

    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="tests",
        TORCHELASTIC_RESTART_COUNT="0",
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    import tests.helpers.rewrite  # noqa: F401  # a failing assert in a rank shows its values

    module, _, name = task.rpartition(".")
    try:
        import torch

        torch.set_num_threads(1)
        function = getattr(importlib.import_module(f"tests.clients.{module}"), name)
        reply = pickle.dumps(("result", function(rank, world, **kwargs)))
        code = 0
    except BaseException:
        reply = pickle.dumps(("error", traceback.format_exc()))
        code = 1
    Path(f"{folder}/{rank}.part").write_bytes(reply)
    os.rename(f"{folder}/{rank}.part", f"{folder}/{rank}.result")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's own shutdown may wait for peers that are gone
