"""Fresh processes: what they print comes back, and nothing outlives the test."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import ROOT, python, run_torchrun, start, torchrun_args

POOL_IN_A_SCRIPT = """
from tests.dist.test_pool import wait_for_nobody
from tests.helpers.pool import Pools

if __name__ == "__main__":
    pools = Pools()
    print("pids", *pools(2).pids(), flush=True)
    pools(2).run(wait_for_nobody, timeout=600)
"""
SCRIPT = """
import os, sys, time
rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
sys.stdout.write(f"rank {rank} of {size} {sys.argv[1:]} {os.environ.get('EXTRA')}\\n")
sys.exit(int(os.environ["RANK"]) * 3 if "fail" in sys.argv else 0)
"""


def test_torchrun_runs_a_script_and_returns_what_it_prints(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = run_torchrun(script, 2, ["--flag"], env={"EXTRA": "x"})
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"rank {r} of 2 ['--flag'] x" for r in (0, 1)]


def test_a_kill_takes_every_rank_that_torchrun_started(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys, time\nsys.stdout.write(f'pid {os.getpid()}\\n')\ntime.sleep(600)\n")
    with start([sys.executable, *torchrun_args(script, 2)]) as running:
        assert running.wait_for("pid", 120), running.stderr()
        end = time.monotonic() + 60
        while running.stdout().count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        pids = [int(line.split()[1]) for line in running.stdout().splitlines()]
        assert len(pids) == 2
        running.kill()
        assert running.completed().returncode == -9
        assert not any(_alive(pid) for pid in (*pids, running.process.pid))


def _alive(pid: int) -> bool:
    """Whether the process can still run; a zombie that waits for its reaper cannot."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_that_takes_too_long_is_killed_and_quoted() -> None:
    program = "import time; print('so far', flush=True); time.sleep(600)"
    with pytest.raises(TimeoutError, match="so far"):
        python("-c", program, timeout=1.5)


def test_what_a_block_leaves_running_is_killed() -> None:
    with start([sys.executable, "-c", "import time; time.sleep(600)"]) as running:
        pid = running.process.pid
        assert not running.wait(0.1)
    assert not _alive(pid)


def test_a_failing_script_is_a_result_not_an_error() -> None:
    done = python("-c", "import sys; sys.stderr.write('why'); sys.exit(4)")
    assert (done.returncode, done.stderr) == (4, "why")


def test_a_test_session_that_is_killed_leaves_no_ranks_behind(tmp_path: Path) -> None:
    """The ranks are busy, are not the session's children, and must go all the same."""
    script = tmp_path / "session.py"
    script.write_text(POOL_IN_A_SCRIPT)
    with start([sys.executable, script], env={"PYTHONPATH": str(ROOT)}) as running:
        assert running.wait_for("pids", 120), running.stderr()
        pids = [int(pid) for pid in running.stdout().split()[1:]]
        server = psutil.Process(pids[0]).ppid()
        assert all(_alive(pid) for pid in (*pids, server))
        time.sleep(0.3)
        running.process.kill()
        end = time.monotonic() + 20
        while any(_alive(pid) for pid in (*pids, server)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(_alive(pid) for pid in (*pids, server))
