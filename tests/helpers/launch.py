"""Fresh processes for tests that need them: scripts under torchrun, and runs that are killed on purpose."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]


def python(
    *args: str | os.PathLike[str],
    env: Mapping[str, str] | None = None,
    timeout: float = 120.0,
    cwd: str | os.PathLike[str] = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter with ``args``; stdout and stderr come back as text. Nothing outlives the call.

    Raises:
        TimeoutError: it ran longer than ``timeout`` seconds; the message has what it printed.
    """
    with start([sys.executable, *args], env=env, cwd=cwd) as process:
        if not process.wait(timeout):
            process.kill()
            raise TimeoutError(
                f"still running after {timeout} s: {process.args}\n"
                f"stdout:\n{process.stdout()[-6000:]}\nstderr:\n{process.stderr()[-6000:]}"
            )
        return process.completed()


def run_torchrun(
    script: str | os.PathLike[str],
    nproc: int,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout: float = 180.0,
) -> subprocess.CompletedProcess[str]:
    """Run ``script`` on ``nproc`` local ranks under torchrun; see ``python``.

    Ranks share one stdout and torchrun runs them unbuffered, so that ``print`` writes each argument and the newline by
    itself and those of two ranks mix. A script whose lines are read says ``sys.stdout.write(f"...\\n")``: one write.
    """
    return python(*torchrun_args(script, nproc, args), env=env, timeout=timeout)


def torchrun_args(
    script: str | os.PathLike[str], nproc: int, args: Sequence[str] = ()
) -> list[str | os.PathLike[str]]:
    """Arguments for the interpreter; ``--standalone`` picks a free port."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", script, *args]


@dataclass(slots=True)
class Started:
    """A running command and all the processes that it starts."""

    args: Sequence[Any]
    process: subprocess.Popen[bytes]
    folder: Path

    def wait(self, timeout: float) -> bool:
        """Whether it ended within ``timeout`` seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.poll() is not None

    def wait_for(self, text: str, timeout: float) -> bool:
        """Whether its output came to contain ``text`` within ``timeout`` seconds, before it ended."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if text in self.stdout() or text in self.stderr():
                return True
            if self.process.poll() is not None:
                return text in self.stdout() or text in self.stderr()
            time.sleep(0.02)
        return False

    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """The command and its descendants; torchrun puts each rank in a session of its own."""
        try:
            parent = psutil.Process(self.process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def signal(self, number: int) -> None:
        """Send one signal to the command itself, as Ctrl-C or a scheduler does."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL for the command and every descendant, as a machine that loses power."""
        tree = self.tree()
        for process in tree:  # stopped first, so that none starts another meanwhile
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)
        for process in {*tree, *self.tree()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def completed(self) -> subprocess.CompletedProcess[str]:
        code = self.process.poll()
        assert code is not None, "still running"
        return subprocess.CompletedProcess(list(self.args), code, self.stdout(), self.stderr())


@contextlib.contextmanager
def start(
    args: Sequence[str | os.PathLike[str]],
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] = ROOT,
) -> Iterator[Started]:
    """Start a command in the background; whatever it left running is killed at the end of the block."""
    # A shell's background job ignores Ctrl-C, and would hand that down to the command.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    full = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    full.update(env or {})
    with tempfile.TemporaryDirectory(prefix="zeropipe-run-") as folder:
        with open(f"{folder}/stdout", "wb") as out, open(f"{folder}/stderr", "wb") as err:
            process = subprocess.Popen(
                [os.fspath(a) for a in args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=full,
                cwd=cwd,
                start_new_session=True,
            )
        started = Started(args, process, Path(folder))
        try:
            yield started
        finally:
            started.kill()
