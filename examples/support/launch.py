"""Start this very script once per rank with torchrun, and leave nothing behind however it ends.

Ctrl-C and a kill are treated alike: every rank dies at once. That is safe because a run can be stopped at any
moment and goes on from its last checkpoint, and it is the path that the tests take.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from zeropipe.config.parse import parse_config
from zeropipe.errors import ConfigError


def is_rank() -> bool:
    """Whether torchrun started this process; if so it will not outlive torchrun."""
    if "LOCAL_RANK" not in os.environ:
        return False
    die_with_parent()
    return True


def check(config: dict[str, Any]) -> None:
    """Read the configuration before any rank does, so that a mistake in it is said once and in plain words."""
    try:
        parse_config(config)
    except ConfigError as error:
        sys.exit(f"The configuration cannot be used: {error}")


def start_ranks(script: str, arguments: Sequence[str], ranks: int) -> int:
    """Run `script` on `ranks` local ranks and return the exit status; 130 after Ctrl-C."""
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    # A session of its own: Ctrl-C reaches only this process, which then ends the ranks.
    process = subprocess.Popen(
        [*command, "--", script, *arguments],
        env=environment,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.")
        return 130
    finally:
        process.kill()  # the ranks asked the kernel to end with their parent
        process.wait()


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent ends, for whatever reason."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
